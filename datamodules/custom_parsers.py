"""Events of a user's own: a table with a header, "user item" lines, or one user a line.

* ``table``: CSV or TSV (``.gz`` too) or Parquet with the columns ``user_id``, ``item_id`` and, optional,
  ``rating`` (any finite number; empty = none) and ``timestamp`` (whole numbers; datetimes in Parquet).
* ``pairs``: "user item" lines without a header, in time order, as the SASRec papers' files.
* ``lists``: "user item item item ..." lines, oldest item first, as S3Rec's and MicroLens's files.

Blanks and tabs of any number divide the ids of pairs and lists.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import polars as pl

from datamodules.custom_items import Renamed, items_catalog, our_name, our_names
from datamodules.delimited import OnBadRow, read_raw
from datamodules.errors import DataFormatError
from datamodules.movielens_parsers import repeated_pairs
from datamodules.parquet_tables import columns_of, read_columns
from datamodules.sources import file_digest
from datamodules.text_tables import Dialect, Table, header_cells, read_lines, read_table
from datamodules.types import INTERACTION_SCHEMA, Catalog, Interactions, RawData

Format = Literal["auto", "table", "pairs", "lists"]
TimeUnit = Literal["s", "ms"]

IDS = ("user_id", "item_id")
PICKLED = (".pkl", ".pickle", ".npy", ".npz", ".pt", ".pth", ".joblib")
FAR = 10**11  # as seconds the year 5138, as milliseconds March 1973
_ID = r"[^ \t\r]+"
_PLAIN = Dialect(" ", quoted=False)
_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,2})?$"
_WHOLE = r"^[0-9]{1,18}(\.0+)?$"  # pandas writes whole numbers with ".0" where one is missing
_NAME = re.compile(r"user|item|rating|time|movie|product", re.IGNORECASE)

logger = logging.getLogger(__name__)


def load_custom(
    interactions: Path,
    items: Path | None = None,
    format: Format = "auto",
    time_unit: TimeUnit = "s",
    ordered: bool = True,
    on_bad_row: OnBadRow = "error",
    columns: Mapping[str, str] | None = None,
) -> RawData:
    """Read a file of events and, where there is one, a file of items.

    Args:
        interactions: the events, see this module's docstring.
        items: see ``custom_items``.
        format: how the events are written; ``auto`` looks, and refuses what may be one or the other.
        time_unit: of whole-number timestamps.
        ordered: whether the rows of a file without times are in time order.
        on_bad_row: ``"error"``, or ``"skip"`` to leave bad rows out and count them in ``skipped``.
        columns: names that columns have in the files -> the ones used here.

    Raises:
        DataFormatError: a file is not in its format, or a bad row that may not be skipped.
        ValueError: an unknown choice.
    """
    refuse_pickles(interactions)
    if interactions.name.lower().removesuffix(".gz").endswith((".jsonl", ".ndjson", ".json")):
        raise DataFormatError(
            f"{interactions}: JSON lines are read for items alone; write the events as CSV or Parquet."
        )
    renamed = Renamed(columns or {})
    events, skipped, checksum = read_events(interactions, format, time_unit, on_bad_row, renamed)
    checksums = {interactions.name: checksum}
    rated = events.select(pl.col("item_id").unique(maintain_order=True))
    kept = {"kept: repeated (user, item) rows": repeated_pairs(events)}
    catalog, more, bare = items_catalog(items, rated, on_bad_row, renamed)
    renamed.require_met()
    if items is not None:
        refuse_pickles(items)
        checksums[f"items: {items.name}"] = file_digest(items)
        kept["kept: items without metadata"] = bare
    timed = events["timestamp"].null_count() < events.height
    counts = {reason: n for reason, n in (skipped | more | kept).items() if n}
    return RawData(
        interactions=Interactions(events, ordered=timed or ordered),
        catalog=Catalog(catalog),
        skipped=counts,
        checksums=checksums,
        source=f"{interactions}" + (f" and {items}" if items is not None else ""),
    )


def refuse_pickles(path: Path) -> None:
    """Raises DataFormatError for a file that could only be read by running what it says."""
    if path.suffix.lower() in PICKLED:
        raise DataFormatError(
            f"{path}: {path.suffix} files are not read, as they may hold code; write a CSV or Parquet file."
        )


def read_events(
    path: Path,
    format: Format,
    time_unit: TimeUnit,
    on_bad_row: OnBadRow,
    columns: Mapping[str, str] | None = None,
) -> tuple[pl.DataFrame, dict[str, int], str]:
    """Events with ``INTERACTION_SCHEMA``, rows left out by reason, and the SHA-256."""
    renamed = columns or {}
    for value, known in ((format, Format), (time_unit, TimeUnit)):
        if value not in get_args(known):
            raise ValueError(f"{value!r} is not one of {', '.join(get_args(known))}.")
    if path.suffix.lower() == ".parquet":
        if format not in ("auto", "table"):
            raise DataFormatError(
                f"{path}: a Parquet file is a table; pass data.format=table or auto."
            )
        table, checksum = _parquet_table(path, renamed), file_digest(path)
    else:
        data, checksum = read_raw(path)
        kind = find_format(path, data, renamed) if format == "auto" else format
        table = _text_table(path, data, renamed) if kind == "table" else _lines(path, data, kind)
    for column in IDS:
        table.reject(pl.col(column).fill_null("") == "", "empty id", column, f"a {column}")
    skipped = table.settle(on_bad_row)
    frame = table.frame
    if "timestamp" in frame.columns:
        frame = frame.with_columns(_seconds(path, frame, time_unit))
    absent = [
        pl.lit(None, t).alias(c) for c, t in INTERACTION_SCHEMA.items() if c not in frame.columns
    ]
    return frame.with_columns(absent).select(list(INTERACTION_SCHEMA)), skipped, checksum


def find_format(path: Path, data: bytes, columns: Mapping[str, str]) -> Format:
    """What kind of text it is. Raises DataFormatError where it may be one or the other."""
    first = data.removeprefix(b"\xef\xbb\xbf").split(b"\n", 1)[0]
    if b"," in first or set(IDS) <= {our_name(name, columns) for name in _header(path, data)}:
        return "table"
    if set(IDS) <= {our_name(name.strip(), columns) for name in _header(path, data)[0].split(";")}:
        raise DataFormatError(f"{path}, line 1: cells are divided by ';'; use commas or tabs.")
    tokens = [text.decode("utf-8", "replace") for text in first.split()]
    if any(_NAME.search(token) for token in tokens):
        raise DataFormatError(
            f"{path}, line 1: {first[:100]!r} looks like a header without the columns user_id and item_id; "
            "name them so, or pass data.format=pairs if it is a row."
        )
    rows = read_lines(data, _PLAIN, []).select(token=pl.col("text").str.extract_all(_ID))
    width = rows["token"].list.len()
    if (width == 2).all():
        return "pairs"
    users = rows["token"].list.first()
    if (width >= 2).all() and users.n_unique() == len(users):
        return "lists"
    odd = int((width != 2).arg_max() or 0) + 1
    raise DataFormatError(
        f"{path}: no header with user_id and item_id, and row {odd} has {width[odd - 1]} ids; pass "
        'data.format=pairs for "user item" lines or data.format=lists for "user item item ..." lines.'
    )


def _header(path: Path, data: bytes) -> list[str]:
    return header_cells(path, data, Dialect("\t", quoted=False))


def _text_table(path: Path, data: bytes, columns: Mapping[str, str]) -> Table:
    tabs = b"\t" in data.split(b"\n", 1)[0]
    dialect = Dialect("\t" if tabs else ",")
    wanted = _wanted(path, header_cells(path, data, dialect), columns)
    table = read_table(path, data, dialect, wanted)
    if "rating" in wanted.values():
        bad = ~pl.col("rating").str.contains(_NUMBER) & (pl.col("rating") != "")
        table.reject(bad, "bad rating", "rating", "a number or nothing")
        rating = pl.when(pl.col("rating") != "").then("rating")
        table.frame = table.frame.with_columns(rating.cast(pl.Float64).cast(pl.Float32))
        _reject_infinite(table)
    if "timestamp" in wanted.values():
        bad = ~pl.col("timestamp").str.contains(_WHOLE)
        table.reject(bad, "bad timestamp", "timestamp", "a whole number since 1970, 0 or more")
        whole = pl.col("timestamp").str.extract("^([0-9]+)").cast(pl.Int64)
        table.frame = table.frame.with_columns(whole.alias("timestamp"))
    return table


def _wanted(path: Path, header: list[str], columns: Mapping[str, str]) -> dict[str, str]:
    """The columns that are read -> our names. Raises DataFormatError; names the others in the log."""
    ours = our_names(path, header, columns)
    missing = [name for name in IDS if name not in ours.values()]
    if missing:
        raise DataFormatError(
            f"{path}: there is no column {' or '.join(missing)}; the file has {', '.join(header)[:200]}. "
            "Rename its columns to user_id, item_id and, where there are any, rating and timestamp, or say "
            'which is which: "data.columns={THEIRS: user_id}".'
        )
    extra = [name for name in header if ours[name] not in INTERACTION_SCHEMA]
    if extra:
        logger.info("%s: not used: columns %s", path, ", ".join(extra)[:200])
    return {name: our for name, our in ours.items() if our in INTERACTION_SCHEMA}


def _reject_infinite(table: Table) -> None:
    odd = pl.col("rating").is_not_null() & ~pl.col("rating").is_finite()
    table.reject(odd, "bad rating", "rating", "a finite number or nothing")


def _parquet_table(path: Path, columns: Mapping[str, str]) -> Table:
    found = columns_of(path)
    wanted = _wanted(path, list(found), columns)
    schema = {ours: found[theirs] for theirs, ours in wanted.items()}
    for name, dtype in schema.items():
        right = {
            "rating": dtype.is_numeric(),
            "timestamp": dtype.is_integer() or dtype == pl.Datetime,
        }.get(name, dtype.is_integer() or dtype in (pl.String, pl.Categorical, pl.Enum))
        if not right:
            raise DataFormatError(
                f"{path}: column {name} is of type {dtype}; expected whole numbers or text for ids, numbers "
                "for rating, whole numbers or datetimes for timestamp. Cast it before it is written."
            )
    frame = read_columns(path, list(wanted)).rename(wanted).with_row_index("line", offset=1)
    table = Table(path, frame.with_columns(pl.col(*IDS).cast(pl.String)))
    if "rating" in schema:
        table.frame = table.frame.with_columns(pl.col("rating").cast(pl.Float32))
        _reject_infinite(table)
    if "timestamp" in schema:
        time = pl.col("timestamp")
        whole = time.dt.epoch("s") if schema["timestamp"] == pl.Datetime else time
        table.frame = table.frame.with_columns(whole.cast(pl.Int64, strict=False))
        bad = ~(time >= 0).fill_null(False)
        table.reject(bad, "bad timestamp", "timestamp", "a time since 1970")
    return table


def _lines(path: Path, data: bytes, kind: Format) -> Table:
    table = Table(path, pl.DataFrame())
    token = pl.col("text").str.extract_all(_ID)
    rows = read_lines(data, _PLAIN, table.problems).with_columns(token=token)
    table.frame = rows.filter(pl.col("token").list.len() > 0)
    many = pl.col("token").list.len()
    if kind == "pairs":
        table.reject(many != 2, "broken row", "text", "a user and an item")
    else:
        table.reject(many < 2, "broken row", "text", "a user and at least one item")
        table.frame = table.frame.with_columns(user_id=pl.col("token").list.first())
        table.reject_repeats("user_id")
    table.frame = table.frame.select(
        "line", user_id=pl.col("token").list.first(), item_id=pl.col("token").list.slice(1)
    ).explode("item_id")
    return table


def _seconds(path: Path, frame: pl.DataFrame, unit: TimeUnit) -> pl.Expr:
    """Timestamps in seconds. Raises DataFormatError where they cannot be of that unit."""
    newest = int(frame["timestamp"].max() or 0)  # type: ignore[arg-type]
    if unit == "s" and newest >= FAR:
        raise DataFormatError(
            f"{path}: timestamp {newest} is after the year 5000 in seconds, so times are in milliseconds; "
            "pass data.time_unit=ms, or correct that row."
        )
    if unit == "ms" and 0 < newest < FAR:
        raise DataFormatError(
            f"{path}: the newest timestamp, {newest}, is before 1974 in milliseconds, so times are in "
            "seconds; pass data.time_unit=s."
        )
    return pl.col("timestamp") // (1000 if unit == "ms" else 1)
