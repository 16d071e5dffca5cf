"""TALLRec's question without training, tiny, through the real command: shown examples, reasons, lists."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score

from tests.lightning_modules.tiny_llm import write_tiny_llm

LONGEST = 4096


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, tiny_movielens: Path) -> list[str]:
    llm = write_tiny_llm(tmp_path_factory.mktemp("llm"), longest=LONGEST)
    return [
        f"data.root={tiny_movielens}", "data.expected=null", f"++llm.source={llm}",
        f"++llm.max_length={LONGEST}", "launch.threads=1", "launch.accelerator=cpu",
    ]  # fmt: skip


def all_of(run: Any, stage: str) -> tuple[dict[str, float], pl.DataFrame]:
    (metrics,) = run.json(stage, "metrics.json")["rows"].values()
    scores = pl.read_parquet(next(run.folder(stage).glob("scores.*.parquet")))
    return {
        k.removeprefix("all/"): v["value"] for k, v in metrics.items() if k[:4] == "all/"
    }, scores


def require_calibration_of_the_scores_file(run: Any, stage: str) -> None:
    """Every number again, from the scores file alone."""
    found, scores = all_of(run, stage)
    p = 1 / (1 + np.exp(-scores["score"].cast(pl.Float64).to_numpy()))
    y = scores["label"].to_numpy()
    assert found["auc"] == pytest.approx(roc_auc_score(y, scores["score"]), abs=1e-9)
    assert found["brier"] == pytest.approx(brier_score_loss(y, p), abs=1e-6)
    assert found["log_loss"] == pytest.approx(log_loss(y, p), abs=1e-6)
    assert found["yes_rate"] == pytest.approx((scores["score"] > 0).mean())
    place = np.clip(np.ceil(p * 15), 1, 15).astype(int)
    curve = run.json(stage, "reliability.evaluate.json")
    assert [line["bin"] for line in curve] == sorted(set(place.tolist()))
    gap = 0.0
    for line in curve:
        own = place == line["bin"]
        assert line["count"] == own.sum()
        assert line["mean_probability"] == pytest.approx(p[own].mean(), abs=1e-6)
        assert line["share_liked"] == pytest.approx(y[own].mean())
        gap += own.mean() * abs(p[own].mean() - y[own].mean())
    assert found["ece"] == pytest.approx(gap, abs=1e-6)


def test_shown_examples_and_the_calibration_of_their_margins(
    finish: Callable[..., Any], words: list[str]
) -> None:
    run = finish("tallrec/movie_icl_few_shot", words)
    require_calibration_of_the_scores_file(run, "evaluate")
    rows = run.json("reference", "metrics.json")["rows"]
    assert not any(
        "ece" in name for row in rows.values() for name in row
    )  # shares of likes are no odds
    heads = next(line for line in run.result.stdout.splitlines() if " auc " in line)
    assert " ece " in heads
    assert " yes_rate " in heads
    assert " refusal_rate " in heads
    assert 0 < all_of(run, "evaluate")[0]["refusal_rate"] <= 1  # a random model says anything
    assert not any("refusal_rate" in name for row in rows.values() for name in row)


@pytest.mark.slow
def test_reasons_are_kept_and_not_written_twice(
    finish: Callable[..., Any], words: list[str]
) -> None:
    short = "stages.evaluate.module.rationale_tokens=4"
    words = [*words, "data.examples.count=9", short]
    run = finish("tallrec/movie_icl_cot", words)
    require_calibration_of_the_scores_file(run, "evaluate")
    found, scores = all_of(run, "evaluate")
    assert found["n"] == scores.height == 9
    assert 0 < found["refusal_rate"] <= 1  # of the first token, read behind the reasons

    written, said = all_of(run, "written")
    assert written["yes_rate"] == pytest.approx((said["score"] == 1).mean())
    assert written["refusal_rate"] == pytest.approx((said["score"] == 0).mean())
    assert "ece" not in written
    assert not list(run.folder("written").glob("reliability.*"))

    folder = run.folder("evaluate")
    (log,) = folder.glob("generations.evaluate.*.jsonl")
    lines = log.read_bytes()
    assert len(lines.splitlines()) == 9
    entries = [json.loads(line) for line in lines.splitlines()]
    names = {"key", "tokens", "text", "check"}
    assert all(set(e) == names and len(e["tokens"]) <= 4 for e in entries)

    # A kill after four texts and a half: the stage goes on from there and ends with the same numbers.
    before = (folder / "metrics.json").read_bytes()
    kept = b"".join(lines.splitlines(keepends=True)[:4])
    log.write_bytes(kept + lines[len(kept) : len(kept) + 10])
    (folder / "done.json").unlink()
    finish("tallrec/movie_icl_cot", words, runs=run.runs)
    assert log.read_bytes().startswith(kept)
    assert sorted(log.read_bytes().splitlines()) == sorted(lines.splitlines())
    assert (folder / "metrics.json").read_bytes() == before


def test_lists_are_answered_or_refused(finish: Callable[..., Any], words: list[str]) -> None:
    run = finish("tallrec/movie_icl_listwise", [*words, "~stages.reference"])
    found, scores = all_of(run, "evaluate")
    assert found["auc"] == pytest.approx(roc_auc_score(scores["label"], scores["score"]), abs=1e-9)
    assert scores["score"].is_between(0, 1).all()
    assert 0 <= found["refusal_rate"] <= (scores["score"] == 0.5).mean()
    assert not {"ece", "yes_rate"} & set(found)
    assert " refusal_rate " in run.result.stdout
