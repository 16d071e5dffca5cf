"""A run that is asked to stop, inside an epoch or anywhere else, ends with the numbers of one that is not."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks import stop_request

EXPERIMENT = "sasrec/movielens_100k"
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def settings(tiny: list[str]) -> list[str]:
    """Fourteen micro batches an epoch, two a step; dropout and negatives are drawn."""
    return [
        *tiny, "~stages.reference", "++stages.train.module.dropout=0.3",
        "++stages.train.module.loss=bce", "launch.micro_batch_size=8",
    ]  # fmt: skip


def folder(runs: Path, stage: str) -> Path:
    (found,) = [f for f in runs.iterdir() if f.name.startswith(f"sasrec.{stage}-")]
    return found


def results(runs: Path) -> Any:
    """Everything that a run has found out."""
    tested = json.loads((folder(runs, "evaluate") / "metrics.json").read_text())["rows"]
    fitted = json.loads((folder(runs, "train") / "done.json").read_text())["results"]
    return tested, fitted


@pytest.fixture(scope="module")
def uninterrupted(
    run_command: Command, settings: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    runs = tmp_path_factory.mktemp("uninterrupted")
    result = run_command("exp", EXPERIMENT, *settings, runs=runs)
    assert result.returncode == 0, result.stderr[-3000:]
    return runs


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = torch.load(checkpoint, weights_only=True)["state_dict"]
    return loaded


@pytest.mark.slow
def test_stopped_in_a_fit_and_in_a_test_it_ends_bit_equal(
    run_command: Command, settings: list[str], uninterrupted: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    # A loader's worker asks for its first batches before the checkpoint is read.
    worker = "launch.num_workers=1"
    train = {
        "at the first of a step's micro batches": (2, 2, []),
        "at an epoch's last": (13, 7, [worker]),
    }
    for where, (number, step, more) in train.items():
        ask = f"+callbacks.ask={{_target_:faults.AskAtBatch,number:{number}}}"
        stopped = run_command("exp", EXPERIMENT, *settings, ask, *more, runs=runs)
        assert stopped.returncode == stop_request.STATUS, stopped.stderr[-3000:]
        assert "the same command goes on" in stopped.stderr
        last = torch.load(folder(runs, "train") / "last.ckpt", weights_only=True)
        assert last["global_step"] == step, where
        assert not (folder(runs, "train") / "done.json").exists()
        assert not (folder(runs, "train") / stop_request.MARK).exists()
    ask = "+callbacks.ask={_target_:faults.AskInTest}"
    stopped = run_command("exp", EXPERIMENT, *settings, ask, worker, runs=runs)
    assert stopped.returncode == stop_request.STATUS, stopped.stderr[-3000:]
    assert (folder(runs, "train") / "done.json").exists()
    assert not (folder(runs, "evaluate") / "done.json").exists()
    done = run_command("exp", EXPERIMENT, *settings, runs=runs)
    assert done.returncode == 0, done.stderr[-3000:]
    assert results(runs) == results(uninterrupted)
    ours = weights(folder(runs, "train") / "last.ckpt")
    theirs = weights(folder(uninterrupted, "train") / "last.ckpt")
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
