"""The data report: what is in a data set, before and after every filter, and what is doubtful about it."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import polars as pl

from datamodules.filters import FilterStep
from datamodules.splits import split_report
from datamodules.types import Histories, RawData


class _Sizes(Protocol):
    def sizes(self, histories: Histories) -> dict[str, int]: ...


def data_report(
    raw: RawData, steps: list[FilterStep], items: pl.DataFrame, histories: Histories, groups: _Sizes
) -> dict[str, Any]:
    """Plain numbers for ``make data`` (shares are of 1)."""
    events = np.diff(histories.offsets)[1:]  # (U,)
    quantiles = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)
    frame = raw.interactions.frame
    return {
        "raw": {**_counts(frame), "catalogue": raw.catalog.frame.height},
        "skipped": raw.skipped,
        "filters": [_step(s) for s in steps],
        "history_length": {f"{q:.0%}": int(np.quantile(events, q)) for q in quantiles},
        "ratings": _histogram(frame),
        "repeated_pairs": frame.height - frame.select("user_id", "item_id").n_unique(),
        "text": _text_report(items),
        "split": split_report(
            histories.offsets, histories.items, histories.split, histories.timestamps
        ),
        "groups": groups.sizes(histories),
    }


def _counts(frame: pl.DataFrame) -> dict[str, int]:
    return {
        "users": frame["user_id"].n_unique(),
        "items": frame["item_id"].n_unique(),
        "interactions": frame.height,
    }


def _step(step: FilterStep) -> dict[str, Any]:
    return {k: getattr(step, k) for k in step.__dataclass_fields__}


def _histogram(frame: pl.DataFrame) -> dict[str, int]:
    if frame["rating"].null_count() == frame.height:
        return {}
    table = frame.group_by("rating").len().sort("rating")
    return {f"{rating:g}": count for rating, count in table.iter_rows() if rating is not None}


def _text_report(items: pl.DataFrame) -> dict[str, int]:
    titles = items["title"].drop_nulls()
    categories = items["categories"].list.len().fill_null(0)
    return {
        "items": items.height,
        "without title": items["title"].null_count(),
        "sharing a title": int(titles.len() - titles.n_unique()),
        "without description": items["description"].null_count(),
        "without categories": int((categories == 0).sum()),
        "without image": int((items["images"].list.len().fill_null(0) == 0).sum()),
    }
