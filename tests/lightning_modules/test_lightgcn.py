"""LightGCN against dense matrices, and what its caches and its penalty do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from datamodules.types import TEST, TRAIN, Batch, Histories
from lightning_modules.base import RankingModule
from lightning_modules.lightgcn import LightGCNModule
from lightning_modules.lightgcn.model import normalised_graph

USERS, ITEMS = 4, 5
# User 4 has no training event, item 5 neither; user 1 met item 2 twice.
EVENTS = [(1, 2, TRAIN), (1, 3, TRAIN), (1, 2, TRAIN), (1, 5, TEST), (2, 3, TRAIN), (2, 1, TEST),
          (3, 1, TRAIN), (3, 2, TRAIN), (3, 4, TRAIN), (4, 5, TEST)]  # fmt: skip
HISTORIES = Histories(
    offsets=np.array([0, 0, 4, 6, 9, 10]),
    items=np.array([i for _, i, _ in EVENTS], np.int32),
    split=np.array([code for _, _, code in EVENTS], np.int8),
    timestamps=np.zeros(len(EVENTS), np.int64),
    num_items=ITEMS,
)


def _adjacency() -> torch.Tensor:
    """A (V, V), from the events one by one."""
    size = USERS + ITEMS + 2
    matrix = torch.zeros(size, size)
    for user, item, code in EVENTS:
        if code == TRAIN:
            matrix[user, USERS + 1 + item] = matrix[USERS + 1 + item, user] = 1
    return matrix


def _normalised() -> torch.Tensor:
    matrix = _adjacency()
    root = matrix.sum(1).clamp(min=1).sqrt()
    return matrix / root[:, None] / root[None]


def _module(**settings: Any) -> LightGCNModule:
    torch.manual_seed(0)
    module = LightGCNModule(num_items=ITEMS, num_users=USERS, hidden_size=3, **settings)
    module.log = lambda *a, **k: None  # type: ignore[method-assign]
    data = SimpleNamespace(histories=HISTORIES)
    module._trainer = SimpleNamespace(precision="32-true", datamodule=data)  # type: ignore[assignment]
    module.setup("fit")
    return module


def _batch() -> Batch:
    """User 1 with item 3 (negatives 1 and 3, the second an accidental hit), user 3 with 4 (5, 3)."""
    return Batch(
        torch.arange(2), torch.tensor([1, 3]), torch.tensor([[3], [4]]), torch.tensor([1, 1]),
        targets=torch.tensor([[3], [4]]), negatives=torch.tensor([[[1, 3]], [[5, 3]]]),
        normaliser=torch.tensor(2.0),
    )  # fmt: skip


def test_the_graph_holds_distinct_training_pairs_alone() -> None:
    torch.testing.assert_close(normalised_graph(HISTORIES).to_dense(), _normalised())


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_tables_are_the_mean_of_dense_layers(layers: int) -> None:
    module = _module(num_layers=layers)
    layer = module.network.nodes.detach()
    found = [layer]
    for _ in range(layers):
        layer = _normalised() @ layer
        found.append(layer)
    expected = torch.stack(found).mean(0)
    torch.testing.assert_close(module.user_table().detach(), expected[: USERS + 1])
    torch.testing.assert_close(module.item_vectors().detach(), expected[USERS + 1 :])
    assert not module.item_vectors()[0].any()


def test_loss_and_gradient_by_dense_matrices() -> None:
    module = _module(num_layers=2, negatives=2, l2=0.1)
    loss = module.training_step(_batch(), 0)
    nodes = module.network.nodes.detach().clone().requires_grad_()
    graph = _normalised()
    mixed = (nodes + graph @ nodes + graph @ graph @ nodes) / 3
    users, items = mixed[: USERS + 1], mixed[USERS + 1 :]
    first = nodes[USERS + 1 :]
    expected = torch.zeros(())
    for user, item, other in [(1, 3, 1), (3, 4, 5), (3, 4, 3)]:
        expected = expected - F.logsigmoid(users[user] @ items[item] - users[user] @ items[other])
    named = [nodes[1], nodes[3], *(first[i] for i in (3, 4, 1, 3, 5, 3))]
    expected = (expected + 0.1 * 0.5 * sum(v.square().sum() for v in named)) / 2
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(module.network.nodes.grad, nodes.grad)
    assert nodes.grad is not None
    assert not nodes.grad[[0, USERS + 1]].any()  # padding


def test_shared_negatives_are_punished_with_every_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    module, batch = _module(negatives=2, l2=0.1, shared_negatives=True), _batch()
    monkeypatch.setattr(module, "_negatives", lambda batch, where: torch.tensor([1, 5]))
    batch.negatives = torch.tensor([1, 5]).expand(2, 1, 2)
    own = _module(negatives=2, l2=0.1)
    torch.testing.assert_close(module._squares(batch), own._squares(batch))


def test_unseen_users_have_the_mean_of_the_trained() -> None:
    module = _module()
    batch = _batch()
    batch.user = torch.tensor([4, 2])
    expected = module.user_table()[1:4].mean(0)
    torch.testing.assert_close(
        module.encode(batch), torch.stack([expected, module.user_table()[2]])
    )


@pytest.mark.parametrize("split", ["validation", "test"])
def test_an_evaluation_propagates_once_and_forgets(
    split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, calls = _module(), []
    forward = module.network.forward
    monkeypatch.setattr(
        module.network, "forward", lambda graph: (calls.append(1), forward(graph))[1]
    )
    monkeypatch.setattr(RankingModule, "_reset", lambda self, split: None)  # of the metrics
    monkeypatch.setattr(RankingModule, "_log", lambda self, split: {})
    getattr(module, f"on_{split}_epoch_start")()
    state = module.encode(_batch())
    first = module.score(state, torch.arange(1, ITEMS + 1))
    module.score(state, torch.tensor([2, 3]))
    assert len(calls) == 1
    getattr(module, f"on_{split}_epoch_end")()
    with torch.no_grad():
        module.network.nodes.mul_(2)
    again = module.score(module.encode(_batch()), torch.arange(1, ITEMS + 1))
    torch.testing.assert_close(again, 4 * first)


def test_the_graph_is_not_part_of_the_weights(tmp_path: Path) -> None:
    first, second = _module(), LightGCNModule(num_items=ITEMS, num_users=USERS, hidden_size=3)
    assert set(first.state_dict()) == {"network.nodes"}
    torch.save({"state_dict": first.state_dict()}, tmp_path / "best.ckpt")
    second.load_weights(tmp_path / "best.ckpt")
    with pytest.raises(RuntimeError, match="no graph yet"):
        second.item_vectors()
    second._trainer = first._trainer
    second.setup("test")
    assert torch.equal(first.item_vectors(), second.item_vectors())


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="num_layers at least 0"):
        LightGCNModule(num_items=5, num_users=3, num_layers=-1)
    with pytest.raises(ValueError, match="l2 must be at least 0"):
        LightGCNModule(num_items=5, num_users=3, l2=-1.0)


def test_training_goes_on_after_an_evaluation_in_inference_mode() -> None:
    module = _module(negatives=2)
    with torch.inference_mode():
        module.encode(_batch())
    module.training_step(_batch(), 0).backward()
    assert module.network.nodes.grad is not None
