"""``make sweep``: an experiment with many values of its settings, each trial the normal command.

Variables: NAME and ARGS as for ``make exp``; SPACE, a file of ``experiments/sweeps``; N, the number of
trials; JOBS at once; SLURM=1 submits an array of N tasks instead, with the variables of ``make slurm``. The
same command goes on where it stood; ``N=0`` prints what is there. ``python -m experiments.sweep trial FOLDER
[key=value ...]`` runs the next trial of a sweep, for the tasks of such an array. No torch here.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from callbacks import stop_request
from callbacks.stop_request import Stopped
from datamodules.versioning import read_json, value_digest, write_json
from experiments import (
    artifacts,
    baseline,
    config,
    messages,
    slurm,
    slurm_submit,
    sweep_space,
    sweep_trial,
)
from experiments.command import switched
from experiments.errors import UserError
from experiments.run import request
from experiments.sweep_space import UNHASHED
from experiments.sweep_study import require_optuna
from experiments.sweep_work import Sweep, told, work

USUAL_TRIALS = 20


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 done, 2 failed (the reason is on the screen), 75 stopped as asked, 130 stopped."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    stop_request.listen(signal.SIGUSR1)
    try:
        if argv[:1] == ["trial"]:
            sweep = opened(Path(argv[1]))
            return work(sweep, 1, argv[2:], only_one=True)
        sweep = asked_for(list(argv))
        if switched("SLURM"):
            return submit(sweep)
        jobs = _count("JOBS", 1, least=1)
        messages.say(f"{sweep.experiment.name}: {messages.short(sweep.folder)}")
        return work(sweep, jobs, []) if os.environ.get("N", "").strip() != "0" else told(sweep)
    except UserError as error:
        messages.print_error(error)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written
        where = messages.short(Path(error.filename)) if error.filename else "the sweep's folder"
        messages.print_error(UserError(f"{where}: {error.strerror or error}"))
        return 2
    except Stopped:
        messages.say("stopped as asked; the same command goes on where it stood")
        return stop_request.STATUS
    except KeyboardInterrupt:
        messages.say(
            "stopped; the same command goes on, trials that ran from their last checkpoints"
        )
        return 130


def asked_for(words: list[str]) -> Sweep:
    """The sweep that the command and its variables name; its folder is made.

    Raises:
        UserError: something of it cannot be.
    """
    name, overrides = request(words)
    name = config.full_name(name)
    if "stale=rerun" in overrides:
        raise UserError("stale=rerun is not for sweeps: delete the sweep's folder to try all anew")
    if os.environ.get("SEEDS", "").strip():
        raise UserError("SEEDS is not for sweeps: run the best trial's command with SEEDS=5")
    overrides = [config.as_text(o) for o in overrides]
    config.find(name)
    require_optuna()
    path = sweep_space.find(os.environ.get("SPACE", "").strip())
    settings = sweep_space.read(path)
    space = sweep_space.parse(settings, path.name)
    whole = len(space.points()) if space.sampler == "grid" else None
    total = _count("N", whole or USUAL_TRIALS, least=0)
    what = [o for o in overrides if baseline.setting(o).partition(".")[0] not in UNHASHED]
    made = value_digest([name, what, {**settings, "pruner": None}])
    folder = artifacts.runs_root().resolve() / "sweeps" / f"{name.replace('/', '.')}-{made}"
    note = {
        "experiment": name, "overrides": overrides, "settings": settings, "file": path.name,
        "total": min(total, whole) if whole else total,
    }  # fmt: skip
    sweep = _sweep(note, folder)
    require_composing(sweep)
    make_folder(sweep, note)
    return sweep


def make_folder(sweep: Sweep, note: dict[str, Any]) -> None:
    """Make the folder, and note what it is for; ``N=0`` changes nothing in it."""
    if sweep.total == 0 and not sweep.folder.is_dir():
        raise UserError("N=0 prints the table of a sweep that was begun, and this one was not")
    if sweep.total:
        write_json(sweep.folder / "sweep.json", note)


def opened(folder: Path) -> Sweep:
    """A sweep that was begun.

    Raises:
        UserError: there is none.
    """
    note = read_json(folder / "sweep.json")
    if note is None:
        raise UserError(f"{folder} has no readable sweep.json: start the sweep with make sweep")
    return _sweep(note, folder)


def _sweep(note: dict[str, Any], folder: Path) -> Sweep:
    space = sweep_space.parse(note["settings"], note["file"])
    experiment = config.load(note["experiment"], note["overrides"])
    aim = sweep_trial.target(space, experiment)
    return Sweep(experiment, space, aim, folder, int(note["total"]))


def require_composing(sweep: Sweep) -> None:
    """Compose the experiment with every choice and with both ends of every range, before anything runs.

    Raises:
        UserError: a key is unknown or given twice, or a value cannot be.
    """
    given = [baseline.setting(o) for o in sweep.experiment.overrides]
    for axis in sweep.space.axes:
        if axis.key in given:
            raise UserError(
                f"{axis.key} is in ARGS and among the parameters: leave it out of one of them"
            )
        for text in axis.ends():
            words = [*sweep.experiment.overrides, f"{axis.key}={text}"]
            changed = config.load(sweep.experiment.name, words)
            if sweep.aim.stage not in changed.stages:
                raise UserError(
                    f"{axis.key}={text} takes away the stage {sweep.aim.stage}, which "
                    "tells the metric"
                )


def _count(name: str, default: int, least: int) -> int:
    text = os.environ.get(name, "").strip() or str(default)
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) < least:
        raise UserError(f"{name}={text!r}, expected a whole number of at least {least}")
    return int(text)


def submit(sweep: Sweep) -> int:
    """Submit an array with a task for each trial that is still to be run (or print it, with DRY=1)."""
    asked = slurm.read_request(os.environ)
    jobs = _count("JOBS", 0, least=0)
    each = range(sweep.study().missing())
    if not each:
        messages.say("all trials were begun; the same command without SLURM=1 prints the table")
        return 0
    folder = sweep.folder / "slurm"
    own = ("experiments.sweep", "trial", str(sweep.folder))
    job = slurm_submit.hand_in(
        slurm.script(asked, sweep.experiment, each, folder, own=own, at_once=jobs), folder
    )
    if job:
        messages.put(job)
        messages.say(
            f"submitted {len(each)} trials as job {job}, logs in {messages.short(folder)}; the same command "
            "with N=0 and without SLURM=1 prints the table of what is done"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
