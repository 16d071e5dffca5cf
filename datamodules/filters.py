"""Filters of raw interactions: what is left out before ids are given, and how much that removes.

A filter maps a frame with the columns of ``INTERACTION_SCHEMA`` to one with fewer rows, in the
same order; ids are strings or ``pl.Categorical``, which never changes the rows that stay.
``apply_filters`` runs a list of them and counts users, items and interactions around every step for
the data report. Filters that only make a data set smaller: ``reductions.py``, ``sample_ids.py``.

Legend: N interactions (rows), D distinct ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
import polars as pl

from datamodules.raw_columns import full_ratings, id_codes, occurs_again, pair_codes, times_or_none

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
    With ``count_from`` only rows rated so high are counted, but rows of every rating stay where both
    counts suffice (A-LLMRec's Beauty and Toys count from 3, in one pass).
    Repeated (user, item) rows count as often as they occur: put ``Dedup`` first if they should not.

    Raises:
        ValueError: a minimum is negative; on a call with ``count_from``, when a rating is missing.
    """

    user: int = 0
    item: int = 0
    iterative: bool = True
    count_from: float | None = None

    def __post_init__(self) -> None:
        if self.user < 0 or self.item < 0:
            raise ValueError(
                f"KCore got user={self.user}, item={self.item}; minimum counts must be 0 "
                "(no minimum) or more."
            )

    def __call__(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The rows whose user and item both have enough interactions."""
        counted = None
        if self.count_from is not None:
            rating = full_ratings(frame, f"KCore(count_from={self.count_from:g})")
            counted = (rating >= self.count_from).to_numpy()
        stays = self._stays(id_codes(frame["user_id"]), id_codes(frame["item_id"]), counted)
        return frame.filter(pl.Series(stays))

    def _stays(self, user: np.ndarray, item: np.ndarray, counted: np.ndarray | None) -> np.ndarray:
        """(N,) bool: the rows that stay; ``counted`` (N,) bool says which count, None: all do."""
        alive = np.ones(len(user), dtype=bool)
        users, items = _tally(user, counted), _tally(item, counted)  # (D,) each
        while True:
            falls = (users < self.user)[user] | (items < self.item)[item]
            stays, gone = ~falls, np.flatnonzero(falls)
            alive[alive] = stays
            if not self.iterative or not len(gone):
                return alive
            # Only what fell is counted again: late passes drop a few rows of millions.
            fell = None if counted is None else counted[gone]
            users -= _tally(user[gone], fell, len(users))
            items -= _tally(item[gone], fell, len(items))
            user, item = user[stays], item[stays]
            counted = None if counted is None else counted[stays]

    def describe(self) -> str:
        """For example ``k-core: users >= 5, items >= 5, repeated to a fixed point``."""
        how = "repeated to a fixed point" if self.iterative else "one pass"
        from_ = "" if self.count_from is None else f", counting ratings >= {self.count_from:g}"
        return f"k-core: users >= {self.user}, items >= {self.item}, {how}{from_}"


@dataclass(frozen=True)
class MinRating:
    """Keep interactions rated at least ``minimum``.

    Raises:
        ValueError: on a call, when a rating is missing.
    """

    minimum: float

    def __call__(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The rows with ``rating >= minimum``."""
        return frame.filter(
            full_ratings(frame, f"MinRating(minimum={self.minimum:g})") >= self.minimum
        )

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
        time = times_or_none(frame, f"Dedup(keep={self.keep!r})")
        pair = pl.Series(pair_codes(id_codes(frame["user_id"]), id_codes(frame["item_id"])))
        repeated = occurs_again(pair)  # few rows are: only those are sorted
        row = repeated.arg_true().to_numpy()
        if time is not None:
            row = row[np.argsort(time[row], kind="stable")]
        in_time = pl.DataFrame({"pair": pair.gather(row), "row": row})
        kept = in_time.unique("pair", keep=self.keep, maintain_order=True)["row"].to_numpy()
        return frame.filter(~repeated | _mask(kept, frame.height))

    def describe(self) -> str:
        """For example ``first of repeated (user, item)``."""
        return f"{self.keep} of repeated (user, item)"


def _tally(codes: np.ndarray, counted: np.ndarray | None, size: int | None = None) -> np.ndarray:
    """(D,) int64: how often each code occurs where ``counted``."""
    if size is None:
        size = int(codes.max(initial=-1)) + 1
    return np.bincount(codes if counted is None else codes[counted], minlength=size)


def _mask(rows: np.ndarray, size: int) -> pl.Series:
    """(N,) bool: True at the numbered rows."""
    mask = np.zeros(size, dtype=bool)
    mask[rows] = True
    return pl.Series(mask)


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
