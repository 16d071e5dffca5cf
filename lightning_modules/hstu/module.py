"""HSTU as a system: the network of ``model.py``, trained on the next item, with the times of events.

Legend: B rows, T history length, N positions with a loss, d width, I items.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from datamodules.types import Batch, Collator, Histories
from lightning_modules.hstu.model import HSTU
from lightning_modules.id_batches import HistoryCollator, TrainCollator
from lightning_modules.next_item import NextItemModule


class HSTUModule(NextItemModule):
    """Hierarchical sequential transduction units (Zhai et al., ICML 2024, arXiv 2402.17152).

    Times: a position sees the times of events up to its own, in training and in evaluation, so the newest
    event's time is the query's. The released code gives the query the time of the NEXT event, the target: its
    published numbers (NDCG@10 0.19 to 0.22 on MovieLens-1M) are told when the target happens, and are not
    comparable with rows that are not. That is not offered here.

    The released code trains ``loss=sampled_ce`` with 128 negatives; the default is the loss over the whole
    catalogue that samples estimate.

    Args:
        num_items: items in the catalogue, given by the runner from the data.
        max_length, hidden_size, num_blocks, num_heads, dropout, attention_dropout, num_time_buckets,
            temperature, tied: of the network, see ``HSTU``.
        time_bias: bias attention by the time between events; false where the data has no times.
        options: of the training and the evaluation, see ``NextItemModule``.
    """

    def __init__(
        self,
        num_items: int,
        max_length: int = 50,
        hidden_size: int = 64,
        num_blocks: int = 2,
        num_heads: int = 1,
        dropout: float = 0.2,
        attention_dropout: float = 0.0,
        time_bias: bool = True,
        num_time_buckets: int = 128,
        temperature: float | None = 0.05,
        tied: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(num_items, max_length, **options)
        self.reads_rows = temperature is None  # cosine scores normalise the whole table
        self.time_bias = time_bias
        self.network = HSTU(
            num_items, max_length, hidden_size, num_blocks, num_heads, dropout, attention_dropout,
            time_bias, num_time_buckets, temperature, tied,
        )  # fmt: skip

    def impossible(self, histories: Histories) -> str | None:
        """A time bias needs times."""
        timeless = self.time_bias and not histories.timestamps.any()
        return (
            "it has time_bias=true, but the data has no times: set time_bias=false"
            if timeless
            else None
        )

    def collator(self, training: bool) -> Collator:
        """Id batches, with times where they are read."""
        kind = TrainCollator if training else HistoryCollator
        return kind(self.max_length, times=self.time_bias)

    def states(self, batch: Batch, where: Tensor) -> Tensor:
        """(N, d)."""
        packed, layout = self.network.packed(batch.history, batch.length, batch.times)
        return packed[layout.pack(where)]

    def user_vectors(self, batch: Batch) -> Tensor:
        """(B, d); zeros for an empty history, which ranks nothing above anything."""
        return self.network.last(batch.history, batch.length, batch.times)

    def item_vectors(self) -> Tensor:
        """(I + 1, d)."""
        return self.network.item_vectors()
