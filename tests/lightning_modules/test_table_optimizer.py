"""Row-wise Adagrad for tables: arithmetic, sparse against dense, and what a module asks for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules.movielens import MovieLensDataModule
from lightning_modules.mf import BPRMFModule
from lightning_modules.nextitnet import NextItNetModule
from lightning_modules.optimizers import TableAdamW
from lightning_modules.sasrec import SASRecModule

RATE, DECAY, EPS = 0.1, 0.2, 1e-8


def fit_rows(table: Tensor, gradient: Tensor, steps: int) -> Tensor:
    """The update written as loops."""
    table, sums = table.clone(), [0.0] * len(table)
    for _ in range(steps):
        for v in range(len(table)):
            if not gradient[v].any():
                continue
            sums[v] += float((gradient[v] ** 2).mean())
            step = RATE / (sums[v] ** 0.5 + EPS)
            table[v] -= RATE * DECAY * table[v] + step * gradient[v]
    return table


@pytest.mark.parametrize("sparse", [False, True])
def test_equals_loops_and_leaves_other_rows_alone(sparse: bool) -> None:
    torch.manual_seed(0)
    table, other = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(4))
    before, plain = table.detach().clone(), nn.Parameter(other.detach().clone())
    gradient = torch.zeros(6, 3)
    gradient[[1, 4]] = torch.randn(2, 3)
    groups: list[dict[str, Any]] = [
        {"params": [other]},
        {"params": [table], "rowwise": True, "weight_decay": DECAY},
    ]
    optimizer = TableAdamW(groups, lr=RATE, eps=EPS, weight_decay=0.0)
    adam = torch.optim.AdamW([plain], lr=RATE, eps=EPS, weight_decay=0.0)
    for _ in range(3):
        table.grad = gradient.to_sparse(1) if sparse else gradient.clone()
        other.grad, plain.grad = torch.ones(4), torch.ones(4)
        optimizer.step()
        adam.step()
        optimizer.zero_grad()
    torch.testing.assert_close(table.detach(), fit_rows(before, gradient, 3))
    assert torch.equal(table.detach()[[0, 2, 3, 5]], before[[0, 2, 3, 5]])
    assert torch.equal(other, plain), "everything else is AdamW's"
    kept = {name: value.numel() for name, value in optimizer.state[table].items()}
    assert kept == {"step": 1, "row_sum": 6}, "one number a row"


def test_repeated_rows_of_a_sparse_gradient_are_summed() -> None:
    tables = [nn.Parameter(torch.ones(5, 2)) for _ in range(2)]
    ids = torch.tensor([2, 2, 4])
    for table, sparse in zip(tables, (False, True), strict=True):
        (F.embedding(ids, table, sparse=sparse) ** 2).sum().backward()
        TableAdamW([{"params": [table], "rowwise": True}], lr=RATE).step()
    torch.testing.assert_close(*tables)


def test_its_state_survives_a_checkpoint() -> None:
    def made() -> tuple[nn.Parameter, TableAdamW]:
        table = nn.Parameter(torch.ones(5, 2))
        return table, TableAdamW([{"params": [table], "rowwise": True}], lr=RATE)

    def step(table: nn.Parameter, optimizer: TableAdamW) -> None:
        table.grad = torch.full((5, 2), 0.5)
        optimizer.step()

    table, optimizer = made()
    step(table, optimizer)
    other, resumed = made()
    other.data.copy_(table.data)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # it keeps the tensors
    step(table, optimizer)
    step(other, resumed)
    assert torch.equal(table, other)


def fit(tiny: Path, tmp_path: Path, module: Any, **options: Any) -> list[float]:
    data = MovieLensDataModule(root=str(tiny))
    data.batch_size = 16
    seen: list[float] = []

    class Watch(lightning.Callback):
        def on_train_epoch_end(self, trainer: lightning.Trainer, *unused: Any) -> None:
            seen.append(float(trainer.callback_metrics["train/loss"]))

    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        use_distributed_sampler=False, num_sanity_val_steps=0, callbacks=[Watch()], **options,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return seen


def items_of(tiny: Path) -> int:
    return MovieLensDataModule(root=str(tiny)).num_items


def sequence_model(tiny: Path, **options: Any) -> NextItNetModule:
    torch.manual_seed(0)
    return NextItNetModule(
        items_of(tiny), max_length=6, hidden_size=8, dilations=(1,), dropout=0.0,
        learning_rate=0.01, table_optimizer="rowwise_adagrad", **options,
    )  # fmt: skip


@pytest.mark.parametrize("loss", ["sampled_ce", "bce", "gbce", "bpr", "bpr_max", "top1_max"])
@pytest.mark.parametrize("shared", [False, True])
def test_sparse_gradients_train_as_dense_ones(
    tiny_movielens: Path, tmp_path: Path, loss: Any, shared: bool
) -> None:
    tables, trained = [], []
    for by_rows in (True, False):
        module = sequence_model(tiny_movielens, loss=loss, negatives=4, shared_negatives=shared)
        module.reads_rows = by_rows
        trained.append(fit(tiny_movielens, tmp_path, module))
        assert module.network.item_embedding.sparse is by_rows
        tables.append(module.item_vectors().detach())
    torch.testing.assert_close(tables[0], tables[1], rtol=1e-4, atol=1e-5)
    assert trained[0] == pytest.approx(trained[1], rel=1e-4)
    assert trained[0][-1] < trained[0][0]
    assert not tables[0][0].any(), "padding stays zero"


@pytest.mark.parametrize("loss", ["ce", "scalable_ce"])
def test_full_losses_train_a_row_wise_table_too(
    tiny_movielens: Path, tmp_path: Path, loss: Any
) -> None:
    module = sequence_model(tiny_movielens, loss=loss)
    assert not module.sparse_gradients
    seen = fit(tiny_movielens, tmp_path, module)
    assert seen[-1] < seen[0]


def test_users_are_tables_too(tiny_movielens: Path, tmp_path: Path) -> None:
    data = MovieLensDataModule(root=str(tiny_movielens))
    module = BPRMFModule(data.num_items, data.num_users, 8, table_optimizer="rowwise_adagrad")
    assert {id(t) for t in module.embedding_tables()} >= {
        id(module.network.users),
        id(module.network.items),
    }
    seen = fit(tiny_movielens, tmp_path, module)
    assert seen[-1] < seen[0]


def test_clipping_sparse_gradients_is_refused(tiny_movielens: Path, tmp_path: Path) -> None:
    module = sequence_model(tiny_movielens, loss="bce")
    clips, free = (lightning.Trainer(gradient_clip_val=v, logger=False) for v in (1.0, None))
    assert "table_optimizer=adamw" in (module.untrainable(clips) or "")
    assert module.untrainable(free) is None
    assert sequence_model(tiny_movielens, loss="ce").untrainable(clips) is None


def test_scaled_gradients_are_unscaled_first_and_overflow_skips_the_step() -> None:
    tables = []
    for scale in (1.0, 1024.0):
        table = nn.Parameter(torch.ones(3, 2))
        groups = [{"params": [table], "rowwise": True}]
        optimizer = TableAdamW(groups, lr=RATE, eps=EPS, weight_decay=0.0, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for factor in (1.0, float("inf"), 2.0):
            scaler.scale((table[:2] * factor).sum()).backward()
            scaler.step(optimizer)
            scaler.update(scale)
            optimizer.zero_grad()
        tables.append(table.detach())
    # Gradients 1, then 2; the overflow between them changes nothing.
    moved = 1 - RATE * (1 / 1 + 2 / 5**0.5)
    torch.testing.assert_close(tables[0], torch.tensor([[moved] * 2] * 2 + [[1.0] * 2]))
    torch.testing.assert_close(tables[1], tables[0])


def test_a_layer_of_a_tables_size_is_no_table() -> None:
    """With 23 items the stacked projection of a width of 8 has 24 rows, as many as the item table."""
    module = SASRecModule(23, max_length=5, hidden_size=8, table_optimizer="rowwise_adagrad")
    assert module.network.blocks[0].attention.in_proj.weight.shape == (24, 8)
    (table,) = module.embedding_tables()
    assert table is module.network.item_embedding.weight


def test_a_shared_pool_is_the_same_on_every_device_and_new_at_every_step(
    tiny_movielens: Path, tmp_path: Path
) -> None:
    drawn: list[Tensor] = []

    class Spy(NextItNetModule):
        def loss_sum(self, states: Tensor, targets: Tensor, negatives: Tensor | None) -> Tensor:
            assert negatives is not None
            drawn.append(negatives)
            return super().loss_sum(states, targets, negatives)

    for rank in (0, 3):
        module = Spy(items_of(tiny_movielens), 6, 8, dilations=(1,), loss="bce", negatives=9,
                     shared_negatives=True)  # fmt: skip
        type(module).global_rank = property(lambda self, rank=rank: rank)  # type: ignore[assignment]
        fit(tiny_movielens, tmp_path, module)
    first, second = drawn[: len(drawn) // 2], drawn[len(drawn) // 2 :]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(pool.shape == (9,) and pool.min() >= 1 for pool in first)
    assert len({tuple(p.tolist()) for p in first}) == len(first)
    with pytest.raises(ValueError, match="samples none"):
        NextItNetModule(9, shared_negatives=True)
