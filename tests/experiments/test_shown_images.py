"""A stage that can show pictures gets another folder when a picture changes; no other stage does."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from datamodules.image_listing import SUMMARY, TABLE
from datamodules.toy_shop import ToyShopDataModule
from experiments import artifacts, config, shown_images
from experiments.errors import UserError

BASIC = "sasrec/movielens_100k"
SASREC = "lightning_modules/sasrec/model.py"
READING = {"train", "evaluate"}  # the reference rows (popularity, Markov) do without that file


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMREC_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shown_images, "READER", SASREC)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in "123":
        draw(folder / f"{name}.png", int(name))
    return folder


def draw(file: Path, shade: int) -> None:
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(file)


Planned = Callable[..., dict[str, str | None]]


@pytest.fixture
def keys(tmp_path: Path) -> Planned:
    """``keys(*overrides)``: the stages' keys, with the data taken as prepared."""

    def make(*overrides: str, name: str = BASIC) -> dict[str, str | None]:
        by_id = ["data.image_ids=id"] if name == BASIC else []
        experiment, cache = config.load(name, [*by_id, *overrides]), tmp_path / "cache"
        folder = tmp_path / "prepared"
        folder.mkdir(exist_ok=True)
        (folder / "manifest.json").write_text('{"recipe": {"name": "films"}}')
        for stage in experiment.stages:
            data = artifacts.stage_spec(experiment, stage)["data"]
            artifacts.record_prepared(data, cache, folder, "d1")
        return {s.name: s.key for s in artifacts.plan(experiment, cache)}

    return make


def renamed(before: dict[str, str | None], after: dict[str, str | None]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


@pytest.mark.parametrize(
    "name", [BASIC, "tallrec/movie_64shot", "morec/movielens_100k", "fusion/movielens_100k_text"]
)
def test_without_pictures_every_key_stays(
    keys: Planned, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(shown_images, "READER", "lightning_modules/no_such_file.py")
    before = keys(name=name)
    monkeypatch.setattr(shown_images, "READER", "lightning_modules/stage_module.py")
    assert keys(name=name) == before
    assert None not in before.values()


def test_only_stages_that_can_show_pictures_depend_on_them(keys: Planned, pictures: Path) -> None:
    bare, given = keys(), keys(f"data.images={pictures}")
    assert renamed(bare, given) == READING
    draw(pictures / "2.png", 77)
    changed = keys(f"data.images={pictures}")
    assert renamed(given, changed) == READING
    assert renamed(bare, changed) == READING
    draw(pictures / "2.png", 2)
    assert keys(f"data.images={pictures}") == given


def test_pictures_count_by_content_not_by_place_or_time(
    keys: Planned, pictures: Path, tmp_path: Path
) -> None:
    given = keys(f"data.images={pictures}")
    os.utime(pictures / "1.png", (1, 1))
    (pictures / "read.me").write_text("no picture")
    assert keys(f"data.images={pictures}") == given
    moved = shutil.copytree(pictures, tmp_path / "elsewhere")
    assert keys(f"data.images={moved}") == given
    with tarfile.open(tmp_path / "packed.tar", "w") as tar:
        tar.add(pictures, "posters")
    assert keys(f"data.images={tmp_path / 'packed.tar'}") == given
    draw(pictures / "4.png", 4)
    assert renamed(given, keys(f"data.images={pictures}")) == READING


def test_the_digest_is_remembered(
    keys: Planned, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = keys(f"data.images={pictures}")
    monkeypatch.setattr("datamodules.image_listing.list_images", lambda _: pytest.fail("listed"))
    assert keys(f"data.images={pictures}") == given
    draw(pictures / "3.png", 99)
    with pytest.raises(pytest.fail.Exception, match="listed"):
        keys(f"data.images={pictures}")


def test_whose_picture_is_whose_counts_too(keys: Planned, pictures: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.csv"
    names.write_text("item_id,image_id\n1,2\n2,1\n")
    words = [f"data.images={pictures}", f"data.image_ids={names}"]
    given = keys(*words)
    names.write_text("item_id,image_id\n1,2\n2,3\n")
    assert renamed(given, keys(*words)) == READING
    names.unlink()
    with pytest.raises(UserError, match=r"names\.csv, which data.image_ids names, is no file"):
        keys(*words)


def test_pictures_that_are_not_there_are_told(keys: Planned, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a folder nor a tar file"):
        keys(f"data.images={tmp_path / 'nowhere'}")


def shown(prepared: Path, data: dict[str, object], cache: Path) -> dict[str, str]:
    return shown_images.shown_images(("lightning_modules.sasrec.model",), data, prepared, cache)


def written(folder: Path, manifest: dict[str, object]) -> Path:
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_download_is_found_by_itself(tmp_path: Path) -> None:
    import polars as pl

    cache = tmp_path / "cache"
    prepared = written(tmp_path / "p", {"recipe": {"name": "films"}})
    assert shown(prepared, {}, cache) == {}
    folder = cache / "images" / "films"
    folder.mkdir(parents=True)
    row = {"item_id": "1", "status": "ok", "format": "PNG", "bytes": 3, "sha256": "a" * 64}
    digests = []
    for sha256 in ("a" * 64, "b" * 64):
        pl.DataFrame([{**row, "sha256": sha256}]).write_parquet(folder / TABLE)
        (folder / SUMMARY).write_text(json.dumps({"digest": sha256}))
        digests.append(shown(prepared, {}, cache)["item_images"])
    assert digests[0] != digests[1]


def test_pictures_that_are_made_with_the_data(tmp_path: Path, pictures: Path) -> None:
    cache = tmp_path / "cache"
    made = {"recipe": {"name": "toys"}, "asked": {"images": "toys/pictures"}}
    prepared = written(tmp_path / "p", made)
    gone = shown(prepared, {}, cache)
    shutil.copytree(pictures, cache / "toys" / "pictures")
    there = shown(prepared, {}, cache)
    assert gone != there
    assert shown(prepared, {"images": str(pictures)}, cache) == there


def test_joined_data_have_those_of_their_parts(tmp_path: Path, pictures: Path) -> None:
    cache = tmp_path / "cache"
    parts = {n: str(written(tmp_path / n, {"recipe": {"name": n}})) for n in ("films", "books")}
    prepared = written(tmp_path / "both", {"recipe": {"name": "films+books"}, "parts": parts})
    assert shown(prepared, {"parts": {"films": {}, "books": {}}}, cache) == {}
    data = {"parts": {"films": {"images": str(pictures)}, "books": {}}}
    films = shown(prepared, data, cache)
    swapped = {"parts": {"films": {}, "books": {"images": str(pictures)}}}
    assert films
    assert films != shown(prepared, swapped, cache)


def test_the_toy_shops_own_pictures_are_found(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shop = ToyShopDataModule(products=36, shoppers=12, cache=str(cache))
    data = {"cache": str(cache)}
    before = shown(shop.prepared.folder, data, cache)
    draw(shop.folder / "pictures" / "B0TOY00007.png", 7)
    after = shown(shop.prepared.folder, data, cache)
    assert len({before["item_images"], after["item_images"], "not made yet"}) == 3
    shutil.rmtree(shop.folder)
    assert shown(shop.prepared.folder, data, cache) == before  # made anew
