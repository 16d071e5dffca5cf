"""TALLRec's movie windows from the raw MovieLens-100K files, against the authors' validation file."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.examples import ExampleTable, SlidingWindows
from datamodules.loading import AttachLabels, EvalDataset
from datamodules.movielens import MovieLensDataModule
from datamodules.samplers import RowBatch
from datamodules.types import TEST, TRAIN, VALID, EvalRows
from lightning_modules.auc import LogitAUC
from lightning_modules.id_batches import HistoryCollator
from lightning_modules.popularity import LikedFractionModule

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(
    not (SHARED / "tallrec").is_dir(), reason="no shared/data beside the repository"
)


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> MovieLensDataModule:
    return MovieLensDataModule(
        root=str(SHARED / "movielens" / "ml-100k"),
        examples=SlidingWindows(),
        cache=str(tmp_path_factory.mktemp("cache")),
    )


def _all_of(rows: EvalRows) -> RowBatch:
    return RowBatch(np.arange(len(rows.user)), np.zeros(len(rows.user), dtype=bool))


def _rows(data: MovieLensDataModule, code: int) -> EvalRows | ExampleTable:
    found = data.prepared.examples() if code == TRAIN else data.rows(code)
    assert found is not None
    return found


@needs_data
def test_the_validation_file_of_the_authors_comes_out_word_for_word(
    windows: MovieLensDataModule,
) -> None:
    with gzip.open(SHARED / "tallrec" / "movie_valid.json.gz") as file:
        published = json.load(file)
    rows, histories, titles = windows.rows(VALID), windows.histories, windows.titles
    assert rows.start is not None
    assert rows.label is not None
    assert histories.ratings is not None
    made = []
    for start, stop, target, label in zip(
        rows.start, rows.position, rows.target, rows.label, strict=True
    ):
        named = [
            (titles[histories.items[at]], bool(histories.ratings[at] > 3))
            for at in range(start, stop)
        ]
        likes = [title for title, liked in named if liked]
        dislikes = [title for title, liked in named if not liked]
        made.append((likes, dislikes, titles[target], "Yes." if label else "No."))
    assert [_parts(example) for example in published] == made


def _parts(example: dict[str, str]) -> tuple[list[str], list[str], str, str]:
    """Likes, dislikes, target and answer of one published prompt."""
    lines = example["input"].split("\n")
    likes, dislikes = (_quoted(line.partition(": ")[2]) for line in lines[:2])
    target = re.fullmatch(r'Whether the user will like the target movie "(.*)"\?', lines[2])
    assert target is not None
    return likes, dislikes, target[1], example["output"]


def _quoted(text: str) -> list[str]:
    return text[1:-1].split('", "') if text else []


@needs_data
@pytest.mark.parametrize(
    ("code", "rows", "users", "liked"),
    [(TRAIN, 8_000, None, None), (VALID, 1_000, 14, 0.658), (TEST, 1_000, 16, 0.528)],
)
def test_counts_are_those_of_the_paper_and_of_its_files(
    windows: MovieLensDataModule, code: int, rows: int, users: int | None, liked: float | None
) -> None:
    table = _rows(windows, code)
    assert len(table.user) == rows
    assert users is None or len(np.unique(table.user)) == users
    assert liked is None or np.mean(table.label) == pytest.approx(liked, abs=1e-12)


@needs_data
@pytest.mark.parametrize(("code", "published"), [(VALID, 0.6890), (TEST, 0.7260)])
def test_the_share_of_likes_has_the_auc_that_was_measured_on_the_authors_files(
    windows: MovieLensDataModule, code: int, published: float
) -> None:
    rows = windows.rows(code)
    assert rows.label is not None
    dataset = EvalDataset(windows.histories, rows, 0, liked_above=3)
    everything = dataset[_all_of(rows)]
    batch = AttachLabels(HistoryCollator(10))(everything)
    method = LikedFractionModule()
    auc = LogitAUC()
    assert batch.target is not None
    scores = method.score(method.encode(batch), batch.target[:, None])[:, 0]
    auc.update(scores, torch.from_numpy(rows.label.copy()))
    assert auc.compute()["auc"].item() == pytest.approx(published, abs=5e-5)
