"""Losses against torch.nn.functional, finite differences and arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules import losses

N, D, I, K = 7, 5, 11, 4  # noqa: E741 - the legend of losses.py


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States, table, targets, negatives (none of which hits a target), float64."""
    g = torch.Generator().manual_seed(0)
    states = torch.randn(N, D, dtype=torch.float64, generator=g).requires_grad_()
    table = torch.randn(I + 1, D, dtype=torch.float64, generator=g).requires_grad_()
    targets = torch.randint(1, I + 1, (N,), generator=g)
    shift = torch.randint(1, I, (N, K), generator=g)
    return states, table, targets, (targets[:, None] - 1 + shift) % I + 1


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_full_softmax_is_the_log_probability_over_the_real_items(
    problem: tuple[Tensor, Tensor, Tensor, Tensor], smoothing: float
) -> None:
    states, table, targets, _ = problem
    expected = torch.zeros((), dtype=torch.float64)
    for state, target in zip(states, targets.tolist(), strict=True):
        score = {i: (state @ table[i]).item() / 0.7 for i in range(1, I + 1)}
        log_z = math.log(sum(math.exp(s) for s in score.values()))
        even = sum(log_z - s for s in score.values()) / I
        expected += (1 - smoothing) * (log_z - score[target]) + smoothing * even
    got = losses.full_softmax(states, table, targets, temperature=0.7, label_smoothing=smoothing)
    torch.testing.assert_close(got.detach(), expected)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100, None])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_chunked_softmax_equals_full_softmax_in_value_and_gradients(
    problem: tuple[Tensor, Tensor, Tensor, Tensor], chunk_size: int | None, smoothing: float
) -> None:
    states, table, targets, _ = problem
    options = {"temperature": 0.5, "label_smoothing": smoothing}
    plain = losses.full_softmax(states, table, targets, **options)
    chunked = losses.chunked_softmax(states, table, targets, chunk_size=chunk_size, **options)
    torch.testing.assert_close(chunked, plain)
    # A factor behind the loss, as the normaliser puts there.
    got, expected = (gradients(3 * loss, states, table) for loss in (chunked, plain))
    torch.testing.assert_close(got, expected)
    assert got[1][0].eq(0).all()  # padding


def test_chunked_softmax_passes_gradcheck(problem: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    states, table, targets, _ = problem
    assert torch.autograd.gradcheck(
        lambda s, w: losses.chunked_softmax(s, w, targets, chunk_size=3, label_smoothing=0.1),
        (states, table),
    )


def test_chunked_softmax_gives_gradients_only_where_asked(
    problem: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    states, table, targets, _ = problem
    frozen = table.detach()
    (got,) = gradients(losses.chunked_softmax(states, frozen, targets), states)
    (expected,) = gradients(losses.full_softmax(states, frozen, targets), states)
    torch.testing.assert_close(got, expected)
    with torch.no_grad():
        value = losses.chunked_softmax(states, table, targets)
    assert not value.requires_grad
    torch.testing.assert_close(value, losses.full_softmax(states, frozen, targets).detach())


def test_chunked_softmax_in_bfloat16_stays_near_float32() -> None:
    g = torch.Generator().manual_seed(1)
    states = torch.randn(64, 32, generator=g).requires_grad_()
    table = (torch.randn(301, 32, generator=g) / 4).requires_grad_()
    targets = torch.randint(1, 301, (64,), generator=g)
    plain = losses.full_softmax(states, table, targets)
    low = losses.chunked_softmax(states, table, targets, chunk_size=20, matmul_dtype=torch.bfloat16)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, plain, rtol=2e-3, atol=0)  # scores carry 8 bits, 4e-3 each
    for a, b in zip(gradients(low, states, table), gradients(plain, states, table), strict=True):
        assert (a - b).norm() < 0.01 * b.norm()


def test_chunked_softmax_survives_large_scores() -> None:
    states = torch.full((2, 1), 1e3, requires_grad=True)
    table = torch.tensor([[0.0], [1.0], [-1.0]])
    loss = losses.chunked_softmax(states, table, torch.tensor([1, 2]))
    assert loss.item() == 2000.0  # 0 for the first position, 1000 - -1000 for the second
    assert gradients(loss, states)[0].flatten().tolist() == [0.0, 2.0]


def test_chunked_softmax_keeps_no_matrix_of_scores() -> None:
    states = torch.randn(50, 4, requires_grad=True)
    table = torch.randn(1001, 4, requires_grad=True)
    kept: list[int] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        losses.chunked_softmax(states, table, torch.ones(50, dtype=torch.int64), chunk_size=10)
    assert max(kept) == 1000 * 4  # a gradient of the table's size, against 50 * 1000 scores


def test_sampled_softmax_with_every_item_and_uniform_q_is_full_softmax(
    problem: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    states, table, targets, _ = problem
    everything = torch.arange(1, I + 1)
    log_q = torch.full((I + 1,), -math.log(I), dtype=torch.float64)
    full = losses.full_softmax(states, table, targets, temperature=0.8)
    for negatives in (everything, everything.expand(N, I)):
        got = losses.sampled_softmax(states, table, targets, negatives, log_q, temperature=0.8)
        torch.testing.assert_close(got, full)
        torch.testing.assert_close(
            gradients(got, states, table),
            gradients(losses.full_softmax(states, table, targets, temperature=0.8), states, table),
        )


def test_log_q_makes_the_partition_estimate_unbiased() -> None:
    g = torch.Generator().manual_seed(2)
    state, table = torch.randn(1, D, generator=g) / 2, torch.randn(I + 1, D, generator=g)
    q = torch.arange(0, I + 1).float()
    q = q / q.sum()  # far from uniform; padding never drawn
    draws, target = 2_000, torch.tensor([3])
    negatives = torch.multinomial(q, draws * K, replacement=True, generator=g).view(draws, K)
    partition = (state @ table[1:].T).exp().sum().item()
    own = (state @ table[3]).item()

    def partitions(log_q: Tensor | None) -> Tensor:
        loss = [losses.sampled_softmax(state, table, target, row, log_q) for row in negatives]
        return (torch.stack(loss) + own).exp()

    corrected, plain = partitions(q.log()), partitions(None)
    error = corrected.std().item() / draws**0.5
    assert abs(corrected.mean().item() - partition) < 3 * error < 0.1 * partition
    assert plain.mean() < 0.8 * partition  # K of I items cannot fill the sum


def test_sampled_softmax_without_log_q_is_cross_entropy_with_the_target_first(
    problem: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    states, table, targets, negatives = problem
    logits = torch.einsum("nd,nkd->nk", states, table[torch.cat([targets[:, None], negatives], 1)])
    expected = F.cross_entropy(logits, torch.zeros(N, dtype=torch.int64), reduction="sum")
    torch.testing.assert_close(
        losses.sampled_softmax(states, table, targets, negatives, None), expected
    )


def test_bce_equals_binary_cross_entropy_with_logits(
    problem: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    states, table, targets, negatives = problem
    logits = torch.einsum("nd,nkd->nk", states, table[torch.cat([targets[:, None], negatives], 1)])
    truth = torch.zeros_like(logits)
    truth[:, 0] = 1
    expected = F.binary_cross_entropy_with_logits(logits, truth, reduction="sum")
    torch.testing.assert_close(losses.bce(states, table, targets, negatives), expected)
    torch.testing.assert_close(losses.gbce(states, table, targets, negatives, t=0.0), expected)


@pytest.mark.parametrize(("t", "alpha"), [(1.0, 0.3), (0.75, 0.3), (0.5, None)])
def test_gbce_equals_bce_with_the_papers_transformed_logit(
    problem: tuple[Tensor, Tensor, Tensor, Tensor], t: float, alpha: float | None
) -> None:
    states, table, targets, negatives = problem
    rate = K / (I - 1) if alpha is None else alpha
    beta = rate * (t * (1 - 1 / rate) + 1 / rate)
    positive = (states * table[targets]).sum(1)
    transformed = -torch.log(torch.sigmoid(positive) ** -beta - 1)  # gamma of the paper
    negative = torch.einsum("nd,nkd->nk", states, table[negatives])
    logits = torch.cat([transformed[:, None], negative], 1)
    truth = torch.zeros_like(logits)
    truth[:, 0] = 1
    expected = F.binary_cross_entropy_with_logits(logits, truth, reduction="sum")
    got = losses.gbce(states, table, targets, negatives, t=t, alpha=alpha)
    torch.testing.assert_close(got, expected)


def test_gbce_is_finite_where_the_transformed_logit_is_not() -> None:
    states = torch.tensor([[1.0], [1.0]], requires_grad=True)
    table = torch.tensor([[0.0], [80.0], [-80.0], [0.0]], requires_grad=True)
    loss = losses.gbce(states, table, torch.tensor([1, 2]), torch.tensor([3]), t=1.0, alpha=0.5)
    assert loss.item() == pytest.approx(0.5 * 80 + 2 * math.log(2))
    assert all(g.isfinite().all() for g in gradients(loss, states, table))


@pytest.mark.parametrize(("t", "alpha"), [(-0.1, 0.5), (1.1, 0.5), (0.5, 0.0), (0.5, 1.5)])
def test_gbce_refuses_rates_out_of_range(
    problem: tuple[Tensor, Tensor, Tensor, Tensor], t: float, alpha: float
) -> None:
    with pytest.raises(ValueError, match="0 <= t <= 1 and 0 < alpha <= 1"):
        losses.gbce(*problem, t=t, alpha=alpha)


def test_bpr_is_the_log_sigmoid_of_the_differences(
    problem: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    states, table, targets, negatives = problem
    positive = (states * table[targets]).sum(1, keepdim=True)
    negative = torch.einsum("nd,nkd->nk", states, table[negatives])
    torch.testing.assert_close(
        losses.bpr(states, table, targets, negatives), -F.logsigmoid(positive - negative).sum()
    )


def test_nce_is_the_posterior_of_data_against_noise(
    problem: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """P(data | item) = p / (p + K q) with p = exp(s): the definition, without logarithms of ratios."""
    states, table, targets, negatives = problem
    q = torch.rand(I + 1, dtype=torch.float64)
    q /= q[1:].sum()
    p = (states.detach() @ table.detach().T).exp()  # (N, I + 1)
    for mass in (1.0, 7.5):  # of exp(s) over the catalogue
        posterior = p / mass / (p / mass + K * q)
        expected = -posterior.gather(1, targets[:, None]).log().sum()
        expected -= (1 - posterior.gather(1, negatives)).log().sum()
        taken = math.log(mass)
        got = losses.nce(states, table, targets, negatives, q.log(), log_partition=taken)
        torch.testing.assert_close(got.detach(), expected)


UNIFORM = torch.full((I + 1,), -math.log(I), dtype=torch.float64)
SAMPLED: list[Callable[..., Tensor]] = [
    lambda *a: losses.sampled_softmax(*a, None),
    lambda s, w, t, n: losses.nce(s, w, t, n, UNIFORM - math.log(n.shape[-1])),  # whatever K is
    losses.bce,
    lambda *a: losses.gbce(*a, t=0.5, alpha=0.5),
    losses.bpr,
]


@pytest.mark.parametrize("loss", SAMPLED, ids=["sampled_softmax", "nce", "bce", "gbce", "bpr"])
def test_sampled_losses_share_pools_mask_hits_and_pass_gradcheck(
    problem: tuple[Tensor, Tensor, Tensor, Tensor], loss: Callable[..., Tensor]
) -> None:
    states, table, targets, negatives = problem
    value = loss(states, table, targets, negatives)
    hits = torch.cat([negatives, targets[:, None]], dim=1)
    torch.testing.assert_close(loss(states, table, targets, hits), value)
    pool = torch.tensor([2, 5, 9])
    torch.testing.assert_close(
        loss(states, table, targets, pool), loss(states, table, targets, pool.expand(N, 3))
    )
    assert torch.autograd.gradcheck(lambda s, w: loss(s, w, targets, negatives), (states, table))
    with pytest.raises(ValueError, match=r"must be \(K,\) or \(N, K\)"):
        loss(states, table, targets, negatives[:3])
