"""Seconds of each step and batch of a short run, from which a long one is foreseen."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch


class StepClock(pl.Callback):
    """Seconds of each optimizer step and of each batch of an evaluation, from end to end."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {"train": [], "val": [], "test": [], "predict": []}
        self.opened: dict[str, float] = {}  # when each loop began
        self.closed: dict[str, float] = {}
        self.tokens = False  # whether batches hold any
        self._since = 0.0

    def _open(self, name: str) -> None:
        self._since = self.opened[name] = _now()

    def _note(self, name: str, batch: Any) -> None:
        self.tokens |= getattr(batch, "token_mask", None) is not None
        now = _now()
        self.seconds[name].append(now - self._since)
        self._since = now

    def on_train_start(self, *unused: Any) -> None:
        """The clock runs."""
        self._open("train")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Behind an optimizer step, a time."""
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            self._note("train", batch)

    def on_validation_start(self, *unused: Any) -> None:
        """The clock runs."""
        self._open("val")

    def on_validation_batch_end(
        self, trainer: Any, module: Any, out: Any, batch: Any, *u: Any
    ) -> None:
        """A time."""
        self._note("val", batch)

    def on_validation_end(self, *unused: Any) -> None:
        """The clock stands still."""
        self.closed["val"] = _now()

    def on_train_end(self, *unused: Any) -> None:
        """The clock stands still."""
        self.closed["train"] = _now()

    def on_test_start(self, *unused: Any) -> None:
        """The clock runs."""
        self._open("test")

    def on_test_batch_end(self, trainer: Any, module: Any, out: Any, batch: Any, *u: Any) -> None:
        """A time."""
        self._note("test", batch)

    def on_test_end(self, *unused: Any) -> None:
        """The clock stands still."""
        self.closed["test"] = _now()

    def on_predict_start(self, *unused: Any) -> None:
        """The clock runs."""
        self._open("predict")

    def on_predict_batch_end(
        self, trainer: Any, module: Any, out: Any, batch: Any, *u: Any
    ) -> None:
        """A time."""
        self._note("predict", batch)

    def on_predict_end(self, *unused: Any) -> None:
        """The clock stands still."""
        self.closed["predict"] = _now()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()
