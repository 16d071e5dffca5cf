"""First-order Markov chain: what followed the newest item most often.

Legend: B rows, C items, I items in the catalogue.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from datamodules.types import Batch
from lightning_modules.base import UntrainedModule
from lightning_modules.markov.model import transitions
from lightning_modules.popularity.model import popularity


class MarkovModule(UntrainedModule):
    """Times that the item followed the row's newest one in training.

    Args:
        backoff: order items that never followed it by popularity, below all that did.
    """

    prior: Tensor

    def __init__(self, backoff: bool = True) -> None:
        super().__init__(max_length=1)
        self.backoff = backoff
        self.offsets = self.next_items = self.counts = np.empty(0, np.int64)

    def setup(self, stage: str) -> None:
        """Count transitions, and popularity for the items that have none."""
        self.offsets, self.next_items, self.counts = transitions(self.histories)
        counts = popularity(self.histories)  # (I + 1,)
        prior = counts / (counts.max() + 1) if self.backoff else torch.zeros_like(counts)
        self.register_buffer("prior", prior.to(self.device), persistent=False)

    def encode(self, batch: Batch) -> Tensor:
        """Scores of the whole catalogue, (B, I + 1) float64; an empty history has popularity alone."""
        newest = batch.history[:, 0].cpu().numpy()  # (B,); 0 = no history, which nothing follows
        start, stop = self.offsets[newest], self.offsets[newest + 1]
        row = np.repeat(np.arange(len(newest)), stop - start)
        within = np.arange(len(row)) - np.repeat(
            np.cumsum(stop - start) - (stop - start), stop - start
        )
        pair = start[row] + within
        scores = self.prior.expand(len(newest), -1).clone()
        where = (torch.from_numpy(row), torch.from_numpy(self.next_items[pair]))
        scores[where] += torch.from_numpy(self.counts[pair]).to(scores)
        return scores

    def score(self, state: Tensor, items: Tensor) -> Tensor:
        """Scores (B, C)."""
        return state[:, items] if items.ndim == 1 else state.gather(1, items)
