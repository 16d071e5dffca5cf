"""One row of Amazon metadata, release by release: which field is what, read fast and read carefully.

The fast half has Polars parse a block of JSON lines; the careful half takes one line. Both make the same
row of ``ITEM_SCHEMA``: texts as they are written, nothing normalised yet. Where a text is due, a whole
number counts as its digits and anything else that is no text as missing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import polars as pl

from datamodules.amazon_reviews import USUAL_ID, parse_raw_id
from datamodules.delimited import BadRows
from datamodules.json_lines import Fast, JsonLines, parse_json, parse_loose

_TEXTS = pl.List(pl.String())
# An item as the file has it, one column a fact, before any text is normalised.
ITEM_SCHEMA: dict[str, Any] = {
    "item_id": pl.String(),
    "title": pl.String(),
    "description": _TEXTS,
    "categories": _TEXTS,
    "brand": pl.String(),
    "price": pl.String(),
    "images": _TEXTS,
    "rank_listed": pl.Boolean(),  # 2018 writes the sales rank, which nothing here reads, in two ways
}
_PICTURE = ("hi_res", "large", "thumb")  # best first
_FIELDS_2018 = {
    "asin": pl.String(), "title": pl.String(), "brand": pl.String(), "price": pl.String(),
    "description": _TEXTS, "category": _TEXTS,
    "imageURLHighRes": _TEXTS, "imageURL": _TEXTS, "image": _TEXTS, "rank": pl.String(),
}  # fmt: skip
_IMAGES_2018 = ("imageURLHighRes", "imageURL", "image")
_FIELDS_2023 = {
    "parent_asin": pl.String(), "title": pl.String(), "main_category": pl.String(),
    "store": pl.String(), "price": pl.String(), "description": _TEXTS, "features": _TEXTS,
    "categories": _TEXTS, "images": _TEXTS,  # of each picture its JSON
}  # fmt: skip
_PICTURE_TYPE = pl.Struct(dict.fromkeys(_PICTURE, pl.String()))
# How Polars writes true, 1.5, {...} and [...] where a text is due: the careful reader must look.
_NO_TEXT = (
    r"(?s)^(?:true|false|-0|-?\d+\.\d+|-?\d{16,}|\{\}|\[\]"
    r'|\{".*|\[["\d\[{-].*|\[(?:true|false|null).*)$'
)
_HALF = re.compile("[\ud800-\udfff]")


def item_lines(path: Path, release: int, bad: BadRows) -> JsonLines:
    """The reader of one metadata file, for frames of ``ITEM_SCHEMA``."""
    # A Python literal is nothing that Polars could read.
    fast: dict[int, Fast | None] = {2014: None, 2018: _fast_2018, 2023: _fast_2023}
    careful = {2014: _item_2014, 2018: _item_2018, 2023: _item_2023}
    return JsonLines(path, bad, fast[release], careful[release], ITEM_SCHEMA)


def _parsed(data: bytes, fields: dict[str, Any], texts: tuple[str, ...]) -> pl.DataFrame | None:
    """A block by Polars, or None unless ``texts`` (its first the id) are surely texts."""
    try:
        frame = pl.read_ndjson(data, schema=fields)
    except pl.exceptions.PolarsError:
        return None
    odd = [
        pl.col(name).explode().str.contains(_NO_TEXT).any()
        if fields[name] == _TEXTS
        else pl.col(name).str.contains(_NO_TEXT).any()
        for name in texts[1:]
    ]
    strange_id = ~pl.col(texts[0]).str.contains(USUAL_ID).fill_null(False)
    return None if frame.select(pl.any_horizontal(strange_id.any(), *odd)).item() else frame


def _fast_2018(data: bytes, lines: pl.Series) -> pl.DataFrame | None:
    frame = _parsed(data, _FIELDS_2018, ("asin", "title", "brand", "description", "category"))
    if frame is None:
        return None
    images = pl.coalesce(pl.when(pl.col(name).list.len() > 0).then(name) for name in _IMAGES_2018)
    return frame.select(
        "title", "description", "brand", "price", item_id="asin", categories="category", images=images,
        rank_listed=pl.col("rank").str.starts_with("[").fill_null(False),
    ).select(list(ITEM_SCHEMA))  # fmt: skip


def _fast_2023(data: bytes, lines: pl.Series) -> pl.DataFrame | None:
    texts = ("parent_asin", "title", "store", "main_category", "description", "features")
    frame = _parsed(data, _FIELDS_2023, (*texts, "categories"))
    images = None if frame is None else _best_of_each(frame["images"], lines)
    if frame is None or images is None:
        return None
    says = pl.col("description").list.eval(pl.element().str.strip_chars() != "").list.any()
    return frame.select(
        "title",
        "price",
        item_id="parent_asin",
        description=pl.when(says).then("description").otherwise("features"),
        categories=pl.concat_list("main_category", pl.col("categories").fill_null([])),
        brand="store",
        images=images,
        rank_listed=pl.lit(False),
    ).select(list(ITEM_SCHEMA))


def _best_of_each(pictures: pl.Series, lines: pl.Series) -> pl.Series | None:
    """From lists of pictures as JSON the address of the best size of each; None where that is not sure.

    Polars takes twice as long to read a block with lists of structs as to read the pictures as texts and
    those again. But it writes those texts without escapes, and a text that looks like a picture as it is.
    """
    escaped = pictures.list.eval(pl.element().str.contains("\\", literal=True)).list.any().any()
    if escaped or lines.str.contains('"{\\"', literal=True).any():
        return None
    try:
        read = pictures.list.eval(pl.element().str.json_decode(_PICTURE_TYPE))
    except pl.exceptions.PolarsError:
        return None
    return read.list.eval(pl.coalesce(pl.element().struct.field(size) for size in _PICTURE))


def _item_2014(line: str) -> dict[str, Any]:
    record = parse_loose(line)
    groups = record.get("categories")
    return {
        "item_id": parse_raw_id(record.get("asin"), "asin"),
        "title": _text(record.get("title")),
        "description": _texts(record.get("description")),
        "categories": [name for group in groups for name in _texts(group)]
        if isinstance(groups, list)
        else _texts(groups),
        "brand": _text(record.get("brand")),
        "price": _price(record.get("price")),
        "images": _texts(record.get("imUrl")),
        "rank_listed": False,
    }


def _item_2018(line: str) -> dict[str, Any]:
    record = parse_json(line)
    rank = record.get("rank")
    return {
        "item_id": parse_raw_id(record.get("asin"), "asin"),
        "title": _text(record.get("title")),
        "description": _texts(record.get("description")),
        "categories": _texts(record.get("category")),
        "brand": _text(record.get("brand")),
        "price": _price(record.get("price")),
        "images": next((urls for n in _IMAGES_2018 if (urls := _texts(record.get(n)))), []),
        "rank_listed": isinstance(rank, list) or str(rank).startswith("["),
    }


def _item_2023(line: str) -> dict[str, Any]:
    record = parse_json(line)
    description = _texts(record.get("description"))
    says = any(part is not None and part.strip() for part in description)
    pictures = record.get("images")
    return {
        "item_id": parse_raw_id(record.get("parent_asin"), "parent_asin"),
        "title": _text(record.get("title")),
        "description": description if says else _texts(record.get("features")),
        "categories": [_text(record.get("main_category")), *_texts(record.get("categories"))],
        "brand": _text(record.get("store")),
        "price": _price(record.get("price")),
        "images": [_best(p) for p in pictures] if isinstance(pictures, list) else [],
        "rank_listed": False,
    }


def _best(picture: object) -> str | None:
    if not isinstance(picture, dict):
        return None
    sizes = (_text(picture.get(size)) for size in _PICTURE)
    return next((address for address in sizes if address is not None), None)


def _text(value: object) -> str | None:
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    whole = isinstance(value, int) or (value == value // 1 and abs(value) < 2**53)
    return str(int(value)) if whole else None


def _texts(value: object) -> list[str | None]:
    """A list's texts, a text alone as a list of one."""
    if isinstance(value, list):
        return [_text(part) for part in value]
    return [_text(value)] if isinstance(value, str) else []


def _price(value: object) -> str | None:
    """A price is a number or a text; what it is worth is for ``amazon_metadata`` to say."""
    return None if value is None else storable(str(value))


def storable(text: str) -> str:
    """Half a character, as a broken escape leaves it, is NUL, as in Polars; no normalised text has it."""
    return text if text.isascii() else _HALF.sub("\0", text)
