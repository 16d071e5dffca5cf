"""Before the first stage starts: every object of the experiment binds, and its data is there.

Runs in a process of its own (it imports torch), started by ``experiments.run``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from datamodules.errors import DataSourceError
from datamodules.sources import cache_root
from experiments import artifacts, build, config
from experiments.errors import UserError
from experiments.report import print_error, say

# Arguments of Trainer that ``stage.py`` gives itself.
RUNNER_SETS = {
    "accelerator", "devices", "num_nodes", "strategy", "accumulate_grad_batches", "callbacks",
    "logger", "default_root_dir", "num_sanity_val_steps", "use_distributed_sampler",
    "enable_progress_bar", "enable_model_summary", "enable_checkpointing", "plugins",
    "log_every_n_steps",
}  # fmt: skip


def binding_problems(experiment: config.Experiment) -> Iterator[str]:
    """Everything that would stop a stage at construction, over all stages."""
    for name in experiment.stages:
        spec = artifacts.stage_spec(experiment, name)
        given = tuple(a for a in spec["inputs"] if a not in build.STAGE_INPUTS)
        single = "module" in experiment.stages[name]
        for row, module in spec["modules"].items():
            where = f"stages.{name}.module" if single else f"stages.{name}.modules.{row}"
            yield from build.problems(module, where, given)
        for argument in sorted(spec["trainer"].keys() & RUNNER_SETS):
            yield f"stages.{name}.trainer.{argument} is set by the runner: see `launch` and `logger`"
        trainer = {"_target_": "lightning.pytorch.Trainer", **spec["trainer"]}
        yield from build.problems(trainer, f"stages.{name}.trainer")
    for data in _distinct_data(experiment):
        yield from build.problems(data, "data")
    yield from build.problems(experiment.config.get("callbacks") or {}, "callbacks")
    for name, logger in (experiment.config.get("logger") or {}).items():
        yield from build.problems(logger, f"logger.{name}", ("save_dir",))


def require_bound(experiment: config.Experiment) -> None:
    """Raise one UserError that lists every problem."""
    found = list(dict.fromkeys(binding_problems(experiment)))
    if found:
        listing = "\n".join(f"  - {p}" for p in found)
        raise UserError(f"{experiment.name} cannot run:\n{listing}")


def prepare_data(experiment: config.Experiment) -> list[Any]:
    """Fetch, parse and split every data set of the experiment; returns the data modules."""
    modules = []
    for data in _distinct_data(experiment):
        module: pl.LightningDataModule = build.build(data)
        prepared = module.prepared  # type: ignore[attr-defined]
        artifacts.record_prepared(data, cache_root(), Path(prepared.folder), prepared.digest)
        modules.append(module)
        for name, count in (data.get("expected") or {}).items():
            if (found := prepared.manifest["counts"].get(name)) != count:
                note = f"make data NAME={experiment.name} shows why, data.expected=null accepts it"
                say(f"warning: the data has {found:,} {name}, expected {count:,} ({note})")
    return modules


def _distinct_data(experiment: config.Experiment) -> list[dict[str, Any]]:
    specs = [artifacts.stage_spec(experiment, name)["data"] for name in experiment.stages]
    return list({json.dumps(s, sort_keys=True): s for s in specs}.values())


def main(argv: list[str]) -> int:
    """``python -m experiments.check NAME [override ...]``."""
    try:
        experiment = config.load(argv[0], argv[1:])
        require_bound(experiment)
        prepare_data(experiment)
    except (UserError, DataSourceError, ValueError) as error:
        print_error(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
