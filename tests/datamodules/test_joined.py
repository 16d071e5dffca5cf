"""Two data sets as one: every row of the whole says what its part's row says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.candidates import UniformCandidates
from datamodules.examples import RatedTargets, SlidingWindows
from datamodules.few_examples import FewExamples
from datamodules.joined import JoinedDataModule
from datamodules.movielens import MovieLensDataModule
from datamodules.splits import LeaveOneOut, RandomByUser
from datamodules.types import CONTEXT, TEST, TRAIN, VALID
from datamodules.user_splits import UnseenUsers
from tests.conftest import write_movielens_100k


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MovieLensDataModule]:
    folder = tmp_path_factory.mktemp("joined")
    options: dict[str, Any] = {"cache": str(folder / "cache")}
    films = write_movielens_100k(folder / "films", seed=1)
    books = write_movielens_100k(folder / "books", seed=2)
    few = FewExamples(SlidingWindows(3, liked_above=3), 16)
    rated = RatedTargets(liked_above=4, length=5, train="last")
    return {
        "film": MovieLensDataModule(root=str(films), examples=few, **options),
        "book": MovieLensDataModule(
            root=str(books), examples=rated, split=RandomByUser(), **options
        ),
    }


@pytest.mark.parametrize(
    ("train", "test"), [(["film"], ["book"]), (["book"], ["film"]), (["film", "book"], None)]
)
def test_rows_of_the_whole_are_the_parts_rows(
    parts: dict[str, MovieLensDataModule], train: list[str], test: list[str] | None, tmp_path: Path
) -> None:
    whole = JoinedDataModule(parts, train, test=test, cache=str(tmp_path))
    users, items = (int(whole.prepared.manifest["counts"][k]) for k in ("users", "items"))
    assert users == sum(p.histories.num_users for p in parts.values())
    assert items == sum(p.histories.num_items for p in parts.values())
    told = _told(whole.prepared.examples(), whole)
    assert told == [
        t for n in parts if n in train for t in _told(parts[n].prepared.examples(), parts[n], n)
    ]
    for code, names in ((VALID, train), (TEST, test or train)):
        assert _told(whole.rows(code), whole) == [
            t for n in parts if n in names for t in _told(parts[n].rows(code), parts[n], n)
        ]
        assert (whole.histories.split == code).sum() == sum(
            (parts[n].histories.split == code).sum() for n in names
        )
    rows, tested = whole.rows(TEST), test or train
    assert rows.group_names[5:] == (tuple(tested) if len(tested) > 1 else ())
    for number, name in enumerate(rows.group_names[5:], start=5):
        domains = whole.catalog["domain"].to_numpy()[rows.target - 1]
        assert (rows.groups[:, number] == (domains == name)).all()
    unused = [n for n in parts if n not in train]
    assert (whole.histories.split == TRAIN).sum() == sum(
        (parts[n].histories.split == TRAIN).sum() for n in parts if n not in unused
    )


def _told(rows: Any, data: Any, prefix: str = "") -> list[tuple[Any, ...]]:
    """Each row in words: user, titles of the history, which were liked, target, label."""
    stops = rows.position if hasattr(rows, "position") else rows.stop
    name = f"{prefix}:" if prefix else ""
    titles, ratings = data.titles, data.histories.ratings
    return [
        (
            name + data.raw_users(np.array([user]))[0],
            [titles[i] for i in data.histories.items[start:stop]],
            [bool(r > data.liked_above) for r in ratings[start:stop]],
            name + data.raw_items(np.array([target]))[0],
            titles[target],
            bool(label),
        )
        for user, start, stop, target, label in zip(
            rows.user, rows.start, stops, rows.target, rows.label, strict=True
        )
    ]


def test_domains_are_never_ranked_against_each_other(
    parts: dict[str, MovieLensDataModule], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"cache": str(tmp_path)}
    ranked = {n: MovieLensDataModule(root=str(p.root), **options) for n, p in parts.items()}
    with pytest.raises(ValueError, match="whole catalogue, which two domains do not share"):
        _ = JoinedDataModule(ranked, ["film"], test=["book"], cache=str(tmp_path)).prepared
    drawn = {
        n: MovieLensDataModule(root=str(p.root), candidates=UniformCandidates(7), **options)
        for n, p in parts.items()
    }
    whole = JoinedDataModule(drawn, ["film"], test=["book"], cache=str(tmp_path))
    rows, own = whole.rows(TEST), drawn["book"].rows(TEST)
    assert rows.candidates is not None
    assert own.candidates is not None
    films = drawn["film"].histories.num_items
    assert np.array_equal(rows.candidates, own.candidates + films)
    assert np.array_equal(rows.target, own.target + films)
    mixed = {"film": drawn["film"], "book": parts["book"]}
    with pytest.raises(ValueError, match="rows differ"):
        _ = JoinedDataModule(mixed, ["film", "book"], cache=str(tmp_path / "c")).prepared


def test_unknown_parts_are_named(parts: dict[str, MovieLensDataModule]) -> None:
    with pytest.raises(ValueError, match="parts film, book, but no part is called music"):
        JoinedDataModule(parts, ["music"])
    with pytest.raises(ValueError, match="a list of parts is empty"):
        JoinedDataModule(parts, [])


def test_unseen_users_are_only_tested() -> None:
    offsets = np.array([0, 0, 3, 7, 10])  # users with 3, 4 and 3 events
    items, times = np.arange(10), np.arange(10)
    codes = UnseenUsers(LeaveOneOut(), events=3)(offsets, items, times)
    held_out = [CONTEXT, CONTEXT, TEST]
    assert codes.tolist() == [*held_out, TRAIN, TRAIN, VALID, TEST, *held_out]
    with pytest.raises(ValueError, match="found no user with exactly 5 events"):
        UnseenUsers(LeaveOneOut(), events=5)(offsets, items, times)
    with pytest.raises(ValueError, match="events=1"):
        UnseenUsers(LeaveOneOut(), events=1)


def test_a_part_is_not_called_like_a_group(parts: dict[str, MovieLensDataModule]) -> None:
    with pytest.raises(ValueError, match="a part cannot be called all: rows have that"):
        JoinedDataModule({"all": parts["film"]}, ["all"])
