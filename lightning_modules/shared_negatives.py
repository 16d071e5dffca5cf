"""Negatives that all positions of a step share: how likely each item is, and which are drawn.

Legend: I items, K negatives.
"""

from __future__ import annotations

import torch
from torch import Tensor


def log_probabilities(num_items: int, counts: Tensor | None = None, power: float = 0.0) -> Tensor:
    """(I + 1,) log q of one draw; -inf for padding.

    Args:
        num_items: I.
        counts: (I + 1,) training events of each item; one without any counts as one.
        power: q is in proportion to the counts to this power (0.75 in word2vec; Mikolov et al., 2013); 0 is
            uniform.
    """
    weights = torch.ones(num_items + 1, dtype=torch.float64)
    if power and counts is not None:
        weights = counts.clamp(min=1).double().pow(power)
    weights[0] = 0
    return (weights.log() - weights.sum().log()).float()


def draw_pool(count: int, seed: int, num_items: int, log_q: Tensor | None = None) -> Tensor:
    """(K,) item ids, independent of each other, by the seed alone.

    Args:
        count: K.
        seed: of the draws.
        num_items: I.
        log_q: (I + 1,) of ``log_probabilities``; None is uniform.
    """
    generator = torch.Generator().manual_seed(seed)
    if log_q is None:
        return torch.randint(1, num_items + 1, (count,), generator=generator)
    # By the inverse of the distribution function: torch.multinomial is slow, and ends at 2**24 items.
    rising = log_q.cpu().double().exp().cumsum(0)  # (I + 1,)
    drawn = torch.rand(count, generator=generator, dtype=torch.float64) * rising[-1]
    return torch.searchsorted(rising, drawn, right=True).clamp(1, num_items)
