"""Cold and warm groups by worked examples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.groups import (
    GROUP_NAMES,
    ExactUserGroups,
    QuantileGroups,
    extremes,
    shared_count,
)
from datamodules.types import CONTEXT, TEST, TRAIN, VALID, Histories


def make(users: list[list[tuple[int, int]]], num_items: int) -> Histories:
    """Histories from (item, code) pairs of each user."""
    flat = [event for events in users for event in events]
    return Histories(
        offsets=np.concatenate([[0, 0], np.cumsum([len(u) for u in users])]).astype(np.int64),
        items=np.array([i for i, _ in flat], dtype=np.int32),
        split=np.array([c for _, c in flat], dtype=np.int8),
        timestamps=np.zeros(len(flat), dtype=np.int64),
        num_items=num_items,
    )


def ids(marks: np.ndarray) -> list[int]:
    return np.flatnonzero(marks).tolist()


def test_share_of_the_items_with_ties_by_id():
    # Ids 1..10 with counts 3 0 5 0 1 1 9 2 2 2; 35 % of 10 is 3 (rounded down).
    counts = np.array([99, 3, 0, 5, 0, 1, 1, 9, 2, 2, 2])
    cold, warm = extremes(counts, 0.35, "count")
    assert ids(cold) == [2, 4, 5]  # zeros, then the lower id of the two ones
    assert ids(warm) == [1, 3, 7]
    cold, warm = extremes(counts, 0.5, "count")
    # The halves meet among the three twos, which nothing tells apart: those with less, and with more.
    assert ids(cold) == [2, 4, 5, 6]
    assert ids(warm) == [1, 3, 7]


def test_share_of_the_interactions():
    # 20 events, 35 % is 7: from below 0 0 1 1 2 2 (6; one more is 9), from above 8 alone.
    counts = np.array([99, 0, 8, 1, 3, 2, 1, 0, 2, 3])
    cold, warm = extremes(counts, 0.35, "interactions")
    assert ids(cold) == [1, 3, 5, 6, 7, 8]
    assert ids(warm) == [2]
    # 50 % is 10: from below up to a three (9), from above 8 + 3; no three is in either.
    cold, warm = extremes(counts, 0.5, "interactions")
    assert ids(cold) == [1, 3, 5, 6, 7, 8]
    assert ids(warm) == [2]


@pytest.mark.parametrize(
    ("counts", "cold", "warm", "shared"),
    [
        ([3, 3, 3, 3, 3, 3], [], [], 3),  # nothing is colder than anything
        ([0, 0, 0, 0, 0, 0], [], [], 0),
        ([0, 0, 0, 0, 0, 7], [0, 0, 0, 0, 0], [7], 0),  # whatever was never trained on is cold
        ([1, 5, 5, 5, 5, 5], [1], [5, 5, 5, 5, 5], 5),
        ([2, 2, 0, 2, 9, 2], [0], [9], 2),
        ([0, 0, 0, 5, 5, 5], [0, 0], [5, 5], None),  # 35 % of either end
    ],
)
@pytest.mark.parametrize("backwards", [False, True])
def test_a_count_that_both_groups_would_hold_decides_alone(
    counts: list[int], cold: list[int], warm: list[int], shared: int | None, backwards: bool
) -> None:
    given = np.array([99, *(counts[::-1] if backwards else counts)])
    found = extremes(given, 0.35, "count")
    assert [given[marks].tolist() for marks in found] == [cold, warm]  # in any order of the ids
    assert shared_count(given, 0.35, "count") == shared


def test_fractions_are_not_cut_by_float_error():
    counts = np.arange(101)  # 0.29 * 100 is 28.999999999999996 in floats
    assert extremes(counts, 0.29, "count")[0].sum() == 29
    assert ids(extremes(np.array([0, 29, 71]), 0.29, "interactions")[0]) == [1]


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=30),
    st.floats(0.01, 0.5),
    st.sampled_from(["count", "interactions"]),
)
def test_cold_never_meets_warm(counts, fraction, by):
    counts = np.array([0, *counts])
    cold, warm = extremes(counts, fraction, by)
    assert not (cold & warm).any()
    assert not (cold | warm)[0]
    if cold.any() and warm.any():
        assert counts[cold].max() < counts[warm].min()
    if by == "interactions" and counts.sum() and shared_count(counts, fraction, by) is None:
        assert counts[cold].sum() <= fraction * counts.sum() + 1e-9
        assert counts[warm].sum() >= fraction * counts.sum() - 1e-9


# Four users; items 1..6 have 3 2 1 0 0 1 training events, users 1..4 have 4 2 1 0.
HISTORIES = make(
    [
        [(1, TRAIN), (2, TRAIN), (3, TRAIN), (6, TRAIN), (4, VALID), (5, TEST)],
        [(1, TRAIN), (2, TRAIN), (3, VALID), (6, TEST)],
        [(1, TRAIN), (2, VALID), (4, TEST)],
        [(2, CONTEXT), (1, TEST)],
    ],
    num_items=6,
)
USER, TARGET = np.array([1, 2, 3, 4]), np.array([5, 6, 4, 1])


def test_rows_by_target_and_user():
    # 35 % of 6 items: 2 cold (4, 5), 2 warm (1, 2); 35 % of 4 users: 1 cold (4), 1 warm (1).
    groups, names = QuantileGroups()(HISTORIES, USER, TARGET)
    assert names == GROUP_NAMES == ("all", "cold_item", "warm_item", "cold_user", "warm_user")
    assert groups.dtype == bool
    assert groups.astype(int).tolist() == [
        [1, 1, 0, 0, 1],
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 1, 0],
    ]


def test_rows_by_exact_user_events():
    groups, names = ExactUserGroups(events=3)(HISTORIES, USER, TARGET)
    assert names == GROUP_NAMES
    assert groups[:, 3].tolist() == [False, False, True, False]  # three events in all, any code
    assert groups[:, 4].tolist() == [True, True, False, False]  # user 4 has two: neither
    np.testing.assert_array_equal(
        groups[:, :3], QuantileGroups()(HISTORIES, USER, TARGET)[0][:, :3]
    )


def test_no_rows():
    empty = np.array([], dtype=np.int64)
    assert QuantileGroups()(HISTORIES, empty, empty)[0].shape == (0, 5)


def test_sizes():
    assert QuantileGroups().sizes(HISTORIES) == {
        "items": 6,
        "users": 4,
        "cold_item": 2,
        "cold_item_min_events": 0,
        "cold_item_max_events": 0,
        "warm_item": 2,
        "warm_item_min_events": 2,
        "warm_item_max_events": 3,
        "cold_user": 1,
        "cold_user_min_events": 0,
        "cold_user_max_events": 0,
        "warm_user": 1,
        "warm_user_min_events": 4,
        "warm_user_max_events": 4,
    }
    # Four users with one event each; of six items two are cold with none, two warm with one or two.
    alike = QuantileGroups().sizes(make([[(i, TRAIN)] for i in (2, 3, 6, 6)], 6))
    assert (alike["cold_item"], alike["warm_item"]) == (2, 2)
    assert "tied_item" not in alike
    assert (alike["cold_user"], alike["warm_user"]) == (0, 0)
    assert (alike["tied_user"], alike["tied_user_events"]) == (4, 1)
    exact = ExactUserGroups(events=5).sizes(HISTORIES)
    assert exact["cold_user"] == 0
    assert exact["warm_user"] == 1
    assert "cold_user_max_events" not in exact


@pytest.mark.parametrize(
    ("make_groups", "message"),
    [
        (lambda: QuantileGroups(item_fraction=0.6), "item_fraction=0.6"),
        (lambda: QuantileGroups(user_fraction=0), "user_fraction=0"),
        (lambda: QuantileGroups(by="items"), "by='items'"),
        (lambda: ExactUserGroups(events=0), "events=0"),
        (lambda: ExactUserGroups(item_fraction=1), "item_fraction=1"),
    ],
)
def test_bad_arguments(make_groups, message):
    with pytest.raises(ValueError, match=message):
        make_groups()
