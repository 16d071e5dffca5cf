"""The Lightning Trainer of a stage: what the config says, on the devices that ``launch`` names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
)
from lightning.pytorch.strategies import Strategy

from callbacks.checkpoints import AtomicCheckpointIO
from callbacks.preemption import Preemption
from datamodules.stage_data import StageDataModule
from experiments import build, launchers, tracking
from experiments.errors import UserError
from experiments.messages import say
from experiments.records import protocol_of, wandb_id
from experiments.reduction import SteadyDDPStrategy
from lightning_modules.devices import multiplies_bfloat16
from lightning_modules.stage_module import StageModule


def make_trainer(
    folder: Path,
    job: dict[str, Any],
    data: StageDataModule,
    module: StageModule,
    callbacks: list[pl.Callback],
    row: str = "",
) -> pl.Trainer:
    """The Trainer of a stage, with its precision, loggers and callbacks.

    Args:
        folder: of the run.
        job: what ``stage.json`` says.
        data: what it learns from.
        module: what it trains or tests.
        callbacks: besides those of the config.
        row: one of several rows of a test; empty where a stage has one module.

    Raises:
        UserError: the device or the strategy cannot compute what the module needs.
    """
    spec, launch = job["spec"], job["launch"]
    settings = dict(spec["trainer"])
    plugins: list[Any] = [AtomicCheckpointIO(), *cluster(launch, os.environ)]
    strategy = _strategy(module, launch)
    if launch["strategy"] == "fsdp":
        settings["inference_mode"] = False  # which forbids how split weights are gathered
    if precision := _precision(module, launch):
        settings.pop("precision", None)
        plugins.append(precision)
    extra = [build.build(node) for node in (job["callbacks"] or {}).values()]
    stopper = Preemption(folder, launchers.stopping_signals(os.environ))
    _tell_slow_precision(settings, launch)
    return pl.Trainer(
        **settings,
        accelerator=launch["accelerator"],
        devices=launch["devices"],
        num_nodes=launch["num_nodes"],
        strategy=strategy,
        accumulate_grad_batches=_micro_batches(spec, launch),
        callbacks=[*callbacks, *extra, stopper],
        logger=_loggers(folder, job, data, row),
        default_root_dir=folder,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # ours neither pads nor repeats
        enable_progress_bar=False,  # RunProgress shows the whole run instead of one epoch
        enable_model_summary=False,
        enable_checkpointing=spec["run"] == "fit",
        plugins=plugins,
        log_every_n_steps=10,
    )


def make_predictor(module: StageModule, launch: dict[str, Any], number: Any = None) -> pl.Trainer:
    """A Trainer of one device that writes nothing, to ask a finished module.

    Args:
        module: it asks.
        launch: the experiment's settings of devices.
        number: the precision of the module's test; None is the usual one.

    Raises:
        UserError: the device cannot compute what the module needs.
    """
    precision = _precision(module, {**launch, "strategy": "auto"})
    return pl.Trainer(
        precision=None if precision else number,
        accelerator=launch["accelerator"], devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        plugins=[precision] if precision else [],
    )  # fmt: skip


def cluster(launch: dict[str, Any], environment: Mapping[str, str]) -> list[ClusterEnvironment]:
    """Who starts the processes of a stage, where Lightning would guess wrong.

    Its own requeueing stays off: it saves inside the signal's handler, where ranks at different places
    wait for each other for ever.

    Raises:
        UserError: Slurm has started another number of tasks than the stage has devices.
    """
    nodes, devices = int(launch["num_nodes"]), int(launch["devices"])
    if not launchers.is_task(environment):
        inside = "SLURM_NTASKS" in environment
        if inside and nodes > 1:
            raise UserError(
                f"launch.num_nodes={nodes} needs processes that srun starts: make slurm NAME=... "
                f"NODES={nodes}"
            )
        return [LightningEnvironment()] if inside else []
    tasks = {
        k: environment.get(k) for k in ("SLURM_NNODES", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE")
    }
    if tuple(tasks.values()) != (str(nodes), str(nodes * devices), str(devices)):
        told = ", ".join(f"{k}={v}" for k, v in tasks.items())
        raise UserError(
            f"Slurm has started other tasks ({told}) than launch.num_nodes={nodes} with launch.devices="
            f"{devices} need, one a device: give make slurm GPUS={devices} NODES={nodes}, and leave task "
            "counts out of slurm.srun and of SLURM_ and SRUN_ variables"
        )
    return [SLURMEnvironment(auto_requeue=False)]


def _strategy(module: StageModule, launch: dict[str, Any]) -> Strategy | str:
    """Lightning's by its name; ``ddp`` as a resumed run needs it, ``fsdp`` as the method has it."""
    name: str = launch["strategy"]
    if name == "ddp":
        return SteadyDDPStrategy()
    if name != "fsdp":
        return name
    try:
        return module.sharded_strategy(int(launch["devices"]) * int(launch["num_nodes"]))
    except ValueError as error:
        raise UserError(str(error)) from error


def _precision(module: StageModule, launch: dict[str, Any]) -> Any:
    """A method's own precision plugin for the devices that the trainer will choose, if it has one."""
    try:
        return module.precision_plugin(_device(launch), launch["strategy"])
    except ValueError as error:
        raise UserError(str(error)) from error


def _device(launch: dict[str, Any]) -> str:
    """What the trainer will choose: cuda or cpu."""
    wanted = launch["accelerator"]
    gpu = wanted in ("gpu", "cuda") or (wanted == "auto" and torch.cuda.is_available())
    return "cuda" if gpu else "cpu"


def _tell_slow_precision(settings: dict[str, Any], launch: dict[str, Any]) -> None:
    """bfloat16 runs on any CPU; where it is emulated, one waits."""
    half = str(settings.get("precision", "")).startswith("bf16")
    if half and _device(launch) == "cpu" and not multiplies_bfloat16("cpu"):
        say(
            f"precision={settings['precision']}: this processor emulates bfloat16, many times slower than "
            "float32 (it lacks AVX512_BF16 and AMX)"
        )


def _micro_batches(spec: dict[str, Any], launch: dict[str, Any]) -> int:
    """Accumulated batches an optimizer step, so that ``batch_size`` holds on any number of devices."""
    if spec["run"] != "fit" or not launch["micro_batch_size"]:
        return 1
    per_device = spec["batch_size"] / (int(launch["devices"]) * int(launch["num_nodes"]))
    return max(1, -(-int(per_device) // launch["micro_batch_size"]))


def _loggers(folder: Path, job: dict[str, Any], data: StageDataModule, row: str) -> list[Logger]:
    protocol, fingerprint = protocol_of(data, job["spec"]["trainer"])
    made: list[Logger] = [CSVLogger(folder / "csv", name=row)]
    for name, node in (job["logger"] or {}).items():
        extra: dict[str, Any] = {"save_dir": str(folder)}
        if name == "wandb":
            extra |= {
                "id": wandb_id(folder, row), "resume": "allow",
                "name": f"{job['label']} {row}".strip(),
                "group": job["experiment"], "job_type": job["stage"],
                "tags": [data.name, f"fingerprint-{fingerprint}", f"git-{job['commit']}"],
                "config": tracking.settings(folder, job, protocol, fingerprint, row),
            }  # fmt: skip
        elif name == "tensorboard":
            extra["name"] = f"tensorboard/{row}".rstrip("/")
        made.append(build.build(node, **extra))
    return made
