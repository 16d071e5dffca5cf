"""One trial of a sweep as a process: the normal command with overrides, watched while it runs.

What a trial comes to is read from run folders, as every table is: a fit's validation by epoch from its log,
the value of the weights that it kept from ``done.json``, a test's from ``metrics.json``.
"""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from callbacks import stop_request
from datamodules.sources import cache_root
from datamodules.versioning import read_json
from experiments import artifacts, config, launchers, plots, trial_driver
from experiments.errors import UserError
from experiments.keys import nearest
from experiments.places import needed_by
from experiments.sweep_space import TEST, Space

SECONDS_TO_STOP = 300.0  # for what is to save and stop; then it is killed
STOPPED = (stop_request.STATUS, 130)
LOG = "log.txt"


@dataclass(frozen=True)
class Target:
    """Where a trial's value comes from.

    Args:
        stage: that tells it.
        fit: whether it is a fit, which tells it after each epoch.
        metric: as that stage calls it.
        needs: all stages that a trial runs.
        words: overrides that a trial has besides its parameters.
    """

    stage: str
    fit: bool
    metric: str
    needs: tuple[str, ...]
    words: tuple[str, ...] = ()


def target(space: Space, experiment: config.Experiment) -> Target:
    """The stage that a space's metric is of.

    Raises:
        UserError: there is none, or it would read the test set.
    """
    name = space.stage or _usual_stage(space, experiment)
    if name not in experiment.stages:
        raise UserError(
            f"stage: {name} is none of {experiment.name}{nearest(name, list(experiment.stages))} "
            f"({', '.join(experiment.stages)})"
        )
    stage = experiment.stages[name]
    run, group_metric = stage.get("run"), _with_group(space.metric)
    if run not in ("fit", "test") or "module" not in stage or (run == "fit" and space.on == TEST):
        raise UserError(
            f"stage: {name} of {experiment.name} is no {'test' if space.on == TEST else 'fit or test'} "
            f"of one module, which {group_metric} on {space.on} could be of"
        )
    needs = _needs(name, experiment)
    if run == "fit":
        _require_same_mode(space, name, stage)
    if space.on == TEST:
        return Target(name, False, group_metric, needs)
    for other in (n for n in needs if n != name and _reads_test(experiment, n)):
        raise UserError(
            f"stage: {name} reads what {other} has scored of the test set: choose another stage, or add "
            f"stages.{other}.split=valid to ARGS"
        )
    if run == "test":
        return Target(name, False, group_metric, needs, (f"++stages.{name}.split=valid",))
    return Target(name, True, f"val/{group_metric}", needs)


def _usual_stage(space: Space, experiment: config.Experiment) -> str:
    """The last fit that validates, by this metric where one selects by it; else the last test of a model."""
    tests = [n for n, s in experiment.stages.items() if s.get("run") == "test" and "module" in s]
    fits = {
        n: str((s.get("select") or {}).get("metric", ""))
        for n, s in experiment.stages.items()
        if s.get("run") == "fit" and "module" in s
    }
    wanted = f"val/{_with_group(space.metric)}"
    same = [n for n, metric in fits.items() if metric == wanted]
    validated = same or [n for n, metric in fits.items() if metric.startswith("val/all/")]
    found = validated if space.on != TEST and validated else tests
    if len(found) > 1 and space.on == TEST:
        raise UserError(
            f"{experiment.name} tests in {', '.join(found)}: say stage: ... in the space file"
        )
    if not found:
        raise UserError(f"{experiment.name} has no stage that tells {space.metric} on {space.on}")
    return found[-1]


def _with_group(metric: str) -> str:
    """``auc`` -> ``all/auc``; ``val/all/auc`` and ``test/all/auc`` are what they are beneath."""
    bare = re.sub("^(val|test)/", "", metric)
    return bare if "/" in bare or bare == "loss" else f"all/{bare}"


def _needs(name: str, experiment: config.Experiment) -> tuple[str, ...]:
    """A stage and all before it that it takes inputs from, directly or not."""
    found = {name} | needed_by(name, experiment.stages)
    return tuple(n for n in experiment.stages if n in found)


def _reads_test(experiment: config.Experiment, name: str) -> bool:
    return artifacts.stage_spec(experiment, name)["split"] == "test"


def _require_same_mode(space: Space, name: str, stage: Mapping[str, Any]) -> None:
    select = stage.get("select") or {}
    mode = select.get("mode", "max")
    if select.get("metric") == f"val/{_with_group(space.metric)}" and mode != space.mode:
        raise UserError(
            f"mode: {space.mode} is not how stages.{name} chooses its epoch by {space.metric}: say "
            f"mode: {mode}"
        )


class Running:
    """A trial's process.

    Args:
        experiment: with all overrides of the trial.
        aim: where its value comes from.
        folder: for its log.
        environment: more variables for it.
    """

    def __init__(
        self,
        experiment: config.Experiment,
        aim: Target,
        folder: Path,
        environment: Mapping[str, str],
    ) -> None:
        self._experiment, self._aim, self.log = experiment, aim, folder / LOG
        self._stage: artifacts.PlannedStage | None = None
        self._told = 0
        self._asked_at: float | None = None
        self._begun = time.monotonic()
        words = [sys.executable, "-m", "experiments.run", "exp", experiment.name]
        own = {
            **launchers.environment_of(None), **environment,
            trial_driver.SWEEP: str(os.getpid()), trial_driver.STAGES: " ".join(aim.needs),
        }  # fmt: skip
        for name in ("NAME", "ARGS", "SEEDS", "BASELINE", "LLMREC_DRIVER"):
            own.pop(name, None)
        with self.log.open("ab") as out:
            # A session of its own: Ctrl-C reaches the sweep alone, which passes it on.
            self._process = subprocess.Popen(
                [*words, *experiment.overrides], env=own, stdin=subprocess.DEVNULL,
                stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self._begun

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._process.pid

    def ended(self) -> str | None:
        """None while it runs; then done, failed, or stopped (it can go on)."""
        status = self._process.poll()
        if status is None:
            if self._asked_at and time.monotonic() - self._asked_at > SECONDS_TO_STOP:
                self._process.kill()
            return None
        if status == 0:
            return "done"
        return "stopped" if status in STOPPED or self._asked_at else "failed"

    def ask_to_stop(self, number: signal.Signals) -> None:
        """Let it save and stop (USR1), or stop at once (TERM): both can go on later."""
        if self._process.poll() is None:
            self._process.send_signal(number)
        self._asked_at = self._asked_at or time.monotonic()

    def folder(self) -> Path | None:
        """Of the stage that tells the value; None while its data is not prepared."""
        if self._stage is None:
            planned = artifacts.plan(self._experiment, cache_root())
            found = next(stage for stage in planned if stage.name == self._aim.stage)
            self._stage = found if found.folder else None
        return self._stage.folder if self._stage else None

    def read(self) -> list[tuple[int, float]]:
        """(epoch from 1, value) of the validations that were logged since the last call.

        Raises:
            UserError: validation reports other metrics alone.
        """
        folder = self.folder() if self._aim.fit else None
        curve = (
            sorted(curves(folder, [self._aim.metric])[self._aim.metric].items()) if folder else []
        )
        new, self._told = curve[self._told :], max(self._told, len(curve))
        return [(epoch, value) for epoch, value in new if not math.isnan(value)]

    def value(self) -> float:
        """What a finished trial came to.

        Raises:
            UserError: its stage has not told it.
        """
        folder = self.folder()
        if folder is None:
            raise UserError(f"no folder of {self._aim.stage} was made, see {self.log}")
        found = _of_fit(folder, self._aim.metric) if self._aim.fit else None
        if not self._aim.fit:
            rows = (read_json(folder / "metrics.json") or {}).get("rows", {})
            metrics = rows.get(self._aim.stage, {})
            if self._aim.metric not in metrics:
                raise _unknown(self._aim.stage, self._aim.metric, list(metrics))
            found = metrics[self._aim.metric]["value"]
        if found is None or math.isnan(found):
            raise UserError(f"{self._aim.metric} of {self._aim.stage} is not a number")
        return float(found)

    def why(self) -> str:
        """The last thing that a failed trial had to say."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        said = errors or [line for line in lines if line.strip()] or ["it said nothing"]
        return said[-1].removeprefix("error: ").strip()[:300]


def curves(folder: Path, metrics: Sequence[str]) -> dict[str, dict[int, float]]:
    """Of each metric its value by epoch (from 1), as far as a fit has come.

    Raises:
        UserError: it validates, but not by this metric.
    """
    try:
        log = plots.logged(folder)
    except (pl.exceptions.PolarsError, OSError):  # it is being written
        return {metric: {} for metric in metrics}
    validated = [c for c in log.columns if c.startswith("val/")]
    for metric in metrics:
        if validated and metric not in log.columns and metric.startswith("val/"):
            raise _unknown(folder.name, metric, validated)
    return {metric: dict(_by_epoch(log, metric)) for metric in metrics}


def _by_epoch(log: pl.DataFrame, metric: str) -> Iterator[tuple[int, float]]:
    if metric in log.columns and "epoch" in log.columns:
        for epoch, value in log.drop_nulls(metric).select("epoch", metric).iter_rows():
            yield int(epoch) + 1, float(value)


def _of_fit(folder: Path, metric: str) -> float | None:
    """The metric of the weights that a finished fit has kept."""
    kept = ((read_json(folder / "done.json") or {}).get("results") or {}).get("selected") or {}
    if metric in kept:
        return float(kept[metric])
    select = ((read_json(folder / "stage.json") or {}).get("spec") or {}).get("select") or {}
    chosen = select.get("metric")
    found = curves(folder, [metric, *([chosen] if chosen else [])])
    if not found[metric]:
        return None
    if not chosen:
        return found[metric][max(found[metric])]
    pick = max if select.get("mode", "max") == "max" else min
    best = pick(found[chosen], key=found[chosen].__getitem__)
    return found[metric].get(best)


def _unknown(stage: str, metric: str, known: Sequence[str]) -> UserError:
    told = ", ".join(sorted(known)[:12])
    return UserError(
        f"{stage} does not report {metric}{nearest(metric, known)} (it reports {told})"
    )
