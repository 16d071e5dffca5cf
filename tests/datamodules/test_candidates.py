"""Candidates: contracts on random histories, exact draw probabilities, and the stored file."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.candidates import (
    PopularityCandidates,
    UniformCandidates,
    draw_candidates,
)
from datamodules.types import CONTEXT, TEST, TRAIN, VALID, Histories


def make(users: list[list[int]], num_items: int, code: int = TRAIN) -> Histories:
    """Histories of these item sequences, all events with one code but the last (TEST)."""
    codes = [c for items in users for c in [code] * (len(items) - 1) + [TEST]]
    return Histories(
        offsets=np.concatenate([[0, 0], np.cumsum([len(u) for u in users])]).astype(np.int64),
        items=np.array([i for items in users for i in items], dtype=np.int32),
        split=np.array(codes, dtype=np.int8),
        timestamps=np.zeros(len(codes), dtype=np.int64),
        num_items=num_items,
    )


def last_items(users: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(1, len(users) + 1), np.array([items[-1] for items in users])


USERS = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=6), min_size=1, max_size=6)


@settings(max_examples=80, deadline=None)
@given(USERS, st.integers(1, 8), st.sampled_from([TRAIN, VALID, CONTEXT]), st.integers(0, 9))
def test_uniform_rows_hold_the_target_and_unseen_items(users, count, code, seed):
    # 14 items and at most 6 seen: count = 8 may ask for every item that is left.
    histories = make(users, 14, code)
    user, target = last_items(users)
    table = UniformCandidates(count, seed).draw(histories, user, target, TEST)
    assert table.shape == (len(users), count + 1)
    assert table.dtype == np.int32
    for row, items in zip(table.tolist(), users, strict=True):
        assert row.count(items[-1]) == 1
        negatives = set(row) - {items[-1]}
        assert len(negatives) == count  # no repeats
        assert not negatives & set(items)
        assert negatives <= set(range(1, 15))


@settings(max_examples=40, deadline=None)
@given(USERS, st.integers(0, 9))
def test_popularity_draws_only_trained_items(users, seed):
    # A last user trains on items 13..18, which nobody else has: six items to draw for all others.
    users = [*users, [13, 14, 15, 16, 17, 18, 19]]
    histories = make(users, 25)
    user, target = (part[:-1] for part in last_items(users))
    table = PopularityCandidates(6, seed).draw(histories, user, target, TEST)
    trained = set(np.flatnonzero(histories.train_counts()).tolist())
    for row, items in zip(table.tolist(), users, strict=False):
        negatives = set(row) - {items[-1]}
        assert len(negatives) == 6
        assert negatives <= trained - set(items)


@pytest.mark.parametrize("draw", [UniformCandidates(5, 3), PopularityCandidates(5, 3)])
def test_a_row_depends_on_no_other_row(draw):
    rng = np.random.default_rng(0)
    users = [rng.permutation(40)[:6].tolist() for _ in range(60)]
    users = [[i + 1 for i in items] for items in users]
    histories = make(users, 40)
    user, target = last_items(users)
    whole = draw.draw(histories, user, target, TEST)
    some = rng.permutation(60)[:17]
    np.testing.assert_array_equal(draw.draw(histories, user[some], target[some], TEST), whole[some])
    assert (draw.draw(histories, user, target, VALID) != whole).any()
    assert (replace(draw, seed=4).draw(histories, user, target, TEST) != whole).any()


def first_draws(weights: list[int], rows: int, count: int) -> np.ndarray:
    """(rows, count + 1) candidates of users without history but target 1, which has no weight."""
    users = [[1]] * rows
    user, target = last_items(users)
    histories = make(users, len(weights))
    return draw_candidates(histories, user, target, np.array([0, *weights]), count, TEST, 0)


@pytest.mark.parametrize(
    "weights",
    [
        [0, 1, 1, 1, 1],
        [0, 5, 3, 2, 1],
        [0, 10_000, 1, 2, 1],  # rejection cannot fill these rows: the race has to finish them
    ],
)
def test_pairs_come_with_the_probabilities_of_successive_draws(weights):
    rows, total = 20_000, sum(weights)
    table = first_draws(weights, rows, 2)
    pairs = [frozenset(r) - {1} for r in map(frozenset, table.tolist())]
    chi_square = 0.0
    for a, b in itertools.combinations(range(2, 6), 2):
        wa, wb = weights[a - 1], weights[b - 1]
        chance = wa / total * wb / (total - wa) + wb / total * wa / (total - wb)
        observed = sum(p == {a, b} for p in pairs)
        if rows * chance < 5:  # too rare for chi-square: P(Poisson(5) > 20) is below 1e-6
            assert observed < 20
        else:
            chi_square += (observed - rows * chance) ** 2 / (rows * chance)
    assert chi_square < 20.52  # 99.9 % quantile, at most 5 degrees of freedom


def test_the_target_stands_anywhere():
    table = first_draws([0, 1, 1, 1, 1], 20_000, 3)
    places = np.bincount(np.argmax(table == 1, axis=1), minlength=4)
    chi_square = ((places - 5000) ** 2 / 5000).sum()
    assert chi_square < 16.27  # 99.9 % quantile, 3 degrees of freedom


def test_too_few_items_is_an_error_with_numbers():
    histories = make([[1], [1, 2, 3, 3]], 6)
    user, target = np.array([1, 2]), np.array([1, 3])
    message = r"4 negatives.*user 2 has a history with 3 of the 6 items.*leaves 3 \(1 of 2 rows"
    with pytest.raises(ValueError, match=message):
        UniformCandidates(4).draw(histories, user, target, TEST)
    assert UniformCandidates(3).draw(histories, user, target, TEST).shape == (2, 4)
    # Trained are 1, 2, 3 (user 2's first three events): user 1 can be asked about 2 and 3 only.
    with pytest.raises(ValueError, match=r"user 1 has a history with 1 of the 3 items"):
        PopularityCandidates(3).draw(histories, user[:1], target[:1], TEST)


def test_no_rows():
    empty = np.array([], dtype=np.int64)
    assert UniformCandidates(3).draw(make([[1, 2]], 9), empty, empty, TEST).shape == (0, 4)


def test_bad_count():
    with pytest.raises(ValueError, match="count=0"):
        UniformCandidates(0)
    with pytest.raises(ValueError, match="count=-1"):
        PopularityCandidates(-1)
