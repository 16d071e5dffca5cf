"""Which losses there are, and which settings of theirs and of the optimizer cannot work."""

from __future__ import annotations

import math
from typing import Literal

Loss = Literal[
    "ce", "scalable_ce", "sampled_ce", "nce", "bce", "gbce", "bpr", "bpr_max", "top1_max"
]

# setting -> (smallest, largest, whether the smallest itself is allowed)
_RANGES = {
    "learning_rate": (0, math.inf, False), "table_learning_rate": (0, math.inf, False),
    "weight_decay": (0, math.inf, True), "warmup": (0, 1, True), "gbce_calibration": (0, 1, True),
    "bpr_max_penalty": (0, math.inf, True), "scalable_items": (1, math.inf, True),
    "popularity": (0, math.inf, True), "warmup_steps": (0, math.inf, True),
}  # fmt: skip


def refuse_settings(
    loss: Loss, label_smoothing: float, betas: tuple[float, float], **settings: float
) -> None:
    """Raise one ValueError that names every setting out of its range."""
    wrong = _out_of_range(betas, settings)
    if not 0 <= label_smoothing < 1:
        wrong.append(f"label_smoothing={label_smoothing} is not at least 0 and below 1")
    elif label_smoothing and loss != "ce":
        wrong.append(f"label_smoothing means nothing with loss={loss}: it is of loss=ce")
    if wrong:
        raise ValueError("; ".join(wrong))


def refuse_rates(betas: tuple[float, float], **settings: float) -> None:
    """The same of an optimizer's settings alone."""
    if wrong := _out_of_range(betas, settings):
        raise ValueError("; ".join(wrong))


def _out_of_range(betas: tuple[float, float], settings: dict[str, float]) -> list[str]:
    wrong = [
        f"{name}={value} is not {'at least' if closed else 'above'} {low}"
        + (f" and at most {high}" if high < math.inf else "")
        for name, value in settings.items()
        for low, high, closed in [_RANGES[name]]
        if not (low < value <= high or (closed and value == low))
    ]
    if not all(0 <= beta < 1 for beta in betas):
        wrong.append(f"betas={list(betas)} are not both at least 0 and below 1")
    return wrong
