"""Stops a fit at a loss that is no number, before it spoils the weights, and keeps what led to it.

In the run folder, read without unpickling anything: ``nonfinite.RANK.safetensors`` has the batch's tensors
(``batch.NAME``), ``nonfinite.weights.safetensors`` the trained weights before the step, and
``nonfinite.RANK.json`` the step, the epoch, the seeds, how the batch is put together and what of it is no
tensor. ``make replay BATCH=...`` (``experiments.replay``) computes it again and says where it begins.
"""

from __future__ import annotations

import json
import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from safetensors.torch import save_file
from torch import Tensor


class NonFiniteError(RuntimeError):
    """A loss was NaN or infinite; the message says where, and where the batch lies."""


class NonFinite(pl.Callback):
    """Looks at each loss before its backward pass.

    Asking waits for the forward pass. A small model's device waits for its next instruction anyway, a large
    one's for the first instructions of the backward pass, once a step.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._batch: Any = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Hold on to the batch."""
        self._batch = batch

    def on_train_batch_end(self, *unused: Any) -> None:
        """Let it go."""
        self._batch = None

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Keep the batch and the weights, and stop, if the loss is no number."""
        if bool(loss.detach().isfinite().all()):
            return
        kept = self._keep(trainer, pl_module, loss)
        raise NonFiniteError(
            f"the loss is {loss.item()} at step {trainer.global_step} (epoch {trainer.current_epoch}, batch "
            f"{trainer.fit_loop.batch_idx}); last.ckpt is what the last save left. `make replay "
            f"BATCH={kept}` computes this batch again and says where it begins; then lower the learning "
            "rate, clip gradients (trainer.gradient_clip_val=1), or mend the data: the same command comes "
            "to the same step"
        )

    def _keep(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> Path:
        rank = trainer.global_rank
        tensors = dict[str, Tensor]()
        built = _built("batch", self._batch, tensors)
        path = self.folder / f"nonfinite.{rank}.safetensors"
        _write(path, tensors)
        trained = {n: p.detach() for n, p in pl_module.named_parameters() if p.requires_grad}
        # Weights that are spread over devices cannot be gathered by one of them alone.
        whole = all(type(p) is Tensor or type(p) is torch.nn.Parameter for p in trained.values())
        whole = whole and "fsdp" not in type(trainer.strategy).__name__.lower()
        if whole:
            weights = {n: p.cpu().clone().contiguous() for n, p in trained.items()}
            _write(self.folder / "nonfinite.weights.safetensors", weights)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        note = {
            "loss": repr(loss.item()),
            "global_step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "batch_index": trainer.fit_loop.batch_idx,
            "rank": rank,
            "seed": getattr(data, "seed", None),
            "torch_seed": torch.initial_seed(),
            "weights": whole,
            "weights_not_finite": sorted(n for n, p in trained.items() if not p.isfinite().all()),
            "batch": built,
        }
        part = self.folder / f".nonfinite.{rank}.json.part"
        part.write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.folder / f"nonfinite.{rank}.json")
        return path


def _built(name: str, value: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """How a value is put together, for JSON; its tensors go to ``tensors`` under their dotted places."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: getattr(value, f.name) for f in fields(value)}
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        return {"type": kind, "fields": _all_built(name, parts, tensors)}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"fields": _all_built(name, value, tensors)}
    if isinstance(value, (list, tuple)):
        parts = {str(number): inner for number, inner in enumerate(value)}
        items = list(_all_built(name, parts, tensors).values())
        return {"items": items, "tuple": isinstance(value, tuple)}
    if value is None or isinstance(value, (int, float, str, bool)):
        return {"value": value}
    return {"lost": repr(value)[:200]}


def _all_built(
    name: str, parts: dict[str, Any], tensors: dict[str, Tensor]
) -> dict[str, dict[str, Any]]:
    return {key: _built(f"{name}.{key}", inner, tensors) for key, inner in parts.items()}


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Whole, whoever else writes the same."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    save_file(tensors, part)
    os.replace(part, path)
