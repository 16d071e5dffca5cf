"""Before the first stage starts: every object of the experiment binds, and its data is there.

Runs in a process of its own (it imports torch), started by ``experiments.run``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from datamodules.base import SequenceDataModule
from datamodules.errors import DataSourceError
from datamodules.groups import GROUP_NAMES
from datamodules.sources import cache_root
from datamodules.stage_data import StageDataModule
from experiments import artifacts, build, config, frame
from experiments.errors import UserError
from experiments.keys import nearest
from experiments.messages import print_error, say
from lightning_modules.base import KS, RankingModule, can_select
from lightning_modules.calibration import Calibration
from lightning_modules.metrics import RankingMetrics
from lightning_modules.predicting import PredictingModule
from lightning_modules.stage_module import StageModule

LOWER_IS_BETTER = ("loss", *Calibration.lower_is_better)


def binding_problems(experiment: config.Experiment) -> Iterator[str]:
    """Everything that would stop a stage at construction, over all stages."""
    seen: list[tuple[Any, tuple[str, ...]]] = []
    engines: list[tuple[str, Iterable[dict[str, Any]]]] = []
    for name, stage in experiment.stages.items():
        if not isinstance(stage, dict) or ("module" in stage) == ("modules" in stage):
            continue  # a problem of its frame, which is told by frame.structure_problems
        spec = artifacts.stage_spec(experiment, name)
        given = tuple(spec["inputs"])
        single = "module" in stage
        yield from _kind_problems(name, spec)
        yield from _never_validated(name, spec)
        for row, module in spec["modules"].items():
            where = f"stages.{name}.module" if single else f"stages.{name}.modules.{row}"
            if (module, given) not in seen:  # a test's module is mostly its fit's, told once
                yield from build.problems(module, where, given)
            seen.append((module, given))
        engines.append((name, spec["modules"].values()))
        trainer = {"_target_": "lightning.pytorch.Trainer", **spec["trainer"]}
        yield from build.problems(trainer, f"stages.{name}.trainer")
    yield from _engine_problems(engines)
    for data in experiment.data_sets:
        yield from build.problems(data, "data")
    yield from build.problems(experiment.config.get("callbacks") or {}, "callbacks")
    for name, logger in (experiment.config.get("logger") or {}).items():
        yield from build.problems(logger, f"logger.{name}", ("save_dir",))


def _engine_problems(stages: Iterable[tuple[str, Iterable[dict[str, Any]]]]) -> Iterator[str]:
    """Engines that are not installed, or cannot run their language models; each is told once."""
    found: dict[str, list[str]] = {}
    for name, modules in stages:
        for module in modules:
            if not isinstance(module.get("engine"), dict) or not isinstance(
                module.get("llm"), dict
            ):
                continue
            try:
                build.build(module["engine"]).require(build.build(module["llm"]))
            except (UserError, ValueError, AttributeError) as error:
                found.setdefault(str(error), []).append(f"stages.{name}")
    yield from (f"{', '.join(dict.fromkeys(told))}: {why}" for why, told in found.items())


def _kind_problems(stage: str, spec: dict[str, Any]) -> Iterator[str]:
    """Data of another kind than the modules learn from, and a metric that these will never log."""
    try:
        data = build.locate(spec["data"]["_target_"])
        kinds = [build.locate(m["_target_"]) for m in spec["modules"].values()]
    except (KeyError, UserError):  # told where constructors are looked at
        return
    for kind in (k for k in kinds if isinstance(k, type) and isinstance(data, type)):
        ranks, predicts = issubclass(kind, RankingModule), issubclass(kind, PredictingModule)
        reads_users = ranks or predicts
        if issubclass(kind, StageModule) and reads_users != issubclass(data, SequenceDataModule):
            yield (
                f"stages.{stage}: {kind.__name__} does not learn from what {data.__name__} holds: give the "
                f"stage `data:` of {'histories' if reads_users else 'instructions'}"
            )
        can: tuple[str, ...] = ("fit",)
        told = "be fitted only"
        if predicts:
            can, told = ("predict",), "predict only"
        elif ranks:
            can, told = ("fit", "test"), "be fitted and tested"
        if spec["run"] in frame.RUNS and spec["run"] not in can:
            yield f"stages.{stage}: {kind.__name__} has nothing to {spec['run']}, it can {told}"
        others = kind.validated if issubclass(kind, StageModule) else ()
        yield from _metric_problems(stage, spec["select"] or {}, None if ranks else others)


def _metric_problems(
    stage: str, select: dict[str, Any], others: tuple[str, ...] | None
) -> Iterator[str]:
    """A metric to select on that no validation will ever log, or that is chosen at its worst.

    ``others`` are those of a module that ranks nothing.
    """
    metric = select.get("metric")
    if metric is None:
        return
    names = (*RankingMetrics(KS).names, "auc", "uauc", *Calibration.lower_is_better)
    validated = [f"val/{group}/{name}" for group in GROUP_NAMES for name in names]
    known = ["train/loss", *(filter(can_select, validated) if others is None else others)]
    if metric not in known:
        hint = nearest(str(metric), known)
        yield f"stages.{stage}.select.metric is {metric!r}, which is never logged{hint}"
    elif metric.rpartition("/")[2] in LOWER_IS_BETTER and select.get("mode") != "min":
        yield f"stages.{stage}.select.metric is {metric!r}, of which less is better: add mode: min"


def _never_validated(stage: str, spec: dict[str, Any]) -> Iterator[str]:
    """A fit that is to choose an epoch by validation, and has none or ends before the first."""
    metric = str((spec["select"] or {}).get("metric", ""))
    if metric.startswith("val/") and spec["trainer"].get("limit_val_batches") == 0:
        yield (
            f"stages.{stage} selects its best epoch by {metric}, but validates on nothing "
            f"(trainer.limit_val_batches is 0): set stages.{stage}.trainer.limit_val_batches=1.0, too"
        )
    epochs, every = (spec["trainer"].get(k) for k in ("max_epochs", "check_val_every_n_epoch"))
    if metric.startswith("val/") and epochs and every and 0 < epochs < every:
        yield (
            f"stages.{stage} ends after {epochs} epochs, before its first validation in epoch {every}: "
            f"set stages.{stage}.trainer.check_val_every_n_epoch, too"
        )


def require_sound(experiment: config.Experiment) -> None:
    """Raise one UserError that lists every problem, of the frame and of every constructor."""
    found = list(frame.structure_problems(experiment.config))
    found += binding_problems(experiment)
    if found:
        raise UserError(config.cannot_run(experiment.name, found))


def prepare_data(experiment: config.Experiment, refuse: bool = True) -> list[Any]:
    """Fetch, parse and split every data set of the experiment; returns the data modules.

    Raises:
        UserError: with ``refuse``, a paper's preset on data that are not the paper's; see ``frame.PRESETS``.
    """
    modules = []
    for data in experiment.data_sets:
        module: StageDataModule = build.build(data)
        prepared = module.prepared
        artifacts.record_prepared(data, cache_root(), Path(prepared.folder), prepared.digest)
        modules.append(module)
        _require_validation(experiment, data, module)
        for remark in module.remarks():
            say(remark)
        _compare(experiment, data, prepared.manifest, refuse)
    return modules


def _compare(
    experiment: config.Experiment, data: dict[str, Any], manifest: dict[str, Any], refuse: bool
) -> None:
    """Tell expected counts that the data does not have, or refuse them."""
    try:
        artifacts.require_expected(experiment, data, manifest)
    except UserError as error:
        if refuse:
            raise
        say(f"warning: {error}")
    else:
        if wrong := artifacts.mismatches(data, manifest):
            note = f"make data NAME={experiment.name} shows why, data.expected=null accepts it"
            say(f"warning: the data has {wrong} ({note})")


def _require_validation(
    experiment: config.Experiment, data: dict[str, Any], module: StageDataModule
) -> None:
    """Refuse a fit that selects on validation rows that its split does not hold out."""
    for name in experiment.stages:
        spec = artifacts.stage_spec(experiment, name)
        selects = str((spec["select"] or {}).get("metric", "")).startswith("val/")
        if selects and spec["data"] == data and not module.validation_rows():
            raise UserError(
                f"stages.{name} selects its best epoch on validation, but the split holds out no "
                f"validation events: hold some out, or keep the last epoch with stages.{name}.select=null"
            )


def main(argv: list[str]) -> int:
    """``python -m experiments.check [--report] NAME [override ...]``: ``--report`` accepts every count."""
    try:
        report_only, words = argv[:1] == ["--report"], [a for a in argv if a != "--report"]
        experiment = config.composed(words[0], words[1:])
        require_sound(experiment)
        prepare_data(experiment, refuse=not report_only)
    except (UserError, DataSourceError, ValueError) as error:
        print_error(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
