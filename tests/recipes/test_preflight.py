"""What ``make plan COST=1`` foresees, beside what the run then takes."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import USERS
from tests.lightning_modules.tiny_llm import tallrec_words, write_tiny_llm
from tests.recipes.conftest import EXPERIMENT, Finished

Command = Callable[..., subprocess.CompletedProcess[str]]


def foreseen(done: subprocess.CompletedProcess[str]) -> dict[str, list[str]]:
    """The table's cells by stage."""
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("│")]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    return {row[0]: row[1:] for row in rows}


def seconds(told: str) -> int:
    hours, minutes, rest = map(int, told.removeprefix("≤ ").split(":"))
    return hours * 3600 + minutes * 60 + rest


def number(told: str) -> float:
    return float(told.removeprefix("≤ ").replace(",", "").split()[0].rstrip("%"))


def test_a_fit_and_its_test_are_foreseen(
    run_command: Command, tiny: list[str], finished: Finished, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    words = [*tiny, "launch.micro_batch_size=8"]  # two micro batches are a step
    asked = {"COST": "1", "MEMORY": "0.01"}
    done = run_command("plan", EXPERIMENT, *words, runs=runs, real=True, **asked)
    rows = foreseen(done)
    assert list(rows) == ["train", "evaluate", "reference"]
    last = finished.folder("train") / "last.ckpt"
    steps = torch.load(last, weights_only=True)["global_step"]
    basis, count, lengths, cut, told, time, peak, size, hours = rows["train"]
    assert basis == "a few steps"
    assert number(told) == steps
    assert number(size) == pytest.approx(last.stat().st_size / 2**20, abs=0.06)
    took = finished.json("train", "done.json")
    assert took["seconds"] / 5 < seconds(time) < 5 * took["seconds"] + 60  # ours with its imports
    assert number(hours) == pytest.approx(seconds(time) / 3600, abs=1e-3)
    assert hours.endswith("CPU")
    host = took["peak_memory_mb"]["host"] / 1024
    assert host / 2 < number(peak) < 2 * host
    assert lengths.endswith("/10"), "no history is read beyond max_length"
    assert cut == "0.0%" or number(cut) > 0
    # The test reads weights of a few steps, and loses what stands before the newest ten events.
    basis, count, _, cut, told, *_ = rows["evaluate"]
    assert (basis, number(count), number(told)) == ("stand-in inputs", USERS, 1)
    lines = (_root(tiny) / "u.data").read_text().splitlines()
    events = Counter(
        line.split("\t")[0] for line in lines
    ).values()  # the last of them is the target
    share = sum(count - 1 > 10 for count in events) / len(events)
    assert number(cut) == pytest.approx(100 * share, abs=0.05)
    assert "will not fit train: its longest step takes" in done.stdout
    assert "more than TIME" not in done.stdout
    longer = "++stages.train.trainer.max_epochs=1000000"
    done = run_command("plan", EXPERIMENT, *words, longer, runs=runs, COST="1", TIME="0:30")
    assert "more than TIME=0:30" in done.stdout
    assert "[1/3] train: a few steps" in done.stderr
    # Nothing of it counts as done.
    assert list(runs.iterdir()) == []
    plain = run_command("plan", EXPERIMENT, *words, runs=runs)
    assert plain.stdout.count("missing") == 3


def test_what_is_done_is_told_from_its_run(
    run_command: Command, tiny: list[str], finished: Finished
) -> None:
    rows = foreseen(run_command("plan", EXPERIMENT, *tiny, runs=finished.runs, COST="1"))
    assert {row[0] for row in rows.values()} == {"done"}
    assert seconds(rows["train"][5]) == round(finished.json("train", "done.json")["seconds"])


def test_prompts_are_measured_in_tokens(
    run_command: Callable[..., Any], tiny_movielens: Path, tmp_path: Path
) -> None:
    llm = write_tiny_llm(tmp_path / "llm", template=True, longest=1024)
    words = [
        *tallrec_words(llm, tiny_movielens, examples=8), "launch.accelerator=cpu",
        "~stages.reference", "~stages.evaluate",
        "++stages.train.trainer.max_epochs=2", "++stages.train.batch_size=4",
    ]  # fmt: skip
    done = run_command("plan", "tallrec/movie_64shot", *words, runs=tmp_path / "runs", COST="1")
    rows = foreseen(done)
    count = int(number(rows["train"][1]))
    assert number(rows["train"][4]) == 2 * -(-count // 4)
    assert count > 4
    (line,) = re.findall(r"^train, train: tokens \S.*\((.*)\)$", done.stdout, re.MULTILINE)
    assert sum(int(part.rpartition(": ")[2].replace(",", "")) for part in line.split(", ")) == count
    half = int(rows["train"][2].partition("/")[0])
    short = run_command(
        "plan", "tallrec/movie_64shot", *words, f"++llm.max_length={half - 3}",
        runs=tmp_path / "runs", COST="1",
    )  # fmt: skip
    cut = foreseen(short)
    assert number(cut["train"][3]) > number(rows["train"][3])
    assert "events did not fit" in short.stdout


def _root(words: list[str]) -> Path:
    (root,) = (w.partition("=")[2] for w in words if w.startswith("data.root="))
    return Path(root)
