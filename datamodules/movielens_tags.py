"""What viewers wrote about films, as the films' descriptions.

Tags of 10m (``tags.dat``) and of the csv releases: a film's description is its distinct tags in lower case,
the most frequent first, equally frequent ones in the file's order, joined by ", ".
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from datamodules.delimited import OnBadRow
from datamodules.text_tables import Dialect, Table, read_cells, read_table

TAGS_CSV, TAGS_DAT = "tags.csv", "tags.dat"
MOST_TAGS = 20  # a film


def read_tags(path: Path, data: bytes) -> Table:
    """``item_id`` and ``tag`` of each row of a file that is called one of the two names."""
    if path.name.removesuffix(".gz") == TAGS_DAT:
        return read_cells(path, data, Dialect("::", quoted=False), 4, {1: "item_id", 2: "tag"})
    return read_table(path, data, Dialect(","), {"movieId": "item_id", "tag": "tag"})


def tag_descriptions(
    path: Path, data: bytes, on_bad_row: OnBadRow
) -> tuple[pl.DataFrame, dict[str, int]]:
    """``item_id`` and ``description`` of each film with a tag; rows left out, by reason.

    A tag of nothing but blanks says nothing: it is left out and counted whatever ``on_bad_row`` is.

    Raises:
        DataFormatError: a missing column, no good row, or a bad row that may not be skipped.
    """
    table = read_tags(path, data)
    table.reject(pl.col("item_id") == "", "empty id", "item_id", "a film's id")
    skipped = table.settle(on_bad_row)
    tag = pl.col("tag").str.to_lowercase().str.replace_all(r"\s+", " ").str.strip_chars()
    rows = table.frame.with_columns(tag)
    said = rows.filter(pl.col("tag") != "")
    if said.height < rows.height:
        skipped[f"{path.name.removesuffix('.gz')}: empty tag"] = rows.height - said.height
    counted = said.group_by("item_id", "tag").agg(times=pl.len(), first=pl.col("line").min())
    ranked = counted.sort("item_id", -pl.col("times").cast(pl.Int64), "first")
    best = ranked.group_by("item_id", maintain_order=True).head(MOST_TAGS)
    joined = best.group_by("item_id", maintain_order=True).agg(
        description=pl.col("tag").str.join(", ")
    )
    return joined, skipped
