"""A run that is killed anywhere ends with the same numbers, to the last bit, as one that is not."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

REPO = Path(__file__).resolve().parents[2]
EXPERIMENT = "sasrec/movielens_100k"
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def settings(tiny: list[str]) -> list[str]:
    """Dropout on, and patience that runs out long before the epochs do."""
    return [
        *[w for w in tiny if "max_epochs" not in w], "~stages.reference",
        "++stages.train.trainer.max_epochs=60", "++stages.train.module.dropout=0.3",
        "++stages.train.select.patience=3", "++stages.train.module.schedule=constant",
        "++stages.train.module.loss=bce",
    ]  # fmt: skip


def fault(name: str, **arguments: Any) -> str:
    inner = ",".join(f"{k}:{v}" for k, v in arguments.items())
    return f"+callbacks.fault={{_target_:faults.{name},{inner}}}".replace(",}", "}")


def stage_folder(runs: Path, stage: str) -> Path:
    (found,) = [f for f in runs.iterdir() if f.name.startswith(f"sasrec.{stage}-")]
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(true: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)
    return true()


@pytest.fixture(scope="module")
def uninterrupted(
    run_command: Command, settings: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    runs = tmp_path_factory.mktemp("uninterrupted")
    result = run_command("exp", EXPERIMENT, *settings, runs=runs)
    assert result.returncode == 0, result.stderr[-3000:]
    epochs = json.loads((stage_folder(runs, "train") / "done.json").read_text())["results"][
        "epochs"
    ]
    assert 4 <= epochs < 60, "patience has to run out, but not at once"
    return runs


@pytest.mark.slow
def test_killed_five_times_and_moved_ends_bit_equal(
    run_command: Command, settings: list[str], uninterrupted: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    whole = torch.load(stage_folder(uninterrupted, "train") / "last.ckpt", weights_only=True)
    late = int(whole["global_step"]) - 1
    draw = random.Random()
    first = draw.randint(1, late // 3)  # may be in the first epoch, when there is no checkpoint yet
    second = draw.randint(first + 1, 2 * late // 3)
    faults = [
        fault("KillAtStep", step=first),
        fault("KillAtStep", step=second),
        fault("KillInCheckpoint", number=1),  # half a file of the next checkpoint
        fault("KillAtStep", step=late),  # the best epoch is past, patience has not run out
        fault("KillAfterFit"),
    ]
    for number, kill in enumerate(faults):
        result = run_command("exp", EXPERIMENT, *settings, kill, runs=runs)
        assert result.returncode == 2, (number, first, second, result.stderr[-2000:])
        assert "SIGKILL" in result.stderr
        assert not (stage_folder(runs, "train") / "done.json").exists()
        if number == 3:  # a folder is no part of a result: the runs may move between two attempts
            runs = Path(shutil.move(runs, tmp_path / "elsewhere"))
    done = run_command("exp", EXPERIMENT, *settings, runs=runs)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming" in done.stderr
    for stage, name in (("evaluate", "metrics.json"), ("train", "done.json")):
        ours = json.loads((stage_folder(runs, stage) / name).read_text())
        theirs = json.loads((stage_folder(uninterrupted, stage) / name).read_text())
        key = "rows" if name == "metrics.json" else "results"
        assert ours[key] == theirs[key], f"killed at steps {first}, {second}, {late}"
    names = [f.name for f in stage_folder(runs, "train").iterdir()]
    assert not [n for n in names if n.endswith(".part")], names


def start(
    settings: list[str], environment: dict[str, str], note: Path, seconds: float = 0.5
) -> tuple[subprocess.Popen[str], int]:
    """Start the command; returns its process and the stage's pid once it is past a checkpoint."""
    words = ["exp", EXPERIMENT, *settings, fault("Linger", step=12, note=note, seconds=seconds)]
    driver = subprocess.Popen(
        [sys.executable, "-m", "experiments.run", *words],
        cwd=REPO, env=environment, text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    assert wait_until(note.exists, 120)
    return driver, int(note.read_text())


@pytest.mark.slow
def test_signals_to_the_driver_leave_a_resumable_folder(
    settings: list[str],
    run_command: Command,
    command_environment: Callable[[Path], dict[str, str]],
    uninterrupted: Path,
    tmp_path: Path,
) -> None:
    runs = tmp_path / "runs"
    saved = []
    # SIGTERM stops at once, and so does a second Ctrl-C; a single one saves behind the step.
    for name, signals, seconds, status in (
        ("terminated", [signal.SIGTERM], 0.5, 130),
        ("impatient", [signal.SIGINT, signal.SIGINT], 20.0, 130),
        ("interrupted", [signal.SIGINT], 0.5, 75),
    ):
        driver, stage = start(settings, command_environment(runs), tmp_path / name, seconds)
        for number in signals:
            driver.send_signal(number)
            time.sleep(0.5)
        _, said = driver.communicate(timeout=30)
        assert driver.returncode == status, said
        assert "Traceback" not in said, said
        assert ("Ctrl-C again stops at once" in said) == (name != "terminated")
        assert not alive(stage), "the stage outlived its driver"
        folder = stage_folder(runs, "train")
        saved.append(torch.load(folder / "last.ckpt", weights_only=True)["global_step"])
        assert not (folder / ".lock").exists()
    assert saved[0] == saved[1] < saved[2]
    # kill -9 cannot be caught: the stage has to notice by itself, and the lock has to be taken over.
    driver, stage = start(settings, command_environment(runs), tmp_path / "SIGKILL")
    refused = run_command("exp", EXPERIMENT, *settings, runs=runs)
    assert refused.returncode == 2
    assert f"process {driver.pid}" in refused.stderr
    assert "Traceback" not in refused.stderr
    driver.kill()
    driver.communicate(timeout=10)
    assert wait_until(lambda: not alive(stage), 2.0), "the stage outlived its killed driver"
    after = run_command("exp", EXPERIMENT, *settings, runs=runs)
    assert after.returncode == 0, after.stderr[-3000:]
    assert f"took over from process {driver.pid}" in after.stderr
    ours = json.loads((stage_folder(runs, "evaluate") / "metrics.json").read_text())
    theirs = json.loads((stage_folder(uninterrupted, "evaluate") / "metrics.json").read_text())
    assert ours["rows"] == theirs["rows"]
