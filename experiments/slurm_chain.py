"""``make slurm CHAIN=1``: a job for each missing stage, with that stage's own devices, behind those it needs.

A job waits for exactly the stages that its stage takes inputs from (``afterok``), so a test on one processor
holds no GPU while a fit still trains, and what does not depend on each other runs at once. Seeds share the
jobs of stages that no seed changes. Slurm looks at a dependency when a job has ended, not when it is queued
again: a preempted stage keeps its chain. A job whose stage can no longer come (``--kill-on-invalid-dep``) is
cancelled, instead of waiting for ever; the same command then submits what is missing. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datamodules.sources import cache_root
from datamodules.versioning import value_digest
from experiments import artifacts, baseline, config, messages, slurm, slurm_queue, slurm_submit
from experiments.artifacts import RUNNING, STALE, PlannedStage
from experiments.command import switched
from experiments.errors import UserError
from experiments.places import stages_before
from experiments.slurm import Request

DATA = "data"


@dataclass(frozen=True)
class Job:
    """One job of a chain.

    Args:
        name: the stage, or ``data``, which prepares what the stages read.
        asked: its devices.
        experiment: with the overrides of its seed.
        after: the jobs that it waits for.
        file: its script, without its ending.
        number: of a job that waits or runs already.
    """

    name: str
    asked: Request
    experiment: config.Experiment
    after: tuple[str, ...]
    file: str
    number: str | None = None


def submit(
    asked: Request, experiments: Sequence[config.Experiment], folder: Path, again: Sequence[str]
) -> int:
    """Submit the chains of an experiment, one for each seed (or print their scripts, with DRY=1).

    Args:
        asked: what a stage is given that says nothing of its own.
        experiments: of one name, a seed each.
        folder: for scripts and logs.
        again: ``stale=rerun``, where it was given.

    Raises:
        UserError: a stage is being run by somebody else, or sbatch refuses a job.
    """
    name = experiments[0].name
    jobs = planned(asked, experiments, bool(again))
    new = {mark: job for mark, job in jobs.items() if job.number is None}
    scripts = {
        mark: slurm.script(
            job.asked, job.experiment, (), folder, again,
            only=job.name, verb=DATA if job.name == DATA else "exp",
        )
        for mark, job in new.items()
    }  # fmt: skip
    if switched("DRY"):
        for mark, text in scripts.items():
            waits = [jobs[before].number or jobs[before].file for before in new[mark].after]
            messages.put(" ".join(["# sbatch", *_options(waits), f"{new[mark].file}.sh"]))
            messages.put(text)
        return 0
    if not jobs:
        messages.say(f"every stage is done: make exp NAME={name} prints the table")
        return 0
    _hand_in(jobs, scripts, folder)
    messages.say(
        f"scripts and logs are in {messages.short(folder)}. When all have ended, make exp NAME={name} prints "
        "the table; of a stage that fails, the jobs behind it are cancelled, and the same command submits "
        "what is missing"
    )
    return 0


def planned(
    asked: Request, experiments: Sequence[config.Experiment], again: bool
) -> dict[str, Job]:
    """The jobs by what they make, each behind those it waits for; what is done has none."""
    jobs: dict[str, Job] = {}
    for experiment in experiments:
        slurm.launch_words(asked, experiment)  # refuses what cannot be
        suffix = f".seed{experiment.config['seed']}" if len(experiments) > 1 else ""
        stages = artifacts.plan(experiment, cache_root())
        marks = slurm_queue.marks(stages)
        for stage in stages:
            before = stages_before(experiment.stages[stage.name])
            waits = [marks[s] for s in sorted(before) if marks[s] in jobs]
            if stage.done and not (again and (waits or stage.state == STALE)):
                continue
            number = slurm_queue.queued(marks[stage.name])
            if stage.state == RUNNING and number is None:
                raise UserError(
                    f"{stage.folder} is {stage.why}; wait for it, or stop it and run again"
                )
            if artifacts.prepared_data(stage.spec["data"], cache_root()) is None:
                waits.append(_preparing(jobs, stage, asked, experiment))
            jobs.setdefault(
                marks[stage.name],
                Job(
                    stage.name, devices(asked, experiment, stage.name), experiment, tuple(waits),
                    stage.name + suffix, number,
                ),
            )  # fmt: skip
    return jobs


def _preparing(
    jobs: dict[str, Job], stage: PlannedStage, asked: Request, experiment: config.Experiment
) -> str:
    """The job that prepares what a stage reads: one for all that read the same."""
    mark = value_digest([DATA, artifacts.data_key(stage.spec["data"])])
    file = f"{DATA}{sum(job.name == DATA for job in jobs.values()) or ''}"
    alone = replace(asked, gpus=0, nodes=1, tasks=1)
    number = slurm_queue.queued(mark)
    jobs.setdefault(mark, Job(DATA, alone, experiment, (), file, number))
    return mark


def devices(asked: Request, experiment: config.Experiment, name: str) -> Request:
    """What a stage's job is given: its own ``launch``, else what was asked for.

    Rows that nobody trains (popularity, Markov) count and look up: one process without a GPU.
    """
    stage = experiment.stages[name]
    own: dict[str, Any] = stage.get("launch") or {}
    given = "launch.accelerator" in [baseline.setting(o) for o in experiment.overrides]
    if "modules" in stage and not stage.get("inputs") and not own and not given:
        return replace(asked, gpus=0, nodes=1, tasks=1)
    usual = experiment.config["launch"]["accelerator"] if given else "gpu"
    tasks = int(own.get("devices", asked.tasks))
    gpus = tasks if asked.gpus and own.get("accelerator", usual) != "cpu" else 0
    return replace(asked, gpus=gpus, nodes=int(own.get("num_nodes", asked.nodes)), tasks=tasks)


def _options(numbers: Sequence[str]) -> list[str]:
    """Of sbatch, for a job that waits for others."""
    listed = ":".join(numbers)
    return [f"--dependency=afterok:{listed}", "--kill-on-invalid-dep=yes"] if numbers else []


def _hand_in(jobs: dict[str, Job], scripts: dict[str, str], folder: Path) -> None:
    """Ask for all new jobs before the first is queued, submit them, and tell which wait for which."""
    for mark, text in scripts.items():
        file = folder / f"{jobs[mark].file}.sh"
        slurm_submit.write(file, text)
        slurm_submit.submit(file, steps=["--test-only"])
    numbers: dict[str, str] = {}
    for mark, job in jobs.items():
        waits = [numbers[before] for before in job.after]
        if job.number is not None:
            numbers[mark] = job.number
            messages.say(f"  {job.file}: job {job.number} waits or runs already")
            continue
        options = _options(waits)
        numbers[mark] = slurm_submit.submit(
            folder / f"{job.file}.sh", *options, steps=["--parsable"]
        )
        messages.put(numbers[mark])
        behind = f" behind {', '.join(waits)}" if waits else ""
        messages.say(f"  {job.file}: job {numbers[mark]}{behind}")
        slurm_queue.note(mark, numbers[mark], slurm.job_name(job.experiment, job.name))
