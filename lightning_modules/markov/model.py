"""First-order transitions between consecutive training events.

Legend: N events, B rows, I items.
"""

from __future__ import annotations

import numpy as np

from datamodules.types import TRAIN, Histories


def transitions(histories: Histories) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How often each item followed each other one, as CSR over the earlier item.

    Both events must be training events of one user, the second right after the first.

    Returns:
        offsets (I + 2,) int64, next items (P,) int64, counts (P,) int64.
    """
    users, trained = histories.users, histories.split == TRAIN
    pair = (users[1:] == users[:-1]) & trained[1:] & trained[:-1]  # (N - 1,)
    width = np.int64(histories.num_items + 1)
    keys = histories.items[:-1][pair].astype(np.int64) * width + histories.items[1:][pair]
    unique, counts = np.unique(keys, return_counts=True)
    rows = np.bincount(unique // width, minlength=int(width))  # (I + 1,)
    return np.concatenate([[0], np.cumsum(rows)]), unique % width, counts
