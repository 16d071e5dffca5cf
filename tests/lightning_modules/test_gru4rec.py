"""GRU4Rec against the GRU's equations written out, and the properties that its training relies on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.types import Batch
from lightning_modules import ranking_losses
from lightning_modules.gru4rec import GRU4RecModule
from tests.lightning_modules.reloading import require_same_scores

ITEMS = 9
HISTORY = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [0, 0, 0, 0]])
LENGTH = torch.tensor([4, 2, 0])
TARGETS = torch.tensor([[2, 3, 0, 5], [0, 7, 0, 0], [0, 0, 0, 0]])


def build(seed: int = 0, **settings: Any) -> GRU4RecModule:
    """A small module whose biases are random, so that no part of it is a no-op."""
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {
        "max_length": 4,
        "embedding_size": 6,
        "hidden_size": 5,
        "dropout": 0,
    }
    module = GRU4RecModule(ITEMS, **(defaults | settings))
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.normal_(std=0.3)
    module.log = lambda *a, **k: None  # type: ignore[method-assign]
    module._trainer = type("T", (), {"precision": "32-true"})()
    return module


def batch(history: Tensor = HISTORY, **extra: Any) -> Batch:
    rows = torch.arange(len(history))
    return Batch(
        rows, rows + 1, history, LENGTH, targets=TARGETS, normaliser=torch.tensor(4.0), **extra
    )


def derive(module: GRU4RecModule, items: list[int]) -> Tensor:
    """States (T, d) of one history, by the equations of a GRU (Cho et al., 2014; torch's gates)."""
    network = module.network
    x = [network.item_embedding.weight[i] * math.sqrt(6) for i in items]
    for layer in range(network.gru.num_layers):
        w, u, b, c = (
            getattr(network.gru, f"{name}_l{layer}")
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        h, outputs = torch.zeros(5), []
        for step in x:
            reset_x, update_x, new_x = (w @ step + b).chunk(3)
            reset_h, update_h, new_h = (u @ h + c).chunk(3)
            reset, update = torch.sigmoid(reset_x + reset_h), torch.sigmoid(update_x + update_h)
            h = (1 - update) * torch.tanh(new_x + reset * new_h) + update * h
            outputs.append(h)
        x = outputs
    return torch.stack([network.output.weight @ h + network.output.bias for h in x])


@pytest.mark.parametrize("layers", [1, 2])
def test_equals_an_independent_derivation(layers: int) -> None:
    module = build(num_layers=layers).eval()
    with torch.no_grad():
        states = module.states(batch(), HISTORY > 0)  # (N, d)
        expected = torch.cat([derive(module, [1, 2, 3, 4]), derive(module, [5, 6])])
        torch.testing.assert_close(states, expected)
        users = torch.stack([expected[3], expected[5], torch.zeros(6)])
        torch.testing.assert_close(module.user_vectors(batch()), users)


def test_neither_later_items_nor_padding_change_a_state() -> None:
    module = build(num_layers=2).eval()
    changed = HISTORY.clone()
    changed[0, 2] = 9
    filled = F.pad(HISTORY, (0, 3))
    filled[1, 2:] = 8
    with torch.no_grad():
        before, after = module.network(HISTORY), module.network(changed)
        torch.testing.assert_close(after[0, :2], before[0, :2])
        assert (after[0, 2:] - before[0, 2:]).abs().amax(1).min() > 1e-4
        torch.testing.assert_close(module.network(filled)[0, :4], before[0])
        torch.testing.assert_close(module.user_vectors(batch(filled)), module.user_vectors(batch()))


def test_loss_is_cross_entropy_and_reaches_every_parameter() -> None:
    module = build(num_layers=2)
    loss = module.training_step(batch(), 0)
    logits = module.network(HISTORY)[TARGETS > 0] @ module.item_vectors()[1:].T  # (N, I)
    expected = F.cross_entropy(logits, TARGETS[TARGETS > 0] - 1, reduction="sum") / 4
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    table = module.item_vectors()
    assert not table[0].any()
    assert not table.grad[0].any()  # type: ignore[index]


@pytest.mark.parametrize("penalty", [0.0, 2.0])
def test_the_penalty_reaches_bpr_max(penalty: float) -> None:
    module = build(loss="bpr_max", negatives=3, bpr_max_penalty=penalty)
    negatives = torch.randint(1, ITEMS + 1, (3, 4, 3))
    where = TARGETS > 0
    expected = ranking_losses.bpr_max(
        module.network(HISTORY)[where], module.item_vectors(), TARGETS[where], negatives[where],
        penalty=penalty,
    )  # fmt: skip
    got = module.training_step(batch(negatives=negatives), 0)
    torch.testing.assert_close(got, expected / 4)


def test_dropout_follows_the_seed_and_only_acts_in_training() -> None:
    module = build(num_layers=2, dropout=0.5)

    def states() -> Tensor:
        torch.manual_seed(3)
        first: Tensor = module.network(HISTORY)
        return first

    torch.testing.assert_close(states(), states())
    assert not torch.equal(states(), module.network(HISTORY))
    module.eval()
    torch.testing.assert_close(module.network(HISTORY), build(num_layers=2).network(HISTORY))


def test_weights_round_trip(tmp_path: Path) -> None:
    scores = require_same_scores(build(0), build(1), batch(), ITEMS, tmp_path)
    assert not scores[2].any()  # an empty history ranks nothing above anything


def test_can_learn_a_cycle() -> None:
    module = build(hidden_size=16, embedding_size=16)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    events = (torch.arange(ITEMS)[:, None] + torch.arange(5)) % ITEMS + 1  # 1, 2, .., I, 1, ..
    for _ in range(60):
        scores = module.network(events[:, :-1]) @ module.item_vectors()[1:].T
        optimizer.zero_grad()
        F.cross_entropy(scores.flatten(0, 1), events[:, 1:].flatten() - 1).backward()
        optimizer.step()
    assert torch.equal(scores.argmax(2) + 1, events[:, 1:])


def test_wrong_sizes_are_all_named() -> None:
    with pytest.raises(ValueError, match="hidden_size=0, num_layers=0"):
        build(hidden_size=0, num_layers=0)
