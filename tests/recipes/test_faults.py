"""What breaks underneath a run: nothing that was finished is lost, a sentence says what to do, and the same
command ends with the numbers of a run to which nothing happened."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from callbacks.checkpoints import BEFORE, LAST, unreadable
from experiments import replay
from lightning_modules.sasrec import SASRecModule
from tests.conftest import ITEMS
from tests.recipes.conftest import EXPERIMENT, Finished

Command = Callable[..., subprocess.CompletedProcess[str]]
ALONE = ["~stages.reference", "~stages.evaluate"]


def fault(name: str, /, **arguments: Any) -> str:
    inner = ",".join(f"{k}:{v}" for k, v in arguments.items())
    return f"+callbacks.fault={{_target_:faults.{name},{inner}}}".replace(",}", "}")


@pytest.fixture
def command(run_command: Command, tiny: list[str], tmp_path: Path) -> Command:
    """``command(*overrides, runs=...)`` on the tiny data; no traceback, whatever happens."""

    def run(*words: str, runs: Path = tmp_path / "runs") -> subprocess.CompletedProcess[str]:
        done = run_command("exp", EXPERIMENT, *tiny, *words, runs=runs)
        assert "Traceback" not in done.stderr, done.stderr[-3000:]
        return done

    return run


def said(done: subprocess.CompletedProcess[str]) -> str:
    """The sentence of a command that failed."""
    assert done.returncode == 2, done.stderr[-3000:]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def train(runs: Path) -> Path:
    (found,) = runs.glob("sasrec.train-*")
    return found


def require_same(runs: Path, finished: Finished) -> None:
    """The fit's outcome and its weights, bit for bit."""
    ours, theirs = train(runs), finished.folder("train")
    assert (
        json.loads((ours / "done.json").read_text())["results"]
        == finished.json("train", "done.json")["results"]
    )
    mine, other = (torch.load(f / "best.ckpt", weights_only=True) for f in (ours, theirs))
    assert all(torch.equal(mine["state_dict"][n], w) for n, w in other["state_dict"].items())
    assert not (ours / BEFORE).exists()
    assert not list(ours.glob(".*.part"))


@pytest.mark.parametrize("name", ["scores.", "done.json"])
def test_killed_while_a_file_is_written(
    command: Command, finished: Finished, tmp_path: Path, name: str
) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(finished.runs, runs)
    (evaluate,) = runs.glob("*evaluate-*")
    before = {f.name: f.read_bytes() for f in evaluate.glob("*.parquet")}
    rows = json.loads((evaluate / "metrics.json").read_text())["rows"]
    shutil.rmtree(evaluate)
    assert "killed by SIGKILL" in said(command(fault("KillInFile", name=name)))
    assert not (evaluate / "done.json").exists()
    assert bool(list(evaluate.glob("*.parquet"))) == (name != "scores."), "whole or absent"
    done = command()
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((evaluate / "metrics.json").read_text())["rows"] == rows
    assert {f.name: f.read_bytes() for f in evaluate.glob("*.parquet")} == before


@pytest.mark.slow
def test_killed_rank(command: Command, tmp_path: Path) -> None:
    """The other rank would wait for it for ever; the run ends, and goes on with nothing lost."""
    two = [*ALONE, "launch.devices=2", "launch.strategy=ddp", "++stages.train.module.dropout=0.0"]
    rows = tmp_path / "rows"
    rows.mkdir()
    log = f"+callbacks.rows={{_target_:faults.RowsLog,folder:{rows}}}"
    told = said(command(*two, log, fault("KillRank", step=10, rank=1)))
    heard = "another rank has ended" in told  # or was stopped, too, before it could say so
    assert heard or "the process, or one of its ranks, was killed by SIGKILL" in told
    assert "the same command resumes" in told
    saved = torch.load(train(tmp_path / "runs") / LAST, weights_only=True)
    for file in rows.glob("*.jsonl"):  # what a rank learned behind the save, it learns again
        lines = [line for line in file.read_text().splitlines() if json.loads(line)[0] < 1]
        file.write_text("".join(f"{line}\n" for line in lines))
    assert (saved["epoch"], saved["global_step"]) == (0, 7)
    done = command(*two, log)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming" in done.stderr
    lines = [json.loads(line) for f in rows.glob("*.jsonl") for line in f.read_text().splitlines()]
    learned = sorted((epoch, row) for epoch, each in lines for row in each)
    count = 1 + max(row for _, row in learned)
    assert learned == [(epoch, row) for epoch in range(3) for row in range(count)]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    command: Command, finished: Finished, tmp_path: Path
) -> None:
    steps = finished_steps(finished)
    assert "SIGKILL" in said(command(*ALONE, fault("KillAtStep", step=steps - 1)))
    last = train(tmp_path / "runs") / LAST
    epochs = [torch.load(f, weights_only=True)["epoch"] for f in (last, last.with_name(BEFORE))]
    assert epochs == [1, 0]
    whole = last.read_bytes()
    middle = len(whole) // 2  # among the weights: torch itself reads it as if nothing were wrong
    last.write_bytes(whole[:middle] + bytes(8) + whole[middle + 8 :])
    torch.load(last, weights_only=True)
    done = command(*ALONE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "last.ckpt cannot be read" in done.stderr
    assert "going on from the one before, last.before.ckpt" in done.stderr
    require_same(tmp_path / "runs", finished)


def finished_steps(finished: Finished) -> int:
    steps: int = torch.load(finished.folder("train") / LAST, weights_only=True)["global_step"]
    return steps


@pytest.fixture
def small_disk(tmp_path: Path, finished: Finished) -> Iterator[Path]:
    """Room for one checkpoint and a half."""
    size = (finished.folder("train") / LAST).stat().st_size
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", f"size={3 * size}", "tmpfs") as place:
        yield place


class mounted:  # noqa: N801 - read as a phrase
    """A file system for the length of a test; skips where this user may not mount."""

    def __init__(self, place: Path, *words: str) -> None:
        self.place, self.words = place, words

    def __enter__(self) -> Path:
        self.place.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["mount", *self.words, str(self.place)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
        return self.place

    def __exit__(self, *unused: object) -> None:
        subprocess.run(["umount", "--lazy", str(self.place)], check=True)


def test_a_full_disk(command: Command, finished: Finished, small_disk: Path) -> None:
    filler = small_disk / "filler"
    runs = small_disk / "runs"
    told = said(command(*ALONE, runs=runs))
    assert "the disk is full" in told
    assert "make room, and run the same command again" in told
    assert unreadable(train(runs) / LAST) is None
    assert not list(train(runs).glob(".*.part")), "what is half written takes room"
    assert not filler.exists()
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    done = command(*ALONE, runs=runs)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming" in done.stderr
    require_same(runs, finished)


def test_a_file_that_may_not_grow(command: Command, finished: Finished, tmp_path: Path) -> None:
    """As a quota or ``ulimit -f``: it fails in the middle of writing the second checkpoint."""
    size = (finished.folder("train") / LAST).stat().st_size // 2
    told = said(command(*ALONE, fault("LimitFiles", step=8, size=size)))
    assert "a file is larger than its limit allows (ulimit -f)" in told
    last = train(tmp_path / "runs") / LAST
    assert unreadable(last) is None
    assert torch.load(last, weights_only=True)["epoch"] == 0
    done = command(*ALONE)
    assert done.returncode == 0, done.stderr[-3000:]
    require_same(tmp_path / "runs", finished)


def test_a_read_only_run_folder(command: Command, finished: Finished, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(finished.runs, runs)
    (evaluate,) = runs.glob("*evaluate-*")
    (evaluate / "done.json").unlink()
    if os.geteuid():
        for place in (evaluate, runs):
            place.chmod(0o555)
        told = said(command())
        for place in (evaluate, runs):
            place.chmod(0o755)
    else:  # root writes whatever the rights say
        with mounted(runs, "--bind", str(runs)):
            subprocess.run(["mount", "-o", "remount,ro,bind", str(runs)], check=True)
            told = said(command())
    assert f"{evaluate.name}" in told
    assert "may not be written (read-only, or no rights)" in told
    assert "set LLMREC_RUNS" in told
    done = command()
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_loss_that_is_no_number_stops_with_its_batch(
    command: Command, finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = said(command(*ALONE, fault("SpoilBatch", number=9)))
    folder = train(tmp_path / "runs")
    assert "the loss is inf at step 9 (epoch 1, batch 2)" in told
    assert f"make replay BATCH={folder / 'nonfinite.0.safetensors'}" in told
    note = json.loads((folder / "nonfinite.0.json").read_text())
    assert (note["global_step"], note["epoch"], note["batch_index"]) == (9, 1, 2)
    assert note["seed"] == 0
    assert note["weights_not_finite"] == []
    # The batch, computed again with the weights before it: only its count is wrong.
    batch = load_file(folder / "nonfinite.0.safetensors")
    weights = load_file(folder / "nonfinite.weights.safetensors")
    assert batch["batch.normaliser"] == 0
    assert batch["batch.history"].shape[0] == len(batch["batch.row"])
    spec = json.loads((folder / "stage.json").read_text())["spec"]
    (node,) = spec["modules"].values()
    options = {k: v for k, v in node.items() if k != "_target_"}
    module = SASRecModule(num_items=ITEMS, **options).eval()
    assert set(weights) == {n for n, p in module.named_parameters() if p.requires_grad}
    module.load_state_dict(weights, strict=False)
    assert torch.isfinite(module.item_vectors()).all()
    assert torch.load(folder / LAST, weights_only=True)["epoch"] == 0, "what was saved is sound"
    assert replay.main([str(folder / "nonfinite.0.safetensors")]) == 0
    shown = capsys.readouterr().out
    assert "batch.normaliser () float32: 0\n" in shown
    for precision in ("float32", "float64"):
        assert f"{precision}: loss inf" in shown
        assert f"{precision}: first not finite: the loss itself, behind network.final_norm" in shown
    assert "it is not finite in float32 and float64" in shown
    done = command(*ALONE)
    assert done.returncode == 0, done.stderr[-3000:]
    require_same(tmp_path / "runs", finished)


def test_a_kept_step_is_computed_again_as_it_was(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sound step of the second epoch, with the dropout that was drawn for it."""
    kept = Path(said(command(*ALONE, fault("CallNonFinite", number=9))).removeprefix("error: "))
    before = {f.name: f.read_bytes() for f in kept.parent.iterdir() if f.is_file()}
    assert replay.main([str(kept)]) == 0
    shown = capsys.readouterr().out
    assert {f.name: f.read_bytes() for f in kept.parent.iterdir() if f.is_file()} == before
    loss = float(json.loads(kept.with_suffix(".json").read_text())["loss"])
    again = [float(t) for t in re.findall(r"^float(?:32|64): loss (\S+),", shown, re.MULTILINE)]
    assert again == pytest.approx([loss, loss], rel=1e-5)
    assert "it is finite here in every precision" in shown


def test_no_memory_names_what_to_lower(
    command: Command, finished: Finished, tmp_path: Path
) -> None:
    told = said(command(*ALONE, fault("NoMemory"), "launch.micro_batch_size=12"))
    assert "out of memory" in told
    assert "lower launch.micro_batch_size=6 (now 12; the same steps, in smaller parts)" in told
    assert "stages.train.batch_size" in told
    runs = tmp_path / "copied"
    shutil.copytree(finished.runs, runs)
    (evaluate,) = runs.glob("*evaluate-*")
    shutil.rmtree(evaluate)
    told = said(command(fault("NoMemory"), runs=runs))
    assert "lower stages.evaluate.batch_size=" in told
    assert "micro_batch_size" not in told


def test_a_clock_that_goes_back(command: Command, finished: Finished, tmp_path: Path) -> None:
    done = command(*ALONE, fault("ClockBack"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert 0 < json.loads((train(tmp_path / "runs") / "done.json").read_text())["seconds"] < 600
    require_same(tmp_path / "runs", finished)


def test_a_package_that_is_not_installed(command: Command) -> None:
    told = said(command(*ALONE, fault("NoPackage", name="no_such_package")))
    assert told == (
        "error: the package no_such_package is not installed: .venv/bin/python -m pip install "
        "no-such-package"
    )
