"""SASRec: a causal transformer over item ids, scored with its own item table.

Kang and McAuley, "Self-Attentive Sequential Recommendation" (ICDM 2018, arXiv 1808.09781).
Histories are padded on the right, so a causal mask alone keeps every real query away from padding,
and everything but the attention itself runs on the real positions only.

Legend: B rows, T history length, N real positions in the batch, I items, d width.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_modules.sasrec.layers import (
    Activation,
    Block,
    CausalAttention,
    FeedForward,
    Layout,
    Norm,
)
from lightning_modules.static_shapes import are_static

Positions = Literal["learned", "reversed", "none"]
Initialisation = Literal["xavier", "truncated"]


class SASRec(nn.Module):
    """Hidden states whose dot product with ``item_vectors()`` scores the next item.

    Args:
        num_items: items 1..num_items; 0 is padding.
        max_length: longest history that the position table can hold.
        hidden_size: width d of items, positions and blocks.
        num_blocks: attention + feed-forward blocks.
        num_heads: attention heads; must divide ``hidden_size``.
        dropout: after the embedding, inside the feed-forward network and on each residual branch.
        attention_dropout: on the attention weights; None = the same as ``dropout``.
        residual_dropout: on the attention's output; None = the same as ``dropout`` (paper), 0 in the public
            PyTorch codes, which have none there.
        norm: residual form, see ``Block``.
        positions: ``learned`` counts from the oldest kept item, ``reversed`` from the most recent
            (0 = newest: what an absolute index amounts to in left-padded code), ``none`` adds none.
        ffn_multiplier: inner width of the feed-forward network over ``hidden_size`` (paper: 1).
        activation: of the feed-forward network (paper: relu).
        scale_embedding: multiply item vectors by sqrt(d) at the input (official code).
        final_norm: LayerNorm after the last block.
        norm_eps: of every LayerNorm (official code: 1e-8).
        initialisation: of every matrix: ``xavier`` normal (official code) or ``truncated`` normal.
        init_std: standard deviation of ``truncated``.
        tied: score with the input's item table (paper: better); False: with a table of its own.

    Raises:
        ValueError: a setting that cannot work; every problem is named at once.
    """

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
    ) -> None:
        super().__init__()
        self.num_items = num_items
        self.max_length = max_length
        self.hidden_size = hidden_size
        self.positions = positions
        self.input_scale = math.sqrt(hidden_size) if scale_embedding else 1.0
        inner = round(ffn_multiplier * hidden_size)
        choices: list[tuple[str, str, tuple[str, ...]]] = [
            ("norm", norm, get_args(Norm)),
            ("positions", positions, get_args(Positions)),
            ("activation", activation, get_args(Activation)),
            ("initialisation", initialisation, get_args(Initialisation)),
        ]
        _check_sizes(
            num_items=num_items, max_length=max_length, hidden_size=hidden_size,
            num_blocks=num_blocks, num_heads=num_heads, ffn_width=inner,
        )  # fmt: skip
        _check_choices(choices, hidden_size, num_heads)

        self.item_embedding = nn.Embedding(num_items + 1, hidden_size, padding_idx=0)
        self.position_embedding = (
            None if positions == "none" else nn.Embedding(max_length, hidden_size)
        )
        self.embedding_dropout = nn.Dropout(dropout)
        on_weights = dropout if attention_dropout is None else attention_dropout
        self.blocks = nn.ModuleList()
        for _ in range(num_blocks):
            attention = CausalAttention(hidden_size, num_heads, on_weights)
            ffn = FeedForward(hidden_size, inner, activation, dropout)
            block = Block(attention, ffn, norm, norm_eps, dropout, residual_dropout)
            self.blocks.append(block)
        self.final_norm = nn.LayerNorm(hidden_size, eps=norm_eps) if final_norm else nn.Identity()
        own = None if tied else nn.Embedding(num_items + 1, hidden_size, padding_idx=0)
        self.output_embedding = own
        self._initialise(initialisation, init_std)

    def _initialise(self, how: Initialisation, std: float) -> None:
        """Matrices drawn as ``how`` says, biases zero, LayerNorms identity, padding rows zero."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() < 2:
                    if name.endswith("bias"):
                        parameter.zero_()
                elif how == "xavier":
                    nn.init.xavier_normal_(parameter)
                else:
                    nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
            self.item_embedding.weight[0].zero_()
            if self.output_embedding is not None:
                self.output_embedding.weight[0].zero_()

    def _embed(self, history: Tensor, length: Tensor, layout: Layout) -> Tensor:
        """Item plus position vectors at the real positions, with dropout: (N, d)."""
        x: Tensor = self.item_embedding(layout.pack(history)) * self.input_scale
        if self.position_embedding is not None:
            place = torch.arange(layout.width, device=history.device).expand(layout.rows, -1)
            if self.positions == "reversed":
                place = (length[:, None] - 1 - place).clamp(min=0)  # padding is dropped by pack
            x = x + self.position_embedding(layout.pack(place))
        dropped: Tensor = self.embedding_dropout(x)
        return dropped

    def packed(self, history: Tensor, length: Tensor) -> tuple[Tensor, Layout]:
        """Hidden states of the real positions only, row after row, oldest first.

        Args:
            history: (B, T) item ids, oldest first, padded on the right with 0.
            length: (B,) real items in each row; 0 is allowed.

        Returns:
            States (N, d), and the layout whose ``pack`` picks the matching (N,) of any (B, T) grid.

        Raises:
            ValueError: T is above ``max_length`` while positions are embedded.
        """
        x, layout = self._before_last_block(history, length)
        for block in self.blocks[-1:]:
            x = block(x, layout)
        return self.final_norm(x), layout

    def _before_last_block(self, history: Tensor, length: Tensor) -> tuple[Tensor, Layout]:
        """(N, d), and where they stand."""
        if self.position_embedding is not None and history.shape[1] > self.max_length:
            raise ValueError(
                f"SASRec got histories of {history.shape[1]} items but has positions for "
                f"max_length={self.max_length}: keep the last {self.max_length} items of each row."
            )
        layout = Layout.of(length, history.shape[1])
        x = self._embed(history, length, layout)
        for block in self.blocks[:-1]:
            x = block(x, layout)
        return x, layout

    def forward(self, history: Tensor, length: Tensor) -> Tensor:
        """Hidden states (B, T, d); zeros at padding. Arguments as in ``packed``."""
        states, layout = self.packed(history, length)
        return layout.pad(states)

    def last(self, history: Tensor, length: Tensor) -> Tensor:
        """The state after each row's newest item: (B, d); zeros for an empty history."""
        if self.training or not self.blocks or are_static():
            states, layout = self.packed(history, length)
            return layout.newest(states, length)
        x, layout = self._before_last_block(history, length)
        last: Any = self.blocks[-1]
        newest = self.final_norm(last.newest(x, layout, length))  # (R, d)
        states = newest.new_zeros(len(length), newest.shape[-1])
        states[length > 0] = newest
        return states

    def item_vectors(self) -> Tensor:
        """The item table (I+1, d) that scores; row 0 is padding and stays zero.

        A loss that leaves item 0 out (or masks its score with -inf) gives row 0 no gradient.
        """
        return (self.output_embedding or self.item_embedding).weight


def _check_sizes(**sizes: int) -> None:
    wrong = [f"{name}={value}" for name, value in sizes.items() if value < 1]
    if "num_blocks=0" in wrong:
        wrong.remove("num_blocks=0")  # the paper's ablation: embeddings and the final norm only
    if wrong:
        raise ValueError(f"SASRec needs sizes of at least 1, got {', '.join(wrong)}.")


def _check_choices(
    choices: list[tuple[str, str, tuple[str, ...]]], hidden_size: int, num_heads: int
) -> None:
    wrong = [
        f"{name}={value!r} is not one of {', '.join(allowed)}"
        for name, value, allowed in choices
        if value not in allowed
    ]
    if hidden_size % num_heads:
        wrong.append(f"num_heads={num_heads} does not divide hidden_size={hidden_size}")
    if wrong:
        raise ValueError(f"SASRec cannot be built: {'; '.join(wrong)}.")
