"""What another version of the code has left in the cache is neither read nor harmed."""

from __future__ import annotations

from pathlib import Path

import pytest

from datamodules import parsed, prepare
from datamodules.movielens import MovieLensDataModule
from experiments import artifacts


def data(root: Path, cache: Path) -> MovieLensDataModule:
    return MovieLensDataModule("100k", root=str(root), cache=str(cache))


def test_data_that_another_version_prepared_are_prepared_anew(
    tiny_movielens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "_target_": "datamodules.movielens.MovieLensDataModule",
        "root": str(tiny_movielens),
    }
    with monkeypatch.context() as other:
        other.setattr(prepare, "package_digest", lambda: "of another version")
        other.setattr(parsed, "package_digest", lambda: "of another version")
        other.setattr(artifacts, "_data_code", lambda: "of another version")
        theirs = data(tiny_movielens, tmp_path).prepared
        artifacts.record_prepared(settings, tmp_path, Path(theirs.folder), theirs.digest)
        assert artifacts.prepared_data(settings, tmp_path) is not None
    # Its format is its own: nothing of it means anything to us.
    for file in tmp_path.glob("*/*/*"):
        if file.suffix == ".parquet" or file.name == "manifest.json":
            file.write_bytes(b"of another version")
    left = {f: f.read_bytes() for f in tmp_path.glob("*/*/*") if f.is_file()}
    assert len(left) > 5
    assert artifacts.prepared_data(settings, tmp_path) is None, "a plan must not point there"
    ours = data(tiny_movielens, tmp_path).prepared
    assert ours.folder != theirs.folder
    assert ours.digest == theirs.digest, "the content is the same, so are the runs' names"
    assert ours.histories.num_users == 60
    assert {f: f.read_bytes() for f in left} == left
