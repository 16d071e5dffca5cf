"""``StageModule``: what the runner asks of all that it trains or tests, whatever it learns from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from lightning_modules.errors import ModelError


class StageModule(pl.LightningModule):
    """Dropout that a resumed run repeats, and checkpoints of what was trained alone."""

    # Weights that the constructor rebuilds bit-equal (frozen backbones) stay out of checkpoints.
    strict_loading = False
    # What its validation logs, where it ranks nothing: an epoch can be chosen by these.
    validated: tuple[str, ...] = ("val/loss",)

    def __init__(self) -> None:
        super().__init__()
        self._weights: Path | None = None  # the checkpoint that was given

    def untrainable(self, trainer: pl.Trainer) -> str | None:
        """Why a trainer's settings cannot train this method; None where they can."""
        return None

    def precision_plugin(self, device: str, strategy: str) -> Precision | None:
        """How this method is computed on ``device`` (cpu, cuda), where that is part of the method.

        Raises:
            ValueError: the device or the strategy cannot do it.
        """
        return None

    def sharded_strategy(self, devices: int) -> Strategy:
        """What ``launch.strategy=fsdp`` means: weights that are spread over ``devices``, of all nodes.

        Raises:
            ValueError: the method's weights fit on every device.
        """
        raise ValueError(
            f"{type(self).__name__} has no large weights to spread over devices: launch.strategy=ddp"
        )

    def remarks(self) -> list[str]:
        """What a user should know of a finished stage besides its metrics."""
        return []

    def compile_training(self) -> None:
        """Pass what a training step computes through ``torch.compile``; results change by rounding, and by
        which numbers dropout draws.

        Raises:
            ValueError: the method has nothing to compile.
        """
        raise ValueError(f"{type(self).__name__} has nothing to compile: launch.compile=false")

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass instead of keeping them: less memory, more work.

        Raises:
            ValueError: the method has none that would matter.
        """
        raise ValueError(
            f"{type(self).__name__} keeps few activations: launch.activation_checkpointing=false"
        )

    def log_train_loss(self, loss: Tensor) -> None:
        """Log ``train/loss``: divided by the global batch's count, its mean over ranks is the batch's."""
        self.log(
            "train/loss", loss, prog_bar=True, on_step=False, on_epoch=True, batch_size=1,
            sync_dist=True,
        )  # fmt: skip

    # Reproducible dropout ----------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        """Draw this step's dropout from (seed, step, rank), so that a resumed run draws the same.

        No random state has to be kept in a checkpoint, and ranks never share a stream.
        """
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        step = self.trainer.fit_loop.epoch_loop.total_batch_idx
        torch.manual_seed(mix_seeds(data.seed, step, self.global_rank))

    # Checkpoints ---------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was trained, and buffers; what is frozen is rebuilt by the constructor."""
        parameters = self.named_parameters(remove_duplicate=False)
        # By name: quantized layers add scales to the state dict that are neither parameters nor buffers.
        kept = {n for n, p in parameters if p.requires_grad} | {n for n, _ in self.named_buffers()}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {n: v for n, v in state.items() if n in kept}

    @property
    def has_parts(self) -> bool:
        """Whether all that has weights is there; some parts are loaded or sized when a trainer is known."""
        return True

    def load_weights(self, path: str | Path) -> None:
        """Take the trained weights of a checkpoint: at once, or when the module's parts are there.

        Raises:
            ModelError: see ``take_weights``.
        """
        self._weights = Path(path)
        if self.has_parts:
            self.take_weights()

    def take_weights(self) -> None:
        """Take those of the checkpoint that was given, if any; a module calls it when its parts are there.

        Raises:
            ModelError: a trained weight is missing from the file, unknown to this module, or of another
                shape; every such name is listed. Or see ``require_same_settings``.
        """
        path = self._weights
        if path is None:
            return
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        self.require_same_settings(path, checkpoint)
        state = checkpoint["state_dict"]
        mine = self.state_dict()
        trained = {n for n, p in self.named_parameters() if p.requires_grad}
        problems = [f"{n} is missing" for n in sorted(trained - state.keys())]
        problems += [f"{n} is unknown" for n in sorted(state.keys() - mine.keys())]
        problems += [
            f"{n} is {tuple(state[n].shape)}, expected {tuple(mine[n].shape)}"
            for n in sorted(state.keys() & mine.keys())
            if state[n].shape != mine[n].shape
        ]
        if problems:
            raise ModelError(f"{path} does not fit {type(self).__name__}: {'; '.join(problems)}")
        self.load_state_dict(state, strict=False)

    def require_same_settings(self, path: Path, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other settings than this module's, where names and shapes do not tell.

        Raises:
            ModelError: it is one.
        """


def mix_seeds(*parts: int) -> int:
    """A 63-bit seed from several whole numbers; near inputs give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
