"""A fit and a test of language models in this process, for ``test_two_language_models``: ``... OUT JOBS``.

Started as one of two processes that find each other through torchrun's variables; for one process the test
calls ``fit`` itself. The trainer is that of the real command.
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
from torch import Tensor

from experiments import artifacts, build, config
from experiments.trainers import make_trainer
from lightning_modules.llm.sharding import whole

NAME = "tallrec/movie_64shot_two_stage"


class Gradients(pl.Callback):
    """Keeps what every optimizer step is given, before it is clipped."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
        """The gradients of all that is trained, in one row."""
        grads = [whole(p.grad).flatten() for p in module.parameters() if p.requires_grad]
        self.steps.append(torch.cat(grads).clone())


def fit(folder: Path, job: dict[str, Any], world: int) -> dict[str, Any]:
    """What one job logs, every step's gradients, the trained weights and how many numbers this rank holds."""
    experiment = config.load(NAME, job["overrides"])
    spec = artifacts.stage_spec(experiment, job["stage"])
    strategy = job["strategy"] if world > 1 else "auto"
    launch = {**experiment.config["launch"], "devices": world, "strategy": strategy}
    data = build.build(spec["data"])
    data.batch_size, data.seed = spec["batch_size"], 0
    pl.seed_everything(0, verbose=False)
    node = next(iter(spec["modules"].values()))
    module = build.build_on(node, data)
    if launch["activation_checkpointing"]:
        module.checkpoint_activations()
    gradients = Gradients()
    told = {"spec": spec, "launch": launch, "callbacks": None, "logger": None}
    trainer = make_trainer(folder, told, data, module, [gradients])
    assert module.untrainable(trainer) is None
    trainer.fit(module, datamodule=data, ckpt_path=job.get("resume"), weights_only=True)
    state = trainer.strategy.lightning_module_state_dict()
    logged = dict(trainer.callback_metrics)
    held = sum(getattr(p, "_local_tensor", p).numel() for p in module.parameters())
    if "save" in job:
        trainer.save_checkpoint(job["save"].format(world=world))
        trainer.test(module, datamodule=data, verbose=False)
        logged |= trainer.callback_metrics
    return {
        "logged": {name: float(value) for name, value in logged.items()},
        "gradients": gradients.steps,
        "weights": {name: value.clone() for name, value in state.items() if "lora_" in name},
        "held": held,
    }


def main(out: str, jobs: str) -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    world = int(os.environ["WORLD_SIZE"])
    found = {name: fit(Path(out).parent, job, world) for name, job in json.loads(jobs).items()}
    if os.environ["RANK"] == "0":
        torch.save(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
