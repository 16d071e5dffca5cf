"""Metrics as exact means over random tie orders: pure functions of rank counts and of scored lists.

A target with ``above`` candidates before it and ``ties`` others with its very score stands on
positions above + 1 .. above + ties + 1, each equally likely. A constant model thus gets the chance
level, not 1 and not 0.

Legend: B rows, C candidates, k cutoff.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_modules.ranking import require_no_nan


def _gain_sums(gain: str, k: int, device: torch.device) -> Tensor:
    """(k + 1,) float64: the sum of the gains of positions 1..p, for p = 0..k."""
    position = torch.arange(1, k + 1, dtype=torch.float64, device=device)
    gains = 1 / torch.log2(1 + position) if gain == "dcg" else 1 / position
    return torch.cat([gains.new_zeros(1), gains.cumsum(0)])


def _mean_gain(sums: Tensor, above: Tensor, ties: Tensor) -> Tensor:
    """Mean over the positions above + 1 .. above + ties + 1 of the gain, which is 0 after k."""
    k = len(sums) - 1
    first, last = above.clamp(max=k), (above + ties + 1).clamp(max=k)
    return (sums[last] - sums[first]) / (ties + 1)


def as_counts(*counts: Tensor) -> tuple[Tensor, ...]:
    """The counts as int64 tensors, from tensors or arrays of any integer type."""
    return tuple(torch.as_tensor(c).to(torch.int64) for c in counts)


def expected_hit(above: Tensor, ties: Tensor, k: int) -> Tensor:
    """hit@k = clip((k - above) / (ties + 1), 0, 1), float64 of the counts' shape."""
    above, ties = as_counts(above, ties)
    return ((k - above).double() / (ties + 1)).clamp(0, 1)


def expected_ndcg(above: Tensor, ties: Tensor, k: int) -> Tensor:
    """ndcg@k of one target: mean of 1 / log2(1 + position) with 0 after position k, float64."""
    above, ties = as_counts(above, ties)
    return _mean_gain(_gain_sums("dcg", k, above.device), above, ties)


def expected_mrr(above: Tensor, ties: Tensor, k: int | None = None) -> Tensor:
    """mrr@k: mean of 1 / position with 0 after position k, or no cutoff if ``k`` is None, float64.

    Without a cutoff the sum of 1 / p over p = a..b is digamma(b + 1) - digamma(a).
    """
    above, ties = as_counts(above, ties)
    if k is not None:
        return _mean_gain(_gain_sums("rr", k, above.device), above, ties)
    first = (above + 1).double()
    tied = (torch.digamma(first + ties + 1) - torch.digamma(first)) / (ties + 1)
    return torch.where(ties == 0, 1 / first, tied)


def expected_auc(above: Tensor, ties: Tensor, count: Tensor) -> Tensor:
    """Share of the other candidates that the target beats, a tie counting half, float64.

    (count - 1 - above - ties / 2) / (count - 1); NaN where the target is the only candidate.
    """
    above, ties, count = as_counts(above, ties, count)
    return (2 * (count - 1 - above) - ties).double() / (2 * (count - 1))


def row_metrics(above: Tensor, ties: Tensor, count: Tensor, ks: Sequence[int]) -> dict[str, Tensor]:
    """Every metric of rows with one target, name -> (B,) float64.

    ``recall@k`` equals ``hit@k`` in a row; they differ in how rows are averaged, see
    ``RankingMetrics``.
    """
    out: dict[str, Tensor] = {}
    for k in ks:
        out[f"hit@{k}"] = out[f"recall@{k}"] = expected_hit(above, ties, k)
        out[f"ndcg@{k}"] = expected_ndcg(above, ties, k)
        out[f"mrr@{k}"] = expected_mrr(above, ties, k)
    out["mrr"] = expected_mrr(above, ties)
    out["uauc"] = expected_auc(above, ties, count)
    return out


def _tie_groups(
    scores: Tensor, labels: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each candidate, (B, C) int64 each: candidates above it, size of its tie group, positives
    in that group, positives above it."""
    # Masked candidates go behind every real one, so a real -inf becomes the lowest finite key.
    key = (-scores.double()).clamp(max=torch.finfo(torch.float64).max)
    key = key.masked_fill(~mask, torch.inf)  # (B, C) ascending = best first
    ordered, order = key.sort(dim=1)
    start = torch.searchsorted(ordered, key)  # (B, C)
    end = torch.searchsorted(ordered, key, right=True)  # (B, C)
    positives = labels.gather(1, order).cumsum(1)  # (B, C)
    positives = torch.cat([positives.new_zeros(len(key), 1), positives], dim=1)  # (B, C + 1)
    before = positives.gather(1, start)
    return start, end - start, positives.gather(1, end) - before, before


def _first_positive(above: Tensor, size: Tensor, positives: Tensor, labels: Tensor) -> Tensor:
    """(B, C) float64: P(the first positive stands on position c + 1) over random tie orders.

    It lies in the best tie group that holds a positive. With p positives among s, the first x slots
    hold none with probability prod_{i < x} (s - p - i) / (s - i).
    """
    width = labels.shape[1]
    best = above.masked_fill(~labels, width).argmin(dim=1, keepdim=True)  # (B, 1)
    g, s, p = (x.gather(1, best) for x in (above, size, positives))  # (B, 1) each
    slot = torch.arange(width, device=labels.device) - g  # (B, C) slot within the group, 0-based
    keep = (s - p - slot).clamp(min=0).double() / (s - slot).clamp(min=1)
    none_yet = torch.where(slot < 0, 1.0, keep).cumprod(dim=1)  # (B, C) none up to position c + 1
    return torch.cat([none_yet.new_ones(len(g), 1), none_yet[:, :-1]], dim=1) - none_yet


def list_metrics(
    scores: Tensor, labels: Tensor, mask: Tensor | None = None, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, Tensor]:
    """Metrics of candidate lists with any number of positives, means over random tie orders.

    Args:
        scores: (B, C), any float dtype; infinities are ordinary scores.
        labels: (B, C) bool, True where the candidate is a positive.
        mask: (B, C) bool, False where the slot is padding; None means all real.
        ks: cutoffs.

    Returns:
        name -> (B,) float64: hit@k (some positive in the top k), recall@k, ndcg@k (ideal DCG of all
        positives), mrr@k and mrr (of the first positive), auc. NaN in rows without a positive; auc
        also in rows without a negative.

    Raises:
        ValueError: shapes differ, or a real candidate's score is NaN.
    """
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.bool()
    if not scores.shape == labels.shape == mask.shape or scores.ndim != 2:
        raise ValueError(
            f"scores {tuple(scores.shape)}, labels {tuple(labels.shape)} and mask "
            f"{tuple(mask.shape)} must have one shape (rows, candidates)."
        )
    require_no_nan(scores.masked_fill(~mask, 0))
    labels = labels.bool() & mask
    above, size, positives, before = _tie_groups(scores, labels, mask)
    first = _first_positive(above, size, positives, labels)  # (B, C)
    position = torch.arange(1, scores.shape[1] + 1, device=scores.device)
    total = labels.sum(1)  # (B,) positives
    out: dict[str, Tensor] = {}
    for k in ks:
        dcg = _gain_sums("dcg", k, scores.device)
        out[f"hit@{k}"] = first[:, :k].sum(1)
        out[f"recall@{k}"] = (expected_hit(above, size - 1, k) * labels).sum(1) / total
        out[f"ndcg@{k}"] = (_mean_gain(dcg, above, size - 1) * labels).sum(1) / dcg[
            total.clamp(max=k)
        ]
        out[f"mrr@{k}"] = (first / position)[:, :k].sum(1)
    out["mrr"] = (first / position).sum(1)
    negatives = mask.sum(1) - total  # (B,)
    tied = size - positives
    beaten = 2 * (negatives[:, None] - (above - before)) - tied  # (B, C) halves of pairs won
    out["auc"] = (beaten * labels).sum(1).double() / (2 * total * negatives)
    return {name: value.masked_fill(total == 0, torch.nan) for name, value in out.items()}
