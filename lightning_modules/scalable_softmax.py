"""Softmax over the items that matter: the loss for catalogues too large for a full one.

Legend: N positions, d width, I items (ids 1..I), M buckets, P positions of a bucket, C items of a bucket.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_SCORES = 2**22  # bucket-to-item scores at a time: 16 MiB in float32


def scalable_softmax(
    states: Tensor,
    table: Tensor,
    targets: Tensor,
    *,
    buckets: int | None = None,
    positions: int | None = None,
    items: int = 256,
) -> Tensor:
    """Cross-entropy of the hardest positions against their hardest items: N times the mean of those covered.

    Mezentsev et al., "Scalable Cross-Entropy Loss for Sequential Recommendations with Large Item Catalogs",
    RecSys 2024 (arXiv 2409.18721), with their mixing: M random combinations of the states are bucket centres;
    each takes the P positions and the C items that agree with it most, and within a bucket every position
    has a softmax over its target and the C items. A position in several buckets counts with its largest
    loss, one in none with nothing. Scores are N x M + M x I + M x P x C instead of N x I; with all items in
    every bucket it is the full softmax over the positions covered.

    Draws from torch's global generator. Buckets are made of the positions of one device.

    Args:
        states: (N, d).
        table: (I + 1, d); row 0 is padding and never taken.
        targets: (N,) item ids in 1..I.
        buckets: M; None takes 2 sqrt(N).
        positions: P; None takes 2 sqrt(N), so that a position is in four buckets on average.
        items: C.

    Raises:
        ValueError: a size below 1.
    """
    count = len(states)
    if count == 0:
        return states.sum() + table.sum() * 0
    root = max(1, round(2 * math.sqrt(count)))
    buckets, positions = (root if size is None else size for size in (buckets, positions))
    if min(buckets, positions, items) < 1:
        raise ValueError(
            f"scalable_softmax needs sizes of at least 1, got buckets={buckets}, "
            f"positions={positions}, items={items}."
        )
    sizes = (buckets, min(positions, count), min(items, len(table) - 1))
    taken, near = _buckets(states.detach(), table.detach(), *sizes)  # (M, P), (M, C)
    wide = states.float() if states.dtype in (torch.float16, torch.bfloat16) else states
    own = (wide * F.embedding(targets, table)).sum(-1)  # (N,)
    scores = wide[taken] @ F.embedding(near, table).to(wide).transpose(1, 2)  # (M, P, C)
    scores = scores.masked_fill(targets[taken][:, :, None] == near[:, None, :], -torch.inf)
    positive = own[taken]  # (M, P)
    loss = torch.cat([scores, positive[:, :, None]], dim=2).logsumexp(2) - positive  # (M, P)
    worst = torch.full_like(own, -torch.inf)
    worst = worst.scatter_reduce(0, taken.flatten(), loss.flatten(), "amax")  # (N,)
    covered = worst > -torch.inf
    return worst[covered].sum() * (count / covered.sum())


@torch.no_grad()
def _buckets(
    states: Tensor, table: Tensor, buckets: int, positions: int, items: int
) -> tuple[Tensor, Tensor]:
    """The positions (M, P) and item ids (M, C) nearest to M random mixtures of the states."""
    mix = torch.randn(buckets, len(states), dtype=states.dtype, device=states.device)
    centres = mix @ states  # (M, d)
    taken = (centres @ states.T).topk(positions, dim=1).indices  # (M, P)
    step = max(1, _SCORES // len(table))
    near = [
        (part @ table[1:].to(part).T).topk(items, dim=1).indices + 1 for part in centres.split(step)
    ]
    return taken, torch.cat(near)
