"""Tied and untied item tables, alike in every sequence model that has the choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from datamodules.types import Batch
from lightning_modules.gru4rec import GRU4RecModule
from lightning_modules.hstu import HSTUModule
from lightning_modules.next_item import NextItemModule
from lightning_modules.nextitnet import NextItNetModule
from lightning_modules.sasrec import SASRecModule

MODELS: dict[str, tuple[type[NextItemModule], dict[str, Any]]] = {
    "sasrec": (SASRecModule, {"hidden_size": 8, "dropout": 0.0}),
    "gru4rec": (GRU4RecModule, {"embedding_size": 8, "hidden_size": 6, "dropout": 0.0}),
    "nextitnet": (NextItNetModule, {"hidden_size": 8, "dilations": (1,), "dropout": 0.0}),
    "hstu": (HSTUModule, {"hidden_size": 8, "dropout": 0.0, "time_bias": False}),
    "hstu plain": (
        HSTUModule,
        {"hidden_size": 8, "dropout": 0.0, "time_bias": False, "temperature": None},
    ),
}
BATCH = Batch(
    torch.arange(2), torch.arange(1, 3), torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]),
    torch.tensor([4, 2]), targets=torch.tensor([[2, 3, 4, 5], [6, 7, 0, 0]]),
    normaliser=torch.tensor(6.0),
)  # fmt: skip


def module_of(name: str, **options: Any) -> Any:
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    module: Any = kind(num_items=9, max_length=4, **settings, **options)
    module.log = lambda *a, **k: None
    module._trainer = type("T", (), {"precision": "32-true"})()
    return module


@pytest.mark.parametrize("name", MODELS)
def test_tied_scores_read_the_inputs_table_and_untied_ones_their_own(name: str) -> None:
    tied, own = module_of(name), module_of(name, tied=False)
    assert tied.network.output_embedding is None
    extra = own.state_dict().keys() - tied.state_dict().keys()
    assert extra == {"network.output_embedding.weight"}
    for module, table in ((tied, "item_embedding"), (own, "output_embedding")):
        before = module.item_vectors().detach().clone()
        with torch.no_grad():
            weight = getattr(module.network, table).weight
            assert not weight[0].any(), "padding is zero"
            weight[5] += 1.0
        changed = (module.item_vectors() != before).any(dim=1).nonzero().flatten().tolist()
        assert changed == [5]


@pytest.mark.parametrize("name", MODELS)
def test_both_tables_learn_and_padding_does_not(name: str) -> None:
    module = module_of(name, tied=False)
    loss = module.training_step(BATCH, 0)
    where = BATCH.targets > 0
    logits = module.states(BATCH, where) @ module.item_vectors()[1:].T
    expected = F.cross_entropy(logits, BATCH.targets[where] - 1)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for table in (module.network.item_embedding, module.network.output_embedding):
        assert table.weight.grad.abs().sum() > 0
        assert not table.weight.grad[0].any()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_by_rows_equal_dense_ones(name: str, tied: bool) -> None:
    """HSTU with a temperature normalises its whole table, so its gradient stays dense."""
    grads = []
    for by_rows in (True, False):
        options = {"table_optimizer": "rowwise_adagrad"} if by_rows else {}
        module = module_of(name, tied=tied, loss="bce", negatives=2, **options)
        assert module.sparse_gradients is (by_rows and name != "hstu")
        module.configure_model()
        batch = Batch(**{**vars(BATCH), "negatives": torch.tensor([7, 8]).expand(2, 4, 2)})
        module.training_step(batch, 0).backward()
        found = {n: p.grad for n, p in module.named_parameters()}
        tables = [g for n, g in found.items() if "item_embedding" in n or "output_emb" in n]
        assert all(g.is_sparse is module.sparse_gradients for g in tables)
        grads.append({n: g.to_dense() for n, g in found.items()})
    torch.testing.assert_close(grads[0], grads[1])
