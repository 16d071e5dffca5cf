"""A few real steps of a stage in a scratch folder: what the whole of it would take.

``python -m experiments.calibrate FOLDER`` reads ``FOLDER/stage.json``, which ``experiments.preflight`` wrote,
and leaves ``FOLDER/estimate.json``, and of a fit ``best.ckpt``, weights of a few steps that stand in for a
later stage's input. Steps are those of one device of the run, whose batch is cut as the run would cut it; the
longest is among them, and is what memory is measured by.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from callbacks.checkpoints import BEFORE, checkpoints
from callbacks.generations import GenerationsLog
from callbacks.nonfinite import NonFiniteError
from callbacks.progress import RunProgress
from callbacks.step_clock import StepClock
from datamodules.errors import DataFormatError, DataSourceError
from datamodules.versioning import read_json, write_json
from experiments import faults
from experiments.errors import UserError
from experiments.few_batches import FewBatches
from experiments.records import peak_memory
from experiments.stage import build_data, build_module, quiet
from experiments.trainers import make_trainer
from lightning_modules.errors import ModelError

# What of the Trainer's settings says how long a fit is: a few batches are given instead.
LENGTHS = (
    "max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "val_check_interval",
    "check_val_every_n_epoch", "limit_train_batches", "limit_val_batches", "limit_test_batches",
    "limit_predict_batches", "overfit_batches",
)  # fmt: skip


def calibrate(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Run a few steps of the stage; what it would take."""
    torch.set_num_threads(job["launch"]["threads"] or os.cpu_count() or 1)
    pl.seed_everything(job["spec"]["seed"], verbose=False)
    found: dict[str, Any] = {"seconds": 0.0, "startup": 0.0, "rows": {}}
    started = job["started"]
    for row, node in job["spec"]["modules"].items():
        part = _one(folder, job, node, row, started)
        started = time.monotonic()
        found["seconds"] += part.pop("seconds")
        found["startup"] += part.pop("startup")
        found["rows"] |= part.pop("rows")
        found |= part
    return {**found, "peak_memory_mb": peak_memory()}


def _one(
    folder: Path, job: dict[str, Any], node: dict[str, Any], row: str, started: float
) -> dict[str, Any]:
    spec, clock = job["spec"], StepClock()
    data = build_data(job)
    module = build_module(node, job, data)
    few = FewBatches(data, module)
    if spec["run"] == "fit" and job["launch"].get("activation_checkpointing"):
        module.checkpoint_activations()
    cut = {k: v for k, v in spec["trainer"].items() if k not in LENGTHS}
    small = {
        **job,
        "logger": None,
        "callbacks": None,
        "spec": {**spec, "trainer": {**cut, "max_epochs": 1}},
    }
    callbacks: list[pl.Callback] = [RunProgress(f"{job['label']} (a few steps)"), clock]
    if spec["run"] == "fit":
        callbacks += checkpoints(folder, None, "max")
    elif getattr(module, "generations", None) is not None:
        callbacks.append(GenerationsLog(folder, row))
    trainer = make_trainer(folder, small, data, module, callbacks)
    if spec["run"] == "fit":
        trainer.fit(module, datamodule=data)
        return _of_a_fit(folder, spec, few, clock, started)
    loop = "test" if spec["run"] == "test" else "predict"
    if loop == "test":
        trainer.test(module, datamodule=data, verbose=False)
    else:
        trainer.predict(module, datamodule=data, return_predictions=False)
    each, rest = _mean(clock, loop)
    whole = _limited(few.whole[loop], spec["trainer"].get(f"limit_{loop}_batches"))
    startup = clock.opened[loop] - started
    return {
        "startup": startup, "seconds": startup + rest + whole * each, "batches": whole,
        "rows": few.rows, "tokens": clock.tokens, "remarks": module.remarks(),
    }  # fmt: skip


def _of_a_fit(
    folder: Path, spec: dict[str, Any], few: FewBatches, clock: StepClock, started: float
) -> dict[str, Any]:
    steps, epochs = fit_length(spec, few.whole["train"], few.micro_batches)
    each, _ = _mean(clock, "train")
    val, overhead = _mean(clock, "val") if clock.seconds["val"] else (0.0, 0.0)
    checks = epochs // int(spec["trainer"].get("check_val_every_n_epoch") or 1)
    batches = _limited(few.whole.get("val", 0), spec["trainer"].get("limit_val_batches"))
    validation = overhead + batches * val if clock.seconds["val"] else 0.0
    validated = clock.closed["val"] - clock.opened["val"] if clock.seconds["val"] else 0.0
    wall = clock.closed["train"] - clock.opened["train"]
    rest = max(0.0, wall - sum(clock.seconds["train"]) - validated)  # checkpoints, mostly
    startup = clock.opened["train"] - started
    (folder / BEFORE).unlink(missing_ok=True)
    return {
        "startup": startup, "seconds": startup + steps * each + checks * validation + epochs * rest,
        "steps": steps, "epochs": epochs, "seconds_per_step": each, "validation": validation,
        "checkpoint_bytes": (folder / "last.ckpt").stat().st_size,
        "at_most": bool((spec["select"] or {}).get("patience")),
        "rows": few.rows, "tokens": clock.tokens, "remarks": few.module.remarks(),
    }  # fmt: skip


def _mean(clock: StepClock, loop: str) -> tuple[float, float]:
    """Seconds of a batch, without the first, which allocates; and of the loop besides batches."""
    seconds = clock.seconds[loop]
    each = float(np.mean(seconds[1:] or seconds))
    return each, max(0.0, clock.closed[loop] - clock.opened[loop] - sum(seconds))


def _limited(batches: int, limit: float | None) -> int:
    """What Lightning leaves of so many batches."""
    if limit is None:
        return batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def fit_length(spec: dict[str, Any], batches: int, micro_batches: int) -> tuple[int, int]:
    """Optimizer steps and epochs of a fit, at most.

    Args:
        spec: of the stage.
        batches: micro batches of an epoch on one device.
        micro_batches: of a step.
    """
    trainer = spec["trainer"]
    an_epoch = math.ceil(_limited(batches, trainer.get("limit_train_batches")) / micro_batches)
    most = trainer.get("max_steps") or -1
    epochs = trainer.get("max_epochs")
    if epochs in (None, -1):
        epochs = math.ceil(most / an_epoch) if most > 0 else 1000  # as Lightning has it
    steps = an_epoch * int(epochs)
    if 0 < most < steps:
        return int(most), math.ceil(most / an_epoch)
    return steps, int(epochs)


def main(argv: list[str]) -> int:
    """Exit status 0 whenever there is an estimate, be it that the stage cannot be run."""
    quiet()
    folder = Path(argv[0])
    job = read_json(folder / "stage.json")
    try:
        found = calibrate(folder, job)
    except (UserError, DataSourceError, DataFormatError, ModelError, NonFiniteError) as error:
        found = {"failed": str(error)}
    except Exception as error:
        told = faults.explained(error, folder, job)
        if told is None:
            raise
        found = {"failed": told}
    write_json(folder / "estimate.json", json.loads(json.dumps(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
