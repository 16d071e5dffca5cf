"""Summaries of items, then of users, through the real command: on one device, on two, and after a change."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

TEXTS = "a_llmrec/luxury_beauty_small_texts"
USERS, ITEMS = 20, 40
OTHERS = (
    "reference", "backbone", "evaluate_backbone", "alignment", "evaluate", "evaluate_texts",
    "alignment_titles", "evaluate_titles", "evaluate_titles_texts", "alignment_summaries",
    "evaluate_summaries", "evaluate_summaries_texts",
)  # fmt: skip
MODULE = "lightning_modules.user_summaries.UserSummariesModule"


def write_shop(folder: Path, told: str = "for dry skin") -> Path:
    """Users who buy 4 to 9 of 40 products; ``told`` stands in the description of the first one."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    events = ["user_id,item_id,rating,timestamp"]
    for user in range(USERS):
        for time, item in enumerate(draw.sample(range(ITEMS), 4 + user % 6)):
            events.append(f"u{user},i{item},5,{1_500_000_000 + 86_400 * time + user}")
    items = ["item_id,title,description"]
    for item in range(ITEMS):
        text = f"a cream {told if item == 0 else 'for dry skin'} "
        items.append(f"i{item},Product {item},{(text * (8 if item < 4 else 1)).strip()}")
    for name, lines in (("train.csv.gz", events), ("items.csv.gz", items)):
        (folder / name).write_bytes(gzip.compress("\n".join(lines).encode()))
    return folder


def words(shop: Path, *more: str) -> list[str]:
    """Overrides: two stages on this data, each user's training events with a negative each."""
    stage = "stages.preferences"
    return [
        f"data.root={shop}", "llm=tiny_random", "launch.threads=1", "launch.accelerator=cpu",
        *(f"~stages.{name}" for name in OTHERS),
        "++data.examples._target_=datamodules.examples.WithNegatives",
        "++stages.summarise.module.max_new_tokens=48",
        f"++{stage}.run=predict", f"++{stage}.module._target_={MODULE}",
        f"++{stage}.module.llm=${{llm}}", f"++{stage}.module.fields=[title,summary]",
        f"++{stage}.module.max_new_tokens=12", f"++{stage}.batch_size=16",
        f"++{stage}.inputs={{catalog.summary: summarise/predictions.parquet}}", *more,
    ]  # fmt: skip


def logged(folder: Path) -> list[dict[str, Any]]:
    """Every text of a stage's folder."""
    files = sorted(folder.glob("generations.*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_bytes().splitlines()]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shop(tmp_path_factory.mktemp("shop") / "data")


@pytest.fixture(scope="module")
def run(shop: Path, finish: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return finish(TEXTS, words(shop), runs=tmp_path_factory.mktemp("first"))


def test_every_history_that_rows_show_has_a_text(run: Any) -> None:
    folder = run.folder("preferences")
    table = pl.read_parquet(folder / "predictions.parquet")
    assert table.columns == ["user", "start", "stop", "text", "steps", "left_out", "empty"]
    # Of n events the last two are held out: n - 3 training targets with a history, and two rows more.
    events = [4 + user % 6 for user in range(USERS)]
    assert len(table) == sum(n - 1 for n in events)
    read = table["stop"] - table["start"]
    assert table["steps"].list.len().to_list() == [-(-n // 3) for n in read]
    lines = logged(folder)
    assert len(lines) == len({line["key"] for line in lines})
    assert all(len(line["tokens"]) <= 12 for line in lines)
    # A user's rows share the texts of whole blocks: one for each event that a history may end with.
    assert len(lines) <= sum(n - 1 for n in events)
    for steps, text in table.select("steps", "text").iter_rows():
        assert (steps[-1] or None) == text


def test_a_changed_item_is_read_again_by_its_users_alone(
    run: Any, finish: Callable[..., Any], tmp_path: Path
) -> None:
    again = finish(TEXTS, words(write_shop(tmp_path / "data", "for oily skin")), runs=tmp_path)
    items = [{line["key"] for line in logged(r.folder("summarise"))} for r in (run, again)]
    assert len(items[0]) == len(items[1]) == 4
    assert len(items[1] - items[0]) == 1
    users = [{line["key"] for line in logged(r.folder("preferences"))} for r in (run, again)]
    new = users[1] - users[0]
    assert 0 < len(new) < len(users[1]) / 2
    tables = [
        pl.read_parquet(r.folder("preferences") / "predictions.parquet") for r in (run, again)
    ]
    assert (
        tables[0].select("user", "start", "stop").equals(tables[1].select("user", "start", "stop"))
    )
    # What both asked for was written once, by the first run.
    told = {line["key"]: line["tokens"] for line in logged(run.folder("preferences"))}
    second = logged(again.folder("preferences"))
    assert all(line["tokens"] == told[line["key"]] for line in second if line["key"] in told)


@pytest.mark.slow
def test_two_devices_write_what_one_writes(
    run: Any, run_command: Callable[..., Any], shop: Path, tmp_path: Path
) -> None:
    two = words(shop, "launch.devices=2", "launch.strategy=ddp")
    # A cache of its own: nothing is found there.
    result = run_command(
        "exp", TEXTS, *two, runs=tmp_path / "runs", LLMREC_CACHE=str(tmp_path / "c")
    )
    assert result.returncode == 0, result.stderr[-4000:]
    (folder,) = (tmp_path / "runs").glob("*preferences*")
    parts = [file.read_bytes() for file in sorted(folder.glob("generations.*.jsonl"))]
    assert len(parts) == 2
    assert all(parts)
    table = pl.read_parquet(folder / "predictions.parquet")
    assert table.equals(pl.read_parquet(run.folder("preferences") / "predictions.parquet"))


def test_a_killed_stage_goes_on(run: Any, run_command: Callable[..., Any], shop: Path) -> None:
    folder = run.folder("preferences")
    table = pl.read_parquet(folder / "predictions.parquet")
    (log,) = folder.glob("generations.*.jsonl")
    written = log.read_bytes()
    (folder / "done.json").unlink()
    (folder / "predictions.parquet").unlink()
    log.write_bytes(written[: len(written) // 2])
    again = run_command("exp", TEXTS, *words(shop), runs=run.runs)
    assert again.returncode == 0, again.stderr[-2000:]
    assert pl.read_parquet(folder / "predictions.parquet").equals(table)
    assert sorted(log.read_bytes().splitlines()) == sorted(written.splitlines())
