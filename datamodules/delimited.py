"""Read delimited text: fast where it is right, exact about the line where it is not.

A file is described by a ``Layout``. ``read_events`` parses tens of millions of rows with Polars,
strictly; when Polars objects, or something does not add up, the same bytes go through the careful
row-by-row reader, which alone decides what is a bad row and names its line. A row is a line: quoted
fields may hold separators and doubled quotes, not line ends. Blank lines are ignored.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from datamodules.errors import DataFormatError
from datamodules.types import INTERACTION_SCHEMA

OnBadRow = str  # "error" | "skip"
_NUMBER = re.compile(r" *[+-]?(\d+\.?\d*|\.\d+)")
_ONE_BYTE = "\x1f"  # ASCII's own "unit separator"; stands in for "::", as Polars splits at one byte


@dataclass(frozen=True)
class Layout:
    """How a text file is written.

    ``columns`` are our names, in the file's order. With a ``header`` the file's first line names
    them: ``header`` maps the file's names to ours, in any order, other columns are ignored.
    """

    separator: str
    columns: tuple[str, ...] = ()
    header: dict[str, str] | None = None
    quoted: bool = False
    encoding: str = "utf-8"


class BadRows:
    """Counts rows left out, or refuses the first (``on_bad_row="error"``)."""

    def __init__(self, path: Path, on_bad_row: OnBadRow) -> None:
        if on_bad_row not in ("error", "skip"):
            raise ValueError(f'on_bad_row is {on_bad_row!r}; expected "error" or "skip".')
        self.path, self.on_bad_row = path, on_bad_row
        self.skipped: dict[str, int] = {}

    def add(self, line: int, reason: str, detail: str) -> None:
        """Count one bad row. Raises DataFormatError unless rows may be skipped."""
        if self.on_bad_row == "error":
            raise DataFormatError(
                f"{self.path}, line {line}: {reason}: {detail}; correct the line or get the file "
                "again, or pass data.on_bad_row=skip to leave such rows out and count them."
            )
        key = f"{self.path.name.removesuffix('.gz')}: {reason}"
        self.skipped[key] = self.skipped.get(key, 0) + 1


def read_raw(path: Path) -> tuple[bytes, str]:
    """A file's bytes, unpacked if it is ``.gz``, and their SHA-256.

    Raises:
        DataFormatError: the file is empty, in UTF-16 or UTF-32, holds a NUL, or its gzip stream is cut
            off or damaged.
    """
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                data = file.read()
        else:
            data = path.read_bytes()
            if data.startswith(b"\x1f\x8b"):
                raise DataFormatError(f"{path}: this is a gzip file; add .gz to its name.")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataFormatError(
            f"{path}: the gzip file is truncated or damaged ({error}); get it again."
        ) from error
    if not data.strip():
        raise DataFormatError(f"{path}: the file is empty; get it again.")
    if b"\0" in data:  # no text format of ours has it; UTF-16 and UTF-32 have it in every line
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise DataFormatError(
            f"{path}, line {line}: a NUL byte, so this is UTF-16, UTF-32 or no text at all; "
            "save it in the release's own encoding, or get it again."
        )
    return data, hashlib.sha256(data).hexdigest()


def read_rows(data: bytes, layout: Layout, bad: BadRows) -> Iterator[tuple[int, list[str]]]:
    """(line number from 1, fields in the order of our columns) of each whole row, one by one.

    Raises:
        DataFormatError: a missing column, or a bad row that may not be skipped.
    """
    lines = enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
    width, picks = len(layout.columns), list(range(len(layout.columns)))
    if layout.header is not None:
        line, names = 1, header_names(data, layout, bad.path)
        width, picks = len(names), [names.index(name) for name in layout.header]
        next(lines)
    for line, raw in lines:
        text = raw.removesuffix(b"\r")
        if not text:
            continue
        try:
            fields = _split(text.decode(layout.encoding), layout)
        except UnicodeDecodeError as error:
            bad.add(line, "bytes of an unknown encoding", f"{error.reason}, {layout.encoding} due")
            continue
        except csv.Error as error:
            bad.add(line, "broken quotes", str(error))
            continue
        if len(fields) != width:
            bad.add(line, "broken row", f"{len(fields)} fields where {width} are expected")
            continue
        yield line, [fields[pick] for pick in picks]


def header_names(data: bytes, layout: Layout, path: Path) -> list[str]:
    """The names in the first line. Raises DataFormatError if one that we need is not there."""
    assert layout.header is not None
    first = data.removeprefix(b"\xef\xbb\xbf").split(b"\n", 1)[0].removesuffix(b"\r")
    try:
        names = _split(first.decode(layout.encoding), layout)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataFormatError(f"{path}, line 1: the header is unreadable ({error}).") from error
    missing = [name for name in layout.header if name not in names]
    if missing:
        raise DataFormatError(
            f"{path}, line 1: missing column {', '.join(missing)}; the header names "
            f"{', '.join(names)[:200]}. Get the file again or name the columns as the release does."
        )
    return names


def _split(line: str, layout: Layout) -> list[str]:
    if not layout.quoted:
        return line.split(layout.separator)
    return next(csv.reader([line], delimiter=layout.separator, strict=True))


def read_events(
    path: Path, data: bytes, layout: Layout, scale: Sequence[float] | None, on_bad_row: OnBadRow
) -> tuple[pl.DataFrame, dict[str, int]]:
    """Events in file order with ``INTERACTION_SCHEMA``, and the rows left out, by reason.

    Args:
        path: for messages.
        data: the file's bytes (``read_raw``).
        layout: its columns, among ``user_id, item_id, rating, timestamp``.
        scale: the ratings that the release knows; None where it has no ratings.
        on_bad_row: ``"error"`` or ``"skip"``.

    Raises:
        DataFormatError: a missing column, no rows, or a bad row that may not be skipped.
    """
    bad = BadRows(path, on_bad_row)
    frame = _read_fast(path, data, layout, scale)
    if frame is None:
        frame = _read_carefully(data, layout, scale, bad)
    if frame.is_empty():
        raise DataFormatError(f"{path}: there is no good row in the file; get it again.")
    missing = [
        pl.lit(None, dtype).alias(name)
        for name, dtype in INTERACTION_SCHEMA.items()
        if name not in frame.columns
    ]
    return frame.with_columns(missing).select(list(INTERACTION_SCHEMA)), bad.skipped


def _read_fast(
    path: Path, data: bytes, layout: Layout, scale: Sequence[float] | None
) -> pl.DataFrame | None:
    """The whole file by Polars, or None if anything about it is not as it should be."""
    names = layout.columns
    if layout.header is not None:
        raw_names = header_names(data, layout, path)
        names = tuple(layout.header.get(name, f"_{i}") for i, name in enumerate(raw_names))
    if layout.encoding != "utf-8" and not data.isascii():
        return None
    rows = _count_lines(data) - (layout.header is not None)
    if len(layout.separator) > 1:
        if _ONE_BYTE.encode() in data:
            return None
        data = data.replace(layout.separator.encode(), _ONE_BYTE.encode())
    try:
        frame = pl.read_csv(
            data,
            has_header=False,  # Polars wants its own names in a header; ours are in the schema
            skip_lines=int(layout.header is not None),
            schema={name: INTERACTION_SCHEMA.get(name, pl.String()) for name in names},
            separator=layout.separator if len(layout.separator) == 1 else _ONE_BYTE,
            quote_char='"' if layout.quoted else None,
        )
    except pl.exceptions.PolarsError:
        return None
    return frame.select(_wanted(layout)) if frame.height == rows and _sound(frame, scale) else None


def _wanted(layout: Layout) -> list[str]:
    return list(layout.header.values() if layout.header is not None else layout.columns)


def _count_lines(data: bytes) -> int:
    end = len(data)
    while end and data[end - 1] in b"\r\n":
        end -= 1
    return data.count(b"\n", 0, end) + 1


def _sound(frame: pl.DataFrame, scale: Sequence[float] | None) -> bool:
    """No hole (a short row leaves one), every rating on the scale, no time before 1970."""
    checks = [pl.all_horizontal(pl.all().is_not_null().all())]
    checks += [(pl.col(name) != "").all() for name in ("user_id", "item_id")]
    if "rating" in frame.columns and scale is not None:
        checks.append(pl.col("rating").is_in(list(scale)).all())
    if "timestamp" in frame.columns:
        checks.append((pl.col("timestamp") >= 0).all())
    return bool(frame.select(pl.all_horizontal(checks)).item()) if frame.height else False


def _read_carefully(
    data: bytes, layout: Layout, scale: Sequence[float] | None, bad: BadRows
) -> pl.DataFrame:
    names = _wanted(layout)
    parsers: dict[str, Callable[[str], object]] = {"timestamp": parse_time}
    if scale is not None:
        parsers["rating"] = lambda text: parse_rating(text, scale)
    columns: list[list[object]] = [[] for _ in names]
    for line, fields in read_rows(data, layout, bad):
        try:
            values = [parsers.get(n, parse_id)(text) for n, text in zip(names, fields, strict=True)]
        except ValueError as error:
            reason, _, detail = str(error).partition(": ")
            bad.add(line, reason, detail)
            continue
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    schema = {name: INTERACTION_SCHEMA[name] for name in names}
    return pl.DataFrame(dict(zip(names, columns, strict=True)), schema=schema)


def parse_id(text: str) -> str:
    """A raw id is any text but none. Raises ValueError."""
    if not text:
        raise ValueError("empty id: expected a user id and an item id")
    return text


def parse_rating(text: str, scale: Sequence[float]) -> float:
    """A rating on the release's scale. Raises ValueError."""
    if not _NUMBER.fullmatch(text) or float(text) not in scale:
        raise ValueError(
            f"rating off the scale: {text!r}, expected {scale[0]:g} to {scale[-1]:g} in steps of "
            f"{scale[1] - scale[0]:g}"
        )
    return float(text)


def parse_time(text: str) -> int:
    """Seconds since 1970, a whole number of at most 63 bits. Raises ValueError."""
    if not re.fullmatch(r"\+?[0-9]+", text) or int(text) >= 2**63:
        raise ValueError(f"bad timestamp: {text!r}, expected whole seconds since 1970, 0 or more")
    return int(text)
