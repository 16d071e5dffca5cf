"""Rows without a model: chance, popularity, and popularity of late.

Legend: B rows, C items, D days, I items in the catalogue.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from datamodules.types import Batch, Histories
from lightning_modules.base import UntrainedModule
from lightning_modules.popularity.model import DAY, dated_events, popularity, window_counts


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

    def __init__(self, days: int = 30) -> None:
        super().__init__()
        if days < 1:
            raise ValueError(f"days must be at least 1, got {days}")
        self.days = days
        self.event_days, self.event_items = np.empty(0, np.int64), np.empty(0, np.int32)

    def impossible(self, histories: Histories) -> str | None:
        """Times are needed."""
        return None if histories.timestamps.any() else "the data has no times"

    def setup(self, stage: str) -> None:
        """Put the events in the order of their days."""
        self.event_days, self.event_items = dated_events(self.histories)

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Rows (B,) of a table, and the table (D, I + 1) of counts for the D different days of the batch."""
        assert batch.time is not None
        end, row = np.unique(batch.time.cpu().numpy() // DAY, return_inverse=True)
        table = window_counts(
            self.event_days, self.event_items, end, self.days, self.histories.num_items
        )
        return torch.from_numpy(row).to(self.device), table.to(self.device)

    def score(self, state: tuple[Tensor, Tensor], items: Tensor) -> Tensor:
        """Counts (B, C) float64."""
        row, table = state
        return table[row[:, None], items].double()


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
