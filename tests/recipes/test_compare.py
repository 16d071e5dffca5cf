"""``make compare``, ``make beyond`` and ``make plots`` on a finished run, through the real commands."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests import preloaded
from tests.conftest import ITEMS, REPO

NAME = "sasrec/movielens_100k"
REFERENCES = {"random", "popularity", "recent_popularity", "markov"}
Tell = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def tell(finished: Any, command_environment: Callable[[Path], dict[str, str]]) -> Tell:
    """``tell(module, *words, **variables)``: the command, as the Makefile starts it."""

    def run(module: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        own = command_environment(finished.runs)
        return preloaded.run(f"experiments.{module}", *words, env={**own, **variables})

    return run


@pytest.fixture(scope="module")
def words(tiny: list[str]) -> str:
    """NAMES: the experiment with the overrides that it was run with."""
    return " ".join([NAME, *(w for w in tiny if not w.startswith("data.root"))])


def test_one_table_with_chance_marks_and_costs(finished: Any, tell: Tell, words: str) -> None:
    made = tell("compare", NAMES=words, FORMAT="csv", BASELINE="popularity")
    assert made.returncode == 0, made.stderr
    rows = {r["method"].partition(" ")[0]: r for r in csv.DictReader(io.StringIO(made.stdout))}
    assert set(rows) == {NAME, *REFERENCES}
    test, metrics = finished.folder("evaluate"), finished.json("evaluate", "metrics.json")
    values = metrics["rows"]["evaluate"]
    for column, metric in (("ndcg@10", "all/ndcg@10"), ("cold item ndcg@10", "cold_item/ndcg@10")):
        assert float(rows[NAME][column]) == pytest.approx(values[metric]["value"], abs=1e-6)
        half = 1.96 * values[metric]["stderr"]
        assert float(rows[NAME][f"{column} ±"]) == pytest.approx(half, rel=1e-4)
    assert 0 < float(rows[NAME]["ndcg@10 p"]) <= 1
    assert rows["popularity"]["ndcg@10 p"] == ""
    seconds = [finished.json(stage, "done.json")["seconds"] for stage in ("train", "evaluate")]
    assert float(rows[NAME]["CPU-hours"]) == pytest.approx(sum(seconds) / 3600, rel=1e-4)
    assert rows["markov"]["CPU-hours"] == ""
    assert float(rows["markov"]["users/s"]) > 0
    assert "than popularity with p < 0.05" in made.stderr
    assert test.is_dir()


def test_no_torch_is_imported(finished: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys; from experiments import compare; status = compare.main(['beyond']); "
        "status |= compare.main([]); print(status, 'torch' in sys.modules)"
    )
    monkeypatch.setenv("LLMREC_RUNS", str(finished.runs))
    monkeypatch.setenv("NAMES", words)
    made = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert made.stdout.splitlines()[-1] == "0 False", made.stderr


def test_what_lists_are_like(tell: Tell, words: str) -> None:
    made = tell("compare", "beyond", NAMES=words, FORMAT="csv", K="5")
    assert made.returncode == 0, made.stderr
    rows = {r["method"].partition(" ")[0]: r for r in csv.DictReader(io.StringIO(made.stdout))}
    popular, ours = rows["popularity"], rows[NAME]
    assert rows["random"]["coverage@5"] == ""
    assert 5 / ITEMS <= float(popular["coverage@5"]) < float(ours["coverage@5"]) <= 1
    assert float(popular["Gini@5"]) > float(ours["Gini@5"])
    assert float(popular["popularity percentile@5"]) > float(ours["popularity percentile@5"])
    assert float(popular["novelty@5 (bits)"]) < float(ours["novelty@5 (bits)"])
    assert 0 <= float(ours["diversity@5 (categories)"]) <= 1
    assert ours["gender gap ndcg@10 note"].startswith(("F over M, p ", "M over F, p "))
    for bad in ("1", "101", "x"):
        refused = tell("compare", "beyond", NAMES=words, K=bad)
        assert refused.returncode == 2
        assert f"K={bad!r}, expected a whole number from 2 to 100" in refused.stderr


def test_charts_are_written_and_printed(tell: Tell, words: str, tmp_path: Path) -> None:
    made = tell("plots", NAMES=words, OUT=str(tmp_path))
    assert made.returncode == 0, made.stderr
    printed = {Path(line).name for line in made.stdout.splitlines()}
    assert printed == {f.name for f in tmp_path.iterdir()}
    stems = ("cold_warm", "cost", "learning.sasrec.movielens_100k.train")
    assert printed == {f"{stem}.{kind}" for stem in stems for kind in ("svg", "png")}
    for file in tmp_path.glob("*.png"):
        with Image.open(file) as image:
            assert image.width == 1600
            assert len(image.getcolors(100_000) or []) > 10


def test_what_was_not_run_and_what_cannot_be(tell: Tell) -> None:
    made = tell("compare", NAMES=f"{NAME} gru4rec/movielens_100k")
    assert made.returncode == 2
    assert "make exp NAME=gru4rec/movielens_100k" in made.stderr
    assert "it was run with" in made.stderr
    made = tell("compare", NAMES="'")
    assert made.returncode == 2
    assert "cannot be read" in made.stderr
