"""``make sweep`` through the real command: a search that is killed, a pruned trial, a table of ablations."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import lock
from tests.conftest import REPO
from tests.recipes.conftest import EXPERIMENT

RATE = "stages.train.module.learning_rate"
Environment = Callable[[Path], dict[str, str]]


def space(folder: Path, text: str) -> str:
    file = folder / "space.yaml"
    file.write_text(f"metric: ndcg@10\n{text}")
    return str(file)


def begin(environment: dict[str, str], words: list[str], **variables: str) -> subprocess.Popen[str]:
    """``make sweep``, as the Makefile starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.sweep", EXPERIMENT, *words],
        cwd=REPO, env={**environment, **variables}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def sweep(environment: dict[str, str], words: list[str], **variables: str) -> tuple[int, str, str]:
    process = begin(environment, words, **variables)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def rows(runs: Path, name: str = "trials.csv") -> list[dict[str, str]]:
    (file,) = runs.glob(f"sweeps/*/{name}")
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def stages(runs: Path) -> set[str]:
    return {f.name.partition("-")[0] for f in runs.iterdir() if (f / "stage.json").is_file()}


def wait_until(true: Callable[[], Any], seconds: float = 240) -> bool:
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.1)
    return bool(true())


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_and_the_best_is_what_the_command_repeats(
    command_environment: Environment,
    run_command: Callable[..., Any],
    tiny: list[str],
    tmp_path: Path,
) -> None:
    runs, note = tmp_path / "runs", tmp_path / "note"
    environment = command_environment(runs)
    # The first trial is done; in the second the whole sweep is killed while it learns.
    linger = f"+callbacks.linger={{_target_:faults.Linger,step:5,note:{note},seconds:0.4}}"
    asked = {
        "SPACE": space(tmp_path, f"sampler: tpe\nparameters: {{{RATE}: {{low: 0.001, high: 0.1}}}}"),
        "N": "3",
    }  # fmt: skip
    status, _, err = sweep(environment, tiny, **{**asked, "N": "1"})
    assert status == 0, err
    first = rows(runs)[0]
    process = begin(environment, [*tiny, linger], **asked)
    assert wait_until(lambda: note.exists() and len(list(runs.glob("*/last.ckpt"))) == 2)
    stage = int(note.read_text())
    process.kill()
    process.communicate()
    assert wait_until(lambda: lock._start_time(stage) is None, 60), "a trial outlives its sweep"
    status, out, err = sweep(environment, tiny, **asked)
    assert status == 0, err
    assert [int(n) for n in re.findall(r"trial (\d) of 3:", err)] == [1, 2], (
        "the first is not repeated"
    )
    logs = [f.read_text() for f in sorted(runs.glob("sweeps/*/trials/*/log.txt"))]
    assert ["resuming" in log for log in logs] == [False, True, False]
    assert not any("error" in log for log in logs)
    found = rows(runs)
    assert sorted(r["trial"] for r in found) == ["0", "1", "2"]
    assert {r["state"] for r in found} == {"done"}
    assert first in found
    values = [float(r["val/all/ndcg@10"]) for r in found]
    assert values == sorted(values, reverse=True)
    assert stages(runs) == {"sasrec.train"}, "a trial has read the test set"
    selected = [
        json.loads(f.read_text())["results"]["selected"]
        for f in runs.glob("sasrec.train-*/done.json")
    ]
    assert sorted(s["val/all/ndcg@10"] for s in selected) == pytest.approx(sorted(values), abs=1e-6)
    # The printed command makes nothing of the fit anew, and tests.
    line = next(li for li in out.splitlines() if li.startswith("the best, trial"))
    words = shlex.split(line)
    assert words[4:7] == ["make", "exp", f"NAME={EXPERIMENT}"]
    best = run_command("exp", EXPERIMENT, *shlex.split(words[7].removeprefix("ARGS=")), runs=runs)
    assert best.returncode == 0, best.stderr
    assert "train: done" in best.stderr
    assert "evaluate: running" in best.stderr
    status, again, err = sweep(environment, tiny, **{**asked, "N": "0"})
    assert (status, "trial 0 of" in err) == (0, False)
    assert again == out
    (folder,) = runs.glob("sweeps/*")
    assert {f.name for f in folder.iterdir()} >= {"trials.md", "sweep.svg", "sweep.png"}


@pytest.mark.slow
def test_a_bad_trial_is_pruned_cleanly_and_one_that_fails_says_why(
    command_environment: Environment, tiny: list[str], tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    # The second learns nothing and so is stopped; the third is no rate.
    text = "sampler: grid\npruner: median\nstartup: 1\nwarmup: 1\n"
    text += f"parameters: {{{RATE}: [0.01, 1e-9, -1.0]}}\n"
    slow = f"+callbacks.linger={{_target_:faults.Linger,step:1,note:{tmp_path}/note,seconds:0.1}}"
    words = [
        *(w for w in tiny if "max_epochs" not in w),
        "++stages.train.trainer.max_epochs=12",
        slow,
    ]
    status, out, err = sweep(
        command_environment(runs), words, SPACE=space(tmp_path, text), JOBS="1"
    )
    assert status == 0, err
    found = {r["trial"]: r for r in rows(runs)}
    assert [found[n]["state"] for n in "012"] == ["done", "pruned", "failed"]
    assert "learning_rate=-1.0 is not above 0" in out.partition("trial 2 failed: ")[2]
    (pruned,) = (
        f
        for f in runs.glob("sasrec.train-*")
        if not (f / "done.json").is_file() and (f / "last.ckpt").is_file()
    )
    assert not (pruned / lock.NAME).exists()
    assert 2 <= int(found["1"]["val/all/ndcg@10 note"].removeprefix("epoch ")) < 12
    assert (
        "stopped as asked"
        in (next(runs.glob("sweeps/*")) / "trials" / "001" / "log.txt").read_text()
    )
    grid = rows(runs, "grid.csv")
    assert [r["learning_rate"] for r in grid] == ["0.01", "1e-09", "-1.0"]
    assert grid[2]["val/all/ndcg@10"] == "failed"


@pytest.mark.slow
def test_a_table_of_ablations_reads_the_test_set_and_says_so(
    command_environment: Environment, tiny: list[str], tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    text = "sampler: grid\non: test\nparameters: {stages.train.module.loss: [ce, bce]}\n"
    environment = command_environment(runs)
    status, out, err = sweep(environment, tiny, SPACE=space(tmp_path, text), JOBS="2")
    assert status == 0, err
    assert "nothing may be chosen by it" in out
    assert "the best" not in out
    assert stages(runs) == {"sasrec.train", "sasrec.evaluate"}
    tested = [
        json.loads(f.read_text())["rows"]["evaluate"]
        for f in runs.glob("sasrec.evaluate-*/metrics.json")
    ]
    found = rows(runs, "grid.csv")
    assert [r["loss"] for r in found] == ["ce", "bce"]
    assert {round(float(r["all/ndcg@10"]), 5) for r in found} == {
        round(t["all/ndcg@10"]["value"], 5) for t in tested
    }
    assert all(float(r["all/ndcg@10 ±"]) > 0 for r in found)


@pytest.mark.slow
def test_asked_to_stop_it_saves_and_goes_on(
    command_environment: Environment, tiny: list[str], tmp_path: Path
) -> None:
    runs, note = tmp_path / "runs", tmp_path / "note"
    linger = f"+callbacks.linger={{_target_:faults.Linger,step:5,note:{note},seconds:0.4}}"
    asked = {"SPACE": space(tmp_path, f"sampler: grid\nparameters: {{{RATE}: [0.01]}}\n")}
    process = begin(command_environment(runs), [*tiny, linger], **asked)
    assert wait_until(note.exists)
    os.kill(process.pid, signal.SIGUSR1)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    status, _, err = sweep(command_environment(runs), tiny, **asked)
    assert status == 0, err
    assert "resuming" in next(runs.glob("sweeps/*/trials/000/log.txt")).read_text()
    assert [r["state"] for r in rows(runs)] == ["done"]
