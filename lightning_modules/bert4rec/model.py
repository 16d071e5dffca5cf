"""BERT4Rec: a bidirectional transformer that fills in hidden items of a history.

Sun et al., "BERT4Rec: Sequential Recommendation with Bidirectional Encoder Representations from
Transformer" (CIKM 2019, arXiv 1904.06690). The next item is asked for by a [MASK] after the newest event.
Histories are padded on the right; everything but the attention itself runs on the real positions only.

Legend: B rows, T history length, N real positions in the batch, I items, d width, H heads.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.sasrec.layers import Block, CausalAttention, FeedForward, Layout
from lightning_modules.static_shapes import are_static

Norm = Literal["post", "pre"]
NORM_EPS = 1e-12  # of every LayerNorm (released code)
INIT_STD = 0.02  # of every matrix, truncated at two deviations (released code)


class BidirectionalAttention(CausalAttention):
    """SASRec's attention with all real positions of the row in sight instead of the earlier ones."""

    def forward(self, query: Tensor, memory: Tensor, layout: Layout) -> Tensor:
        """Attend within each row: ``query`` (N, d), which is ``memory``, gives (N, d)."""
        grid = layout.pad(self.in_proj(query)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = grid.permute(2, 0, 3, 1, 4)  # (B, H, T, d/H) each
        seen = None
        if layout.real is not None:
            seen = layout.real[:, None, None, :]  # (B, 1, 1, T); a row holds a [MASK] at least
        elif layout.places is not None:
            real = layout.pad(torch.ones_like(layout.places, dtype=torch.bool))  # (B, T)
            real[:, 0] = True  # a row of padding alone looks at one, so that nothing divides 0 by 0
            seen = real[:, None, None, :]  # (B, 1, 1, T)
        p = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=p)
        out: Tensor = self.out_proj(layout.pack(mixed.transpose(1, 2).flatten(2)))  # (N, d)
        return out


class BERT4Rec(nn.Module):
    """Output vectors whose dot product with ``item_vectors()`` scores the item at their position.

    Args:
        num_items: items 1..num_items; 0 is padding, num_items + 1 is [MASK].
        max_length: longest history with its [MASK] that the position table can hold.
        hidden_size: width d of items, positions and blocks.
        num_blocks: attention + feed-forward blocks.
        num_heads: attention heads; must divide ``hidden_size``.
        dropout: after the embedding, inside the feed-forward network and on each residual branch.
        attention_dropout: on the attention weights; None = the same as ``dropout``.
        norm: ``post`` (the paper) or ``pre`` LayerNorm, then with one more after the last block.
        ffn_multiplier: inner width of the feed-forward network over ``hidden_size`` (paper: 4).

    Raises:
        ValueError: a setting that cannot work; every problem is named at once.
    """

    def __init__(
        self,
        num_items: int,
        max_length: int = 50,
        hidden_size: int = 64,
        num_blocks: int = 2,
        num_heads: int = 2,
        dropout: float = 0.1,
        attention_dropout: float | None = None,
        norm: Norm = "post",
        ffn_multiplier: float = 4.0,
    ) -> None:
        super().__init__()
        inner = round(ffn_multiplier * hidden_size)
        _check(norm, max_length, num_items=num_items, hidden_size=hidden_size,
               num_blocks=num_blocks, num_heads=num_heads, ffn_width=inner)  # fmt: skip
        self.num_items, self.max_length, self.hidden_size = num_items, max_length, hidden_size
        self.item_embedding = nn.Embedding(num_items + 2, hidden_size, padding_idx=0)
        self.position_embedding = nn.Embedding(max_length, hidden_size)  # counts from the oldest
        self.embedding_norm = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.embedding_dropout = nn.Dropout(dropout)
        on_weights = dropout if attention_dropout is None else attention_dropout
        self.blocks = nn.ModuleList()
        for _ in range(num_blocks):
            attention = BidirectionalAttention(hidden_size, num_heads, on_weights)
            ffn = FeedForward(hidden_size, inner, "gelu", dropout)
            self.blocks.append(Block(attention, ffn, norm, NORM_EPS, dropout))
        self.final_norm = (
            nn.LayerNorm(hidden_size, eps=NORM_EPS) if norm == "pre" else nn.Identity()
        )
        self.head = nn.Linear(hidden_size, hidden_size)
        self.head_norm = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.item_bias = nn.Parameter(torch.zeros(num_items + 1))
        self._initialise()

    def _initialise(self) -> None:
        """Matrices truncated normal, biases zero, LayerNorms identity, padding row zero."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() > 1:
                    nn.init.trunc_normal_(parameter, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)
                elif name.endswith("bias"):
                    parameter.zero_()
            self.item_embedding.weight[0].zero_()

    def packed(self, history: Tensor, length: Tensor) -> tuple[Tensor, Layout]:
        """Hidden states of the real positions only, row after row, oldest first.

        Args:
            history: (B, T) item ids and [MASK]s, oldest first, padded on the right with 0.
            length: (B,) real positions in each row; 0 is allowed.

        Returns:
            States (N, d), and the layout whose ``pack`` picks the matching (N,) of any (B, T) grid.

        Raises:
            ValueError: T is above ``max_length``.
        """
        if history.shape[1] > self.max_length:
            raise ValueError(
                f"BERT4Rec got histories of {history.shape[1]} positions but has max_length="
                f"{self.max_length}, which counts the [MASK] of the next item, too."
            )
        layout = Layout.of(length, history.shape[1])
        place = torch.arange(layout.width, device=history.device).expand(layout.rows, -1)
        x = self.item_embedding(layout.pack(history)) + self.position_embedding(layout.pack(place))
        x = self.embedding_dropout(self.embedding_norm(x))
        for block in self.blocks:
            x = block(x, layout)
        states: Tensor = self.final_norm(x)
        return states, layout

    def output(self, states: Tensor) -> Tensor:
        """``LN(GELU(W h + b))`` of states (N, d), and a 1 that meets the items' biases: (N, d + 1)."""
        x = self.head_norm(F.gelu(self.head(states)))
        return torch.cat([x, torch.ones_like(x[:, :1])], dim=1)

    def next(self, history: Tensor, length: Tensor) -> Tensor:
        """Output (B, d + 1) at a [MASK] after each row's newest item; also for an empty history."""
        row = torch.arange(length.shape[0], device=length.device)
        asked = F.pad(history, (0, 1))  # (B, T + 1)
        asked[row, length] = self.num_items + 1
        if not are_static():
            asked = asked[:, : int(length.max()) + 1 if len(length) else 1]
        states, layout = self.packed(asked, length + 1)
        return self.output(layout.pad(states)[row, length])

    def item_vectors(self) -> Tensor:
        """The item table, tied to the input, and the items' biases as its last column: (I + 1, d + 1).

        Row 0 is padding: it stays zero, because no loss scores it.
        """
        return torch.cat([self.item_embedding.weight[:-1], self.item_bias[:, None]], dim=1)


def _check(norm: str, max_length: int, **sizes: int) -> None:
    wrong = [f"{name}={value} is below 1" for name, value in sizes.items() if value < 1]
    if max_length < 2:
        wrong.append(f"max_length={max_length} has no room for an item and a [MASK]")
    if norm not in ("post", "pre"):
        wrong.append(f"norm={norm!r} is not one of post, pre")
    if sizes["num_heads"] > 0 and sizes["hidden_size"] % sizes["num_heads"]:
        wrong.append(
            f"num_heads={sizes['num_heads']} does not divide hidden_size={sizes['hidden_size']}"
        )
    if wrong:
        raise ValueError(f"BERT4Rec cannot be built: {'; '.join(wrong)}.")
