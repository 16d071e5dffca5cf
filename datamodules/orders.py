"""Other orders of a history than time, for papers whose code had one.

Legend: U users, N events, I items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np

By = Literal["time", "frequency"]


class Order(Protocol):
    """Puts each user's events, which come in order of time, into another order."""

    def __call__(self, offsets: np.ndarray, items: np.ndarray) -> np.ndarray:
        """(N,) int64: for each new place the old one; users stay where they are."""
        ...


@dataclass(frozen=True)
class PopularLast:
    """Each user's ``count`` items with most events in the data come last, all other events before them.

    With a history of ``count - 1`` items only they are seen and asked about, while the catalogue and what
    counts as the user's own items stay whole. It is the protocol quirk of MLLM-MSR's released code
    (arXiv 2408.09698): targets become popular items, which a popularity scorer alone ranks well.

    ``by``: the last events are in order of ``time``, as for MicroLens, or of ``frequency``, the most frequent
    first, as in the code for Amazon, where the target is the least popular of them. Of equally frequent items
    the one that comes first in time wins; an item that a user has repeatedly takes one place with all its
    events.

    Raises:
        ValueError: ``count`` below 1, or an unknown ``by``.
    """

    count: int
    by: By = "time"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"PopularLast got count={self.count}; expected 1 or more.")
        if self.by not in get_args(By):
            raise ValueError(f"PopularLast got by={self.by!r}; give 'time' or 'frequency'.")

    def __call__(self, offsets: np.ndarray, items: np.ndarray) -> np.ndarray:
        """(N,) int64 old places."""
        place = np.arange(len(items))
        user = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))  # (N,)
        frequency = np.bincount(items)  # (I + 1,)
        pair = user.astype(np.int64) * (len(frequency) + 1) + items
        by_pair = np.argsort(pair, kind="stable")  # a pair's events side by side, in time
        begins = np.flatnonzero(np.diff(pair[by_pair], prepend=-1))  # (P,) of each pair
        first = by_pair[begins]
        ranked = np.lexsort((first, -frequency[items[first]], user[first]))  # (P,) best pairs first
        owner = user[first][ranked]
        starts = np.flatnonzero(np.diff(owner, prepend=-1))
        nth = np.empty(len(first), np.int64)  # (P,) rank of a pair among its user's
        nth[ranked] = np.arange(len(owner)) - np.repeat(starts, np.diff(starts, append=len(owner)))
        rank = np.empty(len(items), np.int64)  # (N,) of each event's pair
        rank[by_pair] = np.repeat(nth, np.diff(begins, append=len(items)))
        shown = rank < self.count
        within = np.where(shown, rank, 0) if self.by == "frequency" else np.zeros_like(rank)
        return np.lexsort((place, within, shown, user))
