"""How fast a stage was: rows and tokens a second, and how much of it was padding."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl


class Throughput(pl.Callback):
    """Counts what training or testing has read; the clock stands still while a fit validates.

    Counted in this process alone, since it began: a resumed run knows nothing of what was before.
    """

    def __init__(self) -> None:
        self.rows = self.tokens = self.padding = 0
        self.seconds = 0.0
        self._since: float | None = None

    def summary(self) -> dict[str, float]:
        """Rows a second, and of batches with tokens those a second and the share of padding among all."""
        if not self.rows or not self.seconds:
            return {}
        found = {"rows_per_second": self.rows / self.seconds}
        if self.tokens:
            found["tokens_per_second"] = self.tokens / self.seconds
            found["padding"] = self.padding / (self.tokens + self.padding)
        return {name: round(value, 4) for name, value in found.items()}

    def _go(self, *unused: Any) -> None:
        if self._since is None:
            self._since = time.monotonic()

    def _stop(self, *unused: Any) -> None:
        if self._since is not None:
            self.seconds += time.monotonic() - self._since
            self._since = None

    def _count(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.rows += len(batch.row) * trainer.world_size
        if (mask := getattr(batch, "token_mask", None)) is not None:
            real = int(mask.sum())
            self.tokens += real * trainer.world_size
            self.padding += (mask.numel() - real) * trainer.world_size

    on_train_epoch_start = on_validation_end = on_test_start = _go
    on_train_epoch_end = on_validation_start = on_test_end = _stop
    on_train_batch_end = on_test_batch_end = _count
