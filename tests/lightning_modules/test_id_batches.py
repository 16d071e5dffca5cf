"""Batches of ids: which events are inputs, targets and times."""

from __future__ import annotations

import numpy as np
import pytest

from datamodules.loading import AttachNegatives, TrainDataset, TrainRows
from datamodules.samplers import RowBatch
from datamodules.types import CONTEXT, TEST, TRAIN, VALID, Batch, Histories
from lightning_modules.id_batches import HistoryCollator, PairCollator, TrainCollator

# User 1 has events 0..5, user 2 has 6..8, user 3 only one; items are 10 + place.
CODES = [TRAIN, CONTEXT, TRAIN, TRAIN, VALID, TEST, TRAIN, TRAIN, TEST, TRAIN]
HISTORIES = Histories(
    offsets=np.array([0, 0, 6, 9, 10]),
    items=np.arange(1, 11, dtype=np.int32),
    split=np.array(CODES, np.int8),
    timestamps=np.arange(10) * 100,
    num_items=10,
)


def batch(rows: TrainRows, collate: object) -> Batch:
    everything = RowBatch(np.arange(len(rows.user)), np.zeros(len(rows.user), bool), 1.0, 0)
    made: Batch = collate(TrainDataset(rows, seed=0)[everything])  # type: ignore[operator]
    return made


@pytest.mark.parametrize("max_length", [1, 2, 3, 9])
def test_pairs_are_all_training_events_once_the_first_included(max_length: int) -> None:
    rows = TrainRows(HISTORIES, max_length, all_windows=True, sequential=False)
    made = batch(rows, PairCollator(max_length))
    assert made.targets is not None
    targets = made.targets.numpy()
    pairs = [(u, i) for u, row in zip(made.user.tolist(), targets, strict=True) for i in row if i]
    assert sorted(pairs) == [(1, 1), (1, 3), (1, 4), (2, 7), (2, 8), (3, 10)]
    assert rows.target_counts.tolist() == (targets > 0).sum(1).tolist()


def test_sequences_never_learn_the_first_event() -> None:
    rows = TrainRows(HISTORIES, 9, all_windows=True)
    made = batch(rows, TrainCollator(9, times=True))
    assert made.targets is not None
    assert made.times is not None
    assert made.history.tolist() == [[1, 2, 3], [7, 0, 0]]
    assert made.targets.tolist() == [[0, 3, 4], [8, 0, 0]]
    assert made.times.tolist() == [[0, 100, 200], [600, 0, 0]]


def test_times_are_those_of_the_newest_events() -> None:
    rows = TrainRows(HISTORIES, 2, all_windows=False)
    made = batch(rows, TrainCollator(2, times=True))
    assert made.times is not None
    assert made.times.tolist() == [[100, 200], [600, 0]]
    assert batch(rows, TrainCollator(2)).times is None
    made = batch(rows, HistoryCollator(2, times=True))
    assert made.times is not None
    assert made.times.tolist() == [[200, 300], [600, 700]]


def test_a_pairs_negatives_do_not_depend_on_the_window() -> None:
    found = {}
    for max_length in (1, 2, 4):
        rows = TrainRows(HISTORIES, max_length, all_windows=True, sequential=False)
        made = batch(rows, AttachNegatives(PairCollator(max_length), 3, sequential=False))
        assert made.negatives is not None
        assert made.targets is not None
        found[max_length] = {
            (user, item): drawn.tolist()
            for user, row, negatives in zip(
                made.user.tolist(), made.targets.tolist(), made.negatives, strict=True
            )
            for item, drawn in zip(row, negatives, strict=True)
            if item
        }
    assert found[1] == found[2] == found[4]
    assert len(found[1]) == 6
