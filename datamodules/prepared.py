"""A prepared folder as models read it: memory-mapped, so that opening costs nothing and processes share it.

Legend: U users, N events, R rows, C candidates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from datamodules.examples import ExampleTable
from datamodules.types import SPLIT_NAMES, TRAIN, EvalRows, Histories
from datamodules.versioning import damaged, read_json, write_json

# Each an ``.npy`` file in history order (N,), but for ``offsets`` (U + 2,).
ARRAYS = {
    "offsets": np.int64,
    "item": np.int32,
    "rating": np.float32,
    "timestamp": np.int64,
    "split": np.int8,
}
_TEXT_BLOCK = 100_000  # ids that are hashed at a time
# What a table of rows holds besides its groups.
ROW_COLUMNS = ("user", "start", "position", "target", "label", "weight", "candidates")


@dataclass(frozen=True)
class Prepared:
    """A prepared folder; arrays and tables are mapped when they are asked for."""

    folder: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Recipe, digest, counts and the data report."""
        manifest: dict[str, Any] | None = read_json(self.folder / "manifest.json")
        if not isinstance(manifest, dict):
            raise damaged(self.folder, "manifest.json is no JSON")
        return manifest

    @property
    def digest(self) -> str:
        """Content digest of events, ids, split, groups, candidates and examples."""
        return str(self.manifest["digest"])

    @property
    def protocol(self) -> dict[str, Any]:
        """What was done to the rows, in plain values."""
        protocol: dict[str, Any] = self.manifest["recipe"]
        return protocol

    def tested(self, code: int) -> dict[str, Any]:
        """What two comparable numbers of a split share: what was done to its rows, and what they contain.

        Of labelled rows it is what they show and ask, and their groups; how many others are learned from is
        the method's affair.
        """
        asked = self.manifest.get("asked_digests", {}).get(SPLIT_NAMES[code])
        if asked is None:
            return {**self.protocol, "content": self.digest}
        return {**_what_is_asked(self.protocol), "content": asked}

    @cached_property
    def items(self) -> pl.DataFrame:
        """Catalogue in internal order: row ``i`` is item ``i + 1``."""
        return self._table("items")

    @cached_property
    def users(self) -> pl.DataFrame:
        """Users in internal order: row ``u`` is user ``u + 1``."""
        return self._table("users")

    @cached_property
    def histories(self) -> Histories:
        """Every user's events in time order."""
        try:
            found = {name: np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        except (OSError, ValueError, EOFError) as error:
            raise damaged(self.folder, error) from error
        return Histories(
            offsets=found["offsets"],
            items=found["item"],
            split=found["split"],
            timestamps=found["timestamp"],
            num_items=int(self.manifest["counts"]["items"]),
            ratings=found["rating"],
        )

    def rows(self, code: int) -> EvalRows:
        """The held-out rows of one split with groups, and with candidates or labels."""
        table = self._table(SPLIT_NAMES[code])
        names = tuple(c for c in table.columns if c not in ROW_COLUMNS)
        found = {c: table[c].to_numpy() for c in ROW_COLUMNS if c in table.columns}
        return EvalRows(groups=table.select(names).to_numpy(), group_names=names, **found)

    def examples(self) -> ExampleTable | None:
        """Training examples, where the recipe makes any."""
        table = self.table(TRAIN)
        if table is None:
            return None
        found = {c: table[c].to_numpy() for c in ("user", "start", "target", "label")}
        code = np.full(table.height, TRAIN, np.int8)
        return ExampleTable(**found, stop=table["position"].to_numpy(), code=code)

    def table(self, code: int) -> pl.DataFrame | None:
        """The stored rows of one split as they are, if there are any."""
        file = self.folder / f"{SPLIT_NAMES[code]}.arrow"
        return self._table(SPLIT_NAMES[code]) if file.is_file() else None

    def parquet(self, name: str) -> pl.DataFrame:
        """A table that its data module has stored. Raises DataSourceError where it is damaged."""
        try:
            return pl.read_parquet(self.folder / name)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise damaged(self.folder, error) from error

    def _table(self, name: str) -> pl.DataFrame:
        try:
            return pl.read_ipc(self.folder / f"{name}.arrow")
        except (OSError, pl.exceptions.PolarsError) as error:
            raise damaged(self.folder, error) from error


def _what_is_asked(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe, and those of its parts, without limits on examples."""
    told = {k: _what_is_asked(v) if isinstance(v, dict) else v for k, v in recipe.items()}
    if "asks" in told:
        told["examples"] = told.pop("asks")
    return told


def store(
    folder: Path,
    histories: Histories,
    items: pl.DataFrame,
    users: pl.DataFrame,
    tables: dict[str, pl.DataFrame],
    manifest: dict[str, Any],
) -> None:
    """Write everything that ``Prepared`` reads, and the digest of its content into the manifest."""
    for name, table in {"items": items, "users": users, **tables}.items():
        table.rechunk().write_ipc(folder / f"{name}.arrow", compression="uncompressed")
    arrays = _arrays(histories)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    ids = (items["item_id"], users["user_id"])
    digest = _told_apart(_hashed(arrays, *ids), tables)
    # What is asked, whatever was learned from: a few-shot row stands beside one of all examples.
    shown = {name: array for name, array in arrays.items() if name != "split"}
    labelled = {
        name: table
        for name, table in tables.items()
        if "label" in table.columns and name != SPLIT_NAMES[TRAIN]
    }
    asked = {}
    if labelled:
        common = _hashed(shown, *ids)
        asked = {name: _told_apart(common, {name: table}) for name, table in labelled.items()}
    told = {**manifest, "digest": digest} | ({"asked_digests": asked} if asked else {})
    write_json(folder / "manifest.json", told)


def _arrays(histories: Histories) -> dict[str, np.ndarray]:
    """Name -> array, with the types of ``ARRAYS``."""
    assert histories.ratings is not None
    found = (
        histories.offsets, histories.items, histories.ratings, histories.timestamps, histories.split
    )  # fmt: skip
    pairs = zip(ARRAYS.items(), found, strict=True)
    return {name: np.ascontiguousarray(array, dtype=kind) for (name, kind), array in pairs}


def _hashed(arrays: dict[str, np.ndarray], items: pl.Series, users: pl.Series) -> hashlib._Hash:
    """The hash of events and ids, which tables of rows are added to."""
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name}:{array.dtype}:{array.shape};".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    for series in (items, users):
        for block in _texts(series):
            digest.update(block)
    return digest


def _told_apart(common: hashlib._Hash, tables: dict[str, pl.DataFrame]) -> str:
    """The digest of what was hashed already and of tables; the hash itself stays as it is."""
    digest = common.copy()
    for name, table in sorted(tables.items()):
        for column in table.iter_columns():
            digest.update(f"{name}.{column.name}:{column.dtype}:{len(column)};".encode())
            digest.update(np.ascontiguousarray(column.to_numpy()).tobytes())
    return digest.hexdigest()[:16]


def _texts(series: pl.Series) -> Iterator[bytes]:
    """The ids as bytes, a block at a time: a million of them at once would be a gigabyte."""
    yield f"{series.name}:{len(series)};".encode()
    for at in range(0, len(series), _TEXT_BLOCK):
        yield "".join(f"{text}\0" for text in series.slice(at, _TEXT_BLOCK)).encode()
