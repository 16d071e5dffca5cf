"""How fast a stage was: rows, users, steps and tokens by the clock, and how much of it was padding."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
import torch


class Throughput(pl.Callback):
    """Counts what training or testing has read; the clock stands still while a fit validates.

    Counted in this process alone, since it began: a resumed run knows nothing of what was before. Tokens that
    all rows begin with, as many as a module's ``shared_tokens``, count once for each batch of a fit and once
    for a whole test, since they are computed so often.
    """

    def __init__(self) -> None:
        # Sums stay on the device: asking for one would wait for the GPU after every batch.
        self._sums = torch.zeros(0, dtype=torch.long)
        self._users: list[torch.Tensor] = []  # of the rows of a test
        self.seconds = 0.0
        self.steps = 0  # of the optimizer
        self._shared = 0  # tokens that every row begins with and that are not computed for each
        self._first_step: int | None = None
        self._processes = 1
        self._since: float | None = None

    def counts(self) -> tuple[int, int, int, int]:
        """Rows, tokens, padding, and that of packed rows, had they been padded to their batch's longest."""
        rows, tokens, padding, unpacked = self._sums.tolist() or [0] * 4
        return rows, tokens, padding, unpacked

    def summary(self) -> dict[str, float]:
        """Rows a second, of a test also users, of a fit the seconds of a step; of batches with tokens those a
        second, the share of padding among all, and how many at the rows' beginning were computed for all of
        them at once.
        """
        rows, tokens, padding, unpacked = self.counts()
        if not rows or not self.seconds:
            return {}
        found = {"rows_per_second": rows / self.seconds}
        if self.steps:
            found["seconds_per_step"] = self.seconds / self.steps
        if self._users:
            users = len(torch.cat(self._users).unique()) * self._processes
            found["users_per_second"] = users / self.seconds
        if tokens:
            found["tokens_per_second"] = tokens / self.seconds
            found["padding"] = padding / (tokens + padding)
            if self._shared:
                found["shared_tokens"] = self._shared
        if unpacked:
            found["padding_without_packing"] = unpacked / (tokens + unpacked)
        return {name: round(value, 4) for name, value in found.items()}

    def told(self) -> str | None:
        """The summary in words, of batches with tokens; None of others."""
        found = self.summary()
        if "padding" not in found:
            return None
        without = found.get("padding_without_packing")
        shared = found.get("shared_tokens")
        step, users = found.get("seconds_per_step"), found.get("users_per_second")
        when = "once" if step is None else "once a batch"
        return (
            ("" if step is None else f"{step:.3g} s a step, ")
            + ("" if users is None else f"{users:.3g} users/s, ")
            + f"{found['rows_per_second']:.3g} rows/s, {found['tokens_per_second']:.0f} tokens/s; "
            f"padding was {found['padding']:.1%} of all tokens"
            + ("" if without is None else f", without packing {without:.1%}")
            + (
                ""
                if shared is None
                else f"; the {shared:.0f} that all rows begin with were read {when}"
            )
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The clock runs; a fit that goes on inside an epoch has no start of one."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The clock runs."""
        if self._first_step is None:
            self._first_step = trainer.global_step
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
        self.steps = trainer.global_step - (self._first_step or 0)
        self._shared = getattr(pl_module, "shared_tokens", 0)
        self._count(trainer, batch, read=self._shared)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The clock runs."""
        self._processes = trainer.world_size
        self._go()

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, *unused: Any
    ) -> None:
        """Count a batch."""
        first = not self._users
        self._users.append(batch.user)
        self._shared = getattr(pl_module, "shared_tokens", 0)
        self._count(trainer, batch, read=self._shared if first else 0)

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

    def _count(self, trainer: pl.Trainer, batch: Any, read: int) -> None:
        """Add a batch's rows, tokens, padding, and the padding that packed rows would have had.

        Args:
            trainer: tells how many processes count alike.
            batch: of rows, each of which begins with the shared tokens.
            read: shared tokens that were computed for this batch.
        """
        mask = getattr(batch, "token_mask", None)
        told = batch.row if mask is None else mask
        zero = torch.zeros((), dtype=torch.long, device=told.device)
        rows, tokens, padding, unpacked = zero + len(told), zero, zero, zero
        if mask is not None:
            tokens = mask.sum()
            padding = mask.numel() - tokens
            tokens = tokens - self._shared * len(mask) + read
            if (positions := getattr(batch, "positions", None)) is not None:  # several rows in one
                rows = ((positions == 0) & mask.bool()).sum()
                longest = torch.where(mask.bool(), positions, 0).max() + 1
                unpacked = rows * longest - tokens
        added = torch.stack([rows, tokens, padding, unpacked]) * trainer.world_size
        self._sums = added + self._sums.to(added.device) if len(self._sums) else added
