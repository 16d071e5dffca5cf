"""Shared negatives: probabilities by hand, draws in proportion to them, and a loss that corrects for them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules.sasrec import SASRecModule
from lightning_modules.shared_negatives import draw_pool, log_probabilities


def test_probabilities_by_hand() -> None:
    counts = torch.tensor([7, 0, 1, 4, 9])  # padding's count says nothing
    found = log_probabilities(4, counts, 0.5).exp()
    torch.testing.assert_close(found, torch.tensor([0, 1 / 7, 1 / 7, 2 / 7, 3 / 7]))
    uniform = torch.tensor([0, 0.25, 0.25, 0.25, 0.25])
    torch.testing.assert_close(log_probabilities(4, counts, 0).exp(), uniform)
    torch.testing.assert_close(log_probabilities(4).exp(), uniform)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.floats(0, 2), st.integers(0, 2**40))
def test_draws_are_items(counts: list[int], power: float, seed: int) -> None:
    log_q = log_probabilities(len(counts), torch.tensor([0, *counts]), power)
    pool = draw_pool(64, seed, len(counts), log_q)
    assert pool.shape == (64,)
    assert int(pool.min()) >= 1
    assert int(pool.max()) <= len(counts)
    assert torch.equal(pool, draw_pool(64, seed, len(counts), log_q))


def test_draws_are_in_proportion() -> None:
    log_q = log_probabilities(3, torch.tensor([0, 1, 2, 5]), 1.0)
    share = draw_pool(80_000, 3, 3, log_q).bincount(minlength=4) / 80_000
    # Four standard deviations of a share are below 0.0071.
    assert share.tolist() == pytest.approx([0, 1 / 8, 2 / 8, 5 / 8], abs=0.0071)


def _module(**options: Any) -> SASRecModule:
    torch.manual_seed(0)
    module = SASRecModule(num_items=6, hidden_size=4, shared_negatives=True, **options)
    histories = SimpleNamespace(train_counts=lambda: np.array([0, 1, 1, 2, 4, 8, 8]))
    data = SimpleNamespace(seed=0, histories=histories)
    module._trainer = SimpleNamespace(datamodule=data, global_step=0)  # type: ignore[assignment]
    return module


@pytest.mark.parametrize("table", ["adamw", "rowwise_adagrad"])
def test_the_corrected_loss_comes_to_that_of_the_whole_catalogue(table: Any) -> None:
    """Whatever items are drawn more often, the sum in the logarithm is that of all items but the target."""
    module = _module(loss="sampled_ce", negatives=40_000, popularity=1.0, table_optimizer=table)
    states, targets = torch.randn(3, 4), torch.tensor([1, 4, 6])
    batch: Any = SimpleNamespace(negatives=None)
    pool = module._negatives(batch, targets > 0)
    assert pool is not None
    shares = pool.bincount(minlength=7) / len(pool)
    assert shares[6] > 4 * shares[1]
    found = module.loss_sum(states, targets, pool).item()
    scores = states @ module.item_vectors().T  # (3, 7)
    whole = torch.logsumexp(scores[:, 1:], 1) - scores[torch.arange(3), targets]
    assert found == pytest.approx(whole.sum().item(), abs=0.03)


def test_popularity_is_of_shared_negatives() -> None:
    with pytest.raises(ValueError, match="shared_negatives=true"):
        SASRecModule(num_items=6, loss="bpr", popularity=0.5)
    with pytest.raises(ValueError, match="popularity=-1"):
        SASRecModule(num_items=6, loss="bpr", popularity=-1, shared_negatives=True)


@pytest.mark.parametrize("betas", [(2.0, 3.0), (0.9, 1.0), (-0.1, 0.9)])
def test_betas_are_below_1(betas: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="below 1"):
        SASRecModule(num_items=6, betas=betas)
    assert math.isclose(SASRecModule(num_items=6).betas[1], 0.98)
