"""CTRL's networks: histories as ids and as texts, compared in several sub-spaces.

Legend: B rows, G rows of a group, M sub-spaces; widths: d of collaborative vectors, t of texts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Alignment(nn.Module):
    """Both sides of a history in M sub-spaces (CTRL, Li et al., arXiv 2306.02841).

    Args:
        size: d.
        text_size: t.
        subspaces: M.
    """

    def __init__(self, size: int, text_size: int, subspaces: int) -> None:
        super().__init__()
        self.subspaces = subspaces
        self.collaborative, self.text = nn.Linear(size, size), nn.Linear(text_size, size)
        self.collaborative_parts = nn.Linear(size, subspaces * size)
        self.text_parts = nn.Linear(size, subspaces * size)

    def forward(self, collaborative: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M, d) of both sides, of collaborative vectors (B, d) and texts (B, t)."""
        parts = (
            self.collaborative_parts(self.collaborative(collaborative)),
            self.text_parts(self.text(text)),
        )
        first, second = (part.unflatten(1, (self.subspaces, -1)) for part in parts)
        return first, second


def similarities(a: Tensor, b: Tensor) -> Tensor:
    """sim(a_i, b_j) = sum_m max_m' <a_im, b_jm'>: (G, G) of sub-space vectors (G, M, d) each."""
    products = torch.einsum("imd,jnd->ijmn", a, b)  # (G, G, M, M)
    return products.amax(3).sum(2)


def contrast(a: Tensor, b: Tensor, group_size: int) -> Tensor:
    """Binary cross-entropy of "these are two sides of one row", in both directions; summed over rows.

    Rows are compared within consecutive groups, in which a row's loss is the mean over the group's pairs.

    Args:
        a, b: (B, M, d) the two sides.
        group_size: G; the last group may be smaller.
    """
    total = a.new_zeros(())
    for ours, theirs in zip(a.split(group_size), b.split(group_size), strict=True):
        label = torch.eye(len(ours), device=a.device, dtype=a.dtype)
        for logits in (similarities(ours, theirs), similarities(theirs, ours)):
            pairs = F.binary_cross_entropy_with_logits(logits, label, reduction="none")
            total = total + pairs.mean(1).sum() / 2
    return total
