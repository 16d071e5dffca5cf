"""Preparation and loaders: what reaches a model is what the raw rows say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from datamodules.candidates import FullRanking, UniformCandidates
from datamodules.errors import DataSourceError
from datamodules.filters import KCore
from datamodules.groups import QuantileGroups
from datamodules.loading import AttachTargets, TrainRows
from datamodules.movielens import MovieLensDataModule
from datamodules.prepare import prepare
from datamodules.recipe import Recipe
from datamodules.splits import FewShot, LeaveOneOut
from datamodules.types import (
    CATALOG_SCHEMA,
    INTERACTION_SCHEMA,
    TEST,
    TRAIN,
    VALID,
    Catalog,
    Histories,
    Interactions,
    RawData,
    Rows,
)
from lightning_modules.id_batches import HistoryCollator, TrainCollator

REPO = Path(__file__).resolve().parents[2]
# Three users; user 10's events are written out of order, and its last two times are equal.
EVENTS = [
    ("10", "7", 5.0, 30),
    ("2", "5", 4.0, 5),
    ("10", "5", 3.0, 10),
    ("10", "9", 4.0, 40),
    ("2", "7", 1.0, 6),
    ("10", "11", 2.0, 40),
    ("2", "9", 2.0, 7),
    ("x", "5", 2.0, 1),
]


def _raw(events: list[tuple[str, str, float, int]] = EVENTS) -> RawData:
    frame = pl.DataFrame(events, schema=INTERACTION_SCHEMA, orient="row")
    items = sorted({e[1] for e in events})
    catalog = pl.DataFrame({"item_id": items, "title": [f"Film {i}" for i in items]})
    missing = {c: t for c, t in CATALOG_SCHEMA.items() if c not in catalog.columns}
    catalog = catalog.with_columns(pl.lit(None, t).alias(c) for c, t in missing.items())
    return RawData(
        Interactions(frame), Catalog(catalog.select(list(CATALOG_SCHEMA))), source="test"
    )


RECIPE = Recipe("tiny", (), LeaveOneOut(), FullRanking(), QuantileGroups())


def test_ids_order_and_split_follow_the_raw_rows(tmp_path: Path) -> None:
    prepared = prepare(RECIPE, _raw, {}, tmp_path)
    # Whole numbers sort as numbers, other ids after them.
    assert prepared.users["user_id"].to_list() == ["2", "10", "x"]
    assert prepared.items["item_id"].to_list() == ["5", "7", "9", "11"]
    assert prepared.items["title"].to_list() == ["Film 5", "Film 7", "Film 9", "Film 11"]
    histories = prepared.histories
    assert histories.offsets.tolist() == [0, 0, 3, 7, 8]
    # User 10: 5 (t 10), 7 (t 30), then 9 before 11 because the file has them so.
    assert histories.items.tolist() == [1, 2, 3, 1, 2, 3, 4, 1]
    assert histories.split.tolist() == [TRAIN, VALID, TEST, TRAIN, TRAIN, VALID, TEST, TRAIN]
    rows = prepared.rows(TEST)
    assert rows.user.tolist() == [1, 2]
    assert rows.target.tolist() == [3, 4]
    assert rows.position.tolist() == [2, 6]
    assert rows.candidates is None
    assert rows.weight.tolist() == [1.0, 1.0]
    assert prepared.items["train_count"].to_list() == [3, 1, 0, 0]


def test_a_second_call_parses_nothing_and_content_names_the_digest(tmp_path: Path) -> None:
    first = prepare(RECIPE, _raw, {}, tmp_path)

    def refuse() -> RawData:
        raise AssertionError("parsed again")

    assert prepare(RECIPE, refuse, {}, tmp_path).digest == first.digest
    other_way = prepare(RECIPE, _raw, {"root": "elsewhere"}, tmp_path)
    assert other_way.folder != first.folder
    assert other_way.digest == first.digest
    swapped = [*EVENTS[:3], EVENTS[5], EVENTS[4], EVENTS[3], *EVENTS[6:]]  # the tie turned round
    assert prepare(RECIPE, lambda: _raw(swapped), {"n": 2}, tmp_path).digest != first.digest


def test_a_failure_leaves_no_folder(tmp_path: Path) -> None:
    emptied = replace(RECIPE, filters=(KCore(user=50),))
    with pytest.raises(ValueError, match=r"KCore|k-core|filter"):
        prepare(emptied, _raw, {}, tmp_path)
    assert [f.suffix for f in (tmp_path / "prepared").iterdir()] == [".lock"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataSourceError, match=r"file/parsed.* cannot be written.*set LLMREC_CACHE"):
        prepare(RECIPE, _raw, {}, tmp_path / "file")


def test_what_a_killed_process_left_is_deleted(tmp_path: Path) -> None:
    folder = prepare(RECIPE, _raw, {}, tmp_path).folder
    left = folder.parent / f".{folder.name}.abc.part"
    shutil.move(folder, left)
    assert prepare(RECIPE, _raw, {}, tmp_path).folder == folder
    assert not left.exists()


@pytest.mark.parametrize("name", ["manifest.json", "item.npy", "items.arrow"])
def test_a_damaged_folder_is_named(tmp_path: Path, name: str) -> None:
    folder = prepare(RECIPE, _raw, {}, tmp_path).folder
    (folder / name).write_bytes((folder / name).read_bytes()[:-20])
    again = prepare(RECIPE, _raw, {}, tmp_path)
    with pytest.raises(DataSourceError, match=rf"{folder.name} is damaged.*delete it"):
        _ = again.manifest, again.histories, again.items


def test_of_two_processes_one_prepares_and_the_other_waits(tmp_path: Path) -> None:
    calls: list[int] = []

    def slow() -> RawData:
        calls.append(1)
        time.sleep(0.5)
        return _raw()

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: prepare(RECIPE, slow, {}, tmp_path).folder, range(2)))
    assert found[0] == found[1]
    assert len(calls) == 1


def test_candidates_are_stored_with_the_rows(tmp_path: Path) -> None:
    recipe = replace(RECIPE, candidates=UniformCandidates(count=1, seed=3))
    more = [*EVENTS, ("x", "13", 2.0, 2)]
    rows = prepare(recipe, lambda: _raw(more), {}, tmp_path).rows(TEST)
    assert rows.candidates is not None
    assert rows.candidates.shape == (2, 2)
    # User 10 has seen 5, 7, 9, 11: only item 5 ("13") can be its negative.
    assert sorted(rows.candidates[1].tolist()) == [4, 5]
    assert set(rows.candidates[0].tolist()) - {3} <= {4, 5}  # user 2 has not seen "11" and "13"


def _histories() -> Histories:
    # User 1 has 7 training events and two held out; user 2 one training event; user 3 context first.
    split = [0] * 7 + [1, 2] + [0] + [3, 3, 0, 0]
    items = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5]
    return Histories(
        np.array([0, 0, 9, 10, 14]), np.array(items, np.int32), np.array(split, np.int8),
        np.arange(14), 9,
    )  # fmt: skip


def test_newest_window_counts_only_what_the_collator_keeps() -> None:
    rows = TrainRows(_histories(), max_length=4, all_windows=False)
    assert rows.user.tolist() == [1, 3]
    assert rows.stop.tolist() == [7, 14]
    assert rows.target_counts.tolist() == [4, 2]
    batch = TrainCollator(4)(_training(rows))
    assert batch.history.tolist() == [[3, 4, 5, 6], [2, 3, 4, 0]]
    assert batch.targets is not None
    assert batch.targets.tolist() == [[4, 5, 6, 7], [0, 4, 5, 0]]  # context is no target
    assert (batch.targets > 0).sum().item() == rows.target_counts.sum()


@pytest.mark.parametrize("max_length", [1, 2, 3, 4, 6, 50])
def test_all_windows_learn_every_training_event_once(max_length: int) -> None:
    rows = TrainRows(_histories(), max_length, all_windows=True)
    batch = TrainCollator(max_length)(_training(rows))
    assert batch.targets is not None
    learned = batch.targets[batch.targets > 0].tolist()
    # Every training event but a user's first: items 2..7 of user 1, 4 and 5 of user 3.
    assert sorted(learned) == [2, 3, 4, 4, 5, 5, 6, 7]
    assert (batch.targets > 0).sum(1).tolist() == rows.target_counts.tolist()
    for history, target in zip(batch.history, batch.targets, strict=True):
        for before, after in zip(history.tolist(), target.tolist(), strict=True):
            assert after in (0, before + 1)  # the data counts upwards


def test_filler_rows_carry_no_loss() -> None:
    rows = _training(TrainRows(_histories(), 4, all_windows=False))
    filler = replace(rows, filler=np.array([False, True]))
    batch = TrainCollator(4)(filler)
    assert batch.targets is not None
    assert batch.targets[1].tolist() == [0, 0, 0, 0]


def _training(rows: TrainRows) -> Rows:
    row = np.arange(len(rows.user))
    return Rows(rows.histories, row, rows.user, rows.start, rows.stop, epoch=0, seed=0)


def test_evaluation_batches_hold_history_target_and_what_was_seen(tmp_path: Path) -> None:
    prepared = prepare(RECIPE, _raw, {}, tmp_path)
    held_out, histories = prepared.rows(TEST), prepared.histories
    start = histories.offsets[held_out.user]
    rows = Rows(histories, np.array([0, 1]), held_out.user, start, held_out.position, 0, 0)
    batch = AttachTargets(HistoryCollator(2), held_out, mask_seen=True)(rows)
    assert batch.history.tolist() == [[1, 2], [2, 3]]  # the newest two, oldest first
    assert batch.length.tolist() == [2, 2]
    assert batch.target is not None
    assert batch.target.tolist() == [3, 4]
    assert batch.seen is not None
    assert batch.seen.tolist() == [[0, 1], [0, 2], [1, 1], [1, 2], [1, 3]]
    assert batch.time is not None
    assert batch.time.tolist() == [6, 40]
    assert AttachTargets(HistoryCollator(2), held_out, mask_seen=False)(rows).seen is None


def test_few_shot_users_are_the_only_ones_trained_on(tmp_path: Path) -> None:
    recipe = replace(RECIPE, split=FewShot(LeaveOneOut(), users=1, seed=0))
    histories = prepare(recipe, _raw, {}, tmp_path).histories
    assert len(set(histories.users[histories.split == TRAIN])) == 1
    assert (histories.split == TEST).sum() == 2


def test_movielens_module_prepares_a_folder_and_knows_its_protocol(
    tiny_movielens: Path, tmp_path: Path
) -> None:
    module = MovieLensDataModule(root=str(tiny_movielens), cache=str(tmp_path))
    assert module.rows(TEST).target.shape == (60,)
    assert module.raw_items(np.array([1, 80])).to_list() == ["1", "80"]
    protocol = module.protocol()
    masked = MovieLensDataModule(root=str(tiny_movielens), cache=str(tmp_path), mask_seen=False)
    assert protocol != masked.protocol()
    assert {k: v for k, v in protocol.items() if k != "mask_seen"} == {
        k: v for k, v in masked.protocol().items() if k != "mask_seen"
    }


def test_a_changed_local_file_is_prepared_anew(tiny_movielens: Path, tmp_path: Path) -> None:
    import shutil

    root = tmp_path / "copy"
    shutil.copytree(tiny_movielens, root)
    options: dict[str, Any] = {"root": str(root), "cache": str(tmp_path / "cache")}
    before = MovieLensDataModule(**options).prepared.digest
    lines = (root / "u.data").read_text(encoding="latin-1").splitlines()
    (root / "u.data").write_text("\n".join(lines[:-1]) + "\n", encoding="latin-1")
    assert MovieLensDataModule(**options).prepared.digest != before


_PREPARE = """
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datamodules.candidates import UniformCandidates
from datamodules.examples import WithNegatives
from datamodules.errors import DataSourceError
from datamodules.filters import KCore
from datamodules.movielens import MovieLensDataModule
from datamodules.splits import RandomByUser
print(MovieLensDataModule(
    root=sys.argv[1], cache=sys.argv[2], filters=[KCore(2, 2)], split=RandomByUser(),
    candidates=UniformCandidates(9), examples=WithNegatives(2),
).prepared.folder)
"""


def test_a_cache_is_the_same_whatever_the_number_of_threads(
    tiny_movielens: Path, tmp_path: Path
) -> None:
    contents = []
    for threads in ("1", "7"):
        command = [sys.executable, "-c", _PREPARE, str(tiny_movielens), str(tmp_path / threads)]
        environment = {**os.environ, "POLARS_MAX_THREADS": threads, "PYTHONPATH": str(REPO)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        folder = Path(done.stdout.strip())
        contents.append({f.name: f.read_bytes() for f in sorted(folder.iterdir())})
    names = {"offsets.npy", "item.npy", "manifest.json", "items.arrow", "test.arrow", "train.arrow"}
    assert names <= contents[0].keys()
    assert contents[0] == contents[1]


def test_processes_share_what_is_mapped(tmp_path: Path) -> None:
    histories = prepare(RECIPE, _raw, {}, tmp_path).histories
    for array in (histories.offsets, histories.items, histories.ratings, histories.timestamps):
        assert isinstance(array, np.memmap)
        assert array.mode == "r"
    assert histories.ratings is not None
    assert histories.ratings.tolist() == [4, 1, 2, 3, 5, 4, 2, 2]


def test_another_split_parses_nothing_again(tmp_path: Path) -> None:
    first = prepare(RECIPE, _raw, {}, tmp_path)

    def refuse() -> RawData:
        raise AssertionError("parsed again")

    other = prepare(replace(RECIPE, split=FewShot(LeaveOneOut(), users=1)), refuse, {}, tmp_path)
    assert other.folder != first.folder
    assert other.digest != first.digest


def test_a_file_without_times_and_order_is_shuffled_by_the_seed(tmp_path: Path) -> None:
    events = [("u", str(i), 1.0, None) for i in range(30)]

    def load(rows: list[Any] = events, ordered: bool = False) -> RawData:
        raw = _raw([(u, i, r, 0) for u, i, r, _ in rows])
        frame = raw.interactions.frame.with_columns(timestamp=pl.lit(None, pl.Int64))
        return replace(raw, interactions=Interactions(frame, ordered))

    def items(seed: int, tag: str, **options: Any) -> list[int]:
        recipe = replace(RECIPE, order_seed=seed)
        prepared = prepare(recipe, lambda: load(**options), {"tag": tag}, tmp_path)
        told = prepared.protocol["ties"]
        assert ("shuffled by seed" in told) == (not options.get("ordered", False))
        return prepared.histories.items.tolist()

    kept = items(0, "ordered", ordered=True)
    assert kept == sorted(kept)
    shuffled = items(0, "a")
    assert sorted(shuffled) == kept
    assert shuffled != kept
    # What order the file happens to be in changes nothing; the seed does.
    assert items(0, "b", rows=events[::-1]) == shuffled
    assert items(1, "a") not in (shuffled, kept)


def test_on_bad_row_is_checked() -> None:
    with pytest.raises(ValueError, match="expected 'error' or 'skip'"):
        MovieLensDataModule(on_bad_row="maybe")
