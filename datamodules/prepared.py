"""A prepared folder as models read it: memory-mapped, so that opening costs nothing and processes share it.

Legend: U users, N events, R rows, C candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from datamodules.examples import ExampleTable
from datamodules.types import SPLIT_NAMES, TRAIN, EvalRows, Histories
from datamodules.versioning import read_json

# Each an ``.npy`` file in history order (N,), but for ``offsets`` (U + 2,).
ARRAYS = {
    "offsets": np.int64,
    "item": np.int32,
    "rating": np.float32,
    "timestamp": np.int64,
    "split": np.int8,
}
# What a table of rows holds besides its groups.
ROW_COLUMNS = ("user", "start", "position", "target", "label", "weight", "candidates")


@dataclass(frozen=True)
class Prepared:
    """A prepared folder; arrays and tables are mapped when they are asked for."""

    folder: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Recipe, digest, counts and the data report."""
        manifest: dict[str, Any] = read_json(self.folder / "manifest.json")
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
        found = {name: np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
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
        if not (self.folder / f"{SPLIT_NAMES[TRAIN]}.arrow").is_file():
            return None
        table = self._table(SPLIT_NAMES[TRAIN])
        found = {c: table[c].to_numpy() for c in ("user", "start", "target", "label")}
        code = np.full(table.height, TRAIN, np.int8)
        return ExampleTable(**found, stop=table["position"].to_numpy(), code=code)

    def _table(self, name: str) -> pl.DataFrame:
        return pl.read_ipc(self.folder / f"{name}.arrow")
