"""EASE's item-item weights in closed form.

Steck, "Embarrassingly Shallow Autoencoders for Sparse Data" (WWW 2019, arXiv 1905.03375).

Legend: U users, I items.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from datamodules.samplers import event_keys
from datamodules.types import TRAIN, Histories

MAX_ITEMS = 23_170  # (I, I) float64 is 4 GiB, and the factor needs as much again


def co_occurrences(histories: Histories) -> Tensor:
    """How many users trained on both of two items, (I, I) float64: X^T X of the binary X (U, I)."""
    # A user who met an item several times counts once.
    user, item = np.divmod(event_keys(histories, TRAIN), histories.num_items + 1)
    places = torch.from_numpy(np.stack([user, item - 1]))
    ones = torch.ones(len(user), dtype=torch.float64)
    shape = (histories.num_users + 1, histories.num_items)
    matrix = torch.sparse_coo_tensor(places, ones, shape, is_coalesced=True, check_invariants=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse.mm(matrix.T, matrix).to_dense()


def ease_weights(counts: Tensor, l2: float) -> Tensor:
    """B (I, I) with a zero diagonal that minimises |X - X B|^2 + l2 |B|^2, equation 8.

    With P = (X^T X + l2 E)^-1 it is B_ij = -P_ij / P_jj off the diagonal.

    Args:
        counts: X^T X, (I, I) float64; overwritten.
        l2: above 0, which makes the table invertible.
    """
    counts.diagonal().add_(l2)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(counts))  # (I, I)
    weights = inverse / -inverse.diagonal()
    return weights.fill_diagonal_(0)
