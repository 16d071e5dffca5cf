"""Get one category of an Amazon release and parse it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import polars as pl

from datamodules.amazon_metadata import read_metadata
from datamodules.amazon_releases import fetch_file, find_release
from datamodules.amazon_reviews import Duplicates, Reviews, read_reviews
from datamodules.delimited import OnBadRow
from datamodules.errors import each_or_all_errors
from datamodules.types import CATALOG_SCHEMA, Catalog, Interactions, RawData


def load_amazon(
    release: int,
    category: str,
    reviews: str,
    root: str | Path | None,
    cache: Path,
    on_bad_row: OnBadRow = "error",
    metadata: bool = True,
    duplicates: Duplicates = "drop",
) -> RawData:
    """One category: its events, and what the metadata say of the items that have one.

    Args:
        release: 2014, 2018 or 2023.
        category: a name of that release; blanks, ``&`` and other case are understood.
        reviews: ``"5core"``, ``"full"`` or ``"ratings"`` (every rating, without text).
        root: a folder with the raw files; None = fetch them.
        cache: where fetched files are kept (``sources.cache_root()``).
        on_bad_row: ``"error"``, or ``"skip"`` to leave bad rows out and count them in ``skipped``.
        metadata: False leaves the metadata file alone: every item is without text.
        duplicates: ``"drop"`` leaves out lines that repeat an earlier one in every byte, ``"keep"`` not.

    Raises:
        ValueError: an unknown release, category or choice.
        DataSourceError: a file could not be had; the message says which one to put where.
        DataFormatError: a file is not in its format.
    """
    known = find_release(release)
    name = known.category(category)
    layout = known.kind(reviews)[1]
    place = None if root is None else Path(root).expanduser()
    # Both files first: nothing is parsed for minutes only to find that the second is missing.
    files = each_or_all_errors(
        partial(fetch_file, known, kind, name, place, cache)
        for kind in (reviews, *(("metadata",) if metadata else ()))
    )
    events_file, source = files[0]
    events = read_reviews(events_file, layout, on_bad_row, duplicates)
    raw = RawData(
        interactions=Interactions(events.frame),
        catalog=Catalog(pl.DataFrame(schema=CATALOG_SCHEMA)),
        skipped=events.counts | (_below_five(events.frame) if reviews == "5core" else {}),
        checksums={_stem(events_file): events.sha256},
        source=f"Amazon {known.year} {name} ({reviews}) from {source}",
    )
    return _with_items(raw, events, files[1][0] if metadata else None, known.year, on_bad_row)


def _with_items(
    raw: RawData, events: Reviews, file: Path | None, year: int, on_bad_row: OnBadRow
) -> RawData:
    """Adds the catalogue: items of the metadata, then reviewed items without any (all null)."""
    reviewed = events.frame["item_id"].unique(maintain_order=True).cast(pl.String)
    known, counts, checksums = raw.catalog.frame, {}, {}
    if file is not None:
        items = read_metadata(file, year, reviewed, on_bad_row)
        known, counts, checksums = items.frame, items.counts, {_stem(file): items.sha256}
    bare = reviewed.to_frame("item_id").join(known, on="item_id", how="anti", maintain_order="left")
    whole = pl.concat([known, bare], how="diagonal")
    untitled = known["title"].null_count()
    found = {
        "kept: items without metadata": bare.height,
        "kept: items with metadata, without a usable title": untitled,
    }
    return replace(
        raw,
        catalog=Catalog(whole),
        skipped=raw.skipped | counts | {what: n for what, n in found.items() if n},
        checksums=raw.checksums | checksums,
    )


def _below_five(events: pl.DataFrame) -> dict[str, int]:
    """How far a "5-core" file is from its name, once duplicate lines are gone."""
    few = {
        f"kept: {column.removesuffix('_id')}s with fewer than 5 events": events.group_by(column)
        .len()
        .filter(pl.col("len") < 5)
        .height
        for column in ("user_id", "item_id")
    }
    return {what: n for what, n in few.items() if n}


def _stem(file: Path) -> str:
    return file.name.removesuffix(".gz")
