"""Ranking-max losses of GRU4Rec: pairwise losses that weigh the highest-scored negatives most.

Hidasi & Karatzoglou, "Recurrent Neural Networks with Top-k Gains for Session-based Recommendations",
CIKM 2018 (arXiv 1706.03847). The conventions are those of ``losses``: the SUM over positions that carry
a loss, row 0 of the table is padding, and negatives that equal their position's target carry no loss.

Legend: N positions, d width, I items (ids 1..I), K negatives a position.
s+ is the target's score, s_k a negative's, sigma the logistic function, and
w_k = exp(s_k) / sum_l exp(s_l) the softmax over a position's negatives alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.losses import sampled_scores


def _block(scores: Tensor, hit: Tensor) -> Tensor:
    """Scores that give hits no weight; finite, so that a position of hits alone has no NaN gradient."""
    return scores.masked_fill(hit, torch.finfo(scores.dtype).min)


def bpr_max(
    states: Tensor, table: Tensor, targets: Tensor, negatives: Tensor, *, penalty: float = 1.0
) -> Tensor:
    """BPR-max, sum of -log sum_k w_k sigma(s+ - s_k) + penalty sum_k w_k s_k^2.

    Section 3 of the paper, with its score regularisation. The logarithm is a difference of two
    log-sum-exps, which stays finite where every sigma is 0 in floating point (the authors' code adds 1e-24).

    Args:
        states: (N, d).
        table: (I + 1, d).
        targets: (N,) item ids in 1..I.
        negatives: (N, K) item ids, or (K,) shared by all positions.
        penalty: weight of the score regularisation (lambda of the paper; the authors tuned it to 0.9..1.95).

    Raises:
        ValueError: ``penalty`` is negative, or ``negatives`` has another shape.
    """
    if penalty < 0:
        raise ValueError(f"bpr_max needs penalty >= 0, got {penalty}.")
    positive, negative, hit = sampled_scores(states, table, targets, negatives)
    agree = F.logsigmoid(positive[:, None] - negative)  # (N, K)
    blocked = _block(negative, hit)
    loss = blocked.logsumexp(1) - _block(negative + agree, hit).logsumexp(1)  # (N,)
    weight = blocked.softmax(1).masked_fill(hit, 0)  # (N, K)
    return loss.sum() + penalty * (weight * negative.square()).sum()


def top1_max(states: Tensor, table: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
    """TOP1-max, sum of sum_k w_k (sigma(s_k - s+) + sigma(s_k^2)).

    Section 3 of the paper. sigma(s_k^2) is the regularisation: it is least, 1/2, where s_k is 0.

    Args:
        states, table, targets, negatives: as in ``bpr_max``.

    Raises:
        ValueError: ``negatives`` has another shape.
    """
    positive, negative, hit = sampled_scores(states, table, targets, negatives)
    weight = _block(negative, hit).softmax(1).masked_fill(hit, 0)  # (N, K)
    above = torch.sigmoid(negative - positive[:, None]) + torch.sigmoid(negative.square())
    return (weight * above).sum()
