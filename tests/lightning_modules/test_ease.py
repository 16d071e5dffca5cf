"""EASE against a ridge regression of every item on the others, and what it does with odd rows."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from datamodules.types import TEST, TRAIN, VALID, Batch, Histories, Rows
from lightning_modules.ease import EASEModule
from lightning_modules.ease.model import co_occurrences, ease_weights

EVERY = torch.arange(1, 8)


def _histories(seed: int = 0) -> Histories:
    """12 users of 5 events, items 1..6 of 7, some twice; the last two of each user are held out."""
    draw = np.random.default_rng(seed)
    users, events = 12, 5
    return Histories(
        offsets=np.concatenate([[0], np.arange(0, users * events + 1, events)]),
        items=draw.integers(1, 7, users * events).astype(np.int32),
        split=np.tile(np.array([TRAIN] * 3 + [VALID, TEST], np.int8), users),
        timestamps=np.zeros(users * events, np.int64),
        num_items=7,
    )


def _matrix(histories: Histories) -> np.ndarray:
    """The binary training matrix (U, I), event by event."""
    matrix = np.zeros((histories.num_users, histories.num_items))
    for user, item, code in zip(histories.users, histories.items, histories.split, strict=True):
        if code == TRAIN:
            matrix[user - 1, item - 1] = 1
    return matrix


def _ready(l2: float = 2.0, histories: Histories | None = None) -> EASEModule:
    module = EASEModule(l2)
    found = SimpleNamespace(datamodule=SimpleNamespace(histories=histories or _histories()))
    module._trainer = found  # type: ignore[assignment]
    module.setup("test")
    return module


def _batch(*histories: list[int]) -> Batch:
    rows, width = torch.arange(len(histories)), max(1, *map(len, histories))
    grid = torch.tensor([h + [0] * (width - len(h)) for h in histories])
    return Batch(rows, rows + 1, grid, (grid > 0).sum(1))


def test_each_column_is_the_ridge_regression_of_an_item_on_the_others() -> None:
    histories, l2 = _histories(), 2.0
    matrix = _matrix(histories)
    counts = co_occurrences(histories)
    np.testing.assert_array_equal(counts.numpy(), matrix.T @ matrix)
    weights = ease_weights(counts, l2).numpy()
    for item in range(7):
        others = np.delete(np.arange(7), item)
        x = matrix[:, others]
        expected = np.linalg.solve(x.T @ x + l2 * np.eye(6), x.T @ matrix[:, item])
        np.testing.assert_allclose(weights[others, item], expected, atol=1e-12)
        assert weights[item, item] == 0


def test_scores_are_sums_over_the_set_of_the_history() -> None:
    module = _ready()
    state = module.encode(_batch([3, 1, 3, 5], [5, 1, 3], [2]))
    everything = module.score(state, EVERY)
    weights = module.weights[1:, 1:]
    torch.testing.assert_close(everything[0], weights[[0, 2, 4]].sum(0))
    torch.testing.assert_close(everything[0], everything[1])  # neither order nor repeats matter
    torch.testing.assert_close(everything[2], weights[1])
    lists = torch.tensor([[7, 2], [1, 1], [4, 6]])
    assert torch.equal(module.score(state, lists), everything.gather(1, lists - 1))


def test_padding_empty_histories_and_untrained_items() -> None:
    module = _ready()
    tight, loose = module.encode(_batch([3, 1])), module.encode(_batch([3, 1], [1, 2, 3, 4]))
    torch.testing.assert_close(loose[:1], tight)
    empty = module.score(module.encode(_batch([], [7])), EVERY)
    assert not empty.any()
    assert not module.score(tight, torch.tensor([7])).any()  # nobody trained on item 7


def test_the_whole_history_is_read_however_long() -> None:
    length = 3000
    histories = Histories(
        np.array([0, 0, length]), np.ones(length, np.int32), np.zeros(length, np.int8),
        np.zeros(length, np.int64), 7,
    )  # fmt: skip
    one = np.array([1])
    rows = Rows(histories, one - 1, one, one - 1, one * (length - 1), 0, 0)
    assert EASEModule().collator(training=False)(rows).history.shape == (1, length - 1)


def test_held_out_events_are_not_learned_from() -> None:
    histories = _histories()
    other = np.where(histories.split == TRAIN, histories.items, 7)
    changed = Histories(
        histories.offsets, other.astype(np.int32), histories.split, histories.timestamps, 7
    )
    assert torch.equal(_ready().weights, _ready(histories=changed).weights)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="l2 must be above 0"):
        EASEModule(l2=0)
    wide = Histories(
        np.array([0, 0]), np.empty(0, np.int32), np.empty(0, np.int8), np.empty(0, np.int64), 30_000
    )
    assert "30,000 items do not fit" in str(EASEModule().impossible(wide))
    assert EASEModule().impossible(_histories()) is None
