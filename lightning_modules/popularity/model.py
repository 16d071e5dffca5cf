"""Counts of training events: over all time, and over the days before each target.

Legend: B rows, C items, I items in the catalogue, D days.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from datamodules.types import TRAIN, Histories

DAY = 86_400  # seconds
_MAX_CELLS = 2**28  # (days x items) counts of 4 bytes: 1 GiB


def popularity(histories: Histories) -> Tensor:
    """Training events of each item, (I + 1,) float64."""
    return torch.from_numpy(histories.train_counts()).double()


def daily_counts(histories: Histories) -> tuple[int, Tensor]:
    """Running totals of training events by day.

    Returns:
        The first day (days since 1970), and (D + 1, I + 1) int32: row d counts the events of all days
        before day ``first + d``.

    Raises:
        ValueError: there are no times, or the table would not fit into a GiB.
    """
    days = histories.timestamps // DAY  # (N,)
    if not histories.timestamps.any():
        raise ValueError(
            "recent popularity needs times, and this data set has none: leave the row out with "
            "stages.reference.modules.recent_popularity=null"
        )
    trained = histories.split == TRAIN
    first, span = int(days.min()), int(days.max() - days.min()) + 2
    if span * (histories.num_items + 1) > _MAX_CELLS:
        raise ValueError(
            f"{span} days x {histories.num_items} items do not fit into 1 GiB of counts"
        )
    counts = np.zeros((span, histories.num_items + 1), np.int32)  # (D + 1, I + 1)
    np.add.at(counts, (days[trained] - first + 1, histories.items[trained]), 1)
    return first, torch.from_numpy(np.cumsum(counts, axis=0, dtype=np.int32))
