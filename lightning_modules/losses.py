"""Next-item losses: pure functions on real positions only, each the SUM over positions.

Callers gather the N positions that carry a loss (no padding) and divide by the normaliser of the
whole global batch. Row 0 of the item table is padding: no loss gives it a score or a gradient.
Negatives that equal their position's target ("accidental hits") carry no loss.

Legend: N positions, d width, I items (ids 1..I), K negatives a position.
s_j = <state, table[j]> is the score of item j, s+ the target's, sigma the logistic function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_CHUNK_SCORES = 2**21  # scores of one default chunk: 8 MiB in float32
_LEAST_CHUNK = (
    64  # positions; with fewer a product of matrices is one of vectors, several times as slow
)


def _wide(x: Tensor) -> Tensor:
    """Half precision as float32, because sums of exponentials need the digits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _target_scores(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    return _wide((states * F.embedding(targets, table)).sum(-1))  # (N,)


def full_softmax(
    states: Tensor,
    table: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy over the whole catalogue, sum of -s+ + log sum_{j=1..I} exp(s_j).

    Klenitskiy & Vasilev, "Turning Dross Into Gold Loss", RecSys 2023 (arXiv 2309.07602).

    Args:
        states: (N, d).
        table: (I + 1, d).
        targets: (N,) item ids in 1..I.
        temperature: scores are divided by it (for cosine scores).
        label_smoothing: share of the target distribution spread evenly over the I items.
    """
    logits = _wide(states @ table[1:].T) / temperature  # (N, I)
    return F.cross_entropy(logits, targets - 1, reduction="sum", label_smoothing=label_smoothing)


class _ChunkedSoftmax(torch.autograd.Function):
    """sum_n log sum_j exp(<state_n, item_j>), with the gradients made chunk by chunk in forward.

    d/d state_n = sum_j p_nj item_j and d/d item_j = sum_n p_nj state_n, p the softmax. Only one
    chunk of scores exists at a time; what is kept for backward has the inputs' size.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, items: Tensor, chunk: int, dtype: torch.dtype, gradients: bool
    ) -> Tensor:
        wide = torch.promote_types(states.dtype, items.dtype)
        wide = torch.promote_types(wide, torch.float32)
        low = items.to(dtype)  # (I, d)
        total = torch.zeros((), dtype=wide, device=states.device)
        keep = gradients and (ctx.needs_input_grad[0] or ctx.needs_input_grad[1])
        grad_states = torch.empty_like(states, dtype=wide) if keep else None
        grad_items = torch.zeros_like(items, dtype=wide) if keep else None
        with torch.autocast(states.device.type, enabled=False):
            for start in range(0, len(states), chunk):
                part = states[start : start + chunk].to(dtype)  # (n, d)
                weights = (part @ low.T).to(wide)  # (n, I)
                peak = weights.amax(dim=1, keepdim=True)  # (n, 1)
                weights.sub_(peak).exp_()
                mass = weights.sum(dim=1, keepdim=True)  # (n, 1)
                total += (mass.log() + peak).sum()
                if grad_states is None or grad_items is None:
                    continue
                # Dividing the narrow factors by the mass spares a pass over (n, I).
                weights = weights.to(dtype)
                grad_states[start : start + chunk] = (weights @ low).to(wide) / mass
                scaled = (states[start : start + chunk].to(wide) / mass).to(dtype)
                grad_items += weights.T @ scaled
        ctx.save_for_backward(grad_states, grad_items)
        ctx.dtypes = (states.dtype, items.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        out = [
            (grad * grad_output).to(dtype) if needed else None
            for grad, dtype, needed in zip(
                ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:2], strict=True
            )
        ]
        return (*out, None, None, None)


def chunked_softmax(
    states: Tensor,
    table: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
    matmul_dtype: torch.dtype | None = None,
) -> Tensor:
    """``full_softmax`` with memory bounded by one chunk of positions: same value, same gradients.

    Gradients are made in the forward pass, so the (N, I) scores are never kept. After Wijmans et
    al., "Cut Your Losses in Large-Vocabulary Language Models", ICLR 2025 (arXiv 2411.09009),
    without its gradient filtering. It cannot be differentiated twice.

    Args:
        states, table, targets, temperature, label_smoothing: as in ``full_softmax``.
        chunk_size: positions a chunk; None takes as many as make about two million scores, at least 64.
        matmul_dtype: None keeps the inputs' precision (at least float32). torch.bfloat16 rounds
            the factors and the scores to 8 bits; the log-sum-exp and all sums over chunks stay
            float32. It is many times slower on a CPU without AVX512_BF16 or AMX.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 position, got {chunk_size}.")
    items = table[1:]  # (I, d)
    chunk = chunk_size or max(_LEAST_CHUNK, _CHUNK_SCORES // len(items))
    wide = torch.promote_types(torch.promote_types(states.dtype, table.dtype), torch.float32)
    scaled = states / temperature
    with torch.autocast(states.device.type, enabled=False):
        log_mass: Tensor = _ChunkedSoftmax.apply(
            scaled, items, chunk, matmul_dtype or wide, torch.is_grad_enabled()
        )
        positive = _target_scores(scaled.to(wide), table.to(wide), targets).sum()
        if label_smoothing == 0:
            return log_mass - positive
        even = (scaled.to(wide) @ items.to(wide).mean(dim=0)).sum()  # mean score over the catalogue
        return log_mass - (1 - label_smoothing) * positive - label_smoothing * even


def sampled_scores(
    states: Tensor, table: Tensor, targets: Tensor, negatives: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of targets (N,) and negatives (N, K), and which negatives hit the target (N, K)."""
    if negatives.ndim == 1:
        scores = states @ F.embedding(negatives, table).T  # (N, K), one pool for all positions
    elif negatives.ndim == 2 and len(negatives) == len(states):
        scores = torch.einsum("nd,nkd->nk", states, F.embedding(negatives, table))
    else:
        raise ValueError(
            f"negatives must be (K,) or (N, K) with N = {len(states)} positions, "
            f"got {tuple(negatives.shape)}."
        )
    hit = negatives == targets[:, None]  # (N, K)
    return _target_scores(states, table, targets), _wide(scores), hit


def sampled_softmax(
    states: Tensor,
    table: Tensor,
    targets: Tensor,
    negatives: Tensor,
    log_q: Tensor | None,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Softmax over the target and K sampled negatives, with the log-Q correction.

    sum of -s+ + log(exp(s+) + sum_{k: j_k != target} exp(s_{j_k} - log(K q_{j_k}))): the sum in the
    logarithm is an unbiased estimate of the full one, by importance sampling (Bengio & Senecal,
    IEEE TNN 2008). The target is there with probability 1, so it is not corrected (Khrylchenko et
    al., "Correcting the LogQ Correction", RecSys 2025, arXiv 2507.09331, without its weights).

    Args:
        states, table, targets, temperature: as in ``full_softmax``.
        negatives: (N, K) item ids, or (K,) shared by all positions.
        log_q: (I + 1,) log-probability that one draw gives the item; None corrects nothing.
    """
    positive, negative, hit = sampled_scores(states / temperature, table, targets, negatives)
    if log_q is not None:
        negative = negative - (log_q[negatives] + torch.tensor(negatives.shape[-1]).log().item())
    negative = negative.masked_fill(hit, -torch.inf)
    return (
        torch.logsumexp(torch.cat([positive[:, None], negative], dim=1), dim=1) - positive
    ).sum()


def nce(
    states: Tensor,
    table: Tensor,
    targets: Tensor,
    negatives: Tensor,
    log_q: Tensor,
    *,
    log_partition: float = 0.0,
) -> Tensor:
    """Noise-contrastive estimation, sum of -log sigma(z+) - sum_k log(1 - sigma(z_k)), z = s - c - log(K q).

    s - c are then log-probabilities without a normaliser of their own (Gutmann & Hyvarinen, AISTATS 2010;
    Mnih & Teh, ICML 2012, equation 8). Where states are normalised, scores cannot fall far enough by
    themselves: with c = 0 and I items the first scores claim a total probability of I.

    Args:
        states, table, targets, negatives, log_q: as in ``sampled_softmax``.
        log_partition: c, the logarithm of the sum of exp(s) over the catalogue that is taken for granted.
    """
    positive, negative, hit = sampled_scores(states, table, targets, negatives)
    shift = log_partition + torch.tensor(negatives.shape[-1]).log().item()
    positive = positive - (log_q[targets] + shift)
    negative = negative - (log_q[negatives] + shift)
    return F.softplus(-positive).sum() + F.softplus(negative).masked_fill(hit, 0).sum()


def bce(states: Tensor, table: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
    """Binary cross-entropy, sum of -log sigma(s+) - sum_k log(1 - sigma(s_k)).

    With K = 1 this is the loss of SASRec (Kang & McAuley, ICDM 2018, arXiv 1808.09781).

    Args:
        states, table, targets: as in ``full_softmax``.
        negatives: (N, K) item ids, or (K,) shared by all positions.
    """
    return gbce(states, table, targets, negatives, t=0.0)


def gbce(
    states: Tensor,
    table: Tensor,
    targets: Tensor,
    negatives: Tensor,
    *,
    t: float,
    alpha: float | None = None,
) -> Tensor:
    """Generalised BCE, sum of -beta log sigma(s+) - sum_k log(1 - sigma(s_k)).

    beta = alpha (t (1 - 1/alpha) + 1/alpha), so t = 0 is plain BCE and t = 1 undoes all of the
    overconfidence that sampling adds. Petrov & Macdonald, "gSASRec", RecSys 2023 (arXiv
    2308.07192); they average over the K + 1 terms, here is their sum. log sigma^beta is taken as
    beta log sigma, which is stable without the float64 logit transform of their code.

    Args:
        states, table, targets, negatives: as in ``bce``.
        t: calibration, 0..1.
        alpha: sampling rate, negatives sampled a position over negatives there are; None means
            min(1, K / (I - 1)) from the shapes.

    Raises:
        ValueError: t or alpha out of range.
    """
    if alpha is None:
        alpha = min(1.0, negatives.shape[-1] / max(1, len(table) - 2))
    if not 0 <= t <= 1 or not 0 < alpha <= 1:
        raise ValueError(f"gbce needs 0 <= t <= 1 and 0 < alpha <= 1, got t={t}, alpha={alpha}.")
    beta = alpha * t + 1 - t  # the equation above with the division by alpha carried out
    positive, negative, hit = sampled_scores(states, table, targets, negatives)
    return beta * F.softplus(-positive).sum() + F.softplus(negative).masked_fill(hit, 0).sum()


def bpr(states: Tensor, table: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
    """Bayesian personalised ranking, sum of -sum_k log sigma(s+ - s_k).

    Rendle et al., UAI 2009 (arXiv 1205.2618). The L2 penalty is the optimizer's weight decay.

    Args:
        states, table, targets, negatives: as in ``bce``.
    """
    positive, negative, hit = sampled_scores(states, table, targets, negatives)
    return F.softplus(negative - positive[:, None]).masked_fill(hit, 0).sum()


def rows_used(
    table: Tensor, targets: Tensor, negatives: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows of ``table`` that these ids name, behind a row of padding, and the ids' new numbers.

    The last of the four holds the old number of each of those rows.

    What follows then has a gradient of these rows alone, which reaches the table as a sparse one.
    """
    ids = torch.cat([targets.flatten(), negatives.flatten()])
    used, number = ids.unique(return_inverse=True)
    rows = F.embedding(used, table, sparse=True)  # (used, d)
    small = torch.cat([rows.new_zeros(1, rows.shape[1]), rows])
    where, drawn = (number + 1).split([targets.numel(), negatives.numel()])
    return small, where.view_as(targets), drawn.view_as(negatives), F.pad(used, (1, 0))
