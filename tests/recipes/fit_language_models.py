"""Two epochs of language models in this process, for ``test_two_language_models``: ``... OUT JOBS``.

Started as one process, or as one of two that find each other through torchrun's variables. The trainer is
that of the real command. The first process keeps, job by job, what was logged, every step's gradients and the
trained weights.
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


def fit(out: Path, job: dict[str, Any], world: int) -> dict[str, Any]:
    """What one job leaves behind."""
    experiment = config.load(NAME, job["overrides"])
    spec = artifacts.stage_spec(experiment, job["stage"])
    launch = {**experiment.config["launch"], "devices": world, "strategy": job["strategy"]}
    if world == 1:
        launch["strategy"] = "auto"
    data = build.build(spec["data"])
    data.batch_size, data.seed = spec["batch_size"], 0
    pl.seed_everything(0, verbose=False)
    node = next(iter(spec["modules"].values()))
    module = build.build(node, **build.runtime_arguments(node["_target_"], data))
    if launch["activation_checkpointing"]:
        module.checkpoint_activations()
    gradients = Gradients()
    told = {"spec": spec, "launch": launch, "callbacks": None, "logger": None}
    trainer = make_trainer(out.parent / f"{world}", told, data, module, [gradients])
    assert module.untrainable(trainer) is None
    resume = job.get("resume")
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
    for place in job.get("save", []):
        trainer.save_checkpoint(place.format(world=world))
    return {
        "logged": {k: float(v) for k, v in trainer.callback_metrics.items()},
        "gradients": gradients.steps,
        "weights": {k: v.clone() for k, v in trainer.strategy.lightning_module_state_dict().items()
                    if "lora_" in k},
        "parts": sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel()
                     for p in module.parameters()),
    }  # fmt: skip


def main(out: str, jobs: str) -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    found = {}
    for name, job in json.loads(jobs).items():
        found[name] = fit(Path(out), job, world)
        print("done", name, flush=True)
    if os.environ.get("RANK", "0") == "0":
        torch.save(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
