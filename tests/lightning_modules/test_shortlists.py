"""Shortlists: another method's best items in a new order, and a rank among all items for every target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.types import Batch
from lightning_modules.errors import ModelError
from lightning_modules.ranking import rank_catalogue
from lightning_modules.shortlists import Shortlists

ITEMS = 12
IDS = pl.Series("item_id", [f"item {i}" for i in range(1, ITEMS + 1)])


def _batch(rows: list[int], target: list[int]) -> Batch:
    numbers = torch.tensor(rows)
    return Batch(
        row=numbers, user=numbers + 1, history=torch.ones(len(rows), 1, dtype=torch.long),
        length=torch.ones(len(rows), dtype=torch.long), target=torch.tensor(target),
    )  # fmt: skip


def _write(folder: Path, scores: torch.Tensor, target: torch.Tensor, keep: int) -> Path:
    """The file that a test of the whole catalogue leaves, of scores (R, I)."""
    found = rank_catalogue(lambda items: scores[:, items - 1], ITEMS, target, top_k=keep)
    assert found.top_items is not None
    file = folder / "scores.first.parquet"
    pl.DataFrame({
        "row": np.arange(len(target)), "target_id": [f"item {i}" for i in target.tolist()],
        "above": found.above.numpy(), "ties": found.ties.numpy(), "candidates": found.count.numpy(),
        "top_items": [[f"item {i}" for i in row if i] for row in found.top_items.tolist()],
    }).write_parquet(file)  # fmt: skip
    return file


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), most=st.integers(1, ITEMS), levels=st.sampled_from([3, 1000]))
def test_a_target_has_its_place_in_the_joined_order(
    tmp_path_factory: pytest.TempPathFactory, seed: int, most: int, levels: int
) -> None:
    """By hand: the list sorted by the second method, behind it all others in the first one's order."""
    draw = torch.Generator().manual_seed(seed)
    first, second = (torch.randint(levels, (5, ITEMS), generator=draw).float() for _ in range(2))
    target = torch.randint(1, ITEMS + 1, (5,), generator=draw)
    file = _write(tmp_path_factory.mktemp("first"), first, target, ITEMS)
    lists = Shortlists.read(file, IDS, most)
    batch = _batch(list(range(5)), target.tolist())
    at, items = lists.of(batch)
    assert items.shape == (5, most)
    counts = lists.counts(batch, at, items, second.gather(1, items - 1))
    for row in range(5):
        own = int(target[row])
        # The catalogue in the first method's order, ties by lower id, as lists are cut.
        order = sorted(range(1, ITEMS + 1), key=lambda i: (-float(first[row, i - 1]), i))
        listed, rest = order[:most], order[most:]
        assert items[row].tolist() == listed
        assert lists.retrieved[row] == (own in listed)
        if own in listed:
            value = float(second[row, own - 1])
            above = sum(float(second[row, i - 1]) > value for i in listed)
            ties = sum(float(second[row, i - 1]) == value for i in listed) - 1
        else:
            value = float(first[row, own - 1])
            above = most + sum(float(first[row, i - 1]) > value for i in rest)
            ties = sum(float(first[row, i - 1]) == value for i in rest) - 1
        assert (int(counts.above[row]), int(counts.ties[row])) == (above, ties)
        assert int(counts.count[row]) == ITEMS
        assert counts.top_items is not None
        best = sorted(listed, key=lambda i: -float(second[row, i - 1]))
        found = second[row, counts.top_items[row] - 1].tolist()
        assert found == [float(second[row, i - 1]) for i in best]


def test_rows_with_fewer_items_than_asked_for_are_padded(tmp_path: Path) -> None:
    scores, target = torch.arange(24.0).reshape(2, ITEMS), torch.tensor([12, 1])
    file = _write(tmp_path, scores, target, ITEMS)
    table = pl.read_parquet(file)
    short = table.with_columns(
        top_items=pl.Series([["item 12", "item 11"], table["top_items"][1].to_list()])
    )
    short.write_parquet(file)
    lists = Shortlists.read(file, IDS, 4)
    batch = _batch([0, 1], [12, 1])
    at, items = lists.of(batch)
    assert items.tolist() == [[12, 11, 0, 0], [12, 11, 10, 9]]
    # Padding counts neither where it is scored highest nor among those that stand before the rest.
    counts = lists.counts(
        batch, at, items, torch.tensor([[1.0, 2.0, 9.0, torch.nan], [1, 2, 3, 4]])
    )
    assert counts.above.tolist() == [1, 11]


def _read(file: Path, most: int = 3, batch: Batch | None = None) -> Any:
    lists = Shortlists.read(file, IDS, most)
    return lists.of(batch) if batch is not None else lists


def test_files_that_are_no_shortlists_of_these_rows_are_refused(tmp_path: Path) -> None:
    scores, target = torch.arange(24.0).reshape(2, ITEMS), torch.tensor([12, 1])
    file = _write(tmp_path, scores, target, keep=5)
    assert _read(file, 5).items.shape == (2, 5)
    with pytest.raises(ModelError, match="keeps the first 5 items: ask for fewer"):
        _read(file, 6)
    with pytest.raises(ModelError, match="is of other rows than these"):
        _read(file, batch=_batch([0, 1], [12, 2]))
    with pytest.raises(ModelError, match="is of other rows than these"):
        _read(file, batch=_batch([2], [12]))
    with pytest.raises(ModelError, match="is of other items"):
        Shortlists.read(file, IDS.head(11), 3)
    drawn = tmp_path / "drawn.parquet"
    pl.DataFrame({"row": [0], "item_id": ["a"], "score": [1.0], "is_target": [True]}).write_parquet(
        drawn
    )
    with pytest.raises(ModelError, match=r"no ranking of the whole catalogue: .*whole_catalogue"):
        _read(drawn)
    file.write_bytes(b"PAR1")
    with pytest.raises(ModelError, match="run its test again"):
        _read(file)
    with pytest.raises(ModelError, match="run its test again"):
        _read(tmp_path / "none.parquet")
