"""Delimited text as columns of strings: for tables whose cells may be odd and still worth keeping.

``delimited.read_events`` reads files whose every cell must be right. Here each line that is written
plainly is split by one regular expression in Polars, the others by Python's ``csv`` in the table's own
dialect; what a cell must look like is said afterwards with ``Table.reject``. Bad rows are collected with
their lines and settled once, in file order. A row is a line; blank lines are ignored.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from datamodules.delimited import BadRows, OnBadRow
from datamodules.errors import DataFormatError

Problem = tuple[int, str, str]  # line, reason, detail
# Gets the cells of a row that has too many or too few; returns them as they should be, or as they are.
Mend = Callable[[list[str]], list[str]]
_ESCAPED = r'"[^"\\]*(?:\\.[^"\\]*)*"'


@dataclass(frozen=True)
class Dialect:
    """How a table is written. With ``escapes`` a backslash escapes a quote, else quotes are doubled.

    Without ``quoted`` a quote is a letter like any other.
    """

    separator: str
    quoted: bool = True
    escapes: bool = False
    encoding: str = "utf-8"

    def split(self, line: str) -> list[str]:
        """The cells of one line. Raises csv.Error."""
        if not self.quoted:
            return line.split(self.separator)
        if self.escapes:
            return self._split_escaped(line)
        if not re.fullmatch(
            rf"{self._cell}(?:{re.escape(self.separator)}{self._cell})*", line, re.DOTALL
        ):
            # csv would take the rest of a cell with a line break for a row of its own.
            raise csv.Error("a quote in a cell that is not quoted, or one that is not closed")
        return next(csv.reader([line], delimiter=self.separator, strict=True))

    @property
    def _cell(self) -> str:
        return rf'(?:"(?:[^"]|"")*"|[^"{re.escape(self.separator)}]*)'

    def _split_escaped(self, line: str) -> list[str]:
        cell = rf'(?:{_ESCAPED}|[^"\\{self.separator}]*)'
        if not re.fullmatch(rf"{cell}(?:{self.separator}{cell})*", line, re.DOTALL):
            # csv is strict about this only where quotes are doubled.
            raise csv.Error("a quote in a cell without a backslash before it")
        return next(
            csv.reader([line], delimiter=self.separator, escapechar="\\", doublequote=False)
        )

    def plain(self, width: int) -> str:
        """A pattern of lines of ``width`` cells that hold nothing to decode; a group or two a cell."""
        if not self.quoted:
            return "^" + re.escape(self.separator).join([f"([^{self.separator}]*)"] * width) + "$"
        odd = '"\r\\\\' if self.escapes else '"\r'  # csv has its own word on a lone carriage return
        cell = f'(?:"([^{odd}]*)"|([^{odd}{self.separator}]*))'
        return "^" + re.escape(self.separator).join([cell] * width) + "$"


@dataclass
class Table:
    """Cells as strings, each row with its line (from 1), and the rows that are not good."""

    path: Path
    frame: pl.DataFrame  # "line" and our columns; "" where a cell is empty
    problems: list[Problem] = field(default_factory=list)

    def reject(self, bad: pl.Expr, reason: str, column: str, expected: str) -> None:
        """Move rows out of the table; ``column`` is what the message shows of them."""
        for line, value in self.frame.filter(bad).select("line", column).iter_rows():
            self.problems.append((line, reason, f"{value!r}, expected {expected}"))
        self.frame = self.frame.filter(~bad)

    def reject_repeats(self, column: str) -> None:
        """Move rows out whose id an earlier row has."""
        repeats = ~pl.col(column).is_first_distinct()
        self.reject(repeats, "repeated id", column, "each id once")

    def settle(self, on_bad_row: OnBadRow) -> dict[str, int]:
        """Count the bad rows, or refuse the first of the file. Raises DataFormatError."""
        rows = BadRows(self.path, on_bad_row)
        for problem in sorted(self.problems):
            rows.add(*problem)
        if self.frame.is_empty():
            raise DataFormatError(f"{self.path}: there is no good row in the file; get it again.")
        return rows.skipped


def header_cells(path: Path, data: bytes, dialect: Dialect) -> list[str]:
    """The names in the first line, without blanks around them. Raises DataFormatError."""
    first = data.removeprefix(b"\xef\xbb\xbf").split(b"\n", 1)[0].removesuffix(b"\r")
    try:
        return [name.strip() for name in dialect.split(first.decode(dialect.encoding))]
    except (UnicodeDecodeError, csv.Error, StopIteration) as error:
        raise DataFormatError(
            f"{path}, line 1: the header is unreadable ({error or 'it is empty'}); get the file again."
        ) from error


def read_table(
    path: Path,
    data: bytes,
    dialect: Dialect,
    columns: Mapping[str, str],
    mend: Mend | None = None,
) -> Table:
    """The cells of a file with a header.

    Args:
        path: for messages.
        data: the file's bytes (``delimited.read_raw``).
        dialect: how it is written.
        columns: the file's names of the columns that are wanted -> ours; others are left out.
        mend: for damage that a release is known to have, see ``Mend``.

    Raises:
        DataFormatError: a missing column, or one that is named twice.
    """
    names = header_cells(path, data, dialect)
    missing = [name for name in columns if names.count(name) != 1]
    if missing:
        raise DataFormatError(
            f"{path}, line 1: the header has no column, or several, called {', '.join(missing)}; "
            f"it names {', '.join(names)[:200]}. Name the columns as the message does."
        )
    picks = {names.index(theirs): ours for theirs, ours in columns.items()}
    return read_cells(path, data, dialect, len(names), picks, skip=1, mend=mend)


def read_cells(
    path: Path,
    data: bytes,
    dialect: Dialect,
    width: int,
    picks: Mapping[int, str],
    skip: int = 0,
    mend: Mend | None = None,
) -> Table:
    """The cells of a file whose rows have ``width`` of them.

    Args:
        path: for messages.
        data: the file's bytes.
        dialect: how it is written.
        width: cells a row.
        picks: place of each wanted cell, from 0 -> our name of its column.
        skip: lines before the first row.
        mend: for damage that a release is known to have, see ``Mend``.
    """
    table = Table(path, pl.DataFrame())
    lines = read_lines(data, dialect, table.problems).filter(pl.col("line") > skip)
    groups = lines.select(
        "line", cells=pl.col("text").str.extract_groups(dialect.plain(width))
    ).unnest("cells")
    is_plain = lines["text"].str.contains(dialect.plain(width))
    two = dialect.quoted  # a group for the quoted form of a cell, one for the bare
    plain = groups.filter(is_plain).select(
        "line",
        *(
            pl.coalesce(str(2 * n + 1), str(2 * n + 2)).alias(name) if two else pl.col(str(n + 1))
            for n, name in picks.items()
        ),
    )
    plain.columns = ["line", *picks.values()]
    odd = _split_oddly(lines.filter(~is_plain), dialect, width, picks, table.problems, mend)
    table.frame = pl.concat([plain, odd]).sort("line") if odd.height else plain
    return table


def read_lines(data: bytes, dialect: Dialect, problems: list[Problem]) -> pl.DataFrame:
    """Every line that is not blank as text, with its number."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        texts: Sequence[str | None] = data.decode(dialect.encoding).split("\n")
    except UnicodeDecodeError:
        texts = [_decoded(raw, dialect, n, problems) for n, raw in enumerate(data.split(b"\n"), 1)]
    frame = pl.DataFrame({"text": texts}, schema={"text": pl.String()})
    frame = frame.with_row_index("line", offset=1).drop_nulls()
    return frame.with_columns(pl.col("text").str.strip_suffix("\r")).filter(pl.col("text") != "")


def _decoded(raw: bytes, dialect: Dialect, line: int, problems: list[Problem]) -> str | None:
    try:
        return raw.decode(dialect.encoding)
    except UnicodeDecodeError as error:
        detail = f"{error.reason}, {dialect.encoding} due"
        problems.append((line, "bytes of an unknown encoding", detail))
        return None


def _split_oddly(
    lines: pl.DataFrame,
    dialect: Dialect,
    width: int,
    picks: Mapping[int, str],
    problems: list[Problem],
    mend: Mend | None,
) -> pl.DataFrame:
    rows: list[list[object]] = []
    for line, text in lines.iter_rows():
        try:
            cells = dialect.split(text)
        except csv.Error as error:
            problems.append((line, "broken quotes", str(error)))
            continue
        if len(cells) != width and mend is not None:
            cells = mend(cells)
        if len(cells) == width:
            rows.append([line, *(cells[n] for n in picks)])
        else:
            detail = f"{len(cells)} fields where {width} are expected"
            problems.append((line, "broken row", detail))
    schema = {"line": lines.schema["line"], **{name: pl.String() for name in picks.values()}}
    return pl.DataFrame(rows, schema=schema, orient="row")
