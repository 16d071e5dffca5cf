"""Amazon's metadata files: what each release says of an item, as rows of the catalogue.

Only items that have a review are kept, block by block, so that memory holds their text and no other. All
text goes through ``text.normalise_column``; what a release does not say is null, never invented.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from datamodules.amazon_items import ITEM_SCHEMA, item_lines, storable
from datamodules.delimited import BadRows, OnBadRow
from datamodules.json_lines import parse_literal
from datamodules.text import TITLE_LIMIT, normalise_column, usable_titles
from datamodules.types import CATALOG_SCHEMA

_LISTED = r"""^\s*\[\s*['"].*\]\s*$"""
_PRICE = r"^\s*\$?\s*(\d{1,3}(?:,\d{3}){1,2}(?:\.\d+)?|\d{1,9}(?:\.\d+)?)\s*$"
_ADDRESS = r"^https?://\S+$"
_NO_PICTURE = "/no-img-"  # Amazon's grey "no image available"


@dataclass(frozen=True)
class Metadata:
    """Items with ``CATALOG_SCHEMA``, rows left out or odd by reason, SHA-256."""

    frame: pl.DataFrame
    counts: dict[str, int]
    sha256: str


def read_metadata(
    path: Path, release: int, reviewed: pl.Series, on_bad_row: OnBadRow = "error"
) -> Metadata:
    """The reviewed items of one file, in its order.

    Of several rows of one item the first with a usable title is taken, or else the first. A release
    that splits the description joins its parts by a blank; in 2023 an item without a description has
    its features instead. A title without a letter or digit becomes null.

    Args:
        path: the file, plain or gzip.
        release: 2014 (Python literals), 2018 or 2023 (JSON).
        reviewed: (I,) raw ids of the items that are wanted.
        on_bad_row: ``"error"`` or ``"skip"``.

    Raises:
        DataFormatError: a damaged or empty file, or a bad row that may not be skipped.
    """
    bad = BadRows(path, on_bad_row)
    wanted = pl.DataFrame({"item_id": reviewed.cast(pl.String).unique()})
    lines = item_lines(path, release, bad)
    kept: list[pl.DataFrame] = []
    hashes: list[pl.Series] = []

    def work(rows: pl.DataFrame) -> tuple[pl.Series, pl.DataFrame | None]:
        some = rows.join(wanted, on="item_id", how="semi", maintain_order="left")
        return rows["item_id"].hash(), _compact(clean_items(some)) if some.height else None

    for ids, cleaned in lines.mapped(work):
        hashes.append(ids)
        if cleaned is not None:
            kept.append(cleaned)
    items = pl.concat(kept) if kept else clean_items(pl.DataFrame(schema=ITEM_SCHEMA))
    single = one_row_each(items)
    name = path.name.removesuffix(".gz")
    distinct = pl.concat(hashes).n_unique() if hashes else 0
    left_out = {
        f"{name}: items without a review": distinct - single.height,
        f"{name}: repeated rows of an item": sum(map(len, hashes)) - distinct,
    }
    counts = {what: n for what, n in (left_out | _oddities(single)).items() if n}
    return Metadata(single.select(list(CATALOG_SCHEMA)), bad.skipped | counts, lines.sha256)


def clean_items(items: pl.DataFrame) -> pl.DataFrame:
    """Rows of ``ITEM_SCHEMA`` -> rows of ``CATALOG_SCHEMA`` and what was odd about each (booleans)."""
    title = normalise_column(items["title"], TITLE_LIMIT)
    usable = usable_titles(title)
    opened, listed = _opened(items["description"])
    price = items["price"].str.extract(_PRICE).str.replace_all(",", "").cast(pl.Float32)
    scrap, mended = _title_oddities(items["title"], title, usable)
    return pl.DataFrame(
        {
            "item_id": items["item_id"],
            "title": title.to_frame("t").select(pl.when(usable).then("t"))["t"],
            "description": normalise_column(opened),
            "categories": _normal_lists(items["categories"]),
            "brand": normalise_column(items["brand"], TITLE_LIMIT),
            "price": price,
            "images": _pictures(items["images"]),
            "scrap": scrap,
            "mended": mended,
            "listed": listed,
            "rank_listed": items["rank_listed"],
            "unpriced": price.is_null() & (items["price"].fill_null("").str.strip_chars() != ""),
        }
    )  # fmt: skip


def _title_oddities(
    written: pl.Series, title: pl.Series, usable: pl.Series
) -> tuple[pl.Series, pl.Series]:
    """(whether there was a title and nothing usable in it, whether markup or entities were mended)."""
    marked = written.str.contains("[<&]").fill_null(False)
    rows = (marked & usable).arg_true()  # few: white space is costly to compare
    plain = written.gather(rows).str.replace_all(r"\s+", " ").str.strip_chars()
    mended = pl.repeat(False, len(written), eager=True).scatter(rows, plain != title.gather(rows))
    return written.str.contains(r"\S").fill_null(False) & ~usable, mended


def _pictures(lists: pl.Series) -> pl.Series:
    """Web addresses of real pictures, each once; none is an empty list."""
    address = pl.element().str.contains(_ADDRESS)
    real = address & ~pl.element().str.contains(_NO_PICTURE, literal=True)
    kept = lists.list.eval(pl.element().filter(real).unique(maintain_order=True))
    return kept.to_frame("images").select(pl.col("images").fill_null([]))["images"]


def _compact(items: pl.DataFrame) -> pl.DataFrame:
    """The same rows in memory of their own: a few kept texts would hold on to a whole block's."""
    file = io.BytesIO()
    items.write_ipc(file, compat_level=pl.CompatLevel.oldest())
    return pl.read_ipc(file.getvalue())


def one_row_each(items: pl.DataFrame) -> pl.DataFrame:
    """One row an item: the first with a usable title, or else the first; in the file's order."""
    ranked = items.with_row_index("row").sort(pl.col("title").is_null(), "row")
    return ranked.unique("item_id", keep="first").sort("row").drop("row")


def _oddities(items: pl.DataFrame) -> dict[str, int]:
    titles = items["title"].drop_nulls()
    return {
        "kept: titles that are scraps of markup": int(items["scrap"].sum()),
        "kept: titles with markup or entities, mended": int(items["mended"].sum()),
        "kept: descriptions that were written-out lists": int(items["listed"].sum()),
        "kept: sales ranks written as lists (not used)": int(items["rank_listed"].sum()),
        "kept: prices that are no single number": int(items["unpriced"].sum()),
        "kept: items that share their title": int(titles.is_duplicated().sum()),
    }


def _opened(parts: pl.Series) -> tuple[pl.Series, pl.Series]:
    """(descriptions as one text each, whether a part was itself a list written as text)."""
    listed = parts.list.eval(pl.element().str.contains(_LISTED)).list.any().fill_null(False)
    texts = parts.list.drop_nulls().list.join(" ")
    if listed.any():
        rows = listed.arg_true()
        opened = [" ".join(map(_open, some)) for some in parts.gather(rows).list.drop_nulls()]
        texts = texts.scatter(rows, pl.Series(opened, dtype=pl.String))
    return texts.alias("description"), listed


def _open(text: str) -> str:
    """``"['a', 'b']"`` -> ``"a b"``; any other text as it is."""
    try:
        value = parse_literal(text.strip()) if re.fullmatch(_LISTED, text, re.DOTALL) else None
    except ValueError:
        return text
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        return text
    return " ".join(storable(part) for part in value)


def _normal_lists(lists: pl.Series) -> pl.Series:
    """Each list's texts normalised, without repeats or empty ones; no list is an empty one."""
    rows = lists.to_frame("text").with_row_index("row").explode("text", empty_as_null=True)
    rows = rows.with_columns(normalise_column(rows["text"], TITLE_LIMIT))
    whole = rows.group_by("row", maintain_order=True).agg(
        pl.col("text").drop_nulls().unique(maintain_order=True)
    )
    return whole["text"].alias("categories")
