"""A language model summarises a catalogue, and later stages read what it wrote, through the real command."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.lightning_modules.tiny_bert import LONGEST, write_tiny_bert

TEXTS = "a_llmrec/luxury_beauty_small_texts"
USERS, ITEMS, LONG = 60, 40, 12  # the first 12 items have a long description


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Users who buy 8 of 40 products, and the overrides of a tiny run on them."""
    folder = tmp_path_factory.mktemp("shop")
    draw = random.Random(0)
    events = ["user_id,item_id,rating,timestamp"]
    for user in range(USERS):
        for time, item in enumerate(draw.sample(range(ITEMS), 8)):
            events.append(f"u{user},i{item},5,{1_500_000_000 + 86_400 * time + user}")
    items = ["item_id,title,description"]
    for item in range(ITEMS):
        told = "a cream for dry skin " * (20 if item < LONG else 1)
        items.append(f"i{item},Product {item},{told.strip()}")
    for name, lines in (("train.csv.gz", events), ("items.csv.gz", items)):
        (folder / name).write_bytes(gzip.compress("\n".join(lines).encode()))
    encoder = write_tiny_bert(tmp_path_factory.mktemp("bert"))
    return [
        f"data.root={folder}", "llm=tiny_random", "launch.threads=1", "launch.accelerator=cpu",
        "backbone.trainer.max_epochs=1", "stages.alignment.trainer.max_epochs=1",
        f"stages.alignment.module.encoder.source={encoder}",
        f"stages.alignment.module.encoder.max_length={LONGEST}",
        "++stages.summarise.module.max_new_tokens=48",
    ]  # fmt: skip


def test_what_is_read_of_a_catalogue_stands_in_one_table(
    finish: Callable[..., Any],
    run_command: Callable[..., Any],
    settings: list[str],
    data_cache: Path,
) -> None:
    # A process a stage: those that differ by a field alone are left out.
    left_out = ("evaluate_titles", "evaluate_titles_texts", "alignment_titles", "evaluate_texts")
    words = [*settings, *(f"~stages.{name}" for name in (*left_out, "evaluate_summaries_texts"))]
    run = finish(TEXTS, words)
    tested = ("evaluate_backbone", "evaluate", "evaluate_summaries")
    found = [run.json(name, "metrics.json") for name in tested]
    assert len({row["fingerprint"] for row in found}) == 1
    folder = run.folder("summarise")
    table = pl.read_parquet(folder / "predictions.parquet")
    assert table["item"].to_list() == list(range(1, ITEMS + 1))
    kept = [text for text in table["text"] if text and text.endswith("a cream for dry skin")]
    assert len(kept) >= ITEMS - LONG  # short texts stay
    (log,) = folder.glob("generations.summarise.*.jsonl")
    written = log.read_bytes()
    lines = [json.loads(line) for line in written.splitlines()]
    assert len(lines) == LONG
    assert all(len(line["tokens"]) <= 48 for line in lines)
    # A stage that was asked to stop keeps what it has written, and goes on behind it.
    for file in (folder / "done.json", folder / "predictions.parquet", log):
        file.unlink()
    shutil.rmtree(data_cache / "generations")
    words.append("++stages.summarise.batch_size=4")
    ask = "+callbacks.ask={_target_:faults.AskInTest}"
    stopped = run_command("exp", TEXTS, *words, ask, runs=run.runs)
    assert stopped.returncode == 75, stopped.stderr[-2000:]
    begun = log.read_bytes()
    assert 0 < len(begun.splitlines()) < LONG
    again = run_command("exp", TEXTS, *words, runs=run.runs)
    assert again.returncode == 0, again.stderr[-2000:]
    assert log.read_bytes().startswith(begun)
    assert sorted(log.read_bytes().splitlines()) == sorted(written.splitlines())
    assert pl.read_parquet(folder / "predictions.parquet").equals(table)


def test_what_cannot_be_is_told_before_anything_runs(
    run_command: Callable[..., Any], settings: list[str], tmp_path: Path
) -> None:
    for override, words in (
        ("stages.summarise.run=fit", "it can predict only"),
        ("stages.evaluate.run=predict", "it can be fitted and tested"),
        ("stages.summarise.module.words=some", "words"),
        (
            "stages.evaluate.inputs.weights=summarise/best.ckpt",
            "a predict leaves predictions.parquet",
        ),
    ):
        result = run_command("exp", TEXTS, *settings, override, runs=tmp_path)
        assert result.returncode != 0
        assert words in result.stderr, (override, result.stderr[-2000:])
        assert "Traceback" not in result.stderr
