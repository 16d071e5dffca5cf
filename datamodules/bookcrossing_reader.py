"""What BookCrossing's three files have in common: dialects, names of columns, ISBNs, mending, counting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from datamodules.bookcrossing_text import INVALID, RESTORED, normalise_isbns
from datamodules.delimited import OnBadRow, read_raw
from datamodules.errors import DataFormatError
from datamodules.text_tables import Dialect, Mend, Table, header_cells, read_table

Files = Mapping[str, Path]
Names = Mapping[str, Sequence[str]]  # our column -> the names that it has been given

DUMP = Dialect(";", escapes=True, encoding="latin-1")
TEXTS = ("title", "author", "publisher", "location")  # columns that may need mending


@dataclass
class Reader:
    """Reads the files of one copy and keeps count of checksums, of what was left out and mended."""

    files: Files
    on_bad_row: OnBadRow
    skipped: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)

    def table(
        self,
        name: str,
        required: Names,
        optional: Names,
        mend: Mend | None = None,
    ) -> tuple[Table, Dialect]:
        """Cells of one file and how it is written; ``mend`` is for damage that a file is known to have."""
        path = self.files[name]
        data, self.checksums[name] = read_raw(path)
        dialect = find_dialect(path, data)
        columns = find_columns(path, header_cells(path, data, dialect), required, optional)
        return read_table(path, data, dialect, columns, mend), dialect

    def isbns(self, name: str, table: Table) -> None:
        """Put normal ISBNs in the place of the written ones."""
        table.reject(pl.col("item_id").str.strip_chars() == "", "empty id", "item_id", "an ISBN")
        written = table.frame["item_id"]
        found = normalise_isbns(written)
        counts = {
            "rows whose ISBN got a normal form": (found["isbn"] != written).sum(),
            "rows whose ISBN got lost leading zeros back": (found["kind"] == RESTORED).sum(),
            "rows whose ISBN is not valid": (found["kind"] == INVALID).sum(),
            "ISBNs that met another in their normal form": written.n_unique()
            - found["isbn"].n_unique(),
        }
        self.note(name, counts)
        table.frame = table.frame.with_columns(item_id=found["isbn"])

    def settle(self, table: Table) -> pl.DataFrame:
        """The good rows. Raises DataFormatError."""
        self.skipped |= table.settle(self.on_bad_row)
        return table.frame

    def note(self, name: str, counts: Mapping[str, Any]) -> None:
        """Things that are odd and kept, or mended."""
        self.kept |= {f"kept: {name}: {what}": int(n) for what, n in counts.items() if n}

    def mend(
        self, name: str, frame: pl.DataFrame, suspect: str, rule: Callable[[str], str], what: str
    ) -> pl.DataFrame:
        """Apply a rule to the texts that it may concern; count what it changed, by column."""
        for column in [c for c in TEXTS if c in frame.columns]:
            texts = frame[column]
            some = texts.filter(texts.str.contains(suspect)).unique()
            mended = {old: new for old in some if (new := rule(old)) != old}
            self.note(name, {f"{what} in {column}": int(texts.is_in(list(mended)).sum())})
            frame = frame.with_columns(texts.replace(mended).alias(column))
        return frame


def find_dialect(path: Path, data: bytes) -> Dialect:
    """How a file is written, from its first line. Raises DataFormatError."""
    first = data.removeprefix(b"\xef\xbb\xbf").split(b"\n", 1)[0]
    if b";" in first:
        # Only the dump quotes its header; exports with ";" are in UTF-8.
        return DUMP if first.startswith(b'"') else Dialect(";")
    if b"," in first:
        return Dialect(",")
    raise DataFormatError(
        f"{path}, line 1: {first[:80]!r} is no header with ';' or ',' between names such as User-ID or "
        "ISBN; get the file again."
    )


def find_columns(
    path: Path,
    header: Sequence[str],
    required: Names,
    optional: Names,
) -> dict[str, str]:
    """The header's names of the wanted columns -> ours. Raises DataFormatError if one is not there."""
    columns = {}
    for ours, known in {**required, **optional}.items():
        found = [name for name in known if name in header]
        if len(found) == 1:
            columns[found[0]] = ours
        elif found or ours in required:
            raise DataFormatError(
                f"{path}, line 1: expected one column called {' or '.join(known)}; the header names "
                f"{', '.join(header)[:200]}. Get the file again or name the columns as the dump does."
            )
    return columns
