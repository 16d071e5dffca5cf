"""What a download folder knows: a log that only grows, and the table that is made from it.

``state.jsonl`` has a line for every address that was asked, written when its answer is final, so that a
run that is killed loses only what was under way. ``images.parquet`` (items x status) and
``images.json`` (counts and a content digest) are written anew at the end of a run, atomically; they are
all that ``images`` reads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl

from datamodules.image_decoding import DAMAGED, NOT_AN_IMAGE, TOO_MANY_PIXELS
from datamodules.image_listing import FILES, SUMMARY, TABLE, stored_name
from datamodules.versioning import value_digest, write_json

STATE = "state.jsonl"
OK, TOO_LARGE = "ok", "too large"
NO_ADDRESS, NOT_YET = "no address", "not fetched yet"
# Statuses that another run would only meet again.
PERMANENT = ("http 404", "http 410", NOT_AN_IMAGE, DAMAGED, TOO_MANY_PIXELS)
TABLE_SCHEMA: dict[str, Any] = {
    "item_id": pl.String(),
    "status": pl.String(),
    "address": pl.String(),
    "bytes": pl.Int64(),
    "format": pl.String(),
    "width": pl.Int32(),
    "height": pl.Int32(),
    "sha256": pl.String(),
}


class Record(NamedTuple):
    """The last word on one address of one item; sizes are those of the stored file."""

    item: str
    address: str
    status: str
    bytes: int = 0
    format: str = ""
    width: int = 0
    height: int = 0
    sha256: str = ""
    max_side: int | None = None  # the settings that led to this status
    max_bytes: int = 0

    @property
    def path(self) -> str:
        """Where the image lies below the folder."""
        return stored_name(self.sha256, self.format)


class State:
    """The log of one folder: every item's records by address, the newest of each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: dict[str, dict[str, Record]] = {}
        self._file = folder / STATE
        whole = True
        if self._file.is_file():
            data = self._file.read_bytes()
            whole = not data or data.endswith(b"\n")
            for record in _parse(data):
                self._keep(record)
        self._log = self._file.open("ab")
        if not whole:  # the end of a killed run; its image is fetched again
            self._log.write(b"\n")

    def add(self, record: Record) -> None:
        """Append a record; it is on its way to the disk when this returns."""
        line = json.dumps(record._asdict(), separators=(",", ":"))
        self._log.write(line.encode() + b"\n")
        self._log.flush()
        self._keep(record)

    def close(self) -> None:
        """Close the log."""
        self._log.close()

    def forget_all_but(self, sizes: dict[str, int]) -> None:
        """Forget images whose file is not there with its size (``stored_sizes``)."""
        for records in self.records.values():
            for record in list(records.values()):
                if record.status == OK and sizes.get(record.path) != record.bytes:
                    del records[record.address]

    def publish(self, items: pl.DataFrame) -> pl.DataFrame:
        """Write the table and its summary; returns the rows of ``items`` (``item_id, images``).

        Items of earlier runs that are not asked for now (another filter of the same data) stay in.
        """
        asked = dict(items.select("item_id", "images").iter_rows())
        others = [item for item in self.records if item not in asked]
        rows = [self._row(item, addresses or ()) for item, addresses in asked.items()]
        rows += [self._row(item, list(self.records[item])) for item in others]
        table = pl.DataFrame(rows, schema=TABLE_SCHEMA, orient="row")
        part = self.folder / f".{TABLE}.part"
        table.write_parquet(part)
        os.replace(part, self.folder / TABLE)
        good = table.filter(pl.col("status") == OK).select("item_id", "bytes", "sha256")
        counts = dict(table.group_by("status").len().sort("status").iter_rows())
        digest = value_digest(sorted(good.rows()), 16)
        write_json(self.folder / SUMMARY, {"digest": digest, "items": counts})
        return table.head(len(asked))

    def _keep(self, record: Record) -> None:
        mine = self.records.setdefault(record.item, {})
        mine.pop(record.address, None)  # so that the newest comes last
        mine[record.address] = record

    def _row(self, item: str, addresses: Sequence[str]) -> tuple[Any, ...]:
        """The newest image that one of these addresses gave, else the last thing that went wrong."""
        mine = [r for r in self.records.get(item, {}).values() if r.address in addresses]
        images = [r for r in mine if r.status == OK]
        if images:
            image = images[-1]
            facts = (image.bytes, image.format, image.width, image.height, image.sha256)
            return (item, OK, image.address, *facts)
        if mine:
            return (item, mine[-1].status, mine[-1].address, *[None] * 5)
        return (item, NOT_YET if addresses else NO_ADDRESS, *[None] * 6)


def stored_sizes(folder: Path) -> dict[str, int]:
    """Path below the folder -> bytes of every stored image; leftovers of a killed run are deleted."""
    sizes = {}
    for file in (folder / FILES).glob("*/*"):
        if file.name.endswith(".part"):
            file.unlink()
        else:
            sizes[f"{FILES}/{file.parent.name}/{file.name}"] = file.stat().st_size
    return sizes


def _parse(data: bytes) -> Iterator[Record]:
    """The whole records of a log; a torn line is nobody's."""
    for line in data.splitlines():
        try:
            record = Record(**json.loads(line))
        except (ValueError, TypeError):
            continue
        texts = (record.item, record.address, record.status, record.format, record.sha256)
        numbers = (record.bytes, record.width, record.height, record.max_bytes)
        if all(isinstance(t, str) for t in texts) and all(isinstance(n, int) for n in numbers):
            yield record
