"""GRU4Rec as a system: the network of ``model.py``, trained on the next item.

Legend: B rows, T history length, N positions with a loss, d width of items, I items.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from datamodules.types import Batch
from lightning_modules.gru4rec.model import GRU4Rec
from lightning_modules.next_item import NextItemModule, newest


class GRU4RecModule(NextItemModule):
    """Recurrent recommendation (Hidasi et al., ICLR 2016, arXiv 1511.06939).

    Rows are users' sequences and the default loss is the full softmax, which needs neither the paper's
    session-parallel batches nor negatives from the batch. ``loss=bpr_max`` and ``loss=top1_max`` are those
    of Hidasi & Karatzoglou (CIKM 2018, arXiv 1706.03847), with uniform negatives.

    Args:
        num_items: items in the catalogue, given by the runner from the data.
        embedding_size, hidden_size, num_layers, dropout, tied: of the network, see ``GRU4Rec``.
        max_length, options: of the training and the evaluation, see ``NextItemModule``.
    """

    reads_rows = True

    def __init__(
        self,
        num_items: int,
        max_length: int = 50,
        embedding_size: int = 64,
        hidden_size: int = 128,
        num_layers: int = 1,
        dropout: float = 0.3,
        tied: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(num_items, max_length, **options)
        self.network = GRU4Rec(num_items, embedding_size, hidden_size, num_layers, dropout, tied)

    def states(self, batch: Batch, where: Tensor) -> Tensor:
        """(N, d)."""
        states: Tensor = self.network(batch.history)[where]
        return states

    def user_vectors(self, batch: Batch) -> Tensor:
        """(B, d); zeros for an empty history, which ranks nothing above anything."""
        return newest(self.network(batch.history), batch.length)

    def item_vectors(self) -> Tensor:
        """(I + 1, d); an item that was never trained on keeps what the softmax pushed it to."""
        return self.network.item_vectors()
