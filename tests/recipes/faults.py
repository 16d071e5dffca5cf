"""Faults that a test switches on with ``+callbacks.fault={_target_: faults.X, ...}`` (not hashed)."""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from callbacks.nonfinite import NonFinite, NonFiniteError


def die() -> None:
    """As if the machine had lost power: no handler, no cleaning up."""
    os.kill(os.getpid(), signal.SIGKILL)


class KillAtStep(pl.Callback):
    """Die right after optimizer step ``step``, counted over the whole run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *unused: Any) -> None:
        if trainer.global_step == self.step:
            die()


class KillInCheckpoint(pl.Callback):
    """Die when half of the ``number``-th checkpoint file of this process is written."""

    def __init__(self, number: int) -> None:
        self.left = number

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        whole = torch.save

        def save(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            self.left -= 1
            whole(value, file, *args, **kwargs)
            if self.left == 0:
                file.flush()
                os.ftruncate(file.fileno(), file.tell() // 2)
                die()

        torch.save = save  # type: ignore[assignment]


class KillAfterFit(pl.Callback):
    """Die when training is over and nothing but ``done.json`` is missing."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        die()


class Linger(pl.Callback):
    """Report the process id at a step, then take ``seconds`` for each step from there on.

    ``rank``: the only one that is slow, so that the others wait for it inside the next step. ``until``: a
    file; once it is there, nobody is slow.
    """

    def __init__(
        self,
        step: int,
        note: str,
        seconds: float = 0.5,
        rank: int | None = None,
        until: str | None = None,
    ) -> None:
        self.step, self.note, self.seconds, self.rank = step, Path(note), seconds, rank
        self.until = until

    def on_train_batch_end(self, trainer: pl.Trainer, *unused: Any) -> None:
        if trainer.global_step >= self.step and not (self.until and Path(self.until).exists()):
            if not self.note.exists() and trainer.is_global_zero:
                part = self.note.with_suffix(".part")
                part.write_text(str(os.getpid()))
                part.replace(self.note)
            if self.rank in (None, trainer.global_rank):
                time.sleep(self.seconds)


def ask() -> None:
    """Ask this process to stop, twice, as a cluster would."""
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGUSR1)


class AskAtBatch(pl.Callback):
    """Ask at batch ``number`` of the whole fit."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_train_batch_start(self, trainer: pl.Trainer, *unused: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.number:
            ask()


class AskInTest(pl.Callback):
    """Ask at the first batch of a test or a prediction."""

    def on_test_batch_start(self, *unused: Any) -> None:
        ask()

    def on_predict_batch_start(self, *unused: Any) -> None:
        ask()


class RowsLog(pl.Callback):
    """Write down which rows each rank learned from: epoch, rows."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        line = json.dumps([trainer.current_epoch, batch.row.tolist()])
        with (self.folder / f"rank{trainer.global_rank}.jsonl").open("a") as file:
            file.write(f"{line}\n")


class KillRank(pl.Callback):
    """One rank of several dies at a step."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def on_train_batch_end(self, trainer: pl.Trainer, *unused: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            die()


class KillInFile(pl.Callback):
    """Die when half of a file whose name has ``name`` in it is written, by whatever name it has till then."""

    def __init__(self, name: str) -> None:
        replaced = os.replace

        def replace(source: Any, target: Any) -> None:
            if name in Path(source).name:
                os.truncate(source, Path(source).stat().st_size // 2)
                die()
            replaced(source, target)

        os.replace = replace  # type: ignore[assignment]
        Path.replace = lambda self, target: replace(self, target)  # type: ignore[method-assign,assignment,misc]


class LimitFiles(pl.Callback):
    """From step ``step`` on no file may be larger: writing fails where the system writes."""

    def __init__(self, step: int, size: int) -> None:
        self.step, self.size = step, size

    def on_train_batch_end(self, trainer: pl.Trainer, *unused: Any) -> None:
        if trainer.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


class SpoilBatch(pl.Callback):
    """The loss of batch ``number`` of the fit is divided by nothing."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.number:
            batch.normaliser.zero_()


class CallNonFinite(pl.Callback):
    """Batch ``number`` of the fit is kept as if its loss were no number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: torch.Tensor) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.number:
            (keeper,) = (c for c in trainer.callbacks if isinstance(c, NonFinite))
            raise NonFiniteError(f"{keeper._keep(trainer, pl_module, loss)}")


class NoMemory(pl.Callback):
    """Ask for more memory than there is, at a step of a fit or the first batch of a test."""

    def on_train_batch_start(self, *unused: Any) -> None:
        torch.empty(2**50)

    def on_test_batch_start(self, *unused: Any) -> None:
        torch.empty(2**50)


class ClockBack(pl.Callback):
    """The day's clock is set back by an hour at every batch."""

    def __init__(self) -> None:
        self.hours = 0
        now = time.time
        time.time = lambda: now() - 3600 * self.hours  # type: ignore[assignment]

    def on_train_batch_start(self, *unused: Any) -> None:
        self.hours += 1


class NoPackage(pl.Callback):
    """Something needs a package that is not there."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_start(self, *unused: Any) -> None:
        importlib.import_module(self.name)


class InFlight(pl.Callback):
    """Something happens at batch ``number`` of a prediction."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_predict_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int, *unused: Any
    ) -> None:
        if batch_idx == self.number:
            self.happen(pl_module)

    def happen(self, pl_module: Any) -> None:
        raise NotImplementedError


class KillInFlight(InFlight):
    """Die when the texts of the batch are written, and nobody has stored them."""

    def happen(self, pl_module: Any) -> None:
        pl_module.generations.take_fresh = die


class InterruptInFlight(InFlight):
    """Send Ctrl-C while the batch is written."""

    def happen(self, pl_module: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
