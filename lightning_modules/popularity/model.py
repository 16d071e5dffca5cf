"""Counts of training events: over all time, and over the days before each target.

Legend: B rows, C items, I items in the catalogue, D days.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from datamodules.types import TRAIN, Histories

DAY = 86_400  # seconds


def popularity(histories: Histories) -> Tensor:
    """Training events of each item, (I + 1,) float64."""
    return torch.from_numpy(histories.train_counts()).double()


def dated_events(histories: Histories) -> tuple[np.ndarray, np.ndarray]:
    """Training events by day: (E,) int64 days since 1970, ascending, and (E,) int32 their items."""
    trained = histories.split == TRAIN
    days, items = histories.timestamps[trained] // DAY, histories.items[trained]
    order = np.argsort(days, kind="stable")
    return days[order], items[order]


def window_counts(
    days: np.ndarray, items: np.ndarray, end: np.ndarray, length: int, num_items: int
) -> Tensor:
    """Events of each item in the ``length`` whole days before each day of ``end`` (D,): (D, I + 1) int32."""
    first, stop = np.searchsorted(days, end - length), np.searchsorted(days, end)
    table = np.empty((len(end), num_items + 1), np.int32)
    for row, (a, b) in enumerate(zip(first, stop, strict=True)):
        table[row] = np.bincount(items[a:b], minlength=num_items + 1)
    return torch.from_numpy(table)
