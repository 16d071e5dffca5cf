"""Scalable cross-entropy against the full softmax and a naive loop over its own buckets."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_modules import losses, scalable_softmax
from lightning_modules.scalable_softmax import scalable_softmax as loss_of

N, D, I = 12, 5, 20  # noqa: E741 - the legend of scalable_softmax.py


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    states = torch.randn(N, D, dtype=torch.float64, generator=g).requires_grad_()
    table = torch.randn(I + 1, D, dtype=torch.float64, generator=g).requires_grad_()
    return states, table, torch.randint(1, I + 1, (N,), generator=g)


def test_with_every_position_and_item_it_is_the_full_softmax(
    problem: tuple[Tensor, Tensor, Tensor],
) -> None:
    full = losses.full_softmax(*problem)
    got = loss_of(*problem, buckets=3, positions=N, items=I)
    assert got.item() == pytest.approx(full.item(), rel=1e-12)
    expected = torch.autograd.grad(full, problem[:2])
    for a, b in zip(torch.autograd.grad(got, problem[:2]), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_equals_a_loop_over_its_buckets(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    states, table, targets = (t.detach() for t in problem)
    sizes = {"buckets": 4, "positions": 5, "items": 6}
    torch.manual_seed(3)
    taken, near = scalable_softmax._buckets(states, table, *sizes.values())
    assert (taken.shape, near.shape) == ((4, 5), (4, 6))
    worst: dict[int, float] = {}
    for positions, items in zip(taken.tolist(), near.tolist(), strict=True):
        for n in positions:
            score = [float(states[n] @ table[i]) for i in items if i != int(targets[n])]
            own = float(states[n] @ table[targets[n]])
            value = math.log(sum(map(math.exp, [own, *score]))) - own
            worst[n] = max(value, worst.get(n, value))
    expected = sum(worst.values()) * N / len(worst)
    torch.manual_seed(3)
    assert loss_of(states, table, targets, **sizes).item() == pytest.approx(expected, rel=1e-12)


def test_a_bucket_takes_what_agrees_with_its_centre(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    states, table, _ = (t.detach() for t in problem)
    torch.manual_seed(5)
    taken, near = scalable_softmax._buckets(states, table, 2, 3, 4)
    torch.manual_seed(5)
    centres = torch.randn(2, N, dtype=torch.float64) @ states
    for centre, positions, items in zip(centres, taken.tolist(), near.tolist(), strict=True):
        by_state = sorted(range(N), key=lambda n: -float(centre @ states[n]))
        by_item = sorted(range(1, I + 1), key=lambda i: -float(centre @ table[i]))
        assert set(positions) == set(by_state[:3])
        assert set(items) == set(by_item[:4]), "padding is never taken"


def test_blocks_of_buckets_change_nothing(
    problem: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = []
    for limit in (2**22, 1):
        monkeypatch.setattr(scalable_softmax, "_SCORES", limit)
        torch.manual_seed(0)
        values.append(loss_of(*problem, items=4).item())
    assert values[0] == values[1]


def test_padding_has_no_gradient_and_positions_uncovered_none(
    problem: tuple[Tensor, Tensor, Tensor],
) -> None:
    states, table, targets = problem
    torch.manual_seed(1)
    loss_of(states, table, targets, buckets=1, positions=2, items=3).backward()
    assert table.grad is not None
    assert states.grad is not None
    assert not table.grad[0].any()
    assert int(states.grad.any(dim=1).sum()) == 2


def test_half_precision_is_summed_in_float32(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    states, table, targets = problem
    low = loss_of(states.bfloat16(), table.bfloat16(), targets, buckets=1, positions=N, items=I)
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(losses.full_softmax(*problem).item(), rel=0.02)


def test_no_positions_and_bad_sizes() -> None:
    states = torch.zeros(0, D, requires_grad=True)
    table = torch.zeros(I + 1, D, requires_grad=True)
    value = loss_of(states, table, torch.zeros(0, dtype=torch.int64))
    assert value.item() == 0
    value.backward()  # every rank must take part in the reduction
    assert table.grad is not None
    for bad in ({"buckets": 0}, {"positions": 0}, {"items": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            loss_of(torch.zeros(3, D), table, torch.ones(3, dtype=torch.int64), **bad)
