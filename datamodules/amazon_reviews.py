"""Amazon's review and ratings files, each parsed into events by one streaming reader.

Raw ids stay as they are, events stay in file order; a release in milliseconds is stored in seconds, with
events of one user within one second put in the order of their milliseconds, as later sorts are stable.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from datamodules.delimited import BadRows, OnBadRow
from datamodules.errors import DataFormatError
from datamodules.json_lines import JsonLines, parse_json, parse_loose
from datamodules.raw_columns import occurs_again
from datamodules.types import INTERACTION_SCHEMA

Duplicates = str  # "drop" | "keep"
STARS = (1.0, 2.0, 3.0, 4.0, 5.0)
# Amazon opened in 1995; a time outside says that seconds and milliseconds were mixed up, or is noise.
FIRST_SECOND, LAST_SECOND = 788_918_400, 4_102_444_800  # 1995-01-01, 2100-01-01
# What Polars makes of true, 1.5, [...] or {...} is none, and of 1e300 too many digits.
USUAL_ID = "^(?:[0-9-]{1,15}|[0-9A-Z_#-]*[A-Z_#][0-9A-Z_#-]*)$"
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")
_ROW = {
    "user_id": pl.Categorical(),
    "item_id": pl.Categorical(),
    "rating": pl.Float32(),
    "time": pl.Int64(),  # in the file's own unit
    "silent": pl.Boolean(),  # a review without text
}


@dataclass(frozen=True)
class ReviewFormat:
    """How a release writes its events.

    ``fields`` are the file's names of user, item, rating, time and, in review files, the text. In a
    ratings file (``csv``) they are its columns in their order, under our names. ``header`` is the first
    line that it must have, if any. ``loose`` files may hold Python literals in place of JSON.
    """

    fields: tuple[str, ...]
    csv: bool = False
    header: str | None = None
    loose: bool = False
    per_second: int = 1


@dataclass(frozen=True)
class Reviews:
    """Events with ``INTERACTION_SCHEMA`` (ids as categories), rows left out or odd by reason, SHA-256."""

    frame: pl.DataFrame
    counts: dict[str, int]
    sha256: str


def read_reviews(
    path: Path,
    layout: ReviewFormat,
    on_bad_row: OnBadRow = "error",
    duplicates: Duplicates = "drop",
) -> Reviews:
    """Every event of one file.

    Args:
        path: the file, plain or gzip.
        layout: how it is written.
        on_bad_row: ``"error"`` or ``"skip"``.
        duplicates: ``"drop"`` leaves out a line that repeats an earlier one in every byte.

    Raises:
        DataFormatError: a damaged or empty file, a wrong header, no good row, or a bad row that may
            not be skipped.
    """
    if duplicates not in ("drop", "keep"):
        raise ValueError(f'duplicates is {duplicates!r}; expected "drop" or "keep".')
    bad = BadRows(path, on_bad_row)
    lines = review_lines(path, layout, bad)
    frames = [frame for frame in lines.frames() if frame.height]
    if not frames:
        raise DataFormatError(f"{path}: there is no good row in the file; get it again.")
    frame = pl.concat(frames)
    counts = dict(bad.skipped)
    repeated = repeated_lines(frame)
    if repeated is not None:
        name = path.name.removesuffix(".gz")
        what = f"{name}: exact duplicate lines" if duplicates == "drop" else _KEPT_LINES
        counts[what] = repeated.len()
        frame = drop_rows(frame, repeated) if duplicates == "drop" else frame
    counts |= {reason: n for reason, n in oddities(frame, layout).items() if n}
    return Reviews(_events(frame, layout), counts, lines.sha256)


_KEPT_LINES = "kept: exact duplicate lines"


def review_lines(path: Path, layout: ReviewFormat, bad: BadRows) -> JsonLines:
    """The file's reader (its parts, so that a test can compare them)."""
    fast, careful = (_fast_csv, _careful_csv) if layout.csv else (_fast_json, _careful_json)
    return JsonLines(
        path, bad, partial(fast, layout), partial(careful, layout), _ROW, layout.header
    )


def repeated_lines(frame: pl.DataFrame) -> pl.Series | None:
    """Row numbers of lines that repeat an earlier one; None = there are none."""
    # Most hashes are single: only the others are compared in full.
    again = occurs_again(frame["line"])
    if not again.any():
        return None
    some = frame.with_row_index("row").filter(again)
    first = some.unique([c for c in some.columns if c != "row"], keep="first")
    repeated = some.filter(~pl.col("row").is_in(first["row"].implode()))["row"]
    return repeated if repeated.len() else None


def drop_rows(frame: pl.DataFrame, rows: pl.Series) -> pl.DataFrame:
    """The frame without these row numbers."""
    keep = pl.repeat(True, frame.height, eager=True).scatter(rows, False)
    return frame.filter(keep)


def oddities(frame: pl.DataFrame, layout: ReviewFormat) -> dict[str, int]:
    """What is odd about the rows that are kept."""
    pairs = frame.select(_user_and("item_id")).to_series()
    # Hashes first, as few times collide: only rows whose hash repeats are compared in full.
    tied = frame.select("user_id", "time").filter(occurs_again(_user_time_hash(frame, "time")))
    users = tied.filter(tied.is_duplicated())["user_id"].n_unique()
    return {
        "kept: repeated (user, item) rows": frame.height - pairs.n_unique(),
        "kept: users with several events at one time": users,
        "kept: reviews without text": 0 if layout.csv else int(frame["silent"].sum()),
    }


def _user_and(item: str) -> pl.Expr:
    """One whole number for a (user, item) pair."""
    return pl.col("user_id").to_physical().cast(pl.UInt64) * 2**32 + pl.col(item).to_physical()


def _user_time_hash(frame: pl.DataFrame, time: str) -> pl.Series:
    user = pl.col("user_id").to_physical().hash(seed=1)
    return frame.select(user ^ pl.col(time).hash(seed=2)).to_series()


def _events(frame: pl.DataFrame, layout: ReviewFormat) -> pl.DataFrame:
    """Seconds instead of the file's unit; nothing else of the file's is kept."""
    second = pl.col("time") // layout.per_second
    events = frame.select("user_id", "item_id", "rating", "time", timestamp=second)
    if layout.per_second > 1:
        events = order_within_seconds(events)
    return events.select(list(INTERACTION_SCHEMA))


def order_within_seconds(frame: pl.DataFrame) -> pl.DataFrame:
    """Rows of one user in one second change places so that ``time`` ascends; all others stay."""
    some = frame.select("user_id", "timestamp", "time").with_row_index("row")
    again = occurs_again(_user_time_hash(frame, "timestamp"))
    some = some.filter(again).with_columns(pl.col("user_id").to_physical())
    places = some.sort("user_id", "timestamp", "row")["row"]
    takers = some.sort("user_id", "timestamp", "time", "row")["row"]
    order = pl.arange(frame.height, eager=True, dtype=pl.UInt32)
    return frame[order.scatter(places, takers)]


def _fast_json(layout: ReviewFormat, data: bytes, lines: pl.Series) -> pl.DataFrame | None:
    user, item, rating, time, text = layout.fields
    # Float64: 4.9999999999 is 5 in Float32.
    types = (pl.String(), pl.String(), pl.Float64(), pl.Int64(), pl.String())
    try:
        frame = pl.read_ndjson(data, schema=dict(zip(layout.fields, types, strict=True)))
    except pl.exceptions.PolarsError:
        return None
    silent = pl.col(text).fill_null("").str.strip_chars() == ""
    return _sound(frame.select(
        user_id=user, item_id=item, rating=rating, time=time, silent=silent
    ), layout)  # fmt: skip


def _fast_csv(layout: ReviewFormat, data: bytes, lines: pl.Series) -> pl.DataFrame | None:
    types = {"rating": pl.Float64(), "time": pl.Int64()}
    if data.count(b"\r") != data.count(b"\r\n"):  # Polars would drop one inside a field
        return None
    try:
        frame = pl.read_csv(
            data,
            has_header=False,
            schema={name: types.get(name, pl.String()) for name in layout.fields},
            quote_char=None,
        )
    except pl.exceptions.PolarsError:
        return None
    names = ("user_id", "item_id", "rating", "time")
    return _sound(frame.select(*names, silent=pl.lit(False)), layout)


def _sound(frame: pl.DataFrame, layout: ReviewFormat) -> pl.DataFrame | None:
    """The frame with its final types, or None if the careful reader must look at a row of it."""
    first, last = FIRST_SECOND * layout.per_second, LAST_SECOND * layout.per_second
    checks = [
        pl.all_horizontal(pl.all().is_not_null().all()),
        pl.col("rating").is_in(list(STARS)).all(),
        pl.col("time").is_between(first, last, closed="left").all(),
        *(pl.col(name).str.contains(USUAL_ID).all() for name in ("user_id", "item_id")),
    ]
    sound = frame.height and frame.select(pl.all_horizontal(checks)).item()
    return frame.cast(_ROW) if sound else None  # type: ignore[arg-type]


def _careful_json(layout: ReviewFormat, line: str) -> dict[str, Any]:
    record = parse_loose(line) if layout.loose else parse_json(line)
    user, item, rating, time, text = (record.get(field) for field in layout.fields)
    named = dict(zip(("user", "item", "rating", "time"), layout.fields, strict=False))
    if isinstance(rating, bool) or not isinstance(rating, (int, float)) or rating not in STARS:
        raise ValueError(
            f"rating off the scale: {named['rating']} is {_shown(rating)}, expected 1 to 5"
        )
    return {
        "user_id": parse_raw_id(user, named["user"]),
        "item_id": parse_raw_id(item, named["item"]),
        "rating": float(rating),
        "time": _time(time, named["time"], layout.per_second),
        "silent": text is None or (isinstance(text, str) and not text.strip()),
    }


def _careful_csv(layout: ReviewFormat, line: str) -> dict[str, Any]:
    try:
        fields = next(csv.reader([line], strict=True))
    except csv.Error as error:
        raise ValueError(f"broken quotes: {error}") from error
    if len(fields) != len(layout.fields):
        raise ValueError(
            f"broken row: {len(fields)} fields where {len(layout.fields)} are expected"
        )
    row = dict(zip(layout.fields, fields, strict=True))
    rating, time = row["rating"], row["time"]
    if not _NUMBER.fullmatch(rating) or float(rating) not in STARS:
        raise ValueError(f"rating off the scale: {rating!r}, expected 1 to 5")
    whole = int(time) if re.fullmatch(r"[+-]?[0-9]{1,30}", time) else time
    return {
        "user_id": parse_raw_id(row["user_id"], "user_id"),
        "item_id": parse_raw_id(row["item_id"], "item_id"),
        "rating": float(rating),
        "time": _time(whole, "time", layout.per_second),
        "silent": False,
    }


def parse_raw_id(value: object, name: str) -> str:
    """A raw id: visible text, or a whole number's digits. Raises ValueError."""
    if isinstance(value, float) and value == value // 1 and abs(value) < 2**53:
        value = int(value)  # Polars sees no difference, so neither does the careful reader
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ValueError(f"bad id: {name} is {_shown(value)}, expected letters and digits")
    return value


def _time(value: object, name: str, per_second: int) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not FIRST_SECOND * per_second <= value < LAST_SECOND * per_second:  # type: ignore[operator]
        unit = "seconds" if per_second == 1 else "milliseconds"
        raise ValueError(
            f"bad timestamp: {name} is {_shown(value)}, expected {unit} since 1970 within "
            "the years 1995 to 2099"
        )
    return int(value)  # type: ignore[call-overload]


def _shown(value: object) -> str:
    """A value for a message: short, on one line, without lone surrogates."""
    return ascii(value)[:80] if value is not None else "missing"
