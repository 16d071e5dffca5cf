"""Rows without a model: chance, popularity, and popularity of late.

Legend: B rows, C items.
"""

from __future__ import annotations

import torch
from torch import Tensor

from datamodules.types import Batch
from lightning_modules.base import UntrainedModule
from lightning_modules.popularity.model import DAY, daily_counts, popularity


class RandomModule(UntrainedModule):
    """Equal scores for all: tie handling turns them into the exact expectation of random guessing."""

    def encode(self, batch: Batch) -> Tensor:
        """Zeros (B,)."""
        return torch.zeros(len(batch), device=self.device)

    def score(self, state: Tensor, items: Tensor) -> Tensor:
        """Zeros (B, C)."""
        return state[:, None].expand(-1, items.shape[-1])


class PopularityModule(UntrainedModule):
    """Training events of the item, the same for every user."""

    counts: Tensor

    def setup(self, stage: str) -> None:
        """Count."""
        self.register_buffer("counts", popularity(self.histories).to(self.device), persistent=False)

    def encode(self, batch: Batch) -> int:
        """The number of rows."""
        return len(batch)

    def score(self, state: int, items: Tensor) -> Tensor:
        """Counts (B, C) float64."""
        return self.counts[items].expand(state, -1)


class RecentPopularityModule(UntrainedModule):
    """Training events of the item in the whole days before the row's newest history event.

    Time-aware (no event later than the history is counted) and the strongest simple row where taste
    drifts; see Ji et al., "A Critical Study on Data Leakage in Recommender Systems", TOIS 2023.

    Args:
        days: length of the period.
    """

    totals: Tensor

    def __init__(self, days: int = 30) -> None:
        super().__init__()
        if days < 1:
            raise ValueError(f"days must be at least 1, got {days}")
        self.days = days
        self.first_day = 0

    def setup(self, stage: str) -> None:
        """Count by day."""
        self.first_day, totals = daily_counts(self.histories)
        self.register_buffer("totals", totals.to(self.device), persistent=False)  # (D + 1, I + 1)

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B,) rows of ``totals`` at the end and at the start of each row's period."""
        assert batch.time is not None
        end = torch.div(batch.time, DAY, rounding_mode="floor") - self.first_day
        return end, (end - self.days).clamp(min=0)

    def score(self, state: tuple[Tensor, Tensor], items: Tensor) -> Tensor:
        """Counts (B, C) float64."""
        end, start = (s[:, None] for s in state)
        return (self.totals[end, items] - self.totals[start, items]).double()


class LikedFractionModule(UntrainedModule):
    """The share of likes in the row's history, the same for every item: needs no training at all.

    TALLRec's 256-shot AUC on its films is below it. A row without history gets 0.5.

    Args:
        max_length: newest events of a history that are looked at.
    """

    def __init__(self, max_length: int = 10) -> None:
        super().__init__(max_length)

    def encode(self, batch: Batch) -> Tensor:
        """Shares (B,) float64.

        Raises:
            ValueError: the rows do not say what was liked.
        """
        if batch.liked is None:
            raise ValueError(
                "LikedFractionModule needs labelled rows: give data.examples a recipe with liked_above, "
                "for instance datamodules.examples.RatedTargets."
            )
        likes = batch.liked.sum(1).double()  # (B,)
        return torch.where(batch.length > 0, likes / batch.length.clamp(min=1), 0.5)

    def score(self, state: Tensor, items: Tensor) -> Tensor:
        """Shares (B, C)."""
        return state[:, None].expand(-1, items.shape[-1])
