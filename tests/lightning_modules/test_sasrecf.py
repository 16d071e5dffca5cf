"""SASRecF: what it shares with SASRec, and what features change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.types import Batch
from lightning_modules.sasrec import SASRecModule
from lightning_modules.sasrecf import SASRecFModule
from tests.lightning_modules.reloading import require_same_scores

ITEMS = 9
HISTORY = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [0, 0, 0, 0]])
LENGTH = torch.tensor([4, 2, 0])
TARGETS = torch.tensor([[2, 3, 0, 5], [0, 7, 0, 0], [0, 0, 0, 0]])
CATALOG = pl.DataFrame(
    {
        "categories": [["a"], ["a", "b"], ["b"], ["c"], None, ["c"], ["b"], ["a", "c"], ["a"]],
        "brand": ["x", None, "x", None, None, "y", "z", "y", None],
    },
    schema_overrides={"categories": pl.List(pl.String)},
)


def ready(module: Any) -> Any:
    """A module whose biases and LayerNorms are random, with what ``training_step`` asks of a trainer."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    module.log = lambda *a, **k: None
    module._trainer = type("T", (), {"precision": "32-true"})()
    return module


def build(seed: int = 0, **settings: Any) -> SASRecFModule:
    torch.manual_seed(seed)
    defaults = {"max_length": 4, "hidden_size": 6, "num_heads": 2, "dropout": 0.0}
    module: SASRecFModule = ready(SASRecFModule(ITEMS, CATALOG, **(defaults | settings)))
    return module


def batch(history: Tensor = HISTORY, **extra: Any) -> Batch:
    rows = torch.arange(len(history))
    return Batch(
        rows, rows + 1, history, LENGTH, targets=TARGETS, normaliser=torch.tensor(4.0), **extra
    )


@pytest.mark.parametrize("settings", [{}, {"loss": "bce", "negatives": 2}])
def test_without_feature_weights_it_is_sasrec(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain = ready(SASRecModule(ITEMS, 4, hidden_size=6, num_heads=2, dropout=0.0, **settings))
    module = build(fusion="add", **settings)
    with torch.no_grad():
        module.network.item_embedding.features.embedding.weight.zero_()
    extra = {"negatives": torch.randint(1, ITEMS + 1, (3, 4, 2))} if settings else {}
    pairs = [m.training_step(batch(**extra), 0) for m in (plain, module)]
    assert torch.equal(*pairs)
    for total in pairs:
        total.backward()
    own = dict(module.named_parameters())
    for name, parameter in plain.named_parameters():
        other = own[name.replace("item_embedding.", "item_embedding.ids.")]
        torch.testing.assert_close(other.grad, parameter.grad)
    with torch.no_grad():
        assert torch.equal(module.user_vectors(batch()), plain.user_vectors(batch()))
        assert torch.equal(module.item_vectors(), plain.item_vectors())


@pytest.mark.parametrize("tie", ["fused", "ids"])
def test_input_and_scores_are_those_of_the_fused_table(tie: str) -> None:
    """SASRec with the fused vectors as its own table is an independent way to the same states."""
    module = build(fusion="concat", tie=tie).eval()
    plain = SASRecModule(ITEMS, 4, hidden_size=6, num_heads=2, dropout=0.0).eval()
    items = module.network.item_embedding
    with torch.no_grad():
        state = {k: v for k, v in module.state_dict().items() if ".item_embedding." not in k}
        table = torch.cat([items.ids.weight, items.features(torch.arange(ITEMS + 1))], 1)
        table = table @ items.linear.weight.T  # (I + 1, d)
        plain.load_state_dict(state | {"network.item_embedding.weight": table})
        users = module.user_vectors(batch())
        torch.testing.assert_close(users, plain.user_vectors(batch()))
        assert not users[2].any()  # an empty history ranks nothing above anything
        expected = table if tie == "fused" else items.ids.weight
        torch.testing.assert_close(module.item_vectors(), expected)
        some = torch.tensor([3, 9, 1])
        torch.testing.assert_close(module.score(users, some), users @ expected[some].T)


@pytest.mark.parametrize("tie", ["fused", "ids"])
@pytest.mark.parametrize("fusion", ["concat", "add"])
def test_loss_is_cross_entropy_and_reaches_every_parameter(fusion: str, tie: str) -> None:
    module = build(fusion=fusion, tie=tie)
    loss = module.training_step(batch(), 0)
    states = module.network(HISTORY, LENGTH)[TARGETS > 0]
    logits = states @ module.item_vectors()[1:].T  # (N, I)
    expected = F.cross_entropy(logits, TARGETS[TARGETS > 0] - 1, reduction="sum") / 4
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    items = module.network.item_embedding
    assert not items.ids.weight.grad[0].any()
    assert not items.features.embedding.weight.grad[0].any()


def test_neither_later_items_nor_padding_change_a_state() -> None:
    module = build().eval()
    changed, filled = HISTORY.clone(), HISTORY.clone()
    changed[0, 2] = 9
    filled[1, 2:] = 8
    with torch.no_grad():
        before, after = module.network(HISTORY, LENGTH), module.network(changed, LENGTH)
        torch.testing.assert_close(after[0, :2], before[0, :2])
        assert (after[0, 2:] - before[0, 2:]).abs().amax(1).min() > 1e-4
        torch.testing.assert_close(module.network(filled, LENGTH), before)


def test_an_item_that_was_never_trained_is_scored_by_its_features() -> None:
    """Items 1 and 9 have the same categories; without their brand they differ by the id alone."""
    module = build(fusion="add", columns=("categories",), min_count=1).eval()
    with torch.no_grad():
        ids = module.network.item_embedding.ids.weight
        ids[9] = ids[1]
        scores = module.score(module.user_vectors(batch()), torch.arange(ITEMS + 1))
    torch.testing.assert_close(scores[:, 9], scores[:, 1])


def test_weights_round_trip_and_another_vocabulary_is_refused(tmp_path: Path) -> None:
    require_same_scores(build(0), build(1), batch(), ITEMS, tmp_path)
    with pytest.raises(ValueError, match=r"features.embedding.weight is \(6, 6\), expected \(4, 6"):
        build(columns=("categories",), min_count=1, tie="ids").load_weights(tmp_path / "best.ckpt")


def test_the_gradient_of_the_ids_is_never_sparse() -> None:
    module = build(loss="bce", negatives=2, table_optimizer="rowwise_adagrad")
    module.configure_model()
    negatives = torch.randint(1, ITEMS + 1, (3, 4, 2))
    module.training_step(batch(negatives=negatives), 0).backward()
    assert not module.sparse_gradients
    assert not any(p.grad.is_sparse for p in module.parameters())  # type: ignore[union-attr]


def test_dropout_follows_the_seed() -> None:
    module = build(dropout=0.5)

    def loss(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return module.training_step(batch(), 0)

    assert torch.equal(loss(3), loss(3))
    assert not torch.equal(loss(3), loss(4))


def test_data_without_features_is_refused() -> None:
    nothing = CATALOG.with_columns(pl.lit(None, pl.String).alias("brand"))
    with pytest.raises(ValueError, match="The data has no item features"):
        SASRecFModule(ITEMS, nothing, columns=("brand",))
    with pytest.raises(ValueError, match="have no tied=false: tie=ids"):
        build(tied=False)
    with pytest.raises(ValueError, match="catalogue has 9 items, but the model has 8"):
        SASRecFModule(ITEMS - 1, CATALOG)
