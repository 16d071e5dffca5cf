"""Samples of held-out rows, and what training targets are chosen among."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.candidates import training_candidates
from datamodules.movielens import MovieLensDataModule
from datamodules.row_samples import RowSample, some_of, take_rows
from datamodules.types import TEST, TRAIN, VALID, EvalRows, Histories


def rows_of(cold: list[bool], users: list[int]) -> EvalRows:
    count = len(cold)
    groups = np.stack([np.ones(count, bool), np.array(cold), ~np.array(cold)], axis=1)
    number = np.arange(count)
    return EvalRows(
        np.array(users), number, number + 1, groups, ("all", "cold_item", "warm_item"),
        np.ones(count), np.stack([number, number + 1], axis=1),
    )  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(
    cold=st.lists(st.booleans(), min_size=1, max_size=40), count=st.integers(1, 50),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_a_random_sample_and_the_rest_of_a_rare_group(
    cold: list[bool], count: int, seed: int
) -> None:
    rows = rows_of(cold, [1 + i // 2 for i in range(len(cold))])
    found = RowSample(count, ["cold_item"], seed)(rows)
    place = found.position
    assert (np.diff(place) > 0).all()
    assert np.array_equal(found.target, place + 1)
    assert found.candidates is not None
    assert np.array_equal(found.candidates, np.stack([place, place + 1], axis=1))
    drawn = found.groups[:, 0]
    assert drawn.sum() == min(count, len(cold))
    assert np.array_equal(place[drawn], some_of(len(cold), count, seed))
    # All cold rows are in their group; the further ones are in no other.
    assert found.groups[:, 1].sum() == sum(cold)
    was_cold = np.array(cold)[place]
    assert np.array_equal(found.groups[:, 1], was_cold)
    assert np.array_equal(found.groups[:, 2], drawn & ~was_cold)
    for user in set(found.user.tolist()):
        assert found.weight[found.user == user].sum() == pytest.approx(1)


def test_samples_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="at least 1 row"):
        RowSample(0)
    with pytest.raises(ValueError, match="other than all"):
        RowSample(3, ["all"])
    rows = rows_of([True, False], [1, 2])
    with pytest.raises(ValueError, match="no group cold_user"):
        RowSample(1, ["cold_user"])(rows)
    labelled = EvalRows(**{**vars(rows), "label": np.array([True, False])})
    with pytest.raises(ValueError, match="SampledTest"):
        RowSample(1)(labelled)
    assert take_rows(labelled, np.array([1])).label is not None


def test_what_a_test_scores_is_sampled_and_nothing_else(
    tiny_movielens: Path, data_cache: Path
) -> None:
    """A fit selects on all validation rows; a test of validation rows has the sample of them."""
    made = []
    for code in (TEST, VALID):
        data = MovieLensDataModule(
            release="100k", root=str(tiny_movielens), cache=str(data_cache), test_rows=RowSample(7)
        )
        data.test_code = code
        made.append(data)
    tested, validated = made
    assert len(tested.rows(TEST).user) == len(validated.rows(VALID).user) == 7
    assert len(tested.rows(VALID).user) == len(validated.rows(TEST).user) == 60


def test_all_of_few() -> None:
    assert some_of(5, None, 0).tolist() == some_of(5, 7, 0).tolist() == [0, 1, 2, 3, 4]
    draws = [tuple(some_of(20, 5, seed)) for seed in range(20)]
    assert len(set(draws)) > 10
    assert all(len(set(draw)) == 5 and list(draw) == sorted(draw) for draw in draws)


# ---------------------------------------------------------------- training targets


@settings(max_examples=60, deadline=None)
@given(
    trained=st.lists(st.sets(st.integers(1, 15), min_size=1, max_size=8), min_size=1, max_size=5),
    count=st.integers(2, 8), epoch=st.integers(0, 5), seed=st.integers(0, 5),
)  # fmt: skip
def test_a_target_among_items_that_its_user_has_not_trained_on(
    trained: list[set[int]], count: int, epoch: int, seed: int
) -> None:
    own = [sorted(items) for items in trained]
    flat = [i for items in own for i in (*items, 15)]  # a validation event each, which may be drawn
    split = [code for items in own for code in (*([TRAIN] * len(items)), VALID)]
    offsets = np.cumsum([0, 0, *(len(items) + 1 for items in own)])
    held = Histories(
        offsets, np.array(flat, np.int32), np.array(split, np.int8), np.arange(len(flat)), 15
    )
    user = np.arange(1, len(own) + 1)
    target = np.array([items[-1] for items in own])
    found = training_candidates(held, user, target, count, epoch, seed)
    assert found.shape == (len(own), count)
    for row, items in enumerate(own):
        listed = found[row].tolist()
        assert len(set(listed)) == count
        assert set(listed) & set(items) == {target[row]}
        assert 1 <= min(listed) <= max(listed) <= 15
    # The same in any other batch, whatever stands beside it.
    some = np.arange(len(own))[::-2]
    again = training_candidates(held, user[some], target[some], count, epoch, seed)
    assert np.array_equal(again, found[some])


def test_draws_are_new_each_epoch_and_seed_and_fair() -> None:
    held = Histories(
        np.array([0, 0, 1]), np.array([7], np.int32), np.zeros(1, np.int8), np.zeros(1), 20
    )
    user, target = np.ones(1, np.int64), np.full(1, 7)
    both = [(epoch, seed) for epoch in range(40) for seed in range(25)]
    drawn = np.array([training_candidates(held, user, target, 5, *pair)[0] for pair in both])
    assert len({tuple(row) for row in drawn}) > 990
    times = np.bincount(drawn.flatten(), minlength=21)[1:]
    assert times[6] == 1000
    others = np.delete(times, 6)  # 1000 * 4 / 19 = 210.5 each, standard deviation 12.9
    assert abs(others - 210.5).max() < 5 * 12.9
    places = np.bincount((drawn == 7).argmax(1), minlength=5)  # 200 each, standard deviation 12.6
    assert abs(places - 200).max() < 5 * 12.6


def test_too_few_items_to_choose_among() -> None:
    held = Histories(
        np.array([0, 0, 3]), np.array([1, 2, 3], np.int32), np.zeros(3, np.int8), np.zeros(3), 5
    )
    user, target = np.ones(1, np.int64), np.full(1, 3)
    assert sorted(training_candidates(held, user, target, 3, 0, 0)[0].tolist()) == [3, 4, 5]
    with pytest.raises(ValueError, match="ask for at most 3"):
        training_candidates(held, user, target, 4, 0, 0)
