"""Samplers: counter-based randomness, negatives, and batches that are the same on any launch."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules import samplers
from datamodules.samplers import (
    EvalBatchSampler,
    GlobalBatchSampler,
    contains,
    event_keys,
    hashed_integers,
    hashed_order,
    sample_negatives,
    train_keys,
)
from datamodules.types import CONTEXT, TEST, TRAIN, Histories

MASK = 2**64 - 1


def make(sequences: list[list[int]], num_items: int, codes: list[list[int]] | None = None):
    codes = codes or [[TRAIN] * len(s) for s in sequences]
    flat = [i for s in sequences for i in s]
    offsets = np.concatenate([[0, 0], np.cumsum([len(s) for s in sequences])])
    return Histories(
        offsets=offsets.astype(np.int64),
        items=np.array(flat, dtype=np.int32),
        split=np.array([c for s in codes for c in s], dtype=np.int8),
        timestamps=np.zeros(len(flat), dtype=np.int64),
        num_items=num_items,
    )


def split_mix(state: int) -> int:
    """The published algorithm on Python's unbounded integers."""
    state = (state + 0x9E3779B97F4A7C15) & MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def test_the_mixer_is_split_mix_64():
    # First output for seed 1234567: the test vector published with the algorithm.
    assert split_mix(1234567) == 6457827717110365317
    assert int(samplers._mix(np.array([1234567], dtype=np.uint64))[0]) == 6457827717110365317


@given(st.integers(-(2**70), 2**70), st.lists(st.integers(-(2**62), 2**62), max_size=4))
def test_hashed_integers_follow_the_definition(seed, keys):
    state = split_mix(seed & MASK)
    for key in keys:
        state = split_mix(state ^ (key & MASK))
    drawn = hashed_integers(1000, *keys, seed=seed)
    assert drawn.shape == ()
    assert int(drawn) == state % 1000


def test_hashed_integers_broadcast_and_depend_on_every_key():
    rows, columns = np.arange(3)[:, None], np.arange(4)
    grid = hashed_integers(2**60, rows, columns, seed=7)
    assert grid.shape == (3, 4)
    assert grid[2, 1] == hashed_integers(2**60, 2, 1, seed=7)
    assert len(np.unique(grid)) == 12  # a collision has probability below 1e-16
    bounds = np.array([1, 2, 3, 4])
    assert (hashed_integers(bounds, rows, seed=7) < bounds).all()
    assert grid[0, 0] != hashed_integers(2**60, 0, 0, seed=8)


def test_hashed_integers_are_uniform():
    drawn = hashed_integers(10, np.arange(300)[:, None], np.arange(1000), seed=3)
    counts = np.bincount(drawn.ravel(), minlength=10)
    chi_square = ((counts - 30_000) ** 2 / 30_000).sum()
    assert chi_square < 27.88  # 99.9 % quantile of chi-square with 9 degrees of freedom


def test_hashed_order_is_a_permutation_of_its_own():
    assert sorted(hashed_order(50, 1, seed=0)) == list(range(50))
    assert not np.array_equal(hashed_order(50, 1, seed=0), hashed_order(50, 2, seed=0))


@given(st.lists(st.integers(0, 30)), st.lists(st.integers(-5, 40)))
def test_contains_is_membership(keys, wanted):
    found = contains(np.unique(np.array(keys, dtype=np.int64)), np.array(wanted, dtype=np.int64))
    assert found.tolist() == [w in keys for w in wanted]


def test_event_keys_by_code():
    histories = make([[2, 2, 1], [3]], 4, [[TRAIN, TEST, TEST], [CONTEXT]])
    assert event_keys(histories).tolist() == [6, 7, 13]  # user * 5 + item
    assert event_keys(histories, TEST).tolist() == [6, 7]


def test_train_keys_live_as_long_as_their_histories():
    histories = make([[1]], 2)
    assert train_keys(histories) is train_keys(histories)
    name = id(histories)
    assert name in samplers._TRAIN_KEYS
    del histories
    gc.collect()
    assert name not in samplers._TRAIN_KEYS


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 6), max_size=8), min_size=1, max_size=4),
    st.integers(0, 5),
    st.integers(0, 3),
)
def test_negatives_are_never_trained_on(sequences, seed, epoch):
    histories = make(sequences, 7)  # item 7 is always free
    user = np.arange(1, len(sequences) + 1)
    negatives = sample_negatives(histories, user, epoch, seed, (3, 5))
    assert negatives.shape == (len(user), 3, 5)
    assert negatives.min() >= 1
    assert negatives.max() <= 7
    for row, sequence in zip(negatives, sequences, strict=True):
        assert not set(row.ravel().tolist()) & set(sequence)


def test_negatives_depend_on_user_position_and_draw_only():
    histories = make([[1, 2], [3], [4, 5, 6]], 8)  # few items: many are drawn again
    whole = sample_negatives(histories, np.array([1, 2, 3]), 4, 0, (6, 8))
    part = sample_negatives(histories, np.array([3, 1]), 4, 0, (2, 5))
    np.testing.assert_array_equal(part, whole[[2, 0], :2, :5])
    assert (sample_negatives(histories, np.array([1, 2, 3]), 5, 0, (6, 8)) != whole).any()
    assert (sample_negatives(histories, np.array([1, 2, 3]), 4, 1, (6, 8)) != whole).any()


def test_negatives_belong_to_a_place_in_the_history_whatever_the_window():
    histories = make([[1, 2, 3, 4], [5, 6]], 40)
    whole = sample_negatives(histories, np.array([1]), 3, 0, (6, 5))
    cut = sample_negatives(histories, np.array([1, 1]), 3, 0, (3, 5), begins=np.array([0, 3]))
    np.testing.assert_array_equal(cut[0], whole[0, :3])
    np.testing.assert_array_equal(cut[1], whole[0, 3:])
    assert (cut[0] != cut[1]).any()


def test_negatives_are_uniform_and_may_be_held_out_items():
    # The user trained on 1..4 and is tested on 5: the six others are equally likely.
    histories = make([[1, 2, 3, 4, 5]], 10, [[TRAIN] * 4 + [TEST]])
    drawn = sample_negatives(histories, np.array([1]), 0, 0, (60, 1000)).ravel()
    counts = np.bincount(drawn, minlength=11)
    assert counts[:5].sum() == 0
    chi_square = ((counts[5:] - 10_000) ** 2 / 10_000).sum()
    assert chi_square < 20.52  # 99.9 % quantile, 5 degrees of freedom


def test_no_negative_left_is_an_error():
    with pytest.raises(ValueError, match=r"User 2 has trained on all 2 items"):
        sample_negatives(make([[1], [1, 2]], 2), np.array([1, 2]), 0, 0, (1, 1))


LAUNCHES = st.tuples(st.integers(1, 5), st.integers(1, 4))
SETTINGS = {
    "rows": st.integers(1, 60),
    "batch_size": st.integers(1, 16),
    "launch": LAUNCHES,
    "shuffle": st.booleans(),
    "bucket": st.booleans(),
    "epoch": st.integers(0, 3),
}


def all_ranks(lengths, batch_size, launch, shuffle, bucket, epoch, target_counts=None):
    """(rank, step) -> RowBatch for every rank of a launch."""
    world_size, micro_batches = launch
    ranks = []
    for rank in range(world_size):
        sampler = GlobalBatchSampler(
            lengths, batch_size, 5, shuffle, bucket, rank, world_size, micro_batches, target_counts
        )
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(sampler) == len(ranks[-1])
    return ranks


@settings(max_examples=80, deadline=None)
@given(**SETTINGS)
def test_ranks_share_every_row_once_in_equal_steps(
    rows, batch_size, launch, shuffle, bucket, epoch
):
    lengths = hashed_integers(50, np.arange(rows), seed=rows)
    ranks = all_ranks(lengths, batch_size, launch, shuffle, bucket, epoch)
    steps = -(-rows // batch_size) * launch[1]
    assert [len(r) for r in ranks] == [steps] * launch[0]
    real = np.concatenate([b.row[~b.filler] for r in ranks for b in r])
    assert sorted(real.tolist()) == list(range(rows))
    assert all(len(b.row) >= 1 for r in ranks for b in r)
    for first in range(0, steps, launch[1]):  # shards of one global batch differ by at most one row
        sizes = [int((~b.filler).sum()) for r in ranks for b in r[first : first + launch[1]]]
        assert max(sizes) - min(sizes) <= 1


@settings(max_examples=80, deadline=None)
@given(**SETTINGS)
def test_mean_of_normalised_shard_sums_is_the_global_mean(
    rows, batch_size, launch, shuffle, bucket, epoch
):
    lengths = 1 + hashed_integers(50, np.arange(rows), seed=rows)
    loss = hashed_integers(1000, np.arange(rows), seed=1).astype(float)  # summed over positions
    ranks = all_ranks(lengths, batch_size, launch, shuffle, bucket, epoch, target_counts=lengths)
    alone = all_ranks(lengths, batch_size, (1, 1), shuffle, bucket, epoch, target_counts=lengths)[0]
    for step, batch in enumerate(alone):
        expected = loss[batch.row].sum() / lengths[batch.row].sum()
        shards = [b for r in ranks for b in r[step * launch[1] : (step + 1) * launch[1]]]
        shard_losses = [loss[b.row[~b.filler]].sum() / b.normaliser for b in shards]
        np.testing.assert_allclose(np.mean(shard_losses), expected, rtol=1e-12)


def padding_share(batches, lengths) -> float:
    padded = sum(len(b.row) * lengths[b.row].max() for b in batches)
    return 1 - sum(lengths[b.row].sum() for b in batches) / padded


def test_buckets_save_padding_on_log_normal_lengths():
    uniform = (hashed_integers(2**40, np.arange(2)[:, None], np.arange(20_000), seed=0) + 1) / 2**40
    normal = np.sqrt(-2 * np.log(uniform[0])) * np.cos(2 * np.pi * uniform[1])  # Box-Muller
    lengths = np.ceil(np.exp(3 + 0.8 * normal)).astype(np.int64)
    share = {b: padding_share(GlobalBatchSampler(lengths, 64, bucket=b), lengths) for b in (0, 1)}
    assert share[0] > 0.6
    assert share[1] < share[0] / 4


def test_order_is_a_function_of_seed_and_epoch():
    lengths = np.arange(1, 201)

    def order(seed, epoch, shuffle=True, bucket=True):
        sampler = GlobalBatchSampler(lengths, 8, seed, shuffle, bucket)
        sampler.set_epoch(epoch)
        assert all(b.epoch == epoch for b in sampler)
        return np.concatenate([b.row for b in sampler]).tolist()

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)
    assert order(0, 1, bucket=False) != order(0, 2, bucket=False)
    # Without buckets a batch is any eight rows, the longest first.
    eights = np.arange(200).reshape(25, 8)[:, ::-1].flatten().tolist()
    assert order(0, 1, shuffle=False, bucket=False) == eights
    assert order(0, 1, shuffle=False) == list(range(199, -1, -1))  # one pool, longest first


def test_rows_meet_other_rows_in_every_epoch():
    lengths = np.arange(2 * samplers.POOL_BATCHES * 4)  # two pools: sorting all would fix batches

    def composed(epoch):
        batches = samplers.global_batches(lengths, 4, 0, epoch, shuffle=True, bucket=True)
        return {frozenset(b.tolist()) for b in batches}

    assert len(composed(0)) == 2 * samplers.POOL_BATCHES
    assert len(composed(0) & composed(1)) < samplers.POOL_BATCHES


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 40), together=st.integers(1, 4), size=st.integers(1, 3),
    bucket=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_rows_that_belong_together_stand_in_one_batch(groups, together, size, bucket, seed):
    lengths = np.random.default_rng(seed).integers(1, 30, groups * together)
    sampler = GlobalBatchSampler(lengths, size * together, seed, bucket=bucket, together=together)
    batches = [b.row for b in sampler]
    assert sorted(np.concatenate(batches).tolist()) == list(range(groups * together))
    assert len(batches) == len(sampler)
    for batch in batches:
        assert len(batch) <= size * together
        assert (np.bincount(batch // together)[batch // together] == together).all()


def test_rows_that_cannot_stay_together_are_refused():
    for rows, size in ((7, 4), (8, 3)):
        with pytest.raises(ValueError, match="a batch size that is a multiple of 2"):
            GlobalBatchSampler(np.ones(rows), size, together=2)


def test_filler_and_normaliser_by_hand():
    # One global batch of 2 rows with 3 + 5 targets on 2 ranks x 2 micro batches: 8 / 4 = 2.
    ranks = all_ranks([9, 7], 4, (2, 2), False, True, 0, target_counts=np.array([3, 5]))
    assert [[b.row.tolist() for b in r] for r in ranks] == [[[0], [1]], [[0], [0]]]
    assert [[b.filler.tolist() for b in r] for r in ranks] == [[[False], [False]], [[True], [True]]]
    assert {b.normaliser for r in ranks for b in r} == {2.0}


@pytest.mark.parametrize(
    "arguments",
    [
        {"batch_size": 0},
        {"batch_size": 2, "rank": 2, "world_size": 2},
        {"batch_size": 2, "micro_batches": 0},
        {"batch_size": 2, "target_counts": np.array([1, 0, 2])},
        {"batch_size": 2, "target_counts": np.array([1, 1])},
    ],
)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="expected"):
        GlobalBatchSampler(np.array([1, 2, 3]), **arguments)


def test_no_rows_is_an_error():
    with pytest.raises(ValueError, match="0 rows"):
        GlobalBatchSampler(np.array([]), 2)


@given(st.lists(st.integers(0, 40), max_size=50), st.integers(1, 9), st.integers(1, 4))
def test_evaluation_sees_every_row_exactly_once(lengths, batch_size, world_size):
    seen = []
    for rank in range(world_size):
        sampler = EvalBatchSampler(np.array(lengths, dtype=np.int64), batch_size, rank, world_size)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert not any(b.filler.any() for b in batches)
        assert all(1 <= len(b.row) <= batch_size for b in batches)
        mine = [lengths[i] for b in batches for i in b.row]
        assert mine == sorted(mine, reverse=True)
        seen += [int(i) for b in batches for i in b.row]
    assert sorted(seen) == list(range(len(lengths)))


def test_what_was_learned_from_is_left_out_once():
    sampler = GlobalBatchSampler(np.arange(1, 24), 4, micro_batches=2, rank=1, world_size=2)
    whole = [batch.row.tolist() for batch in sampler]
    sampler.skip = 5
    assert len(sampler) == len(whole) == 12
    assert [batch.row.tolist() for batch in sampler] == whole[5:]
    assert [batch.row.tolist() for batch in sampler] == whole
