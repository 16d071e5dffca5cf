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


def binding_problems(experiment: config.Experiment) -> Iterator[str]:
    """Everything that would stop a stage at construction, over all stages."""
    for name, stage in experiment.stages.items():
        if not isinstance(stage, dict) or ("module" in stage) == ("modules" in stage):
            continue  # a problem of its frame, which is told by config.structure_problems
        spec = artifacts.stage_spec(experiment, name)
        given = tuple(a for a in spec["inputs"] if a not in build.STAGE_INPUTS)
        single = "module" in stage
        for row, module in spec["modules"].items():
            where = f"stages.{name}.module" if single else f"stages.{name}.modules.{row}"
            yield from build.problems(module, where, given)
        trainer = {"_target_": "lightning.pytorch.Trainer", **spec["trainer"]}
        yield from build.problems(trainer, f"stages.{name}.trainer")
    for data in _distinct_data(experiment):
        yield from build.problems(data, "data")
    yield from build.problems(experiment.config.get("callbacks") or {}, "callbacks")
    for name, logger in (experiment.config.get("logger") or {}).items():
        yield from build.problems(logger, f"logger.{name}", ("save_dir",))


def require_sound(experiment: config.Experiment) -> None:
    """Raise one UserError that lists every problem, of the frame and of every constructor."""
    frame = list(config.structure_problems(experiment.config))
    found = [*frame, *binding_problems(experiment)]
    if found:
        raise UserError(config.cannot_run(experiment.name, found))


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
    stages = experiment.stages.values()
    specs = [s.get("data") or experiment.config["data"] for s in stages if isinstance(s, dict)]
    return list({json.dumps(s, sort_keys=True): s for s in specs}.values())


def main(argv: list[str]) -> int:
    """``python -m experiments.check NAME [override ...]``."""
    try:
        experiment = config.composed(argv[0], argv[1:])
        require_sound(experiment)
        prepare_data(experiment)
    except (UserError, DataSourceError, ValueError) as error:
        print_error(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
