"""Items of a user's own: CSV or TSV, JSON lines (``.jsonl``; each ``.gz`` too) or Parquet.

The column ``item_id`` and, each optional, ``title``, ``description``, ``categories`` (a list, or text with
``|`` between), ``brand``, ``price`` (a number, or text as "$4.99"; other text is null and counted), ``image``
(an address) or ``images`` (a list, or text with ``|`` between). ``columns`` says which of a file's names are
these; a type behind a colon, as in RecBole's files, is left off. Cells of a CSV may hold line ends where they
are quoted. Text goes through ``text.normalise_text``; what is empty is null.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from datamodules.delimited import BadRows, OnBadRow, read_raw
from datamodules.errors import DataFormatError
from datamodules.parquet_tables import columns_of, read_columns
from datamodules.text import TITLE_LIMIT, normalise_column
from datamodules.types import CATALOG_SCHEMA

COLUMNS = (*CATALOG_SCHEMA, "image")
_PRICE = re.compile(r"\$? ?([0-9]{1,12}(?:\.[0-9]*)?|\.[0-9]+)")
_TYPE = re.compile(r"(?<=.):(?:token|float)(?:_seq)?\Z")
_LARGEST = 1e38  # a price is stored in 32 bits

Row = dict[str, Any]

logger = logging.getLogger(__name__)
csv.field_size_limit(1 << 30)  # a cell may be longer than csv's 128 KiB


class Renamed(dict[str, str]):
    """Their names -> ours; remembers which names a file had."""

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__(names)
        self.met: set[str] = set()

    def get(self, theirs: str, default: Any = None) -> Any:
        """As of a dictionary."""
        self.met |= {theirs} & self.keys()
        return super().get(theirs, default)

    def require_met(self) -> None:
        """Raises DataFormatError for a name that no file had: a typo would lose a column."""
        if missing := sorted(self.keys() - self.met):
            raise DataFormatError(
                f"data.columns names {', '.join(missing)}, but no file has such a column; correct the name."
            )


def our_name(theirs: str, columns: Mapping[str, str]) -> str:
    """The name that a file's column has here; RecBole's files give a type behind a colon."""
    return columns.get(theirs) or _TYPE.sub("", theirs)


def our_names(path: Path, header: Sequence[str], columns: Mapping[str, str]) -> dict[str, str]:
    """Each column of a header -> its name here. Raises DataFormatError for two of one name."""
    ours = {name: our_name(name, columns) for name in header}
    if len(set(ours.values())) < len(header):
        raise DataFormatError(
            f"{path}: two columns have one name, of {', '.join(header)[:200]}; rename or remove one."
        )
    return ours


def items_catalog(
    path: Path | None,
    rated: pl.DataFrame,
    on_bad_row: OnBadRow,
    columns: Mapping[str, str] | None = None,
) -> tuple[pl.DataFrame, dict[str, int], int]:
    """The catalogue, rows left out by reason, and how many rated items have no row.

    Args:
        path: the items' file, or None: then every item is known by its id alone.
        rated: the items that occur in events, column ``item_id``.
        on_bad_row: ``"error"`` or ``"skip"``.
        columns: names that columns have in the file -> ours.

    Raises:
        DataFormatError: the file is not in its format, or a bad row that may not be skipped.
    """
    none: dict[str, int] = {}
    empty = pl.DataFrame(schema=CATALOG_SCHEMA)
    known, skipped = (empty, none) if path is None else read_items(path, on_bad_row, columns)
    bare = rated.join(known, on="item_id", how="anti", maintain_order="left")
    return pl.concat([known, bare], how="diagonal"), skipped, bare.height


def read_items(
    path: Path, on_bad_row: OnBadRow, columns: Mapping[str, str] | None = None
) -> tuple[pl.DataFrame, dict[str, int]]:
    """Items with ``CATALOG_SCHEMA``, of several rows with one id the first; rows left out by reason."""
    bad = BadRows(path, on_bad_row)
    made: dict[str, Row] = {}
    extra: dict[str, None] = {}
    repeated = no_price = 0
    for line, row in _rows(path, bad, columns or {}):
        extra |= dict.fromkeys(name for name in row if name not in COLUMNS)
        try:
            item = make_item(row)
        except ValueError as error:
            reason, _, detail = str(error).partition(": ")
            bad.add(line, reason, detail)
            continue
        repeated += item["item_id"] in made
        no_price += item["price"] is None and row.get("price") not in (None, "")
        made.setdefault(item["item_id"], item)
    if extra:
        logger.info("%s: not used: columns %s", path, ", ".join(map(str, extra))[:200])
    if not made:
        raise DataFormatError(f"{path}: there is no good row in the file.")
    name = path.name.removesuffix(".gz")
    odd = {
        f"{name}: repeated item, the first row is taken": repeated,
        f"kept: {name}: prices that are no number": no_price,
    }
    frame = pl.DataFrame(list(made.values()), schema=CATALOG_SCHEMA, orient="row")
    texts = [
        normalise_column(frame["title"], TITLE_LIMIT),
        normalise_column(frame["description"]),
        normalise_column(frame["brand"], TITLE_LIMIT),
    ]
    return frame.with_columns(texts), bad.skipped | odd


def make_item(row: Row) -> Row:
    """One row with ``CATALOG_SCHEMA``. Raises ValueError("reason: detail")."""
    item_id = row.get("item_id")
    if isinstance(item_id, int) and not isinstance(item_id, bool):
        item_id = str(item_id)
    if not isinstance(item_id, str) or not item_id:
        raise ValueError(f"empty id: item_id is {item_id!r}, expected text or a whole number")
    return {
        "item_id": _sound(item_id),
        "title": _text(row, "title"),
        "description": _text(row, "description"),
        "categories": _list(row, "categories"),
        "brand": _text(row, "brand"),
        "price": _price(row.get("price")),
        "images": [*filter(None, [_text(row, "image")]), *(_list(row, "images") or [])],
    }


def _sound(text: str) -> str:
    try:
        text.encode()  # JSON can name half a character ("\\ud800")
    except UnicodeEncodeError:
        raise ValueError(f"bad text: {text[:80]!a} holds half a character") from None
    return text


def _text(row: Row, name: str) -> str | None:
    value = row.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"wrong type: {name} is {value!r:.80}, expected text")
    return _sound(value.strip()) or None


def _list(row: Row, name: str) -> list[str] | None:
    value = row.get(name)
    if isinstance(value, str):
        value = value.split("|")
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        raise ValueError(f"wrong type: {name} is {value!r:.80}, expected a list of texts")
    return [_sound(part.strip()) for part in value if part.strip()]


def _price(value: object) -> float | None:
    """The number, or None; shops write ranges and style sheets there, which is no reason to lose an item."""
    if isinstance(value, str):
        found = _PRICE.fullmatch(value.strip().replace(",", ""))
        value = float(found[1]) if found else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < _LARGEST else None  # NaN is not less


def _rows(path: Path, bad: BadRows, columns: Mapping[str, str]) -> Iterator[tuple[int, Row]]:
    """(line or row from 1, its cells by our names) of each row."""
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        names = _named(path, list(columns_of(path)), columns)
        frame = read_columns(path, list(names)).rename(names)
        yield from enumerate(frame.iter_rows(named=True), start=1)
    elif kind in ("jsonl", "ndjson", "json"):
        for line, row in _json_rows(path, bad):
            yield line, {our_name(name, columns): value for name, value in row.items()}
    elif kind in ("csv", "tsv", "item"):  # ".item" is RecBole's
        yield from _csv_rows(path, bad, columns)
    else:
        raise DataFormatError(
            f"{path}: items are read from .csv, .tsv, .item, .jsonl (each also .gz) or .parquet files."
        )


def _named(path: Path, header: list[str], columns: Mapping[str, str]) -> dict[str, str]:
    names = our_names(path, header, columns)
    if "item_id" not in names.values():
        raise DataFormatError(
            f"{path}: there is no column item_id; the file has {', '.join(header)[:200]}. Known are "
            f'{", ".join(COLUMNS)}; rename them, or say which is which: "data.columns={{THEIRS: item_id}}".'
        )
    return names


def _json_rows(path: Path, bad: BadRows) -> Iterator[tuple[int, Row]]:
    data, _ = read_raw(path)
    if data.lstrip().startswith(b"["):
        raise DataFormatError(f"{path}: a JSON list; write one object a line, without brackets.")
    for line, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            row = json.loads(raw)
        except (ValueError, RecursionError) as error:
            bad.add(line, "no JSON", str(error)[:200])
            continue
        if isinstance(row, dict):
            yield line, row
        else:
            bad.add(line, "no JSON object", f"{row!r:.80}")


def _csv_rows(path: Path, bad: BadRows, columns: Mapping[str, str]) -> Iterator[tuple[int, Row]]:
    data, _ = read_raw(path)
    text = _decoded(path, data)
    delimiter = "\t" if "\t" in text.split("\n", 1)[0] else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        header = [name.strip() for name in next(reader)]
        names = list(_named(path, header, columns).values())
        line = reader.line_num + 1
        for cells in reader:
            if len(cells) == len(names):
                yield line, dict(zip(names, cells, strict=True))
            elif cells:
                bad.add(line, "broken row", f"{len(cells)} fields where {len(names)} are expected")
            line = reader.line_num + 1
    except csv.Error as error:  # where the next row begins is anyone's guess
        raise DataFormatError(
            f"{path}, line {line}: broken quotes: {error}; a quote inside a quoted cell is written twice."
        ) from error


def _decoded(path: Path, data: bytes) -> str:
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataFormatError(
            f"{path}, line {line}: bytes of an unknown encoding; save the file as UTF-8."
        ) from error
