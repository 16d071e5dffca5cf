"""FPMC against its equation, user by user and position by position."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from datamodules.types import TEST, TRAIN, Batch, Histories
from lightning_modules.fpmc import FPMCModule

HISTORY = torch.tensor([[1, 2, 3], [5, 0, 0]])
TARGETS = torch.tensor([[2, 0, 4], [6, 0, 0]])


def _module(**settings: Any) -> FPMCModule:
    torch.manual_seed(0)
    module = FPMCModule(num_items=6, num_users=3, hidden_size=4, **settings)
    module.log = lambda *a, **k: None  # type: ignore[method-assign]
    module._trainer = SimpleNamespace(precision="32-true")  # type: ignore[assignment]
    return module


def _batch(history: torch.Tensor = HISTORY, users: tuple[int, ...] = (1, 3), **extra: Any) -> Batch:
    rows = torch.arange(len(users))
    return Batch(rows, torch.tensor(users), history, (history > 0).sum(1), **extra)


def _score(module: FPMCModule, user: int, last: int, item: int) -> torch.Tensor:
    """<V_u, V_i> + <V_l, V_i'>."""
    n = module.network
    return n.users[user] @ n.user_items[item] + n.last_items[last] @ n.next_items[item]


def test_cross_entropy_by_the_equation() -> None:
    module = _module(loss="ce")
    loss = module.training_step(_batch(targets=TARGETS, normaliser=torch.tensor(4.0)), 0)
    expected = torch.zeros(())
    for user, last, target in [(1, 1, 2), (1, 3, 4), (3, 5, 6)]:
        scores = torch.stack([_score(module, user, last, i) for i in range(1, 7)])
        expected = expected + F.cross_entropy(scores, torch.tensor(target - 1)) / 4
    torch.testing.assert_close(loss, expected)


def test_bpr_by_the_equation_and_padding_rows_stay() -> None:
    module = _module(negatives=1)
    negatives = torch.tensor([[[5], [1], [6]], [[1], [1], [1]]])
    batch = _batch(targets=TARGETS, negatives=negatives, normaliser=torch.tensor(1.0))
    loss = module.training_step(batch, 0)
    expected = torch.zeros(())
    for user, last, target, other in [(1, 1, 2, 5), (1, 3, 4, 6), (3, 5, 6, 1)]:
        gap = _score(module, user, last, target) - _score(module, user, last, other)
        expected = expected - F.logsigmoid(gap)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for name, table in module.named_parameters():
        assert table.grad is not None, name
        assert table.grad.any(), name
        assert not table.grad[0].any(), name


def test_scores_read_the_newest_item_alone() -> None:
    module = _module()
    everything = module.score(module.encode(_batch()), torch.arange(1, 7))
    for row, (user, last) in enumerate([(1, 3), (3, 5)]):
        expected = torch.stack([_score(module, user, last, i) for i in range(1, 7)])
        torch.testing.assert_close(everything[row], expected)
    older = HISTORY.clone()
    older[0, :2] = torch.tensor([6, 4])
    wider = F.pad(older, (0, 2))
    assert torch.equal(module.encode(_batch(wider)), module.encode(_batch()))
    lists = torch.tensor([[3, 1], [6, 6]])
    torch.testing.assert_close(
        module.score(module.encode(_batch()), lists), everything.gather(1, lists - 1)
    )


def test_a_later_item_changes_no_earlier_state() -> None:
    module, where = _module(), TARGETS > 0
    changed = HISTORY.clone()
    changed[0, 2] = 6
    before, after = module.states(_batch(), where), module.states(_batch(changed), where)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1], after[1])


def test_unseen_users_have_the_mean_and_empty_histories_no_item_part() -> None:
    module = _module()
    # User 1 has a training event after the first; user 2 only a first one, user 3 none.
    histories = Histories(
        np.array([0, 0, 3, 5, 6]), np.array([1, 2, 3, 4, 5, 6], np.int32),
        np.array([TRAIN, TRAIN, TEST, TRAIN, TEST, TEST], np.int8), np.zeros(6, np.int64), 6,
    )  # fmt: skip
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(histories=histories))  # type: ignore[assignment]
    module.setup("test")
    assert module.trained_users.tolist() == [False, True, False, False]
    states = module.encode(_batch(torch.zeros(3, 1, dtype=torch.long), (1, 2, 3)))
    mean = module.network.users[1].expand(3, -1)  # user 1 is the only one
    torch.testing.assert_close(states, torch.cat([mean, torch.zeros(3, 4)], dim=1))


def test_weights_are_taken_from_a_checkpoint(tmp_path: Path) -> None:
    first, second = _module(), FPMCModule(num_items=6, num_users=3, hidden_size=4)
    torch.save({"state_dict": first.state_dict()}, tmp_path / "best.ckpt")
    second.load_weights(tmp_path / "best.ckpt")
    assert torch.equal(first.encode(_batch()), second.encode(_batch()))


def test_impossible_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="hidden_size must be at least 1"):
        FPMCModule(num_items=6, num_users=3, hidden_size=0)
