"""Caser against the paper's sums written as loops, and the properties that its training relies on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.types import CONTEXT, TEST, TRAIN, VALID, Batch, Histories
from lightning_modules.caser import CaserModule
from lightning_modules.user_item import learned_users
from tests.lightning_modules.reloading import require_same_scores

ITEMS, USERS, D, L = 9, 5, 4, 3
HISTORY = torch.tensor([[1, 2, 3, 4, 7], [5, 6, 0, 0, 0], [0, 0, 0, 0, 0]])
LENGTH = torch.tensor([5, 2, 0])
TARGETS = torch.tensor([[2, 3, 0, 5, 8], [0, 7, 0, 0, 0], [0, 0, 0, 0, 0]])
USER = torch.tensor([2, 4, 5])
TRAINED = torch.tensor([False, False, True, True, False, False])  # users 2 and 3


def build(seed: int = 0, **settings: Any) -> CaserModule:
    """A small module whose biases are random, so that no part of it is a no-op."""
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {
        "max_length": 5, "window": L, "hidden_size": D, "vertical_filters": 2,
        "horizontal_filters": 3, "dropout": 0,
    }  # fmt: skip
    module = CaserModule(ITEMS, USERS, **(defaults | settings))
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter[1:] += 0.3 * torch.randn(len(parameter) - 1)
    module.trained = TRAINED
    module.log = lambda *a, **k: None  # type: ignore[method-assign]
    module._trainer = type("T", (), {"precision": "32-true"})()
    return module


def batch(history: Tensor = HISTORY) -> Batch:
    return Batch(
        torch.arange(3), USER, history, LENGTH, targets=TARGETS, normaliser=torch.tensor(4.0)
    )


def derive(module: CaserModule, items: list[int]) -> Tensor:
    """z (d,) of the last L of ``items``, by the sums of sections 3.2 and 3.3 over the image E (L, d)."""
    network = module.network
    image = network.item_embedding.weight[([0] * L + items)[-L:]]  # (L, d)
    vertical = network.vertical.weight  # (n_v, L)
    found = [
        sum(weight[row] * image[row, k] for row in range(L))
        for k in range(D)
        for weight in vertical
    ]
    for height, layer in enumerate(network.horizontal, start=1):
        filters: Any = layer
        for weight, bias in zip(filters.weight, filters.bias, strict=True):
            values = [
                torch.relu((weight.T * image[top : top + height]).sum() + bias)
                for top in range(L - height + 1)
            ]
            found.append(torch.stack(values).max())
    features = torch.stack(found)
    return torch.relu(network.project.weight @ features + network.project.bias)


def test_scores_equal_an_independent_derivation() -> None:
    module = build().eval()
    network = module.network
    rows = [[1, 2, 3, 4, 7], [5, 6], []]
    table, mean = network.user_embedding.weight, network.user_embedding.weight[[2, 3]].mean(0)
    with torch.no_grad():
        got = module.score(module.encode(batch()), torch.arange(1, ITEMS + 1))
        for row, items, user in zip(got, rows, [table[2], mean, mean], strict=True):
            state = torch.cat([derive(module, items), user])  # (2d,)
            expected = network.output_weight[1:] @ state + network.output_bias[1:]
            torch.testing.assert_close(row, expected)


def test_every_position_in_training_equals_its_own_window() -> None:
    module = build()
    where = HISTORY > 0
    states = module.states(batch(), where)  # (N, 2d + 1)
    z = torch.stack(
        [derive(module, row[: t + 1]) for row in ([1, 2, 3, 4, 7], [5, 6]) for t in range(len(row))]
    )
    torch.testing.assert_close(states[:, :D], z)
    # In training every user has a vector of its own.
    users = module.network.user_embedding.weight[[2, 2, 2, 2, 2, 4, 4]]
    torch.testing.assert_close(states[:, D:-1], users)
    assert states[:, -1].eq(1).all()


def test_neither_later_nor_older_items_nor_padding_change_a_state() -> None:
    module = build(vertical_filters=8, hidden_size=16).eval()
    changed = HISTORY.clone()
    changed[0, 1] = 9
    filled = F.pad(HISTORY, (0, 3))
    filled[1, 2:] = 8
    with torch.no_grad():
        before, after = (module.network.every_window(h)[0] for h in (HISTORY, changed))
        moved = (after - before).abs().amax(1) > 1e-6  # (T,)
        assert moved.tolist() == [False, True, True, True, False]  # the L windows that hold it
        torch.testing.assert_close(module.user_vectors(batch(filled)), module.user_vectors(batch()))
        last = module.network.last_window(HISTORY, LENGTH)
        torch.testing.assert_close(last[0], before[4])
        torch.testing.assert_close(last[1], module.network.every_window(HISTORY)[1, 1])


def test_loss_is_cross_entropy_and_reaches_every_parameter() -> None:
    module = build(vertical_filters=4, horizontal_filters=8, hidden_size=16)
    loss = module.training_step(batch(), 0)
    states = module.states(batch(), TARGETS > 0)  # (N, 2d + 1)
    logits = states[:, :-1] @ module.network.output_weight[1:].T + module.network.output_bias[1:]
    expected = F.cross_entropy(logits, TARGETS[TARGETS > 0] - 1, reduction="sum") / 4
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    network = module.network
    for table in (
        network.item_embedding.weight,
        network.user_embedding.weight,
        network.output_weight,
    ):
        assert not table[0].any()
        assert not table.grad[0].any()  # type: ignore[index]
    assert network.output_bias[0] == 0
    assert network.output_bias.grad[0] == 0  # type: ignore[index]


def histories() -> Histories:
    """User 1: a lone training event; 2: two; 3: context, then training; 4: held out alone; 5: none."""
    lengths = [0, 1, 3, 2, 2, 0]
    split = [TRAIN, TRAIN, TRAIN, TEST, CONTEXT, TRAIN, VALID, TEST]
    return Histories(
        np.concatenate([[0], np.cumsum(lengths)]), np.arange(1, 9, dtype=np.int32),
        np.array(split, np.int8), np.zeros(8, np.int64), ITEMS,
    )  # fmt: skip


def test_setup_finds_the_users_that_carry_a_loss() -> None:
    assert learned_users(histories()).tolist() == TRAINED.tolist()
    module = build()
    module.trained = torch.zeros(USERS + 1, dtype=torch.bool)
    data = SimpleNamespace(histories=histories())
    module._trainer = SimpleNamespace(datamodule=data)  # type: ignore[assignment]
    module.setup("fit")
    assert torch.equal(module.trained, TRAINED)
    assert "trained" not in module.state_dict()  # a fact of the data, not a weight


def test_without_any_trained_user_scores_are_finite() -> None:
    module = build().eval()
    module.trained = torch.zeros(USERS + 1, dtype=torch.bool)
    vectors = module.user_vectors(batch())
    assert vectors.isfinite().all()
    assert not vectors[:, D:-1].any()


def test_dropout_follows_the_seed_and_only_acts_in_training() -> None:
    module = build(dropout=0.5)

    def states() -> Tensor:
        torch.manual_seed(3)
        return module.states(batch(), HISTORY > 0)

    torch.testing.assert_close(states(), states())
    assert not torch.equal(states(), module.states(batch(), HISTORY > 0))
    module.eval()
    torch.testing.assert_close(states(), build().states(batch(), HISTORY > 0))


def test_weights_round_trip(tmp_path: Path) -> None:
    require_same_scores(build(0), build(1), batch(), ITEMS, tmp_path)


def test_can_learn_a_cycle() -> None:
    module = build(hidden_size=16, vertical_filters=4, horizontal_filters=8)
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-2)
    events = (torch.arange(ITEMS)[:, None] + torch.arange(6)) % ITEMS + 1  # 1, 2, .., I, 1, ..
    users = torch.ones(ITEMS, dtype=torch.int64)  # nothing can be learned by heart
    rows = Batch(users, users, events[:, :-1], torch.full((ITEMS,), 5))
    for _ in range(100):
        states = module.states(rows, rows.history > 0)
        scores = states @ module.item_vectors()[1:].T
        optimizer.zero_grad()
        F.cross_entropy(scores, events[:, 1:].flatten() - 1).backward()
        optimizer.step()
    assert torch.equal(scores.argmax(1) + 1, events[:, 1:].flatten())


def test_wrong_sizes_are_all_named() -> None:
    with pytest.raises(ValueError, match="vertical_filters=0, horizontal_filters=0"):
        build(vertical_filters=0, horizontal_filters=0)
    with pytest.raises(ValueError, match="max_length=2, window=3"):
        build(max_length=2)
