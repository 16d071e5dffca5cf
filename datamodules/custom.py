"""Any data of your own: a file of events and, for methods that read text, a file of items."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datamodules.base import SequenceDataModule
from datamodules.custom_items import COLUMNS
from datamodules.custom_parsers import Format, TimeUnit, load_custom
from datamodules.errors import DataSourceError
from datamodules.types import INTERACTION_SCHEMA, RawData
from datamodules.versioning import place_stats


class CustomDataModule(SequenceDataModule):
    """Histories from a file of your own.

    Args:
        interactions: CSV, TSV, Parquet or text file of events (``custom_parsers``).
        items: CSV, TSV, JSON lines or Parquet file of items (``custom_items``); None = ids alone.
        name: names the data in folders and tables: letters, digits, "_", "-" and ".".
        format: ``table``, ``pairs``, ``lists``, or ``auto`` to look.
        time_unit: ``s`` or ``ms``, of whole-number timestamps.
        ordered: whether a file without times is in time order; if not, histories are shuffled by a seed.
        columns: names that columns have in the files -> ``user_id``, ``item_id``, ``title`` and so on.
        where: which files these are and who has them, for the message when none is named.
        options: those of ``SequenceDataModule``; with ``root`` both files lie in that folder.
    """

    def __init__(
        self,
        interactions: str | None,
        items: str | None = None,
        name: str = "custom",
        format: Format = "auto",
        time_unit: TimeUnit = "s",
        ordered: bool = True,
        columns: Mapping[str, str] | None = None,
        where: str | None = None,
        **options: Any,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}", name):
            raise ValueError(
                f"name is {name!r}; expected letters, digits, '_', '-' and '.', as it names a folder."
            )
        known = {*INTERACTION_SCHEMA, *COLUMNS}
        if unknown := sorted(set((columns or {}).values()) - known):
            raise ValueError(
                f"columns gives the names {', '.join(unknown)}; known are {', '.join(sorted(known))}."
            )
        super().__init__(name, **options)
        self.interactions, self.items = interactions, items
        self.format: Format = format
        self.time_unit: TimeUnit = time_unit
        self.ordered = ordered
        self.columns = dict(columns or {})
        self.where = where

    def load_raw(self) -> RawData:
        """Parse the files."""
        items = None if self.items is None else self._file(self.items, "items")
        return load_custom(
            self._file(self.interactions, "interactions"),
            items,
            self.format,
            self.time_unit,
            self.ordered,
            self.on_bad_row,
            self.columns,
        )

    def asked(self) -> dict[str, Any]:
        """How the files are read, and their names, sizes and times. Raises DataSourceError."""
        items = [] if self.items is None else place_stats(self._file(self.items, "items"))
        return {
            "interactions": place_stats(self._file(self.interactions, "interactions")),
            "items": items,
            "format": self.format,
            "time_unit": self.time_unit,
            "ordered": self.ordered,
            "columns": self.columns,
        }

    def _file(self, given: str | None, argument: str) -> Path:
        if given is None:
            what = self.where or "a CSV or Parquet file with the columns user_id and item_id"
            raise DataSourceError(
                f"{self.recipe.name} has no file of {argument}. What to do: pass data.{argument}=FILE, "
                f"{what}."
            )
        path = Path(given).expanduser()
        if self.root is not None:
            path = self.root / path
        if not path.is_file():
            raise DataSourceError(
                f"{path} is not a file: pass data.{argument}=FILE with its whole path."
            )
        return path
