"""One bar for a whole run: epochs, speed, the selected metric and its best, time to go."""

from __future__ import annotations

import operator
import sys
import time
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0  # between lines where there is no terminal


class RunProgress(pl.Callback):
    """Shows fits, tests and predictions on stderr; a line every ten seconds where that is a file.

    Args:
        label: what is running.
        metric: validation metric to show with its best value so far.
        mode: ``max`` or ``min``: which of two values is the better one.
    """

    def __init__(self, label: str, metric: str | None = None, mode: str = "max") -> None:
        self.label, self.metric = label, metric
        self._better = operator.gt if mode == "max" else operator.lt
        self.best: tuple[float, int] | None = None
        self._latest: float | None = None
        self._bar: Progress | None = None
        self._task: Any = None
        self._printed = time.monotonic()
        self._done = self._total = 0
        self._shown = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin at the step a resumed run goes on from."""
        if _by_steps(trainer):
            a_step = trainer.accumulate_grad_batches
            self._open(trainer, trainer.max_steps * a_step, trainer.global_step * a_step)
            return
        batches = int(trainer.num_training_batches)
        self._open(trainer, batches * int(trainer.max_epochs or 1), batches * trainer.current_epoch)

    def on_train_batch_end(self, trainer: pl.Trainer, *unused: Any) -> None:
        """One step on."""
        self._advance(self._text(trainer))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up the metric."""
        value = trainer.callback_metrics.get(self.metric or "")
        if value is not None:
            self._latest = float(value)
            if self.best is None or self._better(self._latest, self.best[0]):
                self.best = (self._latest, trainer.current_epoch + 1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar with the last word."""
        self._close(self._text(trainer))

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin at zero."""
        self._open(trainer, int(sum(trainer.num_test_batches)), 0)

    def on_test_batch_end(self, trainer: pl.Trainer, *unused: Any) -> None:
        """One batch on."""
        self._advance("")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        self._close("")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin at zero."""
        self._open(trainer, int(sum(trainer.num_predict_batches)), 0)

    def on_predict_batch_end(self, trainer: pl.Trainer, *unused: Any) -> None:
        """One batch on."""
        self._advance("")

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        self._close("")

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leave the terminal in order."""
        self._close("stopped")

    def state_dict(self) -> dict[str, Any]:
        """The best so far, so that a resumed bar still knows it."""
        return {"best": list(self.best) if self.best else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up again."""
        best = state_dict["best"]
        self.best = (float(best[0]), int(best[1])) if best else None

    def _text(self, trainer: pl.Trainer) -> str:
        epochs = trainer.max_epochs
        text = f"epoch {min(trainer.current_epoch + 1, epochs or 1)}/{epochs}"
        if _by_steps(trainer):
            text = f"step {trainer.global_step}/{trainer.max_steps}"
        loss = trainer.callback_metrics.get("train/loss")
        if loss is not None:
            text += f"  loss {float(loss):.3f}"
        if self._latest is not None and self.best is not None:
            name = str(self.metric).rpartition("/")[2]
            text += f"  {name} {self._latest:.4f} (best {self.best[0]:.4f} in {self.best[1]})"
        return text

    def _open(self, trainer: pl.Trainer, total: int, done: int) -> None:
        self._total, self._done = total, done
        self._shown = trainer.is_global_zero and total > 0
        if not trainer.is_global_zero or not sys.stderr.isatty():
            return
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.percentage:3.0f}%"),
            TimeElapsedColumn(), TextColumn("<"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
            console=Console(stderr=True), refresh_per_second=4,
        )  # fmt: skip
        self._task = self._bar.add_task(self.label, total=total, completed=done, note="")
        self._bar.start()

    def _advance(self, note: str) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, note=note)
        elif self._shown and time.monotonic() - self._printed > PLAIN_SECONDS:
            self._printed = time.monotonic()
            sys.stderr.write(f"{self.label} {self._done / self._total:4.0%}  {note}\n")

    def _close(self, note: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, note=note)
            self._bar.stop()
            self._bar = None


def _by_steps(trainer: pl.Trainer) -> bool:
    """Whether a number of steps ends a fit, and no number of epochs does."""
    return trainer.max_steps > 0 and trainer.max_epochs in (None, -1)
