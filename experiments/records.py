"""What a finished stage leaves behind besides its results, and the id that ties it to W&B."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from callbacks.checkpoints import BEFORE
from datamodules.sources import file_digest
from datamodules.stage_data import StageDataModule
from datamodules.types import SPLIT_NAMES, TEST
from datamodules.versioning import value_digest, write_json
from experiments.frame import PREDICTIONS
from lightning_modules.metrics import METRICS_VERSION

PACKAGES = ("torch", "lightning", "transformers", "peft", "bitsandbytes", "polars", "numpy")

READ = ("*.ckpt", "scores.*.parquet", PREDICTIONS)  # files that later stages may read, by content


@dataclass(frozen=True)
class Outcome:
    """What a stage came to."""

    trainer: pl.Trainer
    results: dict[str, Any]
    throughput: dict[str, Any]  # like the seconds it is of this machine and this attempt


def finish(folder: Path, job: dict[str, Any], outcome: Outcome, seconds: float) -> None:
    """Write ``done.json``, last and atomically: from then on the stage counts as done."""
    trainer = outcome.trainer
    (folder / BEFORE).unlink(missing_ok=True)  # nobody goes on from here
    write_json(
        folder / "done.json",
        {
            "experiment": job["experiment"],
            "stage": job["stage"],
            "results": outcome.results,
            "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
            "seconds": round(seconds, 2),
            "throughput": outcome.throughput,
            "peak_memory_mb": peak_memory(),
            "devices": trainer.world_size,
            "device": _device(trainer),
            "commit": job["commit"],
            "python": platform.python_version(),
            "outputs": {f.name: file_digest(f) for p in READ for f in sorted(folder.glob(p))},
            "versions": {p: v for p in PACKAGES if (v := _version(p))},
            "sources": job["sources"],
        },
    )


def wandb_id(folder: Path, row: str = "") -> str:
    """The W&B id of a stage (or of one row of it): made before the run, kept over every resume.

    Of several processes that make it at once, as under srun, one succeeds.
    """
    path = folder / (f"wandb_id.{row}" if row else "wandb_id")
    if not path.is_file():
        made = uuid.uuid4().hex[:12]
        part = path.with_name(f".{path.name}.{made}.part")
        part.write_text(made)
        with suppress(FileExistsError):
            os.link(part, path)
        part.unlink()
    return path.read_text().strip()


def protocol_of(data: StageDataModule, trainer: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Everything that comparable numbers share, and its hash: the protocol fingerprint."""
    protocol = {**data.protocol(), "metrics": METRICS_VERSION}
    # A test of some batches alone is another protocol.
    cut = {k: trainer[k] for k in ("limit_test_batches", "overfit_batches") if trainer.get(k)}
    protocol |= {"cut": cut} if cut else {}
    protocol |= {"scored": SPLIT_NAMES[data.test_code]} if data.test_code != TEST else {}
    return protocol, value_digest(protocol)


def peak_memory() -> dict[str, int]:
    """MiB: resident memory of this process, and of its GPU."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    memory = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit}
    if torch.cuda.is_available():
        memory["gpu"] = torch.cuda.max_memory_allocated() // 2**20
    return memory


def _device(trainer: pl.Trainer) -> str:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
