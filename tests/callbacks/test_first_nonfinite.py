"""Where a step that is computed again stops being a number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from callbacks.first_nonfinite import Enough, FirstNonFinite, Found

HERE = Path(__file__).parent


class Exponential(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


class Learner(pl.LightningModule):
    """The mean of exp(weight * x), or its root, whose slope is infinite at 0."""

    def __init__(self, root: bool) -> None:
        super().__init__()
        self.root = root
        self.scale = nn.Linear(1, 1, bias=False)
        self.grow = Exponential()
        self.steps: list[tuple[int, int]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.steps.append((self.trainer.global_step, self.current_epoch))
        grown = self.grow(self.scale(batch))
        return ((grown * 0).sqrt() if self.root else grown).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def step(weight: float, precision: Any, root: bool = False) -> Found:
    probe = FirstNonFinite({"scale.weight": torch.tensor([[weight]])}, 7, 2, HERE)
    learner = Learner(root)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, precision=precision, max_epochs=3, detect_anomaly=True,
        callbacks=[probe],
    )  # fmt: skip
    with pytest.raises(Enough):
        trainer.fit(learner, DataLoader([torch.ones(3, 1)], batch_size=None))
    assert learner.steps == [(7, 2)]
    assert learner.scale.weight.item() == pytest.approx(weight), "nothing is learned"
    assert not torch.is_anomaly_enabled()
    return probe.found


def test_a_sound_step_tells_its_loss_and_gradients() -> None:
    found = step(2.0, "64-true")
    assert found.finite
    assert found.loss == pytest.approx(torch.e**2, rel=1e-6)
    assert found.gradients == {"scale.weight": pytest.approx(torch.e**2, rel=1e-6)}
    assert found.norm == pytest.approx(torch.e**2, rel=1e-6)
    assert (found.module, found.operation) == (None, None)


def test_what_is_too_large_for_single_precision_is_told_with_its_module() -> None:
    found = step(100.0, "32-true")  # exp(100) is 2.7e43
    assert not found.finite
    assert found.loss == float("inf")
    answers = "grow (Exponential) answers inf in 3 of 3 values"
    assert found.module == f"{answers}; what it reads is finite, its weights are finite"
    assert step(100.0, "64-true").finite


def test_a_weight_that_is_no_number_is_told_with_its_module() -> None:
    found = step(float("inf"), "32-true")
    assert found.module is not None
    assert found.module.startswith("scale (Linear) answers inf in 3 of 3 values")
    assert found.module.endswith("its weight is not finite")


def test_a_gradient_that_is_no_number_is_told_with_its_line() -> None:
    found = step(1.0, "32-true", root=True)  # 0 * inf, behind a loss of 0
    assert found.loss == 0
    assert found.module is None
    assert not found.finite
    assert list(found.gradients) == ["scale.weight"]
    assert found.operation is not None
    line = 1 + Path(__file__).read_text().splitlines().index(
        "        return ((grown * 0).sqrt() if self.root else grown).mean()"
    )
    assert found.operation.endswith(f", of test_first_nonfinite.py:{line}"), found.operation
