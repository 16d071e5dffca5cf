"""Popularity, recent popularity, Markov and chance against counts done by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.types import Batch, Histories
from lightning_modules.base import UntrainedModule
from lightning_modules.markov import MarkovModule
from lightning_modules.popularity import PopularityModule, RandomModule, RecentPopularityModule
from lightning_modules.popularity.model import DAY

# Users 1 and 2; items 1..4; training events (split 0) at whole days, the last of each user held out.
HISTORIES = Histories(
    offsets=np.array([0, 0, 5, 9]),
    items=np.array([1, 2, 1, 2, 3, 1, 3, 2, 4], np.int32),
    split=np.array([0, 0, 0, 0, 2, 0, 0, 0, 2], np.int8),
    timestamps=np.array([0, 1, 2, 40, 41, 0, 40, 41, 42]) * DAY,
    num_items=4,
)
EVERY = torch.arange(1, 5)


def _ready(module: UntrainedModule, histories: Histories = HISTORIES) -> Any:
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(histories=histories))  # type: ignore[assignment]
    module.setup("test")
    return module


def _batch(newest: list[int], days: list[int] | None = None) -> Batch:
    rows = torch.arange(len(newest))
    history = torch.tensor(newest)[:, None]
    time = None if days is None else torch.tensor(days) * DAY
    return Batch(rows, rows + 1, history, (history > 0).sum(1), time=time)


def test_popularity_counts_training_events_alone() -> None:
    module = _ready(PopularityModule())
    scores = module.score(module.encode(_batch([2, 2])), EVERY)
    assert scores.tolist() == [[3.0, 3.0, 1.0, 0.0]] * 2  # held-out 3 and 4 are not counted


def test_recent_popularity_looks_at_the_days_before_the_newest_event() -> None:
    module = _ready(RecentPopularityModule(days=30))
    batch = _batch([2, 2, 2], days=[40, 41, 2])
    scores = module.score(module.encode(batch), EVERY)
    # Days 10..39 hold nothing; 11..40 hold item 2 and item 3 (both on day 40); 0..1 hold 1, 1, 2.
    assert scores.tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [2, 1, 0, 0]]


def test_recent_popularity_says_what_to_do_without_times() -> None:
    timeless = Histories(
        HISTORIES.offsets, HISTORIES.items, HISTORIES.split, np.zeros(9, np.int64), 4
    )
    assert RecentPopularityModule().impossible(timeless) == "the data has no times"
    assert RecentPopularityModule().impossible(HISTORIES) is None


def test_markov_counts_what_followed_and_backs_off_to_popularity() -> None:
    module = _ready(MarkovModule())
    scores = module.score(module.encode(_batch([1, 2, 3, 0])), EVERY)
    prior = torch.tensor([3, 3, 1, 0], dtype=torch.float64) / 4
    # 1 -> 2 twice (user 1) and 1 -> 3 once (user 2); 2 -> 1 once; 3 -> 2 once.
    followed = torch.tensor([[0, 2, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    assert torch.equal(scores, followed + prior)
    plain = _ready(MarkovModule(backoff=False))
    assert torch.equal(plain.score(plain.encode(_batch([1, 2, 3, 0])), EVERY), followed.double())
    lists = torch.tensor([[2, 4], [1, 1], [4, 2], [3, 3]])
    state = module.encode(_batch([1, 2, 3, 0]))
    assert torch.equal(module.score(state, lists), scores.gather(1, lists - 1))


def test_chance_ties_everything() -> None:
    module = _ready(RandomModule())
    state = module.encode(_batch([1, 2]))
    assert module.score(state, EVERY).unique().tolist() == [0.0]
    assert module.score(state, torch.ones(2, 3, dtype=torch.long)).shape == (2, 3)


def test_rows_without_weights_refuse_a_fit() -> None:
    with pytest.raises(TypeError, match="nothing to train"):
        RandomModule().configure_optimizers()
