"""One epoch of every model in this process, for ``test_two_devices``: ``fit_models.py OUT ROOT JOBS``.

Started as one process, or as one of several that find each other through variables of torchrun. Dropout is
off, because its streams are the devices' own, and numbers have 64 bits, so that no near tie is rounded over.
The first process writes what was found as JSON.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from experiments import artifacts, build, config
from experiments.reduction import SteadyDDPStrategy
from tests.lightning_modules.tiny_bert import LONGEST

DROPOUTS = ("dropout", "attention_dropout", "hidden_dropout")


def fit(name: str, overrides: list[str], root: str, devices: int) -> dict[str, float]:
    """The first gradients, and losses and validation metrics after one epoch."""
    words = [f"data.root={root}", "data.expected=null", *overrides]
    experiment = config.load(name, words)
    stage = next(s for s, node in experiment.stages.items() if node["run"] == "fit")
    spec = artifacts.stage_spec(experiment, stage)
    data = build.build(spec["data"])
    data.batch_size, data.seed = 37, 0  # neither divides by 2 nor divides the rows
    node = next(iter(spec["modules"].values()))
    if "encoder" in node:
        node["encoder"] |= {"source": os.environ["TINY_BERT"], "max_length": LONGEST}
    arguments = build.signature_of(build.locate(node["_target_"]))
    node |= {key: 0.0 for key in DROPOUTS if key in arguments}
    pl.seed_everything(0, verbose=False)
    module = build.build_on(node, data)
    gradients = FirstGradients()
    trainer = pl.Trainer(
        max_epochs=1, precision="64-true", accelerator="cpu", devices=devices,
        strategy=SteadyDDPStrategy() if devices > 1 else "auto",
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False,
        callbacks=[gradients],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return gradients.found | {k: float(v) for k, v in trainer.callback_metrics.items()}


class FirstGradients(pl.Callback):
    """What the first optimizer step is given, by parameter: two sums in float64 that any change moves."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
        if trainer.global_step:
            return
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                flat = parameter.grad.to_dense().double().flatten()
                weights = torch.linspace(1, 2, len(flat), dtype=torch.double)
                self.found[f"gradient/{name}"] = float(flat @ weights)
                self.found[f"gradient norm/{name}"] = float(flat.norm())


def main(out: str, root: str, jobs: str) -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    devices = int(os.environ.get("WORLD_SIZE", "1"))
    found: dict[str, Any] = {}
    for job in json.loads(jobs):
        found[" ".join(job)] = fit(job[0], job[1:], root, devices)
        print("done", *job, flush=True)
    if os.environ.get("RANK", "0") == "0":
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
