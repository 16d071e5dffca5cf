"""The data report: what is in a data set, before and after every filter, and what is doubtful about it."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from datamodules.examples import ExampleTable
from datamodules.filters import FilterStep, count
from datamodules.parsed import Parsed
from datamodules.raw_columns import id_codes, pair_codes
from datamodules.samplers import distinct
from datamodules.splits import split_report
from datamodules.types import SPLIT_NAMES, TEST, TRAIN, VALID, Histories


def data_report(
    frame: pl.DataFrame,
    raw: Parsed,
    steps: list[FilterStep],
    items: pl.DataFrame,
    histories: Histories,
    groups: dict[str, int],
) -> dict[str, Any]:
    """Plain numbers for ``make data`` (shares are of 1).

    Args:
        frame: all rows of the release, before any filter.
        raw: what else its parser said.
        steps: what the filters did.
        items: the catalogue that is left, in internal order.
        histories: the events that are left.
        groups: how large the cold and warm groups are.
    """
    events = np.diff(histories.offsets)[1:]  # (U,)
    quantiles = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)
    pairs = pair_codes(id_codes(frame["user_id"]), id_codes(frame["item_id"]))  # (N,)
    catalogue = raw.catalog().select(pl.len()).collect().item()
    return {
        "raw": {**count(frame), "catalogue": catalogue},
        "skipped": raw.note["skipped"],
        "filters": [_step(s) for s in steps],
        "history_length": {f"{q:.0%}": int(np.quantile(events, q)) for q in quantiles},
        "ratings": _histogram(frame),
        "repeated_pairs": int((np.diff(np.sort(pairs)) == 0).sum()),
        "text": _text_report(items),
        "split": split_report(
            histories.offsets, histories.items, histories.split, histories.timestamps
        ),
        "groups": groups,
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
        "whose title an earlier item has": int(titles.len() - titles.n_unique()),
        "without description": items["description"].null_count(),
        "without categories": int((categories == 0).sum()),
        "without image address": int((items["images"].list.len().fill_null(0) == 0).sum()),
    }


def examples_report(
    table: ExampleTable, histories: Histories, liked_above: float | None
) -> dict[str, Any]:
    """Per code: examples, users, share of likes, share of histories without a like."""
    report: dict[str, dict[str, float]] = {}
    for code in (TRAIN, VALID, TEST):
        part = table.take(table.code == code)
        if not len(part):
            continue
        report[SPLIT_NAMES[code]] = {
            "examples": len(part),
            "users": len(distinct(part.user)),
            "liked": float(part.label.mean()),
        }
        if liked_above is not None and histories.ratings is not None:
            likes = np.concatenate([[0], np.cumsum(histories.ratings > liked_above)])
            without = likes[part.stop] == likes[part.start]
            report[SPLIT_NAMES[code]]["histories without a like"] = float(without.mean())
    return report
