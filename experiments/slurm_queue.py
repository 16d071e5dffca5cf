"""Which job makes which stage, noted beside the run folders: nothing is queued twice. No torch here."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from datamodules.sources import cache_root
from datamodules.versioning import read_json
from experiments import artifacts, config, slurm_submit
from experiments.artifacts import STALE, PlannedStage
from experiments.errors import UserError


def marks(stages: Sequence[PlannedStage]) -> dict[str, str]:
    """What each stage makes, whether its data are prepared or not: its key without their content."""
    found: dict[str, str] = {}
    for stage in stages:
        parts = {arg: str(source).partition("/") for arg, source in stage.spec["inputs"].items()}
        inputs = {
            arg: f"{found.get(before, before)}/{file}" for arg, (before, _, file) in parts.items()
        }
        found[stage.name] = artifacts.stage_key(stage.spec, "", inputs)
    return found


def missing(experiment: config.Experiment, again: bool) -> dict[str, str]:
    """The marks of the stages that a job has to run; of those with a model of their own, where there are any.

    Args:
        experiment: with its seed.
        again: whether stale stages are run anew.
    """
    stages = artifacts.plan(experiment, cache_root())
    made = marks(stages)
    left = [s.name for s in stages if not s.done or (again and s.state == STALE)]
    own = [name for name in left if "modules" not in experiment.stages[name]]
    return {name: made[name] for name in own or left}


def refuse_queued(wanted: Sequence[dict[str, str]]) -> None:
    """Refuse a job of which another one does all: it would wait for that with its devices in hand.

    Args:
        wanted: the stages that are missing, as ``missing`` has them, of each seed.

    Raises:
        UserError: there is one that waits or runs.
    """
    makers: dict[str, None] = {}
    for stages in wanted:
        jobs = [queued(mark) for mark in stages.values()]
        if jobs and all(jobs):
            makers |= dict.fromkeys(filter(None, jobs))
    if makers:
        raise UserError(
            f"job {', '.join(makers)} waits or runs already and makes the same ({', '.join(wanted[0])}): "
            f"wait for it, or scancel {' '.join(makers)} first"
        )


def note(mark: str, job: str, name: str) -> None:
    """Remember the job that makes something.

    Args:
        mark: what it makes.
        job: its number; of an array's task ``JOB_TASK``.
        name: under which queues show it.

    Raises:
        UserError: the folder of the notes cannot be written.
    """
    slurm_submit.write(_noted(mark), json.dumps({"job": job, "name": name}) + "\n")


def note_free(wanted: Iterable[str], job: str, name: str) -> None:
    """Remember it for those that no job in the queue makes."""
    for mark in wanted:
        if queued(mark) is None:
            note(mark, job, name)


def _noted(mark: str) -> Path:
    return artifacts.runs_root() / "slurm" / "queued" / f"{mark}.json"


def queued(mark: str) -> str | None:
    """The number of the job that makes it, if that waits or runs."""
    found = read_json(_noted(mark))
    if found is None:
        return None
    # Another cluster may have a job of this number: its name is then another one.
    words = ["squeue", "--noheader", f"--jobs={found['job']}", "--format=%j"]
    try:
        told = subprocess.run(words, capture_output=True, text=True, check=False).stdout
    except OSError:  # a dry run where there is no Slurm
        return None
    return str(found["job"]) if found["name"] in told.split() else None
