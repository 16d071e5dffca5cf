"""``make images``: what it asks for, what it says, and how it ends."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest

from experiments import images
from experiments.errors import UserError
from tests.datamodules.picture_server import body, picture, serving

REPO = Path(__file__).resolve().parents[2]
NAME = "sasrec/movielens_100k"


@pytest.fixture
def catalogue(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Stands in for the prepared data of any experiment: the items with these addresses."""

    def give(**addresses: list[str] | None) -> None:
        schema = {"item_id": pl.String(), "title": pl.String(), "images": pl.List(pl.String())}
        columns = {"item_id": list(addresses), "title": None, "images": list(addresses.values())}
        items = pl.DataFrame(columns, schema)
        prepared = SimpleNamespace(items=items, protocol={"name": "shop"})
        monkeypatch.setattr(images, "Prepared", lambda folder: prepared)
        monkeypatch.setattr(images.artifacts, "prepared_data", lambda *_: {"folder": "x"})
        monkeypatch.setattr(images, "_prepare", lambda experiment: None)
        monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")

    return give


def test_its_own_keys_are_taken_out_of_the_arguments() -> None:
    words = ["images.workers=4", "data.root=x", "images.max_side=null", "images.delay=0", "seed=1"]
    request, rest = images.split_request([*words, "images.allow_private=True", "images.limit=7"])
    assert rest == ["data.root=x", "seed=1"]
    assert request == images.Request(workers=4, delay=0.0, limit=7, allow_private=True)
    assert request.options().politeness.workers == 4
    assert request.options().limits.allow_private


@pytest.mark.parametrize(
    ("word", "message"),
    [("images.worker=4", "did you mean 'images.workers'"), ("images.workers=0", "a whole number"),
     ("images.workers=null", "a whole number$"), ("images.delay=-1", "0 or more"),
     ("images.max_side=big", "a whole number or null"), ("images.allow_private=1", "true or false"),
     ("images.limit", "a whole number or null"), ("images.delay=nan", "0 or more"),
     ("images.delay=inf", "0 or more")],
)  # fmt: skip
def test_a_wrong_key_or_value_is_told(word: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        images.split_request([word])


def test_a_download_is_summed_up(
    catalogue: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving() as server:
        server.pages["a"] = body(picture())
        catalogue(
            one=[server.url("a")], two=[server.url("gone")], three=None, four=[server.url("a")]
        )
        words = [NAME, "images.allow_private=true", "images.limit=3"]
        assert images.main(words) == 0
        shown = capsys.readouterr().out.replace("│", " ").split()
        for text in ("items 3", "address 2", "1 (33.3%), 1 of", "http 404 1", "no address 1"):
            assert all(word in shown for word in text.split()), text
        assert images.main(words) == 0
        assert server.counts == {"a": 1, "gone": 1}
    assert "0 of them new" in capsys.readouterr().out
    assert (tmp_path / "cache" / "images" / "shop" / "images.parquet").is_file()


def test_no_network_is_a_sentence(
    catalogue: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving() as server:
        address = server.url("x")
    catalogue(**{f"i{n}": [address] for n in range(9)})
    assert images.main([NAME, "images.allow_private=true"]) == 2
    assert "Check the network" in capsys.readouterr().err
    assert not (tmp_path / "cache" / "images" / "shop" / "images.parquet").exists()


def test_data_without_addresses_and_the_real_command(
    tiny_movielens: Path, command_environment: Callable[[Path], dict[str, str]], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "experiments.images"],
        cwd=REPO, capture_output=True, text=True, timeout=120, check=False,
        env={**command_environment(tmp_path), "NAME": NAME, "ARGS": f"data.root='{tiny_movielens}'"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "has no image addresses" in done.stderr
    assert "data.images=PATH" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_that_is_given_is_looked_at(
    catalogue: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalogue(a=None, b=None, c=None, d=None)
    for name in ("a.png", "zz.png"):
        (tmp_path / name).write_bytes(picture("PNG"))
    (tmp_path / "b.jpg").write_bytes(b"no image")
    items = images.Prepared(Path()).items
    images.print_given("shop", items, tmp_path, {}, tmp_path / "cache")
    shown = [line.split("│")[1:3] for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert {name.strip(): value.strip() for name, value in shown} == {
        "items": "4",
        "with an image": "1 (25.0%)",
        "with a file that is no image": "1",
        "without a file": "2",
        "images in all": "3",
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "NAME is missing"), (["sasrec/nothing"], "no experiment is called"),
     ([NAME, "images.x=1"], "unknown key 'images.x'")],
)  # fmt: skip
def test_a_wrong_request_is_a_sentence(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert images.main(words) == 2
    assert message in capsys.readouterr().err
