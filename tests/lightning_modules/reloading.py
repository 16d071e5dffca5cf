"""A checkpoint's way into another module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.types import Batch


def require_same_scores(first: Any, second: Any, batch: Batch, items: int, folder: Path) -> Tensor:
    """Load the first module's weights into the second: both must score 1..items (B, I) bit-equal."""
    first.eval()
    second.eval()
    torch.save({"state_dict": first.state_dict()}, folder / "best.ckpt")
    second.load_weights(folder / "best.ckpt")
    scores = [m.score(m.encode(batch), torch.arange(1, items + 1)) for m in (first, second)]
    assert torch.equal(*scores)
    found: Tensor = scores[0]
    return found
