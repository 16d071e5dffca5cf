"""Watches one training step that is computed again: where the first value appears that is no number."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn


class Enough(Exception):  # noqa: N818 - no error
    """The step is computed; nothing is to be learned from it."""


@dataclass
class Found:
    """What became of the step.

    Args:
        loss: its value; None where the step did not come to it.
        module: the first module whose output was not finite, and what it read.
        last: the last module that answered before the loss.
        gradients: norm by parameter, in the order of the backward pass.
        operation: the first operation of the backward pass that made NaN, and where it stands.
        raised: an error that the step ended with.
    """

    loss: float | None = None
    module: str | None = None
    last: str | None = None
    gradients: dict[str, float] = field(default_factory=dict)
    operation: str | None = None
    raised: str | None = None

    @property
    def norm(self) -> float:
        """Of all gradients together."""
        return sum(norm**2 for norm in self.gradients.values()) ** 0.5

    @property
    def finite(self) -> bool:
        """Whether loss and gradients are numbers."""
        values = [*self.gradients.values(), float("nan") if self.loss is None else self.loss]
        return self.raised is None and all(abs(v) < float("inf") for v in values)


class FirstNonFinite(pl.Callback):
    """Puts a step's weights and counts in place, watches it, and ends the fit behind its backward pass.

    Args:
        weights: by parameter, from before the step.
        global_step, epoch: of the step.
        code: our own folder: of an operation the last line in it is told.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], global_step: int, epoch: int, code: Path
    ) -> None:
        self.weights, self.global_step, self.epoch, self.code = weights, global_step, epoch, code
        self.found = Found()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the weights, and count steps as if those before had been made."""
        with torch.no_grad():
            for name, value in (*pl_module.named_parameters(), *pl_module.named_buffers()):
                if name in self.weights:
                    value.copy_(self.weights[name])
        loop = trainer.fit_loop
        epochs: Any = loop.epoch_progress.current
        epochs.processed = epochs.completed = self.epoch
        steps = loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
        steps.total.completed = self.global_step
        for name, module in pl_module.named_modules():
            if name:
                module.register_forward_hook(self._answered(name))
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._learned(name))

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Go backward twice: until the first NaN, whose operation is told, and to the end."""
        self.found.loss = float(loss.detach())
        trained = [p for p in pl_module.parameters() if p.requires_grad]
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
            except RuntimeError as error:
                self.found.operation = self._operation(str(error), [str(w.message) for w in told])
        torch.autograd.set_detect_anomaly(False)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The step has been seen."""
        raise Enough

    def _answered(self, name: str) -> Any:
        def hook(module: nn.Module, given: Any, answer: Any) -> None:
            if self.found.loss is not None:
                return
            self.found.last = name
            if self.found.module is None and (wrong := _wrong(answer)):
                own = [n for n, p in module.named_parameters() if not p.isfinite().all()]
                reason = f"its {', '.join(own)} is not finite" if own else "its weights are finite"
                read = _wrong(given)
                reads = f"what it reads has {read}" if read else "what it reads is finite"
                kind = type(module).__name__
                self.found.module = f"{name} ({kind}) answers {wrong}; {reads}, {reason}"

        return hook

    def _learned(self, name: str) -> Any:
        def hook(parameter: Tensor) -> None:
            gradient = parameter.grad
            if gradient is not None:
                values = gradient.coalesce().values() if gradient.is_sparse else gradient
                self.found.gradients[name] = float(values.double().norm())

        return hook

    def _operation(self, error: str, told: list[str]) -> str:
        """``DivBackward0, of lightning_modules/next_item.py:196``, from what torch tells of an anomaly."""
        what = error.partition("'")[2].partition("'")[0] or error.partition("\n")[0]
        lines = [line.strip() for text in told for line in text.splitlines()]
        begins = f'File "{self.code}/'
        ours = [li for li in lines if li.startswith(begins) and "site-packages" not in li]
        if not ours:
            return what
        file, number = ours[-1].split(", ")[:2]
        with suppress(ValueError):
            path = Path(file.removeprefix('File "').rstrip('"')).relative_to(self.code)
            return f"{what}, of {path}:{number.removeprefix('line ')}"
        return what

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """What else the step ended with."""
        if not isinstance(exception, Enough):
            self.found.raised = "".join(traceback.format_exception_only(exception)).strip()


def _wrong(value: Any) -> str | None:
    """``nan in 3 of 12 values`` of the first tensor that has any; None where all are numbers."""
    for tensor in _tensors(value):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            names = (("nan", tensor.isnan()), ("inf", tensor.isinf()))
            counts = [f"{name} in {int(w.sum())}" for name, w in names if w.any()]
            return f"{' and '.join(counts)} of {tensor.numel()} values"
    return None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value.detach()
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)
