"""What is read of an item.

Legend: I items in the catalogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import polars as pl

Field = Literal["title", "categories", "description", "brand"]


def item_texts(catalog: pl.DataFrame, fields: Sequence[str]) -> list[str]:
    """One text an item, (I,): its fields in the given order, ". " between them; "" where it has none.

    Args:
        catalog: columns as ``CATALOG_SCHEMA``; null and blank fields are left out.
        fields: names of text or list columns; the entries of a list are joined by ", ".
    """
    lists = {name for name, kind in catalog.schema.items() if isinstance(kind, pl.List)}
    parts = [pl.col(f).list.join(", ") if f in lists else pl.col(f) for f in fields]
    texts = [part.str.strip_chars() for part in parts]
    filled = [pl.when(text != "").then(text) for text in texts]
    return (
        catalog.select(pl.concat_str(filled, separator=". ", ignore_nulls=True))
        .to_series()
        .to_list()
    )


def catalogue_texts(catalog: pl.DataFrame, fields: Sequence[str], num_items: int) -> list[str]:
    """``item_texts`` of a catalogue that has ``num_items`` items; raises ValueError where it has others."""
    if len(catalog) != num_items:
        raise ValueError(f"the catalogue has {len(catalog)} items, expected {num_items}")
    return item_texts(catalog, fields)


def without_texts(told: bool, fields: Sequence[str]) -> str | None:
    """Why a method that reads texts means nothing on some data; None where any is told."""
    return None if told else f"no item has a {' or '.join(fields)}"
