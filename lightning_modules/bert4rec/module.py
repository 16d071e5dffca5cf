"""BERT4Rec as a system: the network of ``model.py``, trained to fill in hidden items.

Legend: B rows, T window length, N positions with a loss, d width, I items.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from datamodules.types import Batch, Collator
from lightning_modules.bert4rec.collators import ClozeCollator
from lightning_modules.bert4rec.model import BERT4Rec, Norm
from lightning_modules.id_batches import HistoryCollator
from lightning_modules.next_item import NextItemModule


class BERT4RecModule(NextItemModule):
    """Cloze training of a bidirectional transformer (Sun et al., CIKM 2019, arXiv 1904.06690).

    An epoch asks for only about ``mask_probability`` of all events, so BERT4Rec needs many times the epochs
    of a next-item model; trained too little it looks worse than SASRec (Petrov & Macdonald, "A Systematic
    Review and Replicability Study of BERT4Rec", RecSys 2022, arXiv 2207.07483).

    Any training event of a window can be asked for, the user's first one, too. What the window reads is at
    most its own newest training event: nothing held out is ever in it.

    Args:
        num_items: items in the catalogue, given by the runner from the data.
        mask_probability: share of a window's training events that are hidden (paper: 0.2 on MovieLens,
            0.6 on Amazon Beauty).
        last_only: share of windows that hide their newest training event alone, as evaluation does
            (released code: one window in eleven).
        moved: share of users, anew each epoch, whose windows end at a random earlier event (the released
            code has windows that overlap); otherwise every epoch cuts a history at the same places.
        max_length: positions of a window. In evaluation one of them is the [MASK] of the next item.
        hidden_size, num_blocks, num_heads, dropout, attention_dropout, norm, ffn_multiplier:
            of the network, see ``BERT4Rec``.
        options: of the training and the evaluation, see ``NextItemModule``.

    Raises:
        ValueError: a probability out of range.
    """

    sequential = False  # a hidden first event can be told from what follows it
    causal = False

    def __init__(
        self,
        num_items: int,
        mask_probability: float = 0.2,
        last_only: float = 0.1,
        moved: float = 0.0,
        max_length: int = 50,
        hidden_size: int = 64,
        num_blocks: int = 2,
        num_heads: int = 2,
        dropout: float = 0.1,
        attention_dropout: float | None = None,
        norm: Norm = "post",
        ffn_multiplier: float = 4.0,
        **options: Any,
    ) -> None:
        super().__init__(num_items, max_length, **options)
        if not 0 < mask_probability <= 1 or not 0 <= last_only <= 1 or not 0 <= moved <= 1:
            raise ValueError(
                "BERT4Rec needs 0 < mask_probability <= 1 and last_only and moved within 0..1, got "
                f"mask_probability={mask_probability}, last_only={last_only}, moved={moved}."
            )
        self.mask_probability, self.last_only, self.moved = mask_probability, last_only, moved
        self.network = BERT4Rec(
            num_items, max_length, hidden_size, num_blocks, num_heads, dropout, attention_dropout,
            norm, ffn_multiplier,
        )  # fmt: skip

    def collator(self, training: bool) -> Collator:
        """Windows with hidden events; in evaluation plain histories with room for one [MASK]."""
        if training:
            return ClozeCollator(self.max_length, self.mask_probability, self.last_only, self.moved)
        return HistoryCollator(self.max_length - 1)

    def states(self, batch: Batch, where: Tensor) -> Tensor:
        """Outputs (N, d + 1) at the hidden positions."""
        packed, layout = self.network.packed(batch.history, batch.length)
        return self.network.output(packed[layout.pack(where)])

    def user_vectors(self, batch: Batch) -> Tensor:
        """(B, d + 1); a row with an empty history gets what a lone [MASK] says."""
        return self.network.next(batch.history, batch.length)

    def item_vectors(self) -> Tensor:
        """(I + 1, d + 1): the last column holds the biases."""
        return self.network.item_vectors()
