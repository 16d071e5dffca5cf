"""``make replay BATCH=FILE``: a step whose loss was no number, computed again to say where it begins.

FILE is the ``nonfinite.RANK.safetensors`` that the run has kept (``callbacks.nonfinite``). What can be
refused is refused here, without torch; the step is ``replay_step``'s.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datamodules.versioning import read_json
from experiments.command import exit_status
from experiments.errors import UserError


def kept(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The note of a batch that a run has kept, and the stage's settings.

    Raises:
        UserError: the file, or what belongs to it, is not there or does not fit.
    """
    named = file.name.startswith("nonfinite.") and file.suffix == ".safetensors"
    if not named or not file.is_file():
        raise UserError(
            f"BATCH={str(file)!r} is no batch that a run has kept: give the nonfinite.RANK.safetensors that "
            "its message names"
        )
    note, job = read_json(file.with_suffix(".json")), read_json(file.parent / "stage.json")
    if not note or not job or "batch" not in note:
        raise UserError(
            f"{file.with_suffix('.json')} and stage.json beside it cannot be read: the step cannot be built "
            "again without them"
        )
    if not {"fields", "items", "tensor"} & note["batch"].keys():
        raise UserError(f"{file} was kept by older code: run the experiment to the same step again")
    return note, job


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 told, 2 refused (the reason is on the screen)."""

    def work() -> None:
        name = argv[0] if argv else os.environ.get("BATCH", "").strip()
        if not name:
            raise UserError(
                "BATCH is missing: give the nonfinite.RANK.safetensors that the run's message names, "
                "BATCH=runs/.../nonfinite.0.safetensors"
            )
        kept(Path(name))
        from experiments import replay_step  # torch is slow to import
        from lightning_modules.errors import ModelError

        try:
            replay_step.replay(Path(name))
        except ModelError as error:
            raise UserError(str(error)) from error

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
