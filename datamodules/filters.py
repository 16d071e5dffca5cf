"""Filters of raw interactions: what is left out before ids are given, and how much that removes.

A filter maps a frame with the columns of ``INTERACTION_SCHEMA`` to one with fewer rows, in the
same order. ``apply_filters`` runs a list of them and counts users, items and interactions around
every step for the data report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import polars as pl

Keep = Literal["first", "last"]


class Filter(Protocol):
    """Anything that drops rows of a frame of raw interactions and can say what it does."""

    def __call__(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The rows that stay, in the order they came."""
        ...

    def describe(self) -> str:
        """One short line for the data report."""
        ...


@dataclass(frozen=True)
class FilterStep:
    """What one filter did: its description and the counts around it (see ``count``)."""

    description: str
    before: dict[str, int]
    after: dict[str, int]


@dataclass(frozen=True)
class KCore:
    """Keep users with at least ``user`` and items with at least ``item`` interactions.

    ``iterative`` repeats until nothing more falls out, so that the result holds both minima (a true
    k-core). Otherwise both counts are taken once, on the input, and both conditions are applied
    together: users and items may then end below their minimum, as in the A-LLMRec release.
    Repeated (user, item) rows count as often as they occur: put ``Dedup`` first if they should not.

    Raises:
        ValueError: a minimum is negative.
    """

    user: int = 0
    item: int = 0
    iterative: bool = True

    def __post_init__(self) -> None:
        if self.user < 0 or self.item < 0:
            raise ValueError(
                f"KCore got user={self.user}, item={self.item}; minimum counts must be 0 "
                "(no minimum) or more."
            )

    def __call__(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The rows whose user and item both have enough interactions."""
        # Integer codes: the passes below group the same columns again and again.
        rows = frame.select(
            user=pl.col("user_id").cast(pl.Categorical).to_physical(),
            item=pl.col("item_id").cast(pl.Categorical).to_physical(),
        ).with_row_index("row")
        enough = (pl.len().over("user") >= self.user) & (pl.len().over("item") >= self.item)
        while True:
            kept = rows.filter(enough)
            if not self.iterative or kept.height == rows.height:
                return frame[kept["row"]]
            rows = kept

    def describe(self) -> str:
        """For example ``k-core: users >= 5, items >= 5, repeated to a fixed point``."""
        how = "repeated to a fixed point" if self.iterative else "one pass"
        return f"k-core: users >= {self.user}, items >= {self.item}, {how}"


@dataclass(frozen=True)
class MinRating:
    """Keep interactions rated at least ``minimum``.

    Raises:
        ValueError: on a call, when a rating is missing.
    """

    minimum: float

    def __call__(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The rows with ``rating >= minimum``."""
        rating = frame["rating"]
        missing = rating.null_count() + int(rating.is_nan().sum())
        if missing:
            raise ValueError(
                f"MinRating(minimum={self.minimum}) needs a rating in every interaction, but "
                f"{missing} of {frame.height} have none; leave this filter out for data without "
                "ratings, or let the parser skip those rows."
            )
        return frame.filter(pl.col("rating") >= self.minimum)

    def describe(self) -> str:
        """For example ``rating >= 4``."""
        return f"rating >= {self.minimum:g}"


@dataclass(frozen=True)
class Dedup:
    """Keep one interaction of each repeated (user, item) pair: the ``first`` or ``last`` in time.

    Ties in time, and data without timestamps, follow the file's order.

    Raises:
        ValueError: ``keep`` is neither name; on a call, when only some timestamps are missing.
    """

    keep: Keep = "first"

    def __post_init__(self) -> None:
        if self.keep not in get_args(Keep):
            raise ValueError(f"Dedup got keep={self.keep!r}; give 'first' or 'last'.")

    def __call__(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The kept rows, in the order they came."""
        missing = frame["timestamp"].null_count()
        if 0 < missing < frame.height:
            raise ValueError(
                f"Dedup(keep={self.keep!r}) needs timestamps in all interactions or in none, but "
                f"{missing} of {frame.height} have none; let the parser skip those rows."
            )
        rows = frame.select("user_id", "item_id", "timestamp").with_row_index("row")
        in_time = rows.sort("timestamp", maintain_order=True)
        kept = in_time.unique(["user_id", "item_id"], keep=self.keep, maintain_order=True)
        return frame[kept["row"].sort()]

    def describe(self) -> str:
        """For example ``first of repeated (user, item)``."""
        return f"{self.keep} of repeated (user, item)"


def count(frame: pl.DataFrame) -> dict[str, int]:
    """Distinct ``users``, distinct ``items`` and ``interactions`` (rows) of a frame."""
    return {
        "users": frame["user_id"].n_unique(),
        "items": frame["item_id"].n_unique(),
        "interactions": frame.height,
    }


def apply_filters(
    frame: pl.DataFrame, filters: Sequence[Filter]
) -> tuple[pl.DataFrame, list[FilterStep]]:
    """Run ``filters`` one after the other and count what each leaves.

    Raises:
        ValueError: nothing was given, or a filter left nothing (its description is named).
    """
    if frame.is_empty():
        raise ValueError(
            "The filters were given no interactions; check the parser's report of skipped rows."
        )
    steps: list[FilterStep] = []
    before = count(frame)
    for each in filters:
        frame = each(frame)
        after = count(frame)
        if not after["interactions"]:
            raise ValueError(
                f"The filter '{each.describe()}' removed all {before['interactions']} "
                f"interactions ({before['users']} users, {before['items']} items) that it was "
                "given; loosen it or leave it out."
            )
        steps.append(FilterStep(each.describe(), before, after))
        before = after
    return frame, steps
