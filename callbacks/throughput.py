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
        self.unpacked = 0  # padding, had packed rows been padded to the longest of their batch
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
        if self.unpacked:
            found["padding_without_packing"] = self.unpacked / (self.tokens + self.unpacked)
        return {name: round(value, 4) for name, value in found.items()}

    def told(self) -> str | None:
        """The summary in words, of batches with tokens; None of others."""
        found = self.summary()
        if "padding" not in found:
            return None
        without = found.get("padding_without_packing")
        return (
            f"{found['rows_per_second']:.1f} rows/s, {found['tokens_per_second']:.0f} tokens/s; "
            f"padding was {found['padding']:.1%} of all tokens"
            + ("" if without is None else f", without packing {without:.1%}")
        )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The clock runs."""
        self._go()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The clock stands still."""
        self._stop()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The clock runs on."""
        self._go()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The clock stands still."""
        self._stop()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a batch."""
        self._count(trainer, batch)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The clock runs."""
        self._go()

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, *unused: Any
    ) -> None:
        """Count a batch."""
        self._count(trainer, batch)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The clock stands still."""
        self._stop()

    def _go(self) -> None:
        if self._since is None:
            self._since = time.monotonic()

    def _stop(self) -> None:
        if self._since is not None:
            self.seconds += time.monotonic() - self._since
            self._since = None

    def _count(self, trainer: pl.Trainer, batch: Any) -> None:
        mask = getattr(batch, "token_mask", None)
        rows = len(batch.row if mask is None else mask)
        if mask is not None:
            real = int(mask.sum())
            self.tokens += real * trainer.world_size
            self.padding += (mask.numel() - real) * trainer.world_size
            if (positions := getattr(batch, "positions", None)) is not None:  # several rows in one
                own = positions[mask.bool()]
                rows = int((own == 0).sum())
                self.unpacked += (rows * (int(own.max()) + 1) - real) * trainer.world_size
        self.rows += rows * trainer.world_size
