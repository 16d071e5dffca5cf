"""The parts of SASRec's trunk: where real positions stand, causal attention, residual blocks.

Legend: B rows, T history length, N real positions in the batch, d width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.static_shapes import are_static

Norm = Literal["pre", "post", "original", "query"]
Activation = Literal["relu", "gelu", "silu"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
}


class Layout(NamedTuple):
    """Where the N real positions of a batch stand in its (B, T) grid."""

    rows: int  # B
    width: int  # T
    places: (
        Tensor | None
    )  # (N,) flat positions b * T + t, ascending; None = the grid has no padding
    real: Tensor | None = None  # (B, T) bool, of a ``Grid``

    @classmethod
    def of(cls, length: Tensor, width: int) -> Layout:
        """The layout of rows that hold ``length`` (B,) real items, then padding up to ``width``."""
        real = torch.arange(width, device=length.device) < length[:, None]  # (B, T)
        if are_static():
            return Grid(length.shape[0], width, None, real)
        places = real.flatten().nonzero().squeeze(1)  # (N,)
        full = places.numel() == real.numel()
        return cls(len(length), width, None if full else places)

    def pack(self, grid: Tensor) -> Tensor:
        """(B, T, ...) -> (N, ...): the real positions, row after row."""
        flat = grid.flatten(0, 1)
        return flat if self.places is None else flat.index_select(0, self.places)

    def pad(self, packed: Tensor) -> Tensor:
        """(N, ...) -> (B, T, ...): the inverse of ``pack``, with zeros at padding."""
        shape = (self.rows, self.width, *packed.shape[1:])
        if self.places is None:
            return packed.view(shape)
        flat = packed.new_zeros(self.rows * self.width, *packed.shape[1:])
        return flat.index_copy(0, self.places, packed).view(shape)

    def newest(self, packed: Tensor, length: Tensor) -> Tensor:
        """(N, d) -> (B, d): each row's last real position; zeros for an empty row."""
        ends = length.cumsum(0) - 1  # (B,) index of each row's newest item among the N
        last = packed.new_zeros(self.rows, packed.shape[-1])
        known = length > 0
        last[known] = packed[ends[known]]
        return last


class Grid(Layout):
    """A layout whose padding is computed, too, so that no shape depends on a value: N = B T."""

    __slots__ = ()

    def newest(self, packed: Tensor, length: Tensor) -> Tensor:
        """(N, d) -> (B, d): as of a layout."""
        rows = torch.arange(self.rows, device=length.device)
        last = self.pad(packed)[rows, (length - 1).clamp(min=0)]
        return last.masked_fill((length == 0)[:, None], 0)


class CausalAttention(nn.Module):
    """Multi-head attention from each position to itself and to those before it."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj = nn.Linear(hidden_size, 3 * hidden_size)  # query, key, value, stacked
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, query: Tensor, memory: Tensor, layout: Layout) -> Tensor:
        """Attend from ``query`` (N, d) to ``memory`` (N, d), the keys and values: (N, d)."""
        if query is memory:
            stacked = self.in_proj(query)  # (N, 3d)
        else:
            d = query.shape[-1]
            weight, bias = self.in_proj.weight, self.in_proj.bias
            stacked = torch.cat(
                [F.linear(query, weight[:d], bias[:d]), F.linear(memory, weight[d:], bias[d:])], -1
            )  # (N, 3d)
        grid = layout.pad(stacked).unflatten(-1, (3, self.num_heads, -1))  # (B, T, 3, H, d/H)
        q, k, v = grid.permute(2, 0, 3, 1, 4)  # (B, H, T, d/H) each
        p = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        return self.out_proj(layout.pack(mixed.transpose(1, 2).flatten(2)))  # (N, d)

    def newest(self, query: Tensor, memory: Tensor, layout: Layout, length: Tensor) -> Tensor:
        """Attend from one query a row to all its positions: what ``forward`` gives for the newest.

        Args:
            query: (R, d), of the R rows that are not empty.
            memory: (N, d).
            layout: of ``memory``.
            length: (B,) real positions.
        """
        d = query.shape[-1]
        weight, bias = self.in_proj.weight, self.in_proj.bias
        some = length > 0  # (B,)
        q = F.linear(query, weight[:d], bias[:d]).unflatten(-1, (self.num_heads, 1, -1))
        grid = layout.pad(F.linear(memory, weight[d:], bias[d:]))[some]  # (R, T, 2d)
        k, v = grid.unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (R, H, T, d/H)
        real = torch.arange(layout.width, device=length.device) < length[some, None]  # (R, T)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None])
        attended: Tensor = self.out_proj(mixed.flatten(1))  # from (R, H, 1, d/H)
        return attended


class FeedForward(nn.Module):
    """``W2 act(W1 x + b1) + b2``, with dropout after the activation."""

    def __init__(
        self, hidden_size: int, inner: int, activation: Activation, dropout: float
    ) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, inner)
        self.down = nn.Linear(inner, hidden_size)
        self.activation = ACTIVATIONS[activation]
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(N, d) -> (N, d)."""
        down: Tensor = self.down(self.dropout(self.activation(self.up(x))))
        return down


class Block(nn.Module):
    """Attention, then the feed-forward network, with one of four published residual forms.

    pre: ``x + g(LN(x))`` (the paper); post: ``LN(x + g(x))``; original (the first public PyTorch code, and
    A-LLMRec's): the residual starts from the normalised query, ``q = LN(x)``, ``q + attention(q, x, x)``,
    then ``y = LN(x)``, ``y + ffn(y)``; query (CE-SCE-LLMRec): as original, but ``x + attention(q, x, x)``.
    ``dropout`` is on what is added to the residual; ``residual_dropout`` sets that of attention apart.
    """

    def __init__(
        self, attention: CausalAttention, ffn: FeedForward, norm: Norm, eps: float, dropout: float,
        residual_dropout: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        width = attention.out_proj.out_features
        self.norm = norm
        self.attention = attention
        self.ffn = ffn
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.ffn_norm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.attended_dropout = nn.Dropout(
            dropout if residual_dropout is None else residual_dropout
        )

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """(N, d) -> (N, d)."""
        memory = x if self.norm == "post" else self.attention_norm(x)
        if self.norm in ("original", "query"):
            start = memory if self.norm == "original" else x
            return self._rest(start, self.attention(memory, x, layout))
        return self._rest(x, self.attention(memory, memory, layout))

    def newest(self, x: Tensor, layout: Layout, length: Tensor) -> Tensor:
        """(N, d) -> (R, d): the newest position of each row that is not empty, and nothing else.

        In evaluation the last block is asked for no more; it has no dropout, so it is for evaluation alone.
        """
        ends = (length.cumsum(0) - 1)[length > 0]  # (R,)
        memory = x if self.norm == "post" else self.attention_norm(x)
        query, start = memory[ends], x[ends]
        if self.norm in ("original", "query"):
            memory = x
        if self.norm == "original":
            start = query
        return self._rest(start, self.attention.newest(query, memory, layout, length))

    def _rest(self, start: Tensor, attended: Tensor) -> Tensor:
        """What follows attention: the residual sums and the feed-forward network, (N, d)."""
        x: Tensor = start + self.attended_dropout(attended)
        if self.norm == "post":
            x = self.attention_norm(x)
            y: Tensor = self.ffn_norm(x + self.dropout(self.ffn(x)))
            return y
        y = self.ffn_norm(x)
        return (x if self.norm == "pre" else y) + self.dropout(self.ffn(y))
