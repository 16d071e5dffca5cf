"""Checkpoints that survive a kill at any moment, and the choice of the best epoch on validation."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

LAST, BEFORE = "last.ckpt", "last.before.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames; the ``last.ckpt`` before is kept as ``last.before.ckpt``.

    Lightning's own writer goes through the system's temporary folder; when that is another file
    system, its last step is a copy, and a kill during it leaves half a checkpoint.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Save ``checkpoint`` whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:  # a full disk needs its room
            part.unlink(missing_ok=True)
            raise
        if path.name == LAST and path.is_file():
            _keep_before(path)
        os.replace(part, path)

    def load_checkpoint(
        self,
        path: Any,
        map_location: Callable[..., Any] | None = None,
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Load without unpickling objects, whatever the caller asked for."""
        loaded: dict[str, Any] = super().load_checkpoint(path, map_location, weights_only=True)
        return loaded


def _keep_before(path: Path) -> None:
    """At every moment there is a ``last.ckpt``: what becomes of it is linked, not moved."""
    link = path.with_name(f".{BEFORE}.part")
    with suppress(OSError):  # a file system without links keeps the last one alone
        link.unlink(missing_ok=True)
        os.link(path, link)
        os.replace(link, path.with_name(BEFORE))


def unreadable(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be read, or is not as it was written; None where it can.

    Our own writer leaves no half file, but a full disk or a broken copy may. torch does not look at the
    check sums that it writes.
    """
    try:
        with zipfile.ZipFile(checkpoint) as parts:
            if wrong := parts.testzip():
                return f"{wrong} in it is damaged"
        torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:
        return str(error).partition("\n")[0]
    return None


class Patience(EarlyStopping):
    """Early stopping that a resumed run obeys.

    Lightning forgets ``should_stop`` over a restart: a run that was killed after its last epoch and
    before its results were written would train one epoch more than an uninterrupted one.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop at once if the checkpoint says that patience had run out."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True


class Checkpoint(ModelCheckpoint):
    """A choice of epochs that survives a move of the run folder.

    Lightning forgets the best score so far when a checkpoint was written elsewhere: the next epoch,
    however bad, would then be the best.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state, with its paths as if it had been written here."""
        old, new = str(state_dict["dirpath"]), str(self.dirpath)

        def here(value: Any) -> Any:
            if isinstance(value, dict):
                return {here(path): score for path, score in value.items()}
            return value.replace(old, new, 1) if isinstance(value, str) else value

        super().load_state_dict({name: here(value) for name, value in state_dict.items()})


def checkpoints(folder: Path, metric: str | None, mode: str) -> tuple[Checkpoint, Checkpoint]:
    """``best.ckpt`` by a validation metric (the newest epoch without one) and ``last.ckpt``, each epoch.

    Two callbacks, because one ``ModelCheckpoint`` writes its last only in epochs that are also best.
    ``last`` comes second, so that it knows the best of its own epoch.
    """
    options: dict[str, Any] = {
        "dirpath": folder,
        "save_on_train_epoch_end": True,  # after validation, so that a checkpoint closes its epoch
        "enable_version_counter": False,
        "auto_insert_metric_name": False,
    }
    best = Checkpoint(filename="best", monitor=metric, mode=mode, **options)
    last = Checkpoint(filename="last", every_n_epochs=1, monitor=None, **options)
    last.CHECKPOINT_NAME_LAST = "last"
    return best, last
