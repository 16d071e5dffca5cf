"""Training step, schedules and weights of the modules that every id model shares."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.types import Batch
from lightning_modules.errors import ModelError
from lightning_modules.popularity import RandomModule
from lightning_modules.sasrec import SASRecModule

HISTORY = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
TARGETS = torch.tensor([[2, 3, 0, 5], [0, 7, 0, 0]])  # zeros: context or padding


def _module(**settings: Any) -> SASRecModule:
    torch.manual_seed(0)
    module = SASRecModule(num_items=9, max_length=4, hidden_size=8, dropout=0.0, **settings)
    module.log = lambda *a, **k: None  # type: ignore[method-assign]
    module._trainer = type("T", (), {"precision": "32-true"})()  # type: ignore[assignment]
    return module


def _batch(normaliser: float, **extra: Any) -> Batch:
    rows = torch.arange(2)
    return Batch(
        rows, rows + 1, HISTORY, torch.tensor([4, 2]), targets=TARGETS,
        normaliser=torch.tensor(normaliser), **extra,
    )  # fmt: skip


def test_cross_entropy_is_over_real_targets_and_the_whole_catalogue() -> None:
    module = _module()
    loss = module.training_step(_batch(8.0), 0)
    states = module.network(HISTORY, torch.tensor([4, 2]))  # (B, T, d)
    logits = states @ module.item_vectors()[1:].T  # (B, T, I)
    where = TARGETS > 0
    expected = F.cross_entropy(logits[where], TARGETS[where] - 1, reduction="sum") / 8
    torch.testing.assert_close(loss, expected)


def test_a_batch_cut_in_two_has_the_gradient_of_the_whole() -> None:
    whole, parts = _module(), _module()
    whole.training_step(_batch(4.0), 0).backward()
    for row in (0, 1):
        batch = _batch(4.0)
        cut = Batch(
            batch.row[row : row + 1], batch.user[row : row + 1], HISTORY[row : row + 1],
            batch.length[row : row + 1], targets=TARGETS[row : row + 1], normaliser=batch.normaliser,
        )  # fmt: skip
        parts.training_step(cut, 0).backward()
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


@pytest.mark.parametrize("loss", ["sampled_ce", "bce", "gbce", "bpr"])
def test_sampled_losses_read_their_negatives(loss: str) -> None:
    module = _module(loss=loss, negatives=3)
    negatives = torch.full((2, 4, 3), 8)
    low = module.training_step(_batch(4.0, negatives=negatives), 0)
    with torch.no_grad():
        module.item_vectors()[8] += 5 * module.network(HISTORY, torch.tensor([4, 2]))[0, 3]
    assert module.training_step(_batch(4.0, negatives=negatives), 0) > low


def test_every_parameter_moves_and_the_padding_row_does_not() -> None:
    module = _module()
    module.training_step(_batch(4.0), 0).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0 or "position" in name, name
    assert module.item_vectors().grad is not None
    assert module.item_vectors().grad[0].abs().sum() == 0  # type: ignore[index]


def shares(steps: int, **options: Any) -> list[float]:
    """The learning rate of each step, as a share of its peak."""
    module = _module(**options)
    trainer = SimpleNamespace(estimated_stepping_batches=steps)
    module._trainer = trainer  # type: ignore[assignment]
    share = module.configure_optimizers()["lr_scheduler"]["scheduler"].lr_lambdas[0]
    return [share(step) for step in range(steps + 1)]


def test_schedules() -> None:
    rates = shares(100, warmup=0.1, schedule="cosine")
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[55] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.5)))
    assert rates[100] == pytest.approx(0.0)
    assert shares(100)[57] == 1.0
    # A warm-up of no share is a step; the fall then takes 98 of 99.
    assert shares(99, schedule="linear")[50] == pytest.approx(0.5)


def test_scores_of_blocks_and_of_lists_agree() -> None:
    module = _module().eval()
    state = module.encode(_batch(1.0))
    everything = module.score(state, torch.arange(1, 10))
    lists = torch.tensor([[3, 9], [1, 1]])
    torch.testing.assert_close(module.score(state, lists), everything.gather(1, lists - 1))


def test_weights_round_trip_and_misfits_are_listed(tmp_path: Path) -> None:
    first, second = _module(), SASRecModule(num_items=9, max_length=4, hidden_size=8)
    path = tmp_path / "best.ckpt"
    torch.save({"state_dict": first.state_dict()}, path)
    second.load_weights(path)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    wider = SASRecModule(num_items=9, max_length=4, hidden_size=16, num_blocks=3)
    with pytest.raises(ModelError, match=r"blocks\.2.* is missing.*item_embedding.*is \(10, 8\)"):
        wider.load_weights(path)


def test_a_compiled_step_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph and its gradients, traced for any shape; the code generator itself is torch's affair."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain, compiled = _module(), _module()
    compiled.load_state_dict(plain.state_dict())
    compiled.compile_training()
    assert compiled.state_dict().keys() == plain.state_dict().keys(), "checkpoints stay the same"
    for columns in (4, 3):
        losses = []
        for module in (plain, compiled):
            batch = _batch(4.0)
            batch.history, batch.targets = batch.history[:, :columns], batch.targets[:, :columns]
            batch.length = batch.length.clamp(max=columns)
            losses.append(module.training_step(batch, 0))
            losses[-1].backward()
        torch.testing.assert_close(*losses)
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_what_has_no_network_cannot_be_compiled() -> None:
    with pytest.raises(ValueError, match=r"RandomModule has nothing to compile: launch\.compile"):
        RandomModule().compile_training()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 1.5}, r"label_smoothing=1.5 is not at least 0 and below 1"),
        ({"label_smoothing": 0.1, "loss": "bce"}, "label_smoothing means nothing with loss=bce"),
        ({"learning_rate": -1}, "learning_rate=-1 is not above 0"),
        ({"warmup": 2}, "warmup=2 is not at least 0 and at most 1"),
        ({"scalable_items": 0}, "scalable_items=0 is not at least 1"),
        ({"gbce_calibration": 3}, "gbce_calibration=3 is not at least 0 and at most 1"),
        ({"bpr_max_penalty": -1, "weight_decay": -2}, "bpr_max_penalty=-1 .*; weight_decay=-2"),
        ({"table_learning_rate": 0}, "table_learning_rate=0 is not above 0"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SASRecModule(num_items=9, **settings)


def test_the_item_table_is_made_once_for_an_evaluation_and_scored_wide() -> None:
    module = SASRecModule(num_items=9, hidden_size=8).eval()
    made: list[int] = []
    table = module.item_vectors

    def counted() -> Tensor:
        made.append(1)
        return table()

    module.item_vectors = counted  # type: ignore[method-assign]
    module._table = module.item_vectors()
    state, items = torch.randn(2, 8), torch.arange(1, 10)
    for _ in range(3):
        scores = module.score(state, items)
    assert made == [1]
    module._table = None
    assert torch.equal(module.score(state, items), scores)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module.score(state, items).dtype == torch.float32
    narrow = module.bfloat16()
    assert narrow.score(state.bfloat16(), items).dtype == torch.float32
    assert module.double().score(state.double(), items).dtype == torch.float64


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one sampled item"):
        _module(loss="bce", negatives=0)
    with pytest.raises(ValueError, match="max_length"):
        SASRecModule(num_items=9, max_length=0)
