"""The GPUs of one machine, dealt out among trials that run at once. No torch here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from experiments.config import Experiment

VISIBLE = "CUDA_VISIBLE_DEVICES"
DRIVER = Path("/proc/driver/nvidia/gpus")


def visible(environment: Mapping[str, str]) -> list[str]:
    """Names of the GPUs that may be used: those that the variable lists, else all by number."""
    if (listed := environment.get(VISIBLE)) is not None:
        return [name.strip() for name in listed.split(",") if name.strip()]
    count = len(list(DRIVER.iterdir())) if DRIVER.is_dir() else 0
    return [str(number) for number in range(count)]


def each_trial(experiment: Experiment, stages: Collection[str]) -> int:
    """How many GPUs a trial takes: those of its largest stage; 0 where all of it computes on the CPU."""
    launch = experiment.config["launch"]
    every = [{**launch, **(experiment.stages[name].get("launch") or {})} for name in stages]
    return max((int(one["devices"]) for one in every if one["accelerator"] != "cpu"), default=0)


def at_once(jobs: int, each: int, names: list[str]) -> tuple[int, str | None]:
    """How many of ``jobs`` trials have the GPUs that they take, and a sentence where it is fewer."""
    fit = max(1, len(names) // each) if each and names else jobs
    if jobs <= fit:
        return jobs, None
    return fit, (
        f"JOBS={jobs}, but {len(names)} GPUs are enough for {fit} at once with launch.devices={each}: {fit} "
        f"trials run at once ({VISIBLE}=0,0 would put two on the first GPU)"
    )


def share(slot: int, jobs: int, each: int, names: list[str]) -> dict[str, str]:
    """What one of several trials sees of the GPUs: different ones at once, of a name given twice the same."""
    if jobs < 2 or not each or len(names) < jobs * each:
        return {}
    return {VISIBLE: ",".join(names[slot::jobs][:each])}
