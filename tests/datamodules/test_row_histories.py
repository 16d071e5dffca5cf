"""The histories that rows show are each named once, by split, as the loaders' rows have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from datamodules.examples import Examples, RatedTargets, SlidingWindows, WithNegatives
from datamodules.loading import EvalDataset
from datamodules.movielens import MovieLensDataModule
from datamodules.row_samples import RowSample
from datamodules.types import TEST, VALID


def movies(root: Path, **options: object) -> MovieLensDataModule:
    return MovieLensDataModule("100k", root=str(root), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "examples",
    [None, WithNegatives(2), SlidingWindows(length=4), RatedTargets(3, length=5)],
    ids=str,
)
def test_every_row_finds_its_history(tiny_movielens: Path, examples: Examples | None) -> None:
    data = movies(tiny_movielens, examples=examples)
    found = data.row_histories
    assert list(found) == ["train", "valid", "test"]
    shown = {"valid": VALID, "test": TEST}
    for name, rows in found.items():
        keys = list(zip(rows.user.tolist(), rows.start.tolist(), rows.stop.tolist(), strict=True))
        assert keys == sorted(set(keys))
        assert rows.row.tolist() == list(range(len(keys)))
        some = rows.start < rows.stop
        owner = data.histories.users[rows.stop[some] - 1]
        assert some.any() == bool(keys)
        assert (owner == rows.user[some]).all()
        assert (data.histories.users[rows.start[some]] == owner).all()
        if name in shown:
            every = EvalDataset(data.histories, data.rows(shown[name]), 0).every()
        else:
            table = data.prepared.examples()
            assert (table is None) == (examples is None)
            if table is None:
                assert keys == []
                continue
            every = table  # type: ignore[assignment]
        asked = zip(every.user.tolist(), every.start.tolist(), every.stop.tolist(), strict=True)
        assert set(asked) == set(keys)
        assert rows.liked_above == data.liked_above
    if isinstance(examples, WithNegatives):  # three examples show one history
        table = data.prepared.examples()
        assert table is not None
        assert len(table) == 3 * len(found["train"].row)


def test_a_sample_of_test_rows_asks_for_less(tiny_movielens: Path) -> None:
    data = movies(tiny_movielens, test_rows=RowSample(7))
    assert len(data.row_histories["test"].row) == 7
    assert len(data.row_histories["valid"].row) > 7
