"""SASRec as a system: the network of ``model.py``, trained on the next item.

Legend: B rows, T history length, N positions with a loss, d width, I items.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from datamodules.types import Batch
from lightning_modules.next_item import NextItemModule
from lightning_modules.sasrec.model import Activation, Initialisation, Norm, Positions, SASRec


class SASRecModule(NextItemModule):
    """Self-attentive sequential recommendation (Kang & McAuley, ICDM 2018, arXiv 1808.09781).

    Args:
        num_items: items in the catalogue, given by the runner from the data.
        max_length, hidden_size, num_blocks, num_heads, dropout, attention_dropout, residual_dropout, norm,
            positions, ffn_multiplier, activation, scale_embedding, final_norm, norm_eps, initialisation,
            init_std, tied: of the network, see ``SASRec``.
        options: of the training and the evaluation, see ``NextItemModule``.
    """

    reads_rows = True

    def __init__(
        self,
        num_items: int,
        max_length: int = 50,
        hidden_size: int = 50,
        num_blocks: int = 2,
        num_heads: int = 1,
        dropout: float = 0.2,
        attention_dropout: float | None = None,
        residual_dropout: float | None = None,
        norm: Norm = "pre",
        positions: Positions = "learned",
        ffn_multiplier: float = 1.0,
        activation: Activation = "relu",
        scale_embedding: bool = True,
        final_norm: bool = True,
        norm_eps: float = 1e-8,
        initialisation: Initialisation = "xavier",
        init_std: float = 0.02,
        tied: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(num_items, max_length, **options)
        self.network = SASRec(
            num_items, max_length, hidden_size, num_blocks, num_heads, dropout, attention_dropout,
            residual_dropout, norm, positions, ffn_multiplier, activation, scale_embedding, final_norm,
            norm_eps, initialisation, init_std, tied,
        )  # fmt: skip

    def states(self, batch: Batch, where: Tensor) -> Tensor:
        """(N, d)."""
        packed, layout = self.network.packed(batch.history, batch.length)
        return packed[layout.pack(where)]

    def user_vectors(self, batch: Batch) -> Tensor:
        """(B, d); zeros for an empty history, which ranks nothing above anything."""
        return self.network.last(batch.history, batch.length)

    def item_vectors(self) -> Tensor:
        """(I + 1, d)."""
        return self.network.item_vectors()
