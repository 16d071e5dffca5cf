"""NextItNet as a system: the network of ``model.py``, trained on the next item of every position.

Legend: B rows, T history length, N positions with a loss, d width, I items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from datamodules.types import Batch
from lightning_modules.next_item import NextItemModule, newest
from lightning_modules.nextitnet.model import NextItNet


class NextItNetModule(NextItemModule):
    """Convolutional recommendation (Yuan et al., WSDM 2019, arXiv 1808.05163).

    Args:
        num_items: items in the catalogue, given by the runner from the data.
        hidden_size, kernel_size, dilations, dropout, tied: of the network, see ``NextItNet``.
        max_length, options: of the training and the evaluation, see ``NextItemModule``.
    """

    reads_rows = True

    def __init__(
        self,
        num_items: int,
        max_length: int = 50,
        hidden_size: int = 64,
        kernel_size: int = 3,
        dilations: Sequence[int] = (1, 4, 1, 4),
        dropout: float = 0.2,
        tied: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(num_items, max_length, **options)
        self.network = NextItNet(num_items, hidden_size, kernel_size, dilations, dropout, tied)

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
