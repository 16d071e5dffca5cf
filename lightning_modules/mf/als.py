"""Implicit alternating least squares: every vector is the solution of a small ridge regression.

Hu, Koren & Volinsky, "Collaborative Filtering for Implicit Feedback Datasets" (ICDM 2008), in the form of
Rendle et al., "Revisiting the Performance of iALS on Item Recommendation Benchmarks" (RecSys 2022,
arXiv 2110.14037). Over the observed pairs S and all pairs it minimises

    sum_S (1 - <w_u, h_i>)^2 + alpha sum_{u,i} <w_u, h_i>^2
        + l2 (sum_u (|S_u| + alpha I)^nu |w_u|^2 + sum_i (|S_i| + alpha U)^nu |h_i|^2)

where S_u are the items of user u. With the item vectors fixed, each user's minimum is that of ``ridge``.

Legend: R rows (users or items), T length of the longest row, d width, U users, I items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.samplers import distinct
from datamodules.types import TRAIN, Histories

_CHUNK_CELLS = 2**22  # numbers in one chunk of gathered vectors or of matrices: 16 MiB in float32


@dataclass(frozen=True)
class Regularisation:
    """Weights of the objective above.

    alpha: weight of every pair, observed or not, as a negative.
    l2: regularisation.
    nu: how it grows with a row's number of pairs: 0 not at all, 1 as in a mean over pairs.
    """

    alpha: float
    l2: float
    nu: float

    def scale(self, counts: Tensor, others: int) -> Tensor:
        """Rows' own ridge, (R,): l2 (counts + alpha others)^nu."""
        return self.l2 * (counts + self.alpha * others) ** self.nu


def ridge(table: Tensor, gram: Tensor, rows: Tensor, real: Tensor, by: Regularisation) -> Tensor:
    """Best vectors (R, d) of rows that are sets of entries of ``table``.

    w = (sum_{i in S} h_i h_i^T + alpha H^T H + l2 (|S| + alpha I)^nu E)^-1 sum_{i in S} h_i.
    A row without entries gets zeros.

    Args:
        table: H (I + 1, d); row 0 is padding and does not count in I.
        gram: H^T H (d, d).
        rows: (R, T) entries of the table.
        real: (R, T) which of them count.
    """
    width, out = table.shape[1], []
    step = max(1, _CHUNK_CELLS // (width * max(rows.shape[1], width)))
    for part, kept in zip(rows.split(step), real.split(step), strict=True):
        vectors = F.embedding(part, table) * kept[..., None]  # (r, T, d)
        scale = by.scale(kept.sum(1).to(table), len(table) - 1)  # (r,)
        system = vectors.mT @ vectors + by.alpha * gram  # (r, d, d)
        system.diagonal(dim1=1, dim2=2).add_(scale[:, None])
        factor = torch.linalg.cholesky(system)
        out.append(torch.cholesky_solve(vectors.sum(1)[..., None], factor)[..., 0])
    return torch.cat(out) if out else table.new_zeros(0, width)


@dataclass(frozen=True)
class Sets:
    """Distinct partners of each row in the training events, as CSR arrays; row 0 is padding and empty."""

    offsets: np.ndarray  # (R + 2,) int64
    partners: np.ndarray  # (N,) int64

    @classmethod
    def of(cls, rows: np.ndarray, partners: np.ndarray, count: int) -> Sets:
        """The partners of rows 1..count; pairs may repeat."""
        width = np.int64(partners.max(initial=0) + 1)
        keys = distinct(rows.astype(np.int64) * width + partners)
        lengths = np.bincount(keys // width, minlength=count + 1)
        return cls(np.concatenate([[0], np.cumsum(lengths)]), keys % width)

    def solve(self, table: Tensor, by: Regularisation) -> Tensor:
        """``ridge`` of every row, (R + 1, d); rows of like length share a batch, so little is padded."""
        gram = table.T @ table
        lengths = np.diff(self.offsets)  # (R + 1,)
        solved = table.new_zeros(len(lengths), table.shape[1])
        order = np.argsort(lengths, kind="stable")
        order = order[lengths[order] > 0]
        while len(order):
            # Rows up to twice as long as the shortest that is left.
            size = int(np.searchsorted(lengths[order], 2 * lengths[order[0]], side="right"))
            rows, order = order[:size], order[size:]
            columns = np.arange(lengths[rows[-1]])
            real = columns < lengths[rows, None]  # (r, T)
            index = np.where(real, self.offsets[rows, None] + columns, 0)
            entries = torch.from_numpy(np.where(real, self.partners[index], 0))
            where = torch.from_numpy(rows)
            solved[where] = ridge(table, gram, entries, torch.from_numpy(real), by)
        return solved


def training_sets(histories: Histories) -> tuple[Sets, Sets]:
    """The items of each user, and the users of each item, in the training events."""
    trained = histories.split == TRAIN
    users, items = histories.users[trained], histories.items[trained]
    return (
        Sets.of(users, items, histories.num_users),
        Sets.of(items, users, histories.num_items),
    )
