"""Items that are known by their texts alone.

Legend: I items, D distinct items, t width of the text encoder, d width of the sequence model.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.llm.text_encoder import ItemTextEncoder

Activation = Literal["gelu", "none"]


class TextItems(nn.Module):
    """Item vectors made of texts, to be used like the ``nn.Embedding`` of a network's ids.

    An item's vector is ``GELU(W x + b)`` of its text's vector x (Yuan et al., SIGIR 2023, arXiv
    2303.13835), or ``W x + b``. An item without a text has x = 0: all such items share the vector ``GELU(b)``
    or ``b``, which is trained, so that they are scored like any other and tie. Padding is zero.

    Args:
        encoder: of the items' texts.
        width: d.
        activation: after the projection.

    Raises:
        ValueError: an unknown activation.
    """

    def __init__(self, encoder: ItemTextEncoder, width: int, activation: Activation) -> None:
        super().__init__()
        if activation not in get_args(Activation):
            known = ", ".join(get_args(Activation))
            raise ValueError(f"activation is {activation!r}, expected one of {known}")
        self.encoder, self.width, self.activation = encoder, width, activation
        self.projection: nn.Linear | None = None  # as wide as the encoder turns out to be
        self._kept: Tensor | None = None

    def load(self, device: torch.device) -> None:
        """Make the encoder be there, and draw the projection from the current random stream.

        Raises:
            DataSourceError: the encoder cannot be had or loaded.
        """
        size = self.encoder.load(device)
        self.projection = nn.Linear(size, self.width)
        nn.init.xavier_normal_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)
        self.projection.to(device)

    def _project(self, texts: Tensor) -> Tensor:
        """(D, t) -> (D, d)."""
        assert self.projection is not None
        # In half precision items that are near each other would tie.
        with torch.autocast(texts.device.type, enabled=False):
            made: Tensor = self.projection(texts.to(self.projection.weight.dtype))
            return F.gelu(made) if self.activation == "gelu" else made

    def rows(self, items: Tensor) -> Tensor:
        """A table (I + 1, d) in which the ids ``items`` (any shape) alone are made; the rest is zero."""
        distinct = items.unique()
        distinct = distinct[distinct > 0]  # (D,)
        made = self._project(self.encoder(distinct))
        table = made.new_zeros(len(self.encoder.told), self.width)
        return table.index_put((distinct,), made)

    def table(self) -> Tensor:
        """Vectors of all items (I + 1, d) as the encoder is now, which gets no gradient."""
        return F.pad(self._project(self.encoder.all_vectors()[1:]), (0, 0, 1, 0))

    def forward(self, items: Tensor) -> Tensor:
        """Vectors (*, d) of the ids ``items`` (*)."""
        return F.embedding(items, self.rows(items) if self._kept is None else self._kept)

    @property
    def weight(self) -> Tensor:
        """The table (I + 1, d) that scores are made with."""
        return self.table() if self._kept is None else self._kept

    def keep(self, table: Tensor) -> None:
        """Use ``table`` (I + 1, d) until ``forget``; the weights must not change meanwhile."""
        self._kept = table

    def forget(self) -> None:
        """Undo ``keep``."""
        self._kept = None
