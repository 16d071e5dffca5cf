"""Cut a batch into groups of rows of about the same length, so that little padding is computed."""

from __future__ import annotations

import numpy as np
from torch import Tensor

# Padded cells that a group of its own must spare, or its smaller operations cost more than it gains.
LEAST_ON_CPU, LEAST_ELSEWHERE = 1_024, 65_536


def length_groups(
    length: Tensor, width: int, least: int | None = None
) -> list[tuple[int, int, int]]:
    """Consecutive rows as (first row, one past the last, their longest length), for every row of a batch.

    A group ends where the rows that follow are at most half as long as its longest, if that spares
    ``least`` cells. Where rows are sorted, longest first, less than half of the cells are then padding,
    whatever the lengths.

    Args:
        length: (B,) real positions of each row.
        width: T of the batch, at least as large as any length.
        least: padded cells worth a group; None takes what was measured for the device.
    """
    if least is None:
        least = LEAST_ON_CPU if length.device.type == "cpu" else LEAST_ELSEWHERE
    rows = len(length)
    lengths = length.cpu().numpy()
    longest = np.maximum.accumulate(lengths[::-1])[
        ::-1
    ]  # (B,) of this row and of those that follow
    groups, start = [], 0
    while start < rows:
        width = min(width, max(1, int(longest[start])))
        half = width // 2
        stop = start + int(np.searchsorted(-longest[start:], -half)) if half else rows
        if stop < rows and (rows - stop) * (width - int(longest[stop])) < least:
            stop = rows
        groups.append((start, stop, width))
        start = stop
    return groups
