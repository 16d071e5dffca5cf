"""GRU4Rec: a recurrent network over item ids, scored with its own item table.

Hidasi, Karatzoglou, Baltrunas and Tikk, "Session-based Recommendations with Recurrent Neural Networks"
(ICLR 2016, arXiv 1511.06939). Histories are padded on the right, and a GRU reads from left to right, so
no real position ever sees padding and nothing has to be packed.

Legend: B rows, T history length, I items, d width of items, H width of the GRU.
"""

from __future__ import annotations

import math

from torch import Tensor, nn


class GRU4Rec(nn.Module):
    """Hidden states whose dot product with ``item_vectors()`` scores the next item.

    Items are embedded, the output is projected to the items' width and by default the output table is the
    input's (the "constrained embedding" of Hidasi & Karatzoglou, CIKM 2018).

    Args:
        num_items: items 1..num_items; 0 is padding.
        embedding_size: width d of items.
        hidden_size: width H of the GRU.
        num_layers: stacked GRU layers.
        dropout: on the item vectors and between GRU layers.
        tied: score with the input's item table; False: with a table of its own.

    Raises:
        ValueError: a size below 1; every one is named.
    """

    def __init__(
        self,
        num_items: int,
        embedding_size: int = 64,
        hidden_size: int = 128,
        num_layers: int = 1,
        dropout: float = 0.3,
        tied: bool = True,
    ) -> None:
        super().__init__()
        sizes = {
            "num_items": num_items, "embedding_size": embedding_size,
            "hidden_size": hidden_size, "num_layers": num_layers,
        }  # fmt: skip
        wrong = [f"{name}={value}" for name, value in sizes.items() if value < 1]
        if wrong:
            raise ValueError(f"GRU4Rec needs sizes of at least 1, got {', '.join(wrong)}.")
        # A large table starts near zero, which suits its scores but leaves a GRU without input.
        self.input_scale = math.sqrt(embedding_size)
        self.item_embedding = nn.Embedding(num_items + 1, embedding_size, padding_idx=0)
        self.dropout = nn.Dropout(dropout)
        between = dropout if num_layers > 1 else 0.0  # torch warns where there is no such place
        self.gru = nn.GRU(
            embedding_size, hidden_size, num_layers, batch_first=True, dropout=between
        )
        self.output = nn.Linear(hidden_size, embedding_size)
        own = None if tied else nn.Embedding(num_items + 1, embedding_size, padding_idx=0)
        self.output_embedding = own
        self._initialise()

    def _initialise(self) -> None:
        """Xavier for every matrix, as in RecBole; zero biases and zero padding rows."""
        for parameter in self.parameters():
            if parameter.dim() < 2:
                nn.init.zeros_(parameter)
            else:
                nn.init.xavier_uniform_(parameter)
        nn.init.zeros_(self.item_embedding.weight[0])
        if self.output_embedding is not None:
            nn.init.zeros_(self.output_embedding.weight[0])

    def forward(self, history: Tensor) -> Tensor:
        """States (B, T, d) after each item of ``history`` (B, T); meaningless at padding."""
        items = self.item_embedding(history) * self.input_scale  # (B, T, d)
        hidden, _ = self.gru(self.dropout(items))  # (B, T, H)
        states: Tensor = self.output(hidden)
        return states

    def item_vectors(self) -> Tensor:
        """The item table (I + 1, d) that scores; row 0 is padding and stays zero."""
        return (self.output_embedding or self.item_embedding).weight
