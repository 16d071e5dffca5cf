"""MLLM-SRec's chain, tiny, through the real command: pictures asked about, fused, users, tuned, probed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

NAME = "mllm_srec/toy_shop"
PRODUCTS, SHOPPERS, CANDIDATES = 24, 20, 9
TINY = [
    "llm=tiny_random_vision", f"data.products={PRODUCTS}", f"data.shoppers={SHOPPERS}",
    f"data.candidates.count={CANDIDATES - 1}", "launch.threads=1", "launch.accelerator=cpu",
    "srec_steps.picture_tokens=6", "srec_steps.item_tokens=6", "srec_steps.user_tokens=6",
    "srec_tuning.trainer.max_epochs=1", "++srec_tuning.learning_rate=0.005",
    "~stages.sasrec", "~stages.evaluate_sasrec", "~stages.reference",
]  # fmt: skip
WRITERS = ("item_attributes", "item_fusion", "user_summaries")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def finished(finish: Callable[..., Any], runs: Path) -> Any:
    return finish(NAME, [*TINY, "srec_probes=both", "~stages.evaluate_blank"], runs)


def scores_of(run: Any, stage: str) -> pl.DataFrame:
    (file,) = run.folder(stage).glob("scores.*.parquet")
    return pl.read_parquet(file).sort("row", "item_id")


def test_the_chain_runs_and_its_probes_change_what_they_are_about(finished: Any) -> None:
    (metrics,) = finished.json("evaluate", "metrics.json")["rows"].values()
    own = scores_of(finished, "evaluate")
    assert own.height == CANDIDATES * metrics["all/n"]["value"] == CANDIDATES * SHOPPERS * 0.4
    expected = roc_auc_score(own["is_target"], own["score"])
    assert metrics["all/auc"]["value"] == pytest.approx(expected, abs=1e-9)
    for stage in WRITERS[:2]:
        assert pl.read_parquet(finished.folder(stage) / "predictions.parquet").height == PRODUCTS
    users = pl.read_parquet(finished.folder("user_summaries") / "predictions.parquet")
    assert users["steps"].list.len().max() == 3  # windows of 3 events, 2 apart, of 6
    for probe in ("swapped", "contradictory"):
        other = scores_of(finished, f"evaluate_{probe}")
        assert other["item_id"].to_list() == own["item_id"].to_list()
        assert ((own["score"] - other["score"]).abs() > 1e-4).mean() > 0.5, probe
    # Projectors are learned where a language model comes without one.
    assert not [f for f in finished.runs.iterdir() if "align_vision" in f.name]


def test_an_axis_runs_anew_what_it_touches_and_nothing_else(
    finished: Any, finish: Callable[..., Any], runs: Path
) -> None:
    """The steps in one prompt without tuning, of the pictures alone: texts of pictures are there already."""
    before = {f.name for f in runs.iterdir()}
    words = ["srec_tuning=zero_shot", "srec_reasoning=in_one", "srec_steps=viu"]
    again = finish(
        NAME,
        [*TINY, *words, "srec_input=image", "+stages.evaluate.module.reasoning_tokens=6"],
        runs,
    )
    made = {f.name for f in runs.iterdir()} - before
    assert [name.split("-")[0] for name in made] == ["mllm_srec.evaluate"]
    folder = again.runs / made.pop()
    (file,) = folder.glob("scores.*.parquet")
    assert pl.read_parquet(file).height == CANDIDATES * SHOPPERS * 0.4
    written = list(folder.glob("generations.*.jsonl"))
    assert written
    assert finished.folder("sft").is_dir()
