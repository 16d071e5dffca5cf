"""What is read of an item.

Legend: I items in the catalogue.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import polars as pl

Field = Literal["title", "categories", "description", "brand", "summary", "picture", "fusion"]
# What stages of their own wrote, and which modules they run; the other fields are the data's.
_WRITTEN = {
    "summary": "ItemSummariesModule", "picture": "ItemPicturesModule", "fusion": "ItemFusionModule",
}  # fmt: skip
_YEAR = re.compile(r"\s*\(\d{4}\)\s*$")


def item_texts(catalog: pl.DataFrame, fields: Sequence[str]) -> list[str]:
    """One text an item, (I,): its fields in the given order, ". " between them; "" where it has none.

    Args:
        catalog: columns as ``CATALOG_SCHEMA``; null and blank fields are left out.
        fields: names of text or list columns; the entries of a list are joined by ", ".

    Raises:
        ValueError: what another stage writes is asked for, and is not there.
    """
    for name in fields:
        if name in _WRITTEN and name not in catalog.columns:
            raise ValueError(
                f"fields name {name}: give the stage inputs: {{catalog.{name}: STAGE/predictions.parquet}}, "
                f"of a stage that runs {_WRITTEN[name]}"
            )
    lists = {name for name, kind in catalog.schema.items() if isinstance(kind, pl.List)}
    parts = [pl.col(f).list.join(", ") if f in lists else pl.col(f) for f in fields]
    texts = [part.str.strip_chars() for part in parts]
    filled = [pl.when(text != "").then(text) for text in texts]
    return (
        catalog.select(pl.concat_str(filled, separator=". ", ignore_nulls=True))
        .to_series()
        .to_list()
    )


def without_years(titles: Sequence[str]) -> list[str]:
    """(I,) titles without the year in brackets that they end with, where it tells no two of them apart.

    Digits are tokens of their own in many vocabularies, so that years are half of what films' titles take.
    """
    short = [_YEAR.sub("", title) or title for title in titles]
    meant = Counter(name for name, _ in {*zip(short, titles, strict=True)})
    return [title if meant[name] > 1 else name for name, title in zip(short, titles, strict=True)]


def catalogue_texts(catalog: pl.DataFrame, fields: Sequence[str], num_items: int) -> list[str]:
    """``item_texts`` of a catalogue that has ``num_items`` items; raises ValueError where it has others."""
    if len(catalog) != num_items:
        raise ValueError(f"the catalogue has {len(catalog)} items, expected {num_items}")
    return item_texts(catalog, fields)


def without_texts(told: bool, fields: Sequence[str]) -> str | None:
    """Why a method that reads texts means nothing on some data; None where any is told."""
    return None if told else f"no item has a {' or '.join(fields)}"
