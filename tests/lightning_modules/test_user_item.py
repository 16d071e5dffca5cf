"""Users' vectors, histories as sets, and the rows that pair models train on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from datamodules.loading import AttachNegatives, TrainDataset, TrainRows
from datamodules.samplers import RowBatch
from datamodules.types import CONTEXT, TEST, TRAIN, Batch, Histories
from lightning_modules.id_batches import HistoryCollator
from lightning_modules.user_item import UserItemModule, first_meetings, known_or_mean

# User 1 trains on items 1, 2, 3; user 2 has no training event; user 3 trains on item 4 alone.
HISTORIES = Histories(
    offsets=np.array([0, 0, 4, 6, 7]),
    items=np.array([1, 2, 3, 4, 5, 1, 4], np.int32),
    split=np.array([TRAIN, TRAIN, TRAIN, TEST, CONTEXT, TEST, TRAIN], np.int8),
    timestamps=np.zeros(7, np.int64),
    num_items=5,
)


class Tables(UserItemModule):
    """Two plain tables."""

    def __init__(self, **options: Any) -> None:
        super().__init__(num_items=5, num_users=3, **options)
        self.users = nn.Parameter(torch.arange(8.0).view(4, 2))
        self.items = nn.Parameter(torch.arange(12.0).view(6, 2))

    def user_table(self) -> Tensor:
        return self.users

    def item_vectors(self) -> Tensor:
        return self.items


def _ready(**options: Any) -> Tables:
    module = Tables(**options)
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(histories=HISTORIES))  # type: ignore[assignment]
    module.setup("fit")
    return module


def _users(*users: int) -> Batch:
    rows = torch.arange(len(users))
    return Batch(rows, torch.tensor(users), torch.zeros(len(users), 1, dtype=torch.long), rows * 0)


def test_users_without_training_events_have_the_trained_users_mean() -> None:
    vectors = _ready().user_vectors(_users(1, 2, 3, 0))
    assert vectors.tolist() == [[2, 3], [4, 5], [6, 7], [4, 5]]  # (2, 3) and (6, 7) average (4, 5)
    assert Tables().user_vectors(_users(2)).tolist() == [[4, 5]]  # its own before setup
    nobody = known_or_mean(torch.ones(4, 2), torch.tensor([1]), torch.zeros(4, dtype=torch.bool))
    assert nobody.tolist() == [[0, 0]]


def test_a_history_as_a_set() -> None:
    history = torch.tensor([[3, 1, 3, 0], [2, 2, 2, 2], [0, 0, 0, 0]])
    items, first = first_meetings(history)
    assert [sorted(i[f].tolist()) for i, f in zip(items, first, strict=True)] == [[1, 3], [2], []]


@pytest.mark.parametrize("max_length", [1, 2, 5])
def test_every_training_event_is_a_pair_of_its_user(max_length: int) -> None:
    module = _ready(max_length=max_length, loss="bpr", negatives=2)
    rows = TrainRows(HISTORIES, module.max_length, module.all_windows, module.sequential)
    collate = AttachNegatives(module.collator(training=True), module.num_negatives, False)
    everything = RowBatch(np.arange(len(rows.user)), np.zeros(len(rows.user), bool), 1.0, 0)
    batch = collate(TrainDataset(rows, seed=0)[everything])
    assert batch.targets is not None
    where = batch.targets > 0
    states = module.states(batch, where)
    pairs = zip(states[:, 0].tolist(), batch.targets[where].tolist(), strict=True)
    assert sorted(pairs) == [(2, 1), (2, 2), (2, 3), (6, 4)]  # user u's first number is 2 u


def test_evaluation_reads_histories() -> None:
    assert isinstance(Tables().collator(training=False), HistoryCollator)


def test_who_is_trained_is_not_part_of_the_weights() -> None:
    assert set(Tables().state_dict()) == {"users", "items"}
