"""The mean text of a history.

Legend: B rows, T history length, I items in the catalogue, d width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_ROUNDING = 1e-5  # a centred vector that is no longer is the mean itself, but for rounding


def centred(vectors: Tensor) -> Tensor:
    """Vectors (I + 1, d) less the mean of those with a text, rescaled to length 1; zero rows stay zero.

    Sentence vectors share a large common part, which makes any two texts alike (Mu & Viswanath, ICLR 2018,
    arXiv 1702.01417, whose removal of further directions is left out).
    """
    told = (vectors != 0).any(1, keepdim=True)  # (I + 1, 1)
    mean = vectors.sum(0) / told.sum().clamp(min=1)  # (d,)
    found = (vectors - mean) * told
    length = found.norm(dim=1, keepdim=True)  # (I + 1, 1)
    return torch.where(length > _ROUNDING, found / length.clamp(min=_ROUNDING), 0.0)


def mean_text(
    history: Tensor, length: Tensor, vectors: Tensor, told: Tensor, recency: float
) -> Tensor:
    """Weighted mean (B, d) of the history's text vectors; zero where no item of it has a text.

    An event t steps before the newest weighs ``recency ** t``; items without text and padding weigh nothing.

    Args:
        history: (B, T) item ids, oldest first, padded on the right with 0.
        length: (B,) real items.
        vectors: (I + 1, d), zero for padding and for items without text.
        told: (I + 1,) bool, items with a text.
        recency: in (0, 1]; 1 is the plain mean.
    """
    steps = length[:, None] - 1 - torch.arange(history.shape[1], device=history.device)  # (B, T)
    weights = (recency ** steps.clamp(min=0)) * told[history]  # (B, T)
    total = F.embedding_bag(history, vectors, mode="sum", per_sample_weights=weights.to(vectors))
    return total / weights.sum(1, keepdim=True).clamp(min=torch.finfo(vectors.dtype).tiny)
