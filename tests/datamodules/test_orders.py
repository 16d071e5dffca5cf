"""Orders of histories other than time."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.orders import PopularLast

HISTORIES = st.lists(st.lists(st.integers(1, 8), max_size=9), max_size=6)


def arranged(histories: list[list[int]], order: PopularLast) -> list[list[int]]:
    """Old places within each user, in the new order; users 1..U, 0 is padding."""
    lengths = [0, *map(len, histories)]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    items = np.array([i for h in histories for i in h], np.int32)
    found = order(offsets, items)
    assert sorted(found.tolist()) == list(range(len(items)))
    return [(found[a:b] - a).tolist() for a, b in pairwise(offsets[1:])]


@given(HISTORIES, st.integers(1, 4), st.sampled_from(["time", "frequency"]))
def test_the_most_popular_items_come_last(histories: list[list[int]], count: int, by: str) -> None:
    frequency = Counter(i for h in histories for i in h)
    found = arranged(histories, PopularLast(count, by))  # type: ignore[arg-type]
    for history, places in zip(histories, found, strict=True):
        ranked = sorted(
            dict.fromkeys(history), key=lambda i: -frequency[i]
        )  # stable: first seen wins
        best = ranked[:count]
        hidden = [n for n, item in enumerate(history) if item not in best]
        shown = [n for n, item in enumerate(history) if item in best]
        if by == "frequency":
            shown.sort(key=lambda n: best.index(history[n]))
        assert places == hidden + shown


def test_by_hand() -> None:
    # Item 1 has three events, 2 and 3 have two each, 4 has one.
    histories = [[4, 2, 3, 2, 1], [3, 1], [1]]
    assert arranged(histories, PopularLast(2)) == [[0, 2, 1, 3, 4], [0, 1], [0]]
    assert arranged(histories, PopularLast(2, "frequency")) == [[0, 2, 4, 1, 3], [1, 0], [0]]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="count=0"):
        PopularLast(0)
    with pytest.raises(ValueError, match="by='size'"):
        PopularLast(3, "size")  # type: ignore[arg-type]
