"""MLLM-MSR's texts, tiny, through the real command: users summarised, a yes/no tuned, candidates ranked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM, AutoTokenizer

from datamodules.loading import EvalDataset
from datamodules.types import TEST
from experiments import build, load
from experiments.demo_desk import Desk
from experiments.demo_model import written_of
from tests import preloaded
from tests.lightning_modules.tiny_llm import write_tiny_llm

NAME = "mllm_msr/movielens_100k_text"
CANDIDATES = 21


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, tiny_movielens: Path) -> list[str]:
    llm = write_tiny_llm(tmp_path_factory.mktemp("llm"), longest=1024)
    return [
        f"data.root={tiny_movielens}", "data.expected=null", "data.split.users=40",
        f"++llm.source={llm}", "++llm.max_length=1024", "++llm.dtype=float32",
        "launch.threads=1", "launch.accelerator=cpu", "~stages.sasrec", "~stages.evaluate_sasrec",
        "++stages.sft.trainer.max_epochs=2", "++stages.user_summaries.module.max_new_tokens=8",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(finish: Callable[..., Any], words: list[str]) -> Any:
    return finish(NAME, words)


def scores_of(finished: Any) -> pl.DataFrame:
    return pl.read_parquet(next(finished.folder("evaluate").glob("scores.*.parquet")))


def test_users_are_ranked_among_candidates_by_group(finished: Any) -> None:
    (metrics,) = finished.json("evaluate", "metrics.json")["rows"].values()
    scores = scores_of(finished)
    assert scores.height == CANDIDATES * metrics["all/n"]["value"] == CANDIDATES * 6
    expected = roc_auc_score(scores["is_target"], scores["score"])
    assert metrics["all/auc"]["value"] == pytest.approx(expected, abs=1e-9)
    lists = scores.partition_by("row")
    own = [roc_auc_score(each["is_target"], each["score"]) for each in lists]
    assert metrics["all/uauc"]["value"] == pytest.approx(np.mean(own), abs=1e-9)
    places = [
        1 + int((each["score"] > each.filter("is_target")["score"].item()).sum()) for each in lists
    ]
    for k in (3, 5, 10):
        hits = [place <= k for place in places]
        assert metrics[f"all/hit@{k}"]["value"] == pytest.approx(np.mean(hits), abs=1e-9)
        gains = [hit / place for hit, place in zip(hits, places, strict=True)]
        assert metrics[f"all/mrr@{k}"]["value"] == pytest.approx(np.mean(gains), abs=1e-9)
    assert {"cold_item/auc", "warm_item/auc", "warm_item/ndcg@5"} <= set(metrics)
    assert scores["score"].n_unique() > scores.height // 2


def test_targets_do_not_stand_first(finished: Any) -> None:
    places = [each["is_target"].arg_max() for each in scores_of(finished).partition_by("row")]
    assert len(set(places)) > 1


@torch.no_grad()
def test_scores_are_margins_of_whole_prompts_one_by_one(
    finished: Any, words: list[str], command_environment: Callable[[Path], dict[str, str]]
) -> None:
    """The tested weights in plain transformers: nothing of ours computes."""
    done = preloaded.run("experiments.export", NAME, *words, env=command_environment(finished.runs))
    assert done.returncode == 0, done.stderr[-2000:]
    spec = finished.json("evaluate", "stage.json")["spec"]
    (node,) = spec["modules"].values()
    data: Any = build.build(spec["data"])
    rows = EvalDataset(data.histories, data.rows(TEST), data.seed, data.liked_above).every()
    assert rows.label is None
    zeros = np.zeros(len(rows.row), np.int64)
    table = finished.folder("user_summaries") / "predictions.parquet"
    module = build.build_on(node, data, preferences=str(table))
    merged = finished.folder("sft") / "export" / "merged"
    tokenizer = AutoTokenizer.from_pretrained(merged)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    scores = scores_of(finished)
    written = pl.read_parquet(table)["text"].drop_nulls().to_list()
    assert any(text in known for text in written for known in module.user_texts(rows, zeros))
    for row in range(2):
        asked = rows.candidates[row]
        known = module.user_texts(rows, zeros)[row]
        for item in asked.tolist():
            prompt = known + module.item_texts.parts[item]
            yes, no = (
                tokenizer(prompt + word, add_special_tokens=False)["input_ids"]
                for word in ("Yes.", "No.")
            )
            parted = next(i for i, (a, b) in enumerate(zip(yes, no, strict=False)) if a != b)
            logits = model(torch.tensor([yes[:parted]])).logits[0, -1]
            expected = float(logits[yes[parted]] - logits[no[parted]])
            raw = data.raw_items(np.array([item]))[0]
            got = scores.filter((pl.col("row") == row) & (pl.col("item_id") == raw))["score"].item()
            assert got == pytest.approx(expected, abs=1e-4)


def test_a_summary_is_shown_as_it_grew(
    finished: Any, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last text is the one that the prompts hold, and the texts are about the newest events in order."""
    monkeypatch.setenv("LLMREC_RUNS", str(finished.runs))
    model = load(NAME, *words)
    desk = Desk(model, model, written_of(model))
    about = desk.about()
    assert (about["histories"], about["summaries"]) == (False, True)
    tested = scores_of(finished).filter("is_target")["user_id"].to_list()
    assert about["first_users"] == sorted(map(str, tested), key=list(model.users).index)
    (user, *_) = tested
    (answer,) = model.recommend(user, items=["1", "2", "3"])
    steps = desk.steps(str(user))
    assert len(steps) > 1
    assert steps[-1]["text"] == answer.preference
    shown = [card["item"] for step in steps for card in step["cards"]]
    assert shown == desk.history(str(user))[-len(shown) :]
