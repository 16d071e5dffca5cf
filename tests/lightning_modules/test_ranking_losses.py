"""BPR-max and TOP1-max against naive loops, arithmetic and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from datamodules.types import Batch
from lightning_modules import ranking_losses
from lightning_modules.next_item import Loss
from lightning_modules.sasrec import SASRecModule

N, D, I, K = 7, 5, 11, 4  # noqa: E741 - the legend of ranking_losses.py
Problem = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture
def problem() -> Problem:
    """States, table, targets, negatives (none of which hits a target), float64."""
    g = torch.Generator().manual_seed(0)
    states = torch.randn(N, D, dtype=torch.float64, generator=g).requires_grad_()
    table = torch.randn(I + 1, D, dtype=torch.float64, generator=g).requires_grad_()
    targets = torch.randint(1, I + 1, (N,), generator=g)
    shift = torch.randint(1, I, (N, K), generator=g)
    return states, table, targets, (targets[:, None] - 1 + shift) % I + 1


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def naive(problem: Problem, penalty: float | None) -> float:
    """The papers' sums, written out; ``penalty`` None is TOP1-max. Hits are left out."""
    states, table, targets, negatives = problem
    total = 0.0
    for state, target, drawn in zip(states, targets.tolist(), negatives.tolist(), strict=True):
        positive = (state @ table[target]).item()
        scores = [(state @ table[k]).item() for k in drawn if k != target]
        if not scores:
            continue
        mass = sum(math.exp(s) for s in scores)
        weights = [math.exp(s) / mass for s in scores]
        pairs = list(zip(weights, scores, strict=True))
        if penalty is None:
            total += sum(w * (sigma(s - positive) + sigma(s * s)) for w, s in pairs)
        else:
            total -= math.log(sum(w * sigma(positive - s) for w, s in pairs))
            total += penalty * sum(w * s * s for w, s in pairs)
    return total


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, None])
@pytest.mark.parametrize("hits", [False, True])
def test_equals_the_naive_loop(problem: Problem, penalty: float | None, hits: bool) -> None:
    states, table, targets, negatives = problem
    if hits:  # some hits in one position, hits alone in another
        negatives[0, :2] = targets[0]
        negatives[1] = targets[1]
    expected = naive((states, table, targets, negatives), penalty)
    if penalty is None:
        got = ranking_losses.top1_max(*problem)
    else:
        got = ranking_losses.bpr_max(*problem, penalty=penalty)
    assert got.item() == pytest.approx(expected, rel=1e-12)


LOSSES = [ranking_losses.bpr_max, ranking_losses.top1_max]


@pytest.mark.parametrize("loss", LOSSES)
def test_pools_hits_and_gradients(problem: Problem, loss: Callable[..., Tensor]) -> None:
    states, table, targets, negatives = problem
    value = loss(states, table, targets, negatives)
    hits = torch.cat([negatives, targets[:, None]], dim=1)
    torch.testing.assert_close(loss(states, table, targets, hits), value)
    pool = torch.tensor([2, 5, 9])
    torch.testing.assert_close(
        loss(states, table, targets, pool), loss(states, table, targets, pool.expand(N, 3))
    )
    for drawn in (negatives, hits):
        assert torch.autograd.gradcheck(
            lambda s, w, j=drawn: loss(s, w, targets, j), (states, table)
        )
    with pytest.raises(ValueError, match=r"must be \(K,\) or \(N, K\)"):
        loss(states, table, targets, negatives[:3])


@pytest.mark.parametrize("loss", LOSSES)
def test_a_position_with_hits_alone_carries_nothing(
    problem: Problem, loss: Callable[..., Tensor]
) -> None:
    states, table, targets, _ = problem
    value = loss(states, table, targets, targets[:, None].expand(N, K))
    assert value.item() == 0
    gradients = torch.autograd.grad(value, (states, table))
    assert all(not g.any() for g in gradients)


def test_extreme_scores_stay_finite_and_exact() -> None:
    state = torch.ones(1, 1, requires_grad=True)
    table = torch.tensor([[0.0], [-1e3], [1e3], [0.0]])
    loss = ranking_losses.bpr_max(
        state, table, torch.tensor([1]), torch.tensor([2, 3]), penalty=0.0
    )
    # Weight 1 times sigma(-2000) and weight exp(-1000) times sigma(-1000): both are exp(-2000).
    assert loss.item() == pytest.approx(2000 - math.log(2))
    assert torch.autograd.grad(loss, state)[0].isfinite().all()
    top = ranking_losses.top1_max(state, table, torch.tensor([1]), torch.tensor([2, 3]))
    assert top.item() == pytest.approx(2.0)  # all weight on the item at 1000, both sigmas at 1


def test_a_negative_penalty_is_refused(problem: Problem) -> None:
    with pytest.raises(ValueError, match="penalty >= 0"):
        ranking_losses.bpr_max(*problem, penalty=-1.0)


@pytest.mark.parametrize("name", ["bpr_max", "top1_max"])
def test_sasrec_can_choose_them(name: Loss) -> None:
    torch.manual_seed(0)
    module = SASRecModule(
        num_items=9, max_length=4, hidden_size=8, dropout=0.0, loss=name, negatives=3
    )
    module.log = lambda *a, **k: None  # type: ignore[method-assign]
    assert module.num_negatives == 3
    history = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    targets = torch.tensor([[2, 3, 0, 5], [0, 7, 0, 0]])
    rows, length = torch.arange(2), torch.tensor([4, 2])
    negatives = torch.randint(1, 10, (2, 4, 3))
    batch = Batch(
        rows, rows + 1, history, length, targets=targets, negatives=negatives,
        normaliser=torch.tensor(8.0),
    )  # fmt: skip
    states = module.network(history, length)[targets > 0]  # (N, d)
    args = (states, module.item_vectors(), targets[targets > 0], negatives[targets > 0])
    expected = getattr(ranking_losses, name)(*args) / 8
    torch.testing.assert_close(module.training_step(batch, 0), expected)
