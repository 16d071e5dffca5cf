"""A sweep's trials in their journal: drawn apart, taken once, and after a kill the same as without."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments import lock, sweep_space
from experiments.sweep_study import JOURNAL, Asked, Study
from tests.conftest import REPO

PARAMETERS: dict[str, Any] = {
    "rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "drop": {"low": 0.0, "high": 1.0},
    "kind": ["a", "b", "c"],
}


def study(folder: Path, total: int, parameters: Any = None, **settings: Any) -> Study:
    folder.mkdir(parents=True, exist_ok=True)
    told = {"sampler": "tpe", "metric": "m", "parameters": parameters or PARAMETERS, **settings}
    return Study(folder, sweep_space.parse(told, "x.yaml"), total)


def value_of(asked: Asked) -> float:
    """Best at rate 0.001, drop 0.3, kind b."""
    point = asked.point
    off = abs(math.log10(point["rate"]) + 3) + abs(point["drop"] - 0.3) + (point["kind"] != "b")
    return -off


def run(made: Study) -> list[dict[str, Any]]:
    points = []
    while asked := made.next():
        points.append(asked.point)
        made.told(asked, "done", 1.0, value_of(asked))
    return points


def test_parameters_of_a_trial_are_drawn_apart_and_trials_too(tmp_path: Path) -> None:
    points = run(study(tmp_path, 10))
    shares = [((math.log10(p["rate"]) + 4) / 2, p["drop"]) for p in points]
    assert all(abs(a - b) > 1e-3 for a, b in shares), "one generator for each parameter draws alike"
    assert len({p["drop"] for p in points}) == 10
    assert {p["kind"] for p in points} == {"a", "b", "c"}


def test_the_seed_makes_the_draws(tmp_path: Path) -> None:
    first, again, other = (
        run(study(tmp_path / n, 3, seed=s)) for n, s in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == again != other


def test_tpe_learns(tmp_path: Path) -> None:
    made = study(tmp_path, 40)
    run(made)
    values = [t.value or 0.0 for t in made.tried()]
    assert sum(values[:10]) / 10 + 0.3 < sum(values[30:]) / 10


def test_one_that_was_cut_off_and_one_that_was_killed_come_again_and_all_is_as_without(
    tmp_path: Path,
) -> None:
    whole = study(tmp_path / "whole", 14)
    expected = run(whole)
    here = tmp_path / "cut"
    made = study(here, 14)
    for _ in range(11):
        asked = made.next()
        assert asked
        made.told(asked, "done", 1.0, value_of(asked))
    stopped = made.next()
    assert stopped
    made.told(stopped, "cut off", 1.0)
    assert made.missing() == 3
    killed = study(here, 14).next()
    assert killed
    assert killed.point == stopped.point
    assert killed.place == 11
    assert made.missing() == 2
    lock_file = killed.folder / lock.NAME
    lock_file.write_text(lock_file.read_text().replace('"start": "', '"start": "9'))  # nobody's now
    assert made.missing() == 3
    again = study(here, 14)
    rest = run(again)
    assert rest == expected[11:], "the kill has changed what came next"
    tried = again.tried()
    assert [t.place for t in tried] == list(range(14))
    assert [t.value for t in tried] == [t.value for t in whole.tried()]


def test_a_line_that_a_kill_left_half_written_is_taken_away(tmp_path: Path) -> None:
    made = study(tmp_path, 3)
    asked = made.next()
    assert asked
    made.told(asked, "done", 1.0, 0.5)
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"op_code":4,"worker_id"')
    again = study(tmp_path, 3)
    assert [t.value for t in again.tried()] == [0.5]
    run(again)
    assert len(study(tmp_path, 3).tried()) == 3


def test_two_that_ask_share_the_trials(tmp_path: Path) -> None:
    one, other = study(tmp_path, 3), study(tmp_path, 3)
    taken = [one.next(), other.next(), one.next(), other.next()]
    assert [t.place if t else None for t in taken] == [0, 1, 2, None]
    assert one.elsewhere() == 3
    assert one.missing() == 0
    for asked in taken[:3]:
        assert asked
        other.told(asked, "failed", 1.0, why="it fell")
    assert [(t.state, t.why) for t in one.tried()] == [("failed", "it fell")] * 3
    more = study(tmp_path, 4).next()
    assert more
    assert more.place == 3


def test_a_grid_is_taken_in_order_in_values_of_its_kinds(tmp_path: Path) -> None:
    parameters = {
        "n": {"low": 1, "high": 2, "step": 1},
        "f": {"low": 0.0, "high": 0.2, "step": 0.1},
        "k": ["x"],
    }
    made = study(tmp_path, 6, parameters, sampler="grid")
    points = []
    while asked := made.next():
        points.append(asked.point)
        made.told(asked, "done", 1.0, 0.0)
    assert [p["n"] for p in points] == [1, 1, 1, 2, 2, 2]
    assert [p["f"] for p in points] == pytest.approx([0.0, 0.1, 0.2] * 2)
    axes = made.space.axes
    assert [sweep_space.override_words(p, axes) for p in points] == [
        [f"{k}={v}" for k, v in point.items()] for point in made.space.points()
    ]


def test_the_median_prunes_behind_the_warmup(tmp_path: Path) -> None:
    made = study(tmp_path, 3, pruner="median", startup=2, warmup=3)
    for _ in range(2):
        asked = made.next()
        assert asked
        for epoch in range(1, 6):
            asked.trial.report(0.5, epoch)
        made.told(asked, "done", 1.0, 0.5)
    worse = made.next()
    assert worse
    said = []
    for epoch in range(1, 6):
        worse.trial.report(0.4, epoch)
        said.append(worse.trial.should_prune())
    assert said == [False, False, False, True, True]
    made.told(worse, "pruned", 1.0)
    last = made.tried()[2]
    assert (last.state, last.value, last.epochs) == ("pruned", 0.4, 5)


def test_without_optuna_the_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "optuna.py").write_text("raise ImportError('none here')")
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    code = f"{path}; from experiments import sweep; sys.exit(sweep.main([]))"
    variables = {
        "NAME": "sasrec/movielens_100k",
        "SPACE": "sasrec_movielens_100k",
        "LLMREC_RUNS": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False,
        env={**os.environ, **variables},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: a sweep needs the package optuna")
    assert ".[sweep]" in done.stderr
