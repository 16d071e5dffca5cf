"""Scripts handed to Slurm."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments import faults, messages
from experiments.command import switched, write_whole
from experiments.errors import UserError
from experiments.slurm_time import seconds_of

DOWN = "down, drained or reserved"


def hand_in(text: str, folder: Path) -> str:
    """Write a script to its folder and submit it; its number, none with DRY=1, which prints it instead.

    Raises:
        UserError: the folder cannot be written, or sbatch refuses the job.
    """
    if switched("DRY"):
        messages.put(text)
        return ""
    write(folder / "job.sh", text)
    return submit(folder / "job.sh")


def write(file: Path, text: str) -> None:
    """Write a script or a note among the runs, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    write_whole(file, text, lambda error: faults.explained(error, file.parent))


def submit(file: Path, *options: str, steps: Sequence[str] = ("--test-only", "--parsable")) -> str:
    """Hand the script to sbatch; the job's number.

    Args:
        file: the script.
        options: of sbatch, besides those in the script.
        steps: asked first, since sbatch also takes what can never start; then submitted.

    Raises:
        UserError: sbatch is missing, or refuses it, or it asks for more time than its partition gives.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            f"sbatch is not here: run this where jobs are submitted (the script is {file}), or print it "
            "with DRY=1"
        )
    for option in steps:
        words = ["sbatch", option, *options, str(file)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        # Nodes that are down now may come back.
        if done.returncode and not (option == "--test-only" and DOWN in done.stderr):
            raise UserError(f"sbatch refused {messages.short(file)}: {done.stderr.strip()}")
        if option == "--test-only" and (told := too_long(file.read_text("utf-8"), os.environ)):
            raise UserError(told)
    return done.stdout.strip().partition(";")[0]


def too_long(script: str, environment: Mapping[str, str]) -> str | None:
    """Why the job would wait for ever: its time is over its partition's limit, which sbatch does not tell.

    None where it is not, or where that cannot be known: a QOS may give more than the partition does.
    """
    asked = dict(re.findall(r"^#SBATCH --([a-z]+)=(.*)$", script, re.M))
    for key, name in (("partition", "PARTITION"), ("time", "TIMELIMIT"), ("qos", "QOS")):
        if value := environment.get(f"SBATCH_{name}"):  # which sbatch prefers to the script
            asked[key] = value
    words = ["sinfo", "--noheader", "--all", "--format=%P %l"]
    try:
        told = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30).stdout
        wanted = seconds_of(asked["time"])
    except (OSError, subprocess.TimeoutExpired, UserError):
        return None
    limits = longest(told, asked.get("partition"))
    if (
        "qos" in asked
        or not limits
        or any(most is None or most >= wanted for most in limits.values())
    ):
        return None
    listed = ", ".join(f"{name} gives {_clock(most or 0)}" for name, most in limits.items())
    return (
        f"TIME={asked['time']} is more than the partition allows ({listed} at most), and Slurm would keep "
        'the job waiting for ever: give less TIME, or another partition (ARGS="slurm.partition=...")'
    )


def longest(told: str, partition: str | None) -> dict[str, int | None]:
    """The limits, in seconds (None: there is none), of the partitions that a job may run in.

    Args:
        told: lines of sinfo, ``NAME LIMIT``; a star marks the default partition.
        partition: those that the job names, with commas; None for the default one.

    Returns:
        Nothing where one of them, or its limit, is not known.
    """
    found: dict[str, int | None] = {}
    wanted = partition.split(",") if partition else []
    for name, _, limit in (line.strip().partition(" ") for line in told.splitlines()):
        if not partition and name.endswith("*"):
            wanted = [name[:-1]]
        try:
            found[name.rstrip("*")] = (
                None if limit.strip() == "infinite" else seconds_of(limit.strip())
            )
        except UserError:
            continue
    return {name: found[name] for name in wanted} if set(wanted) <= set(found) else {}


def _clock(seconds: int) -> str:
    minutes = seconds // 60
    return f"{minutes // 60}:{minutes % 60:02}:{seconds % 60:02}"
