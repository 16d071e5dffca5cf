"""MLLM-MSR's chain with pictures, tiny, through the real command: five stages, then wrong pictures."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from tests import preloaded

NAME = "mllm_msr/microlens_probes"
USERS, ITEMS, EVENTS, WITHOUT = 40, 40, 8, (3, 7)  # two items have no cover
COLOURS = ("red", "green", "blue", "yellow", "white", "black", "orange")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Pairs, titles and covers as MicroLens has them, and the overrides of a tiny run on them."""
    folder = tmp_path_factory.mktemp("microlens")
    draw = random.Random(0)
    events = (draw.sample(range(1, ITEMS + 1), EVENTS) for _ in range(USERS))
    pairs = [f"{user}\t{' '.join(map(str, own))}" for user, own in enumerate(events, start=1)]
    titles = ["item,title", *(f"{item},Video {item}" for item in range(1, ITEMS + 1))]
    (folder / "pairs.tsv").write_text("\n".join(pairs) + "\n")
    (folder / "titles.csv").write_text("\n".join(titles) + "\n")
    (folder / "covers").mkdir()
    for item in set(range(1, ITEMS + 1)) - set(WITHOUT):
        cover = Image.new("RGB", (60 + item, 50), COLOURS[item % len(COLOURS)])
        cover.save(folder / "covers" / f"{item}.png")
    fits = [
        f"++stages.{name}.module.max_new_tokens=6"
        for name in ("item_pictures", "item_fusion", "user_summaries")
    ]
    return [
        f"data.interactions={folder / 'pairs.tsv'}", f"data.items={folder / 'titles.csv'}",
        f"data.images={folder / 'covers'}", "data.expected=null", "data.filters=[]",
        "data.split.valid=0.2", "data.split.test=0.2", "data.candidates.count=10",
        "llm=tiny_random_vision", "launch.threads=1", "launch.accelerator=cpu", *fits,
        "~stages.sasrec", "~stages.evaluate_sasrec", "~stages.reference", "~stages.blank",
        "++stages.sft.trainer.max_epochs=1", "++stages.sft.module.learning_rate=0.001",
    ]  # fmt: skip


def scores_of(run: Any, stage: str) -> pl.DataFrame:
    (file,) = run.folder(stage).glob("scores.*.parquet")
    return pl.read_parquet(file).sort("row", "item_id")


@pytest.fixture(scope="module")
def run(finish: Callable[..., Any], words: list[str]) -> Any:
    return finish(NAME, words)


def test_the_chain_runs_and_reads_the_pictures(run: Any) -> None:
    (metrics,) = run.json("evaluate", "metrics.json")["rows"].values()
    own, swapped, without = (scores_of(run, name) for name in ("evaluate", "swapped", "without"))
    assert metrics["all/n"]["value"] == USERS // 5
    assert own.height == 11 * metrics["all/n"]["value"]
    expected = roc_auc_score(own["is_target"], own["score"])
    assert metrics["all/auc"]["value"] == pytest.approx(expected, abs=1e-9)
    pictures = pl.read_parquet(run.folder("item_pictures") / "predictions.parquet")
    assert pictures.height == ITEMS
    assert pictures["text"].is_null().sum() >= len(WITHOUT)
    # Held-out users have 7 events; of nobody more are read than of those who are learned from.
    users = pl.read_parquet(run.folder("user_summaries") / "predictions.parquet")
    assert (users["stop"] - users["start"]).max() == EVENTS - 1
    assert users["steps"].list.len().max() == 2
    # The same weights: only the pictures that candidates are shown with are other ones.
    bare = own["item_id"].cast(pl.String).is_in([str(item) for item in WITHOUT])
    assert bare.any()
    for probe in (swapped, without):
        assert probe["item_id"].to_list() == own["item_id"].to_list()
        moved = (own["score"] - probe["score"]).abs() > 1e-4
        assert moved.filter(~bare).mean() > 0.5
        assert not moved.filter(bare).any()


def test_a_page_and_a_sheet_tell_what_was_written_and_answered(
    run: Any,
    words: list[str],
    command_environment: Callable[[Path], dict[str, str]],
    tmp_path: Path,
) -> None:
    """``make preferences``: three of the eight users, their events in blocks of three."""
    asked = {**command_environment(run.runs), "USERS": "3", "OUT": str(tmp_path)}
    made = preloaded.run("experiments.preferences", NAME, *words, env=asked)
    assert made.returncode == 0, made.stderr[-3000:]
    assert [Path(line).name for line in made.stdout.splitlines()] == [
        "preferences.html", "preferences.png",
    ]  # fmt: skip
    page = (tmp_path / "preferences.html").read_text()
    sections = page.split("<section>")[1:]
    assert len(sections) == 3
    scores = scores_of(run, "evaluate").with_columns(pl.col("user_id", "item_id").cast(pl.String))
    assert len({s.partition("User ")[2].partition(":")[0] for s in sections}) == 3
    for section in sections:
        user = section.partition("User ")[2].partition(":")[0]
        own = scores.filter(pl.col("user_id") == user).sort("score", descending=True)
        told = [float(p) for p in re.findall(r"p (\d\.\d{3})", section)]
        expected = [1 / (1 + math.exp(-score)) for score in own["score"]]
        assert told == pytest.approx(expected, abs=6e-4)
        (target,) = own.filter("is_target")["score"]
        if (own["score"] == target).sum() == 1:
            assert f"number {1 + (own['score'] > target).sum()} of 11" in section
        assert section.count('class="right"') == 1
        notes, _, answers = section.partition("<h3>Candidates</h3>")
        blocks = [len(re.findall(r"<figure", note)) for note in notes.split("<li>")[1:]]
        assert blocks == [3, 2]  # the newest five of seven events are read
        assert len(re.findall("<figure", answers)) == 11
    assert Image.open(tmp_path / "preferences.png").width == 3000
