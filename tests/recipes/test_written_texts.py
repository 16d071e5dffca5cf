"""Texts that a chain writes, through the real command: what a change, a kill, a second process do to them."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image

from experiments import build, config
from tests.conftest import REPO
from tests.lightning_modules import vllm_stand_in

NAME = "mllm_msr/microlens"
WRITERS = ("item_pictures", "item_fusion", "user_summaries")
FIRST = ("~stages.item_fusion", "~stages.user_summaries")  # leave the first writer alone
OTHERS = ("sasrec", "evaluate_sasrec", "reference", "sft", "evaluate")
USERS, ITEMS, EVENTS, WITHOUT = 24, 20, 7, (3,)  # one item has no cover


@dataclass(frozen=True)
class World:
    """Pairs, titles and covers, with a cache and a runs folder of their own."""

    folder: Path

    def cover(self, item: int, seed: int) -> None:
        pixels = np.random.default_rng(seed).integers(0, 255, (50, 60 + item, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(self.folder / "covers" / f"{item}.png")

    def words(self, *more: str) -> list[str]:
        folder = self.folder
        return [
            f"data.interactions={folder / 'pairs.tsv'}", f"data.items={folder / 'titles.csv'}",
            f"data.images={folder / 'covers'}", "data.expected=null", "data.filters=[]",
            "data.split.valid=0.2", "data.split.test=0.2", "data.candidates.count=5",
            "llm=tiny_random_vision", "launch.threads=1", "launch.accelerator=cpu",
            *(f"~stages.{name}" for name in OTHERS),
            *(f"++stages.{name}.module.max_new_tokens=12" for name in WRITERS),
            *(f"++stages.{name}.batch_size=4" for name in WRITERS), *more,
        ]  # fmt: skip

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def stored(self) -> dict[str, list[int]]:
        """Every text of the cache; a line that is no text is an error."""
        files = (self.cache / "generations").glob("*.jsonl")
        lines = [json.loads(line) for f in files for line in f.read_bytes().splitlines()]
        found = {line["key"]: line["tokens"] for line in lines}
        assert len(found) == len(lines), "a text was written twice"
        return found

    def of(self, stage: str, runs: Path | None = None) -> tuple[set[str], pl.DataFrame]:
        """Keys of the texts that the newest folder of a stage holds, and its table."""
        every = (runs or self.runs).iterdir()
        folders = [f for f in every if f.name.split("-")[0].split(".")[-1] == stage]
        folder = max(folders, key=lambda f: f.stat().st_mtime_ns)
        return keys(folder), pl.read_parquet(folder / "predictions.parquet")


def keys(folder: Path) -> set[str]:
    files = folder.glob("generations.*.jsonl")
    return {json.loads(line)["key"] for f in files for line in f.read_bytes().splitlines()}


def make(folder: Path) -> World:
    draw = random.Random(0)
    histories = [draw.sample(range(1, ITEMS + 1), EVENTS) for _ in range(USERS)]
    pairs = [f"{user}\t{' '.join(map(str, own))}" for user, own in enumerate(histories, start=1)]
    titles = ["item,title", *(f"{item},Video {item}" for item in range(1, ITEMS + 1))]
    (folder / "covers").mkdir(parents=True)
    (folder / "pairs.tsv").write_text("\n".join(pairs) + "\n")
    (folder / "titles.csv").write_text("\n".join(titles) + "\n")
    world = World(folder)
    for item in set(range(1, ITEMS + 1)) - set(WITHOUT):
        world.cover(item, item)
    return world


@pytest.fixture(scope="module")
def finished(run_command: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world whose texts are written."""
    world = make(tmp_path_factory.mktemp("world"))
    run(run_command, world)
    return world


def run(
    run_command: Callable[..., Any], world: World, *more: str, code: int = 0, **variables: str
) -> Any:
    result = run_command(
        "exp",
        NAME,
        *world.words(*more),
        runs=world.runs,
        LLMREC_CACHE=str(world.cache),
        **variables,
    )
    assert result.returncode == code, result.stderr[-4000:]
    return result


def test_a_changed_picture_asks_again_about_its_item_and_users_alone(
    run_command: Callable[..., Any], finished: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: finished.of(name) for name in WRITERS}
    stored = finished.stored()
    monkeypatch.setenv("LLMREC_CACHE", str(finished.cache))
    (node,) = config.load(NAME, finished.words()).data_sets
    data = build.build(node)
    shown, item = data.histories.items, data.item_images.raw_ids.index("11") + 1
    finished.cover(11, seed=999)
    run(run_command, finished)
    after = {name: finished.of(name) for name in WRITERS}
    fresh = {name: after[name][0] - before[name][0] for name in WRITERS}
    assert set(finished.stored()) - set(stored) == set().union(*fresh.values())
    assert (len(fresh["item_pictures"]), len(fresh["item_fusion"])) == (1, 1)
    assert [rows_that_differ(*(side[name][1] for side in (before, after))) for name in WRITERS[:2]] == [
        [item], [item]
    ]  # fmt: skip
    # A user is asked about again from the block that shows the item on; all other texts are found.
    expected = chains_that_show(after["user_summaries"][1], shown, item)
    assert 0 < len({user for user, *_ in expected}) < USERS
    assert len(fresh["user_summaries"]) == len(expected)
    old, new = (side["user_summaries"][1] for side in (before, after))
    key = ["user", "start", "stop"]
    assert old.select(key).equals(new.select(key))
    for row, was, now in zip(new.select(key).rows(), old["steps"], new["steps"], strict=True):
        for step, (a, b) in enumerate(zip(was, now, strict=True)):
            assert a == b or (row[0], blocks(*row[1:])[: step + 1]) in expected


def rows_that_differ(old: pl.DataFrame, new: pl.DataFrame) -> list[int]:
    return new["item"].filter(new["text"].ne_missing(old["text"])).to_list()


def blocks(start: int, stop: int) -> tuple[tuple[int, int], ...]:
    """The newest 5 events in blocks of 3, the oldest first."""
    begin = max(start, stop - 5)
    return tuple((at, min(at + 3, stop)) for at in range(begin, stop, 3))


def chains_that_show(table: pl.DataFrame, shown: np.ndarray, item: int) -> set[Any]:
    """Calls, by user and all events that they depend on, of which an item is one."""
    found = set()
    for user, start, stop in table.select("user", "start", "stop").rows():
        spans = blocks(start, stop)
        for length in range(1, len(spans) + 1):
            if item in shown[spans[0][0] : spans[length - 1][1]]:
                found.add((user, spans[:length]))
    return found


def test_two_processes_on_one_cache_leave_it_whole(
    command_environment: Callable[[Path], dict[str, str]], tmp_path: Path
) -> None:
    world = make(tmp_path)
    command = [sys.executable, "-m", "experiments.run", "exp", NAME, *world.words(*FIRST)]
    both = [world.folder / name for name in ("one", "two")]
    running = [
        subprocess.Popen(
            command, cwd=REPO, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
            env={**command_environment(runs), "LLMREC_CACHE": str(world.cache)},
        )
        for runs in both
    ]  # fmt: skip
    for process in running:
        told = process.communicate(timeout=600)[1]
        assert process.returncode == 0, told[-4000:]
    lines = [
        json.loads(line)
        for file in (world.cache / "generations").glob("*.jsonl")
        for line in file.read_bytes().splitlines()
    ]
    told = {line["key"]: line["tokens"] for line in lines}
    assert all(told[line["key"]] == line["tokens"] for line in lines)
    (one, first), (two, second) = (world.of("item_pictures", runs) for runs in both)
    assert one == two == told.keys()
    assert first.equals(second)


def test_a_truncated_cache_loses_the_truncated_texts_alone(
    run_command: Callable[..., Any], finished: World
) -> None:
    whole = finished.stored()
    tables = {name: finished.of(name)[1] for name in WRITERS}
    (file,) = (finished.cache / "generations").glob("*.jsonl")
    content = file.read_bytes()
    kept = content[: int(len(content) * 0.8)]  # in the middle of a line
    assert not kept.endswith(b"\n")
    file.write_bytes(kept)
    shutil.rmtree(finished.runs)
    run(run_command, finished)
    begun = kept[: kept.rindex(b"\n") + 1]
    assert file.read_bytes().startswith(begun)
    assert len(begun.splitlines()) < len(whole)
    asked = set().union(*(finished.of(name)[0] for name in WRITERS))
    now = finished.stored()
    assert asked <= now.keys()
    assert all(whole[key] == tokens for key, tokens in now.items())
    assert all(finished.of(name)[1].equals(table) for name, table in tables.items())


@pytest.mark.parametrize(
    ("fault", "batches", "status"),
    [
        ("KillInFlight", 2, 2),
        pytest.param("InterruptInFlight", 3, 75, marks=pytest.mark.slow),  # Ctrl-C waits for it
    ],
)
def test_a_batch_in_flight_is_all_that_is_lost(
    fault: str, batches: int, status: int, run_command: Callable[..., Any], tmp_path: Path
) -> None:
    world = make(tmp_path)
    ask = f"+callbacks.fault={{_target_:faults.{fault},number:2}}"
    words = world.words(*FIRST, ask)
    result = run_command("exp", NAME, *words, runs=world.runs, LLMREC_CACHE=str(world.cache))
    assert result.returncode == status, result.stderr[-2000:]
    (folder,) = world.runs.glob("*item_pictures-*")
    stored = keys(folder)
    assert len(stored) == batches * 4
    assert stored == world.stored().keys()
    run(run_command, world, *FIRST)
    everything, table = world.of("item_pictures")
    assert stored < everything
    assert len(everything) == ITEMS - len(WITHOUT)
    assert table["text"].null_count() >= len(WITHOUT)


def test_vllm_is_an_engine_of_the_same_chain(
    run_command: Callable[..., Any],
    command_environment: Callable[[Path], dict[str, str]],
    finished: World,
    tmp_path: Path,
) -> None:
    """A stand-in of vLLM's interface: the texts are the same, under keys of their own."""
    here, table = finished.of("item_pictures")
    missing = run_command("exp", NAME, *finished.words("engine=vllm"), runs=tmp_path / "none")
    assert missing.returncode == 2
    assert "engine=vllm needs vLLM, which is not installed" in missing.stderr
    assert not list((tmp_path / "none").glob("*item_pictures*"))
    site = vllm_stand_in.install(tmp_path / "site")
    path = command_environment(finished.runs)["PYTHONPATH"]
    run(run_command, finished, "engine=vllm", *FIRST, PYTHONPATH=os.pathsep.join([str(site), path]))
    written, other = finished.of("item_pictures")
    assert len(written) == len(here)
    assert not written & here
    assert other.equals(table)
