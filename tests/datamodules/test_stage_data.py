"""Numbered things reach each device in the batches that their module made."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest

from datamodules.movielens import MovieLensDataModule
from lightning_modules.predicting import PredictingModule


class Numbers(PredictingModule):
    """Seven things."""

    numbered = 7

    def table(self) -> pl.DataFrame:
        return pl.DataFrame()


def batches(root: Path, module: Any, size: int, rank: int, world: int) -> list[list[int]]:
    data = MovieLensDataModule("100k", root=str(root))
    data.batch_size = size
    trainer: Any = SimpleNamespace(lightning_module=module, global_rank=rank, world_size=world)
    data.trainer = trainer
    return [batch.tolist() for batch in data.predict_dataloader()]


@pytest.mark.parametrize(
    ("size", "world", "expected"),
    [(3, 1, [[[0, 1, 2], [3, 4, 5], [6]]]), (4, 2, [[[0, 2], [4, 6]], [[1, 3], [5]]]),
     (1, 2, [[[0], [2], [4], [6]], [[1], [3], [5]]])],
)  # fmt: skip
def test_each_number_comes_once(
    tiny_movielens: Path, size: int, world: int, expected: list[list[list[int]]]
) -> None:
    found = [batches(tiny_movielens, Numbers(), size, rank, world) for rank in range(world)]
    assert found == expected


def test_a_device_without_work_comes_to_the_meetings(tiny_movielens: Path) -> None:
    found = [batches(tiny_movielens, Numbers(), 9, rank, 9) for rank in range(9)]
    assert found == [[[number]] for number in range(7)] + [[[]], [[]]]
