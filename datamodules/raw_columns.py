"""Columns of raw interactions as arrays that filters can work on: id codes, ratings, times.

Ids are strings or ``pl.Categorical``; what is missing where it is needed ends in a clear error.

Legend: N interactions (rows), D distinct ids.
"""

from __future__ import annotations

import numpy as np
import polars as pl


def id_codes(ids: pl.Series) -> np.ndarray:
    """(N,) int32: a whole number for each raw id, from 0 to D - 1 in no stated order."""
    if ids.dtype != pl.Categorical:
        # Grouped rows are twice as fast as a join with the distinct ids, or a cast to categories.
        groups = ids.to_frame("id").with_row_index("row").group_by("id").agg("row")
        rows = groups.select("row").with_row_index("code").explode("row")
        codes = np.empty(len(ids), np.int32)
        codes[rows["row"].to_numpy()] = rows["code"].to_numpy()
        return codes
    # Categories are shared by columns and frames: their numbers have holes here.
    number = ids.to_physical().to_numpy()
    return (np.cumsum(np.bincount(number) > 0, dtype=np.int32) - 1)[number]


def pair_codes(user: np.ndarray, item: np.ndarray) -> np.ndarray:
    """(N,) int64: one number for each (user code, item code), ordered by user, then item."""
    return user.astype(np.int64) * (int(item.max(initial=0)) + 1) + item


def occurs_again(numbers: pl.Series) -> pl.Series:
    """(N,) whether each number is there more than once: by sorting, six times as fast where few are."""
    ordered = np.sort(numbers.to_numpy())
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(again) > len(ordered) // 4:
        return numbers.is_duplicated()
    return numbers.is_in(pl.Series(again).implode())


def full_ratings(frame: pl.DataFrame, asked_by: str) -> pl.Series:
    """(N,) ratings, none of them missing.

    Raises:
        ValueError: some are; the message names ``asked_by``.
    """
    rating = frame["rating"]
    missing = rating.null_count() + int(rating.is_nan().sum())
    if missing:
        raise ValueError(
            f"{asked_by} needs a rating in every interaction, but {missing} of {frame.height} have "
            "none; leave it out for data without ratings, or let the parser skip those rows."
        )
    return rating


def times_or_none(frame: pl.DataFrame, asked_by: str) -> np.ndarray | None:
    """(N,) int64 seconds, or None where no interaction has a time.

    Raises:
        ValueError: only some have; the message names ``asked_by``.
    """
    missing = frame["timestamp"].null_count()
    if 0 < missing < frame.height:
        raise ValueError(
            f"{asked_by} needs timestamps in all interactions or in none, but {missing} of "
            f"{frame.height} have none; let the parser skip those rows."
        )
    return None if missing else frame["timestamp"].to_numpy()
