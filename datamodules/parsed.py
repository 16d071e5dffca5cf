"""A release as its parser read it, kept as Parquet: another split or filter parses nothing again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from datamodules.types import RawData
from datamodules.versioning import (
    damaged,
    package_digest,
    publish_folder,
    read_json,
    value_digest,
    write_json,
)


@dataclass(frozen=True)
class Parsed:
    """A folder with a parser's rows; tables are read when they are asked for."""

    folder: Path

    @cached_property
    def note(self) -> dict[str, Any]:
        """``source``, ``checksums``, ``skipped`` and ``ordered``."""
        note: dict[str, Any] | None = read_json(self.folder / "parsed.json")
        if not isinstance(note, dict):
            raise damaged(self.folder, "parsed.json is no JSON")
        return note

    def interactions(self) -> pl.DataFrame:
        """Events in the raw file's order; ids as ``pl.Categorical``."""
        try:
            return pl.read_parquet(self.folder / "interactions.parquet")
        except (OSError, pl.exceptions.PolarsError) as error:
            raise damaged(self.folder, error) from error

    def catalog(self) -> pl.LazyFrame:
        """Every item of the release."""
        return pl.scan_parquet(self.folder / "catalog.parquet")

    def users(self) -> pl.LazyFrame | None:
        """The users' attributes, where the release has any."""
        file = self.folder / "users.parquet"
        return pl.scan_parquet(file) if file.is_file() else None


def parsed(name: str, load: Callable[[], RawData], asked: dict[str, Any], cache: Path) -> Parsed:
    """Parse a release, or find it parsed.

    Args:
        name: begins the folder's name.
        load: fetches and parses; called only when there is no folder yet.
        asked: plain values that name the folder (release, local files' sizes and times).
        cache: the cache root.
    """
    folder = cache / "parsed" / f"{name}-{value_digest({'asked': asked, 'code': package_digest()})}"
    if not (folder / "parsed.json").is_file():
        publish_folder(folder, "parsed.json", lambda part: _write(part, load()))
    return Parsed(folder)


def _write(part: Path, raw: RawData) -> None:
    # Numbers for ids: every filter groups by them again and again.
    ids = pl.col("user_id", "item_id").cast(pl.Categorical)
    raw.interactions.frame.with_columns(ids).write_parquet(
        part / "interactions.parquet", compression="lz4"
    )
    raw.catalog.frame.write_parquet(part / "catalog.parquet", compression="lz4")
    if raw.users is not None:
        raw.users.write_parquet(part / "users.parquet")
    note = {
        "source": raw.source,
        "checksums": raw.checksums,
        "skipped": raw.skipped,
        "ordered": raw.interactions.ordered,
    }
    write_json(part / "parsed.json", note)
