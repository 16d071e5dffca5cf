"""NextItNet: dilated causal convolutions over item ids, scored with its own item table.

Yuan, Karatzoglou, Arapakis, Jose and He, "A Simple Convolutional Generative Network for Next Item
Recommendation" (WSDM 2019, arXiv 1808.05163). Histories are padded on the right and convolutions read
the past alone, so no real position ever sees padding.

Legend: B rows, T history length, I items, d width, k kernel size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class CausalConvolution(nn.Module):
    """A dilated convolution whose output at position t reads t, t - dilation, .. alone."""

    def __init__(self, width: int, kernel_size: int, dilation: int) -> None:
        super().__init__()
        self.reach = (kernel_size - 1) * dilation  # how far back it reads
        self.convolution = nn.Conv1d(width, width, kernel_size, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d); what lies before the first position counts as zeros."""
        channels = F.pad(x.transpose(1, 2), (self.reach, 0))  # (B, d, reach + T)
        convolved: Tensor = self.convolution(channels).transpose(1, 2)
        return convolved


class ResidualBlock(nn.Module):
    """Two convolutions, the second with twice the dilation: the paper's block (b), figure 3.

    ``x + ReLU(LN(conv_2l(ReLU(LN(conv_l(x))))))``. LayerNorm is over the d channels of one position, so
    that it cannot carry a later item back.
    """

    def __init__(self, width: int, kernel_size: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.first = CausalConvolution(width, kernel_size, dilation)
        self.first_norm = nn.LayerNorm(width)
        self.second = CausalConvolution(width, kernel_size, 2 * dilation)
        self.second_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d) -> (B, T, d)."""
        y = F.relu(self.first_norm(self.first(x)))
        branch: Tensor = self.dropout(F.relu(self.second_norm(self.second(y))))
        return x + branch


class NextItNet(nn.Module):
    """Hidden states whose dot product with ``item_vectors()`` scores the next item.

    The output table is the input's, behind a linear layer, as in RecBole.

    Args:
        num_items: items 1..num_items; 0 is padding.
        hidden_size: width d of items and channels.
        kernel_size: positions that a convolution reads.
        dilations: one residual block each, in this order; a block's second convolution doubles it.
        dropout: on the item vectors and on every residual branch (the paper has none).
        tied: score with the input's item table; False: with a table of its own, as in the paper.

    Raises:
        ValueError: a size below 1, or no dilation.
    """

    def __init__(
        self,
        num_items: int,
        hidden_size: int = 64,
        kernel_size: int = 3,
        dilations: Sequence[int] = (1, 4, 1, 4),
        dropout: float = 0.2,
        tied: bool = True,
    ) -> None:
        super().__init__()
        if min(num_items, hidden_size, kernel_size, *dilations, len(dilations)) < 1:
            raise ValueError(
                "NextItNet needs sizes and dilations of at least 1 and one dilation or more, got "
                f"num_items={num_items}, hidden_size={hidden_size}, kernel_size={kernel_size}, "
                f"dilations={list(dilations)}."
            )
        # A large table starts near zero, too small beside the residual branches' normalised outputs.
        self.input_scale = math.sqrt(hidden_size)
        self.item_embedding = nn.Embedding(num_items + 1, hidden_size, padding_idx=0)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            ResidualBlock(hidden_size, kernel_size, dilation, dropout) for dilation in dilations
        )
        self.output = nn.Linear(hidden_size, hidden_size)
        own = None if tied else nn.Embedding(num_items + 1, hidden_size, padding_idx=0)
        self.output_embedding = own
        self._initialise()

    @property
    def receptive_field(self) -> int:
        """Newest items that a state depends on."""
        convolutions = (m for m in self.modules() if isinstance(m, CausalConvolution))
        return 1 + sum(convolution.reach for convolution in convolutions)

    def _initialise(self) -> None:
        """Xavier for the item tables and the output; zero biases there and a zero padding row."""
        for table in (self.item_embedding, self.output_embedding):
            if table is not None:
                nn.init.xavier_normal_(table.weight)
                nn.init.zeros_(table.weight[0])
        nn.init.xavier_normal_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, history: Tensor) -> Tensor:
        """States (B, T, d) after each item of ``history`` (B, T); meaningless at padding."""
        x = self.dropout(self.item_embedding(history) * self.input_scale)  # (B, T, d)
        for block in self.blocks:
            x = block(x)
        states: Tensor = self.output(x)
        return states

    def item_vectors(self) -> Tensor:
        """The item table (I + 1, d) that scores; row 0 is padding and stays zero."""
        return (self.output_embedding or self.item_embedding).weight
