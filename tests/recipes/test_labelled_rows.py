"""The real command on labelled rows, on a paper's preset, and on data that are joined."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from tests.conftest import write_movielens_100k

NAME = "reference/tallrec_movie"
ROWS = {"random", "popularity", "recent_popularity", "markov", "liked_fraction"}


@pytest.fixture(scope="module")
def labelled(finish: Callable[..., Any], tiny_movielens: Path) -> Any:
    """TALLRec's rows without a model on the tiny data."""
    options = [f"data.root={tiny_movielens}", "data.expected=null", "launch.threads=1"]
    return finish(NAME, options)


def test_the_auc_of_labelled_rows_is_that_of_the_scores_file(labelled: Any) -> None:
    rows = labelled.json("reference", "metrics.json")["rows"]
    assert set(rows) == ROWS
    for row, metrics in rows.items():
        file = labelled.folder("reference") / f"scores.{row}.parquet"
        scores = pl.read_parquet(file)
        assert scores["row"].to_list() == list(range(scores.height))
        assert metrics["all/n"]["value"] == scores.height > 20
        expected = roc_auc_score(scores["label"], scores["score"])
        assert metrics["all/auc"]["value"] == pytest.approx(expected, abs=1e-9)
        own = [
            roc_auc_score(user["label"], user["score"])
            for user in scores.partition_by("user_id")
            if user["label"].n_unique() == 2
        ]
        assert metrics["all/users"]["value"] == len(own)
        assert metrics["all/uauc"]["value"] == pytest.approx(sum(own) / len(own), abs=1e-9)
    assert rows["random"]["all/auc"]["value"] == 0.5
    assert " auc" in labelled.result.stdout
    assert "liked_fraction" in labelled.result.stdout


def test_a_papers_preset_refuses_other_data_unless_told(
    run_command: Callable[..., Any], tiny_movielens: Path, tmp_path: Path
) -> None:
    words = [NAME, f"data.root={tiny_movielens}", "preset=paper"]
    refused = run_command("exp", *words, runs=tmp_path)
    assert refused.returncode == 2
    assert "is a paper's preset, but the data has 60 users (expected 943)" in refused.stderr
    assert "data.allow_mismatch=true" in refused.stderr
    assert not list(tmp_path.iterdir())
    report = run_command("data", *words, runs=tmp_path)
    assert report.returncode == 2
    assert "(expected 943: -883)" in report.stdout, "the report is printed all the same"
    assert "is a paper's preset" in report.stderr
    allowed = run_command("data", *words, "data.allow_mismatch=true", runs=tmp_path)
    assert allowed.returncode == 0, allowed.stderr


def test_a_data_config_reports_joined_domains(
    run_command: Callable[..., Any], tiny_movielens: Path, tmp_path: Path
) -> None:
    other = write_movielens_100k(tmp_path / "other", seed=5)
    module = "_target_: datamodules.movielens.MovieLensDataModule"
    examples = "examples: {_target_: datamodules.examples.RatedTargets, liked_above: 3}"
    parts = ", ".join(
        f"{name}: {{{module}, root: '{root}', {examples}, expected: {{users: 61}}}}"
        for name, root in (("a", tiny_movielens), ("b", other))
    )
    joined = "datamodules.joined.JoinedDataModule"
    whole = f"data={{_target_: {joined}, parts: {{{parts}}}, train: [a], test: [b]}}"
    result = run_command("data", NAME, whole, runs=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "120" in result.stdout  # users of both
    assert "train: a; valid: a; test: b" in result.stdout
    assert "in a 60 users (expected 61), in b 60 users (expected 61)" in result.stderr
    refused = run_command("exp", NAME, whole, "preset=paper", runs=tmp_path)
    assert refused.returncode == 2
    assert "in a 60 users (expected 61), in b 60 users" in refused.stderr
    words = (whole, "preset=paper", "data.allow_mismatch=true")
    assert run_command("data", NAME, *words, runs=tmp_path).returncode == 0
