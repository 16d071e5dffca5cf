"""TALLRec's chain, tiny, through the real command."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from tests.conftest import REPO
from tests.lightning_modules.tiny_llm import tallrec_words, write_tiny_llm

NAME = "tallrec/movie_64shot"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, tiny_movielens: Path) -> list[str]:
    llm = write_tiny_llm(tmp_path_factory.mktemp("llm"), longest=1024)
    return [
        *tallrec_words(llm, tiny_movielens, examples=8),
        "launch.accelerator=cpu", "++stages.train.trainer.max_epochs=2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(finish: Callable[..., Any], words: list[str]) -> Any:
    return finish(NAME, words)


def test_the_chain_runs_and_its_auc_is_that_of_the_scores_file(finished: Any) -> None:
    rows = finished.json("evaluate", "metrics.json")["rows"]
    (metrics,) = rows.values()
    scores = pl.read_parquet(next(finished.folder("evaluate").glob("scores.*.parquet")))
    expected = roc_auc_score(scores["label"], scores["score"])
    assert metrics["all/auc"]["value"] == pytest.approx(expected, abs=1e-9)
    assert metrics["all/auc"]["stderr"] > 0
    assert scores["score"].n_unique() > scores.height // 2
    assert "liked_fraction" in finished.result.stdout
    assert "resamples users" in finished.result.stdout


def test_a_second_run_has_nothing_to_do(
    finished: Any, run_command: Callable[..., Any], words: list[str]
) -> None:
    again = run_command("exp", NAME, *words, runs=finished.runs)
    assert again.returncode == 0
    assert "running" not in again.stdout + again.stderr


def test_a_finished_model_is_exported(
    finished: Any, words: list[str], command_environment: Callable[[Path], dict[str, str]]
) -> None:
    def export(name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "experiments.export", name, *overrides],
            cwd=REPO, env=command_environment(finished.runs), capture_output=True, text=True,
            check=False,
        )  # fmt: skip

    done = export(NAME, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = finished.folder("train") / "export"
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert (folder / "merged" / "model.safetensors").is_file()
    none = export("sasrec/movielens_100k")
    assert none.returncode == 2
    assert "trains no language model" in none.stderr
    unfinished = export(NAME, *words, "seed=9")
    assert unfinished.returncode == 2
    assert "has not been run to its end" in unfinished.stderr


def test_a_quantized_model_goes_through_the_same_chain(
    finish: Callable[..., Any], words: list[str]
) -> None:
    run = finish(NAME, [*words, "++llm.quantization=nf4", "~stages.reference"])
    (metrics,) = run.json("evaluate", "metrics.json")["rows"].values()
    assert 0 <= metrics["all/auc"]["value"] <= 1
