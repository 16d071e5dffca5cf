"""Learning rates over a run, as shares of their peak."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Schedule = Literal["constant", "cosine", "linear"]


def learning_rate_share(step: int, steps: int, rise: int, schedule: Schedule) -> float:
    """Share of the peak learning rate at a step.

    Args:
        step: steps taken so far.
        steps: of the whole run.
        rise: steps of the linear warm-up; the first step already has 1 / rise.
        schedule: what follows the warm-up: ``constant``, or ``cosine`` or ``linear`` down to 0 at ``steps``.
    """
    rise = max(1, rise)
    if step < rise:
        return (step + 1) / rise
    done = min(1.0, (step - rise) / max(1, steps - rise))
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if schedule == "linear" else 1.0


def scheduled(optimizer: Optimizer, share: Callable[[int], float]) -> dict[str, Any]:
    """What ``configure_optimizers`` returns for a learning rate that moves with every step."""
    scheduler = {"scheduler": LambdaLR(optimizer, share), "interval": "step"}
    return {"optimizer": optimizer, "lr_scheduler": scheduler}
