"""Scripts handed to Slurm."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from experiments import messages
from experiments.command import switched
from experiments.errors import UserError

DOWN = "down, drained or reserved"


def hand_in(text: str, folder: Path) -> str:
    """Write a script to its folder and submit it; its number, none with DRY=1, which prints it instead."""
    if switched("DRY"):
        messages.put(text)
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.sh").write_text(text, encoding="utf-8")
    return submit(folder / "job.sh")


def submit(file: Path, *options: str, steps: Sequence[str] = ("--test-only", "--parsable")) -> str:
    """Hand the script to sbatch; the job's number.

    Args:
        file: the script.
        options: of sbatch, besides those in the script.
        steps: asked first, since sbatch also takes what can never start; then submitted.

    Raises:
        UserError: sbatch is missing, or refuses it.
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
    return done.stdout.strip().partition(";")[0]
