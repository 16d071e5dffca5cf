"""``SEEDS=2`` through the real command: what is done is used, and a second time there is nothing to do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.conftest import EXPERIMENT


@pytest.mark.slow
def test_two_seeds_then_nothing_to_do_then_another_baseline(
    finished: Any, run_command: Callable[..., Any], tiny: list[str], tmp_path: Path
) -> None:
    runs = Path(shutil.copytree(finished.runs, tmp_path / "runs"))  # seed 0 and the reference rows
    first = run_command("exp", EXPERIMENT, *tiny, runs=runs, SEEDS="2")
    assert first.returncode == 0, first.stderr[-3000:]
    zero, one = first.stderr.split("seed 1 (2 of 2)")
    assert "running" not in zero
    assert "train: running" in one
    assert "evaluate: running" in one
    assert "reference: done" in one
    folders = {f.name for f in runs.iterdir()}
    assert len(folders) == 5  # two seeds trained and tested, the reference rows once
    assert "±" in first.stdout
    assert "the strongest row without a model" in first.stdout
    again = run_command("exp", EXPERIMENT, *tiny, runs=runs, SEEDS="2", BASELINE="markov")
    assert again.returncode == 0, again.stderr[-3000:]
    assert "running" not in again.stderr
    assert "checking" not in again.stderr
    assert {f.name for f in runs.iterdir()} == folders
    table, _, tests = first.stdout.partition("against markov, the strongest row without a model,")
    assert tests, "the tiny data are made by a chain"
    assert again.stdout.startswith(table)
    assert again.stdout.endswith(tests.partition("users")[2])
    plan = run_command("plan", EXPERIMENT, *tiny, runs=runs, SEEDS="0,1")
    assert plan.stdout.count("done") == 6
    # The experiment with overrides of its own is a baseline, too, but not by another protocol.
    validated = [*tiny, "split=valid", "~stages.reference"]
    other = run_command("exp", EXPERIMENT, *validated, runs=runs, SEEDS="1")
    assert other.returncode == 0, other.stderr[-3000:]
    assert "no paired test" in other.stdout
    against = " ".join([EXPERIMENT, *validated])
    refused = run_command("exp", EXPERIMENT, *tiny, runs=runs, SEEDS="2", BASELINE=against)
    assert refused.returncode == 2
    assert "has not been run to its end for seed 1: make exp NAME=" in refused.stderr
    refused = run_command("exp", EXPERIMENT, *tiny, runs=runs, SEEDS="1", BASELINE=against)
    assert refused.returncode == 2
    assert "differ in scored (none against valid)" in refused.stderr
