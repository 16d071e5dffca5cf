"""NeuMF against its equations, pair by pair, and its blocks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.types import Batch
from lightning_modules.neumf import NeuMFModule

BRANCHES: list[Any] = ["neumf", "gmf", "mlp"]
ITEMS = 7


def _module(branches: Any = "neumf", **settings: Any) -> NeuMFModule:
    torch.manual_seed(0)
    module = NeuMFModule(
        num_items=ITEMS, num_users=3, branches=branches, hidden_size=4, layers=(6, 5),
        negatives=2, init_std=1.0, **settings,
    )  # fmt: skip
    module.log = lambda *a, **k: None  # type: ignore[method-assign]
    module._trainer = SimpleNamespace(precision="32-true")  # type: ignore[assignment]
    return module


def _batch() -> Batch:
    """User 1 with item 2 (negatives 3 and 2, the second an accidental hit), user 3 with item 4 (1, 5)."""
    return Batch(
        torch.arange(2), torch.tensor([1, 3]), torch.tensor([[2], [4]]), torch.tensor([1, 1]),
        targets=torch.tensor([[2], [4]]), negatives=torch.tensor([[[3, 2]], [[1, 5]]]),
        normaliser=torch.tensor(2.0),
    )  # fmt: skip


def _logit(module: NeuMFModule, user: int, item: int) -> Tensor:
    """Equations 9, 10 and 12 of one pair: product and perceptron, then one output layer."""
    n, parts = module.network, []
    p, q = n.users[user], n.items[item]
    if n.gmf_size:
        parts.append(p[: n.gmf_size] * q[: n.gmf_size])
    if n.mlp_size:
        x = torch.cat([p[n.gmf_size :], q[n.gmf_size :]])
        for layer in n.layers:
            assert isinstance(layer, nn.Linear)
            x = F.relu(layer.weight @ x + layer.bias)
        parts.append(x)
    return (n.output.weight @ torch.cat(parts) + n.output.bias)[0]


@pytest.mark.parametrize("branches", BRANCHES)
def test_scores_by_the_equations(branches: Any) -> None:
    module = _module(branches)
    state = module.encode(_batch())
    everything = module.score(state, torch.arange(1, ITEMS + 1))
    expected = torch.stack(
        [torch.stack([_logit(module, u, i) for i in range(1, ITEMS + 1)]) for u in (1, 3)]
    )
    torch.testing.assert_close(everything, expected)
    lists = torch.tensor([[3, 7, 1], [1, 1, 2]])
    torch.testing.assert_close(module.score(state, lists), expected.gather(1, lists - 1))


@pytest.mark.parametrize("branches", BRANCHES)
def test_blocks_of_items_change_nothing(branches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _module(branches)
    state, lists = module.encode(_batch()), torch.tensor([[3, 7, 1], [1, 1, 2]])
    whole, some = module.score(state, torch.arange(1, 8)), module.score(state, lists)
    widths: list[int] = []
    forward = module.network.forward
    monkeypatch.setattr("lightning_modules.neumf.model._BLOCK_CELLS", 2 * 2 * 8)

    def counted(users: Tensor, items: Tensor) -> Tensor:
        widths.append(items.shape[-2])
        return forward(users, items)

    monkeypatch.setattr(module.network, "forward", counted)
    torch.testing.assert_close(module.score(state, torch.arange(1, 8)), whole)
    torch.testing.assert_close(module.score(state, lists), some)
    assert max(widths) * 2 * (8 if branches == "neumf" else 6 if branches == "mlp" else 4) <= 32


@pytest.mark.parametrize("branches", BRANCHES)
def test_loss_is_binary_cross_entropy_of_pairs_and_every_weight_learns(branches: Any) -> None:
    module = _module(branches)
    loss = module.training_step(_batch(), 0)
    pairs = [(1, 2, 1.0), (1, 3, 0.0), (3, 4, 1.0), (3, 1, 0.0), (3, 5, 0.0)]  # without the hit
    logits = torch.stack([_logit(module, u, i) for u, i, _ in pairs])
    labels = torch.tensor([label for _, _, label in pairs])
    expected = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / 2
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    for table in (module.network.users, module.network.items):
        assert table.grad is not None
        assert not table.grad[0].any()  # padding


def test_dropout_is_of_training_alone() -> None:
    module = _module(dropout=0.5)
    state = module.encode(_batch())
    assert not torch.equal(
        module.score(state, torch.arange(8)), module.score(state, torch.arange(8))
    )
    module.eval()
    assert torch.equal(module.score(state, torch.arange(8)), module.score(state, torch.arange(8)))


def test_unseen_users_have_the_mean_of_the_trained() -> None:
    module = _module()
    module.trained_users = torch.tensor([False, True, False, True])
    batch = _batch()
    batch.user = torch.tensor([2, 1])
    users = module.network.users
    expected = torch.stack([(users[1] + users[3]) / 2, users[1]])
    torch.testing.assert_close(module.encode(batch), expected)


def test_weights_are_taken_from_a_checkpoint(tmp_path: Path) -> None:
    first, second = _module(), NeuMFModule(ITEMS, 3, hidden_size=4, layers=[6, 5])
    torch.save({"state_dict": first.state_dict()}, tmp_path / "best.ckpt")
    second.load_weights(tmp_path / "best.ckpt")
    items = torch.arange(1, ITEMS + 1)
    assert torch.equal(
        first.score(first.encode(_batch()), items), second.score(second.encode(_batch()), items)
    )


def test_impossible_networks_are_refused() -> None:
    with pytest.raises(ValueError, match="expected neumf, gmf or mlp"):
        _module("both")
    with pytest.raises(ValueError, match="a perceptron needs a layer"):
        NeuMFModule(ITEMS, 3, branches="mlp", layers=())
    assert NeuMFModule(ITEMS, 3, branches="gmf", layers=()).network.output.in_features == 32


def test_another_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="loss is bce, got ce"):
        _module(loss="ce")


def test_shared_negatives_are_those_of_every_pair() -> None:
    module, targets = _module(), torch.tensor([2, 4])
    states = module.states(_batch(), torch.ones(2, 1, dtype=torch.bool))
    drawn = torch.tensor([1, 4, 6])
    torch.testing.assert_close(
        module.loss_sum(states, targets, drawn),
        module.loss_sum(states, targets, drawn.repeat(2, 1)),
    )
