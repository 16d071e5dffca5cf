"""GRU4RecF: what it shares with GRU4Rec, and what features change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.types import Batch
from lightning_modules.gru4rec import GRU4RecModule
from lightning_modules.gru4recf import GRU4RecFModule
from tests.lightning_modules.reloading import require_same_scores

ITEMS = 9
HISTORY = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [0, 0, 0, 0]])
LENGTH = torch.tensor([4, 2, 0])
TARGETS = torch.tensor([[2, 3, 0, 5], [0, 7, 0, 0], [0, 0, 0, 0]])
CATALOG = pl.DataFrame(
    {
        "categories": [["a"], ["a", "b"], ["b"], ["c"], None, ["c"], ["b"], ["a", "c"], ["a"]],
        "brand": [None] * ITEMS,
    },
    schema={"categories": pl.List(pl.String), "brand": pl.String},
)
SIZES: dict[str, Any] = {"max_length": 4, "embedding_size": 6, "hidden_size": 5, "dropout": 0.0}


def ready(module: Any) -> Any:
    """What ``training_step`` asks of a trainer, and an output bias that is not zero."""
    torch.nn.init.constant_(module.network.output.bias, 0.3)
    module.log = lambda *a, **k: None
    module._trainer = type("T", (), {"precision": "32-true"})()
    return module


def build(seed: int = 0, **settings: Any) -> GRU4RecFModule:
    torch.manual_seed(seed)
    module: GRU4RecFModule = ready(GRU4RecFModule(ITEMS, CATALOG, **(SIZES | settings)))
    return module


def batch(history: Tensor = HISTORY) -> Batch:
    rows = torch.arange(len(history))
    return Batch(rows, rows + 1, history, LENGTH, targets=TARGETS, normaliser=torch.tensor(4.0))


def test_without_feature_weights_it_is_gru4rec() -> None:
    torch.manual_seed(0)
    plain = ready(GRU4RecModule(ITEMS, **SIZES))
    module = build(fusion="add")
    with torch.no_grad():
        module.network.item_embedding.features.embedding.weight.zero_()
    assert torch.equal(module.training_step(batch(), 0), plain.training_step(batch(), 0))
    assert torch.equal(module.user_vectors(batch()), plain.user_vectors(batch()))
    assert torch.equal(module.item_vectors(), plain.item_vectors())


@pytest.mark.parametrize("tie", ["fused", "ids"])
def test_loss_is_that_of_the_fused_table_and_reaches_every_parameter(tie: str) -> None:
    module = build(fusion="concat", tie=tie, num_layers=2)
    loss = module.training_step(batch(), 0)
    items = module.network.item_embedding
    table = torch.cat([items.ids.weight, items.features(torch.arange(ITEMS + 1))], 1)
    table = table @ items.linear.weight.T  # (I + 1, d)
    hidden, _ = module.network.gru(table[HISTORY] * 6**0.5)  # (B, T, H)
    states = module.network.output(hidden)[TARGETS > 0]  # (N, d)
    scored = table if tie == "fused" else items.ids.weight
    targets = TARGETS[TARGETS > 0] - 1
    expected = F.cross_entropy(states @ scored[1:].T, targets, reduction="sum") / 4
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    assert not items.ids.weight.grad[0].any()


def test_neither_later_items_nor_padding_change_a_state() -> None:
    module = build().eval()
    changed = HISTORY.clone()
    changed[0, 2] = 9
    filled = F.pad(HISTORY, (0, 3))
    filled[1, 2:] = 8
    with torch.no_grad():
        before, after = module.network(HISTORY), module.network(changed)
        torch.testing.assert_close(after[0, :2], before[0, :2])
        assert (after[0, 2:] - before[0, 2:]).abs().amax(1).min() > 1e-5
        users = module.user_vectors(batch())
        torch.testing.assert_close(module.user_vectors(batch(filled)), users)
        assert not users[2].any()


def test_weights_round_trip(tmp_path: Path) -> None:
    require_same_scores(build(0), build(1), batch(), ITEMS, tmp_path)


def test_data_without_features_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"no item features: of its 9 items no 2 share .* of brand"
    ):
        build(columns=("brand",))
