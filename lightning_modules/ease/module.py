"""EASE as a row of a test: nothing is trained, everything is solved for in ``setup``.

Legend: B rows, T history length, C items, I items in the catalogue.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from datamodules.types import Batch, Histories
from lightning_modules.base import UntrainedModule
from lightning_modules.ease.model import MAX_ITEMS, co_occurrences, ease_weights
from lightning_modules.user_item import WHOLE_HISTORY, first_meetings


class EASEModule(UntrainedModule):
    """Linear autoencoder of histories (Steck, WWW 2019, arXiv 1905.03375).

    Item j's score is the sum of B_ij over the distinct items i of the row's whole history, held-out events
    before the target included. There is no user table, so users without a training event are scored
    like all others. An empty history, or one of items that nobody trained on, scores every item 0.
    An item without a training event always has score 0.

    Args:
        l2: regularisation, in users: the more, the fewer users two items have in common on average.

    Raises:
        ValueError: ``l2`` is not positive.
    """

    weights: Tensor

    def __init__(self, l2: float = 500.0) -> None:
        super().__init__(max_length=WHOLE_HISTORY)
        if l2 <= 0:
            raise ValueError(f"l2 must be above 0, got {l2}")
        self.l2 = l2

    def impossible(self, histories: Histories) -> str | None:
        """Too many items."""
        if histories.num_items <= MAX_ITEMS:
            return None
        return (
            f"it inverts a table of items x items, and {histories.num_items:,} items do not fit into 4 GiB; "
            f"filter the data to at most {MAX_ITEMS:,}"
        )

    def setup(self, stage: str) -> None:
        """Solve for B on the training events; (I + 1, I + 1) float32 with zeros for padding."""
        solved = ease_weights(co_occurrences(self.histories), self.l2).float()  # (I, I)
        weights = F.pad(solved, (1, 0, 1, 0)).to(self.device)
        self.register_buffer("weights", weights, persistent=False)

    def encode(self, batch: Batch) -> Tensor:
        """Scores of the whole catalogue, (B, I + 1)."""
        items, first = first_meetings(batch.history)  # (B, T) each
        return F.embedding_bag(
            items, self.weights, mode="sum", per_sample_weights=first.to(self.weights)
        )

    def score(self, state: Tensor, items: Tensor) -> Tensor:
        """Scores (B, C)."""
        return state[:, items] if items.ndim == 1 else state.gather(1, items)
