"""HSTU: gated blocks whose attention weighs events by SiLU instead of softmax, and by when they were.

Zhai et al., "Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for Generative
Recommendations" (ICML 2024, arXiv 2402.17152), equations 1 to 3, in the form of the released research code
(generative-recommenders, ML-1M): LayerNorms without weights, biases shared over heads.
Histories are padded on the right, so the causal mask alone keeps every real query away from padding, and
everything but the attention itself runs on the real positions only.

Legend: B rows, T history length, N real positions in the batch, I items, d width, H heads, L blocks,
S time buckets.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.sasrec.layers import Layout

LOG_WIDTH = 0.301  # of a time bucket, in ln(seconds): a factor of 1.35 (released code)
NORM_EPS = 1e-6  # of every LayerNorm (released code)


def time_buckets(times: Tensor, last: int) -> Tensor:
    """Which bucket each pair of events is in: floor(ln(max(1, |t_i - t_j|)) / 0.301), at most ``last``.

    The query's time is that of its own event. The released code takes the time of the event AFTER the query,
    which is the target: a model that reads it is told when the event that it must predict happens.

    Args:
        times: (B, T) seconds, int64.
        last: number of the last bucket.

    Returns:
        (B, T, T) int64, query i by key j.
    """
    apart = (times[:, :, None] - times[:, None, :]).abs().clamp(min=1)  # (B, T, T)
    return (apart.float().log() / LOG_WIDTH).long().clamp(max=last)


class Block(nn.Module):
    """One sequential transduction unit: ``x + W2 (LN(A V) * U)``, A = SiLU(Q K^T + bias) / max_length.

    U, V, Q and K are the SiLU of one linear map of LN(x). The bias of query i and key j is a learned number
    for i - j plus one for the bucket of the time between them; all heads share them.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, max_length: int, last_bucket: int | None,
        dropout: float, attention_dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_heads, self.max_length = num_heads, max_length
        self.in_proj = nn.Linear(hidden_size, 4 * hidden_size, bias=False)  # U, V, Q, K, stacked
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        self.position_bias = nn.Parameter(torch.empty(max_length))  # of i - j
        self.time_bias = None if last_bucket is None else nn.Parameter(torch.empty(last_bucket + 1))
        self.dropout = nn.Dropout(dropout)
        self.attention_dropout = nn.Dropout(attention_dropout)

    def bias(self, width: int, buckets: Tensor | None) -> Tensor:
        """(T, T), or (B, 1, T, T) with time; what stands above the diagonal has no meaning."""
        place = torch.arange(width, device=self.position_bias.device)
        bias = self.position_bias[(place[:, None] - place).clamp(min=0)]  # (T, T)
        if self.time_bias is None or buckets is None:
            return bias
        timed = self.time_bias.index_select(0, buckets.flatten()).view(buckets.shape)  # (B, T, T)
        return (bias + timed)[:, None]

    def forward(self, x: Tensor, layout: Layout, buckets: Tensor | None) -> Tensor:
        """(N, d) -> (N, d); ``buckets`` (B, T, T) of the time between events, None without times."""
        stacked = F.silu(self.in_proj(F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)))  # (N, 4d)
        u, attended = stacked.split([x.shape[-1], 3 * x.shape[-1]], dim=-1)
        grid = layout.pad(attended).unflatten(-1, (3, self.num_heads, -1))  # (B, T, 3, H, d/H)
        v, q, k = grid.permute(2, 0, 3, 1, 4)  # (B, H, T, d/H) each
        weights = F.silu(q @ k.transpose(-1, -2) + self.bias(layout.width, buckets))  # (B, H, T, T)
        weights = self.attention_dropout(weights.tril() / self.max_length)
        mixed = layout.pack((weights @ v).transpose(1, 2).flatten(2))  # (N, d)
        gated = u * F.layer_norm(mixed, x.shape[-1:], eps=NORM_EPS)
        out: Tensor = x + self.out_proj(self.dropout(gated))
        return out


class HSTU(nn.Module):
    """Hidden states whose dot product with ``item_vectors()`` scores the next item.

    Args:
        num_items: items 1..num_items; 0 is padding.
        max_length: longest history that the position tables can hold; attention is divided by it.
        hidden_size: width d of items and blocks; U, V, Q and K have d / num_heads a head.
        num_blocks: blocks.
        num_heads: attention heads; must divide ``hidden_size``.
        dropout: after the embedding and on each block's gated attention.
        attention_dropout: on the attention weights (released: 0).
        time_bias: also bias attention by the time between events.
        num_time_buckets: S, buckets of ``time_buckets``; 128 (released) hold any time.
        temperature: states and items are scaled to length 1 and scores divided by it (released: 0.05);
            None: the states get a LayerNorm, and scores are plain dot products.
        tied: score with the input's item table (released); False: with a table of its own.

    Raises:
        ValueError: a setting that cannot work; every problem is named at once.
    """

    def __init__(
        self,
        num_items: int,
        max_length: int = 50,
        hidden_size: int = 64,
        num_blocks: int = 2,
        num_heads: int = 1,
        dropout: float = 0.2,
        attention_dropout: float = 0.0,
        time_bias: bool = True,
        num_time_buckets: int = 128,
        temperature: float | None = 0.05,
        tied: bool = True,
    ) -> None:
        super().__init__()
        sizes = {
            "num_items": num_items, "max_length": max_length, "hidden_size": hidden_size,
            "num_blocks": num_blocks, "num_heads": num_heads, "num_time_buckets": num_time_buckets,
        }  # fmt: skip
        wrong = [f"{name}={value} is below 1" for name, value in sizes.items() if value < 1]
        if num_heads > 0 and hidden_size % num_heads:
            wrong.append(f"num_heads={num_heads} does not divide hidden_size={hidden_size}")
        if temperature is not None and temperature <= 0:
            wrong.append(f"temperature={temperature} is not above 0")
        if wrong:
            raise ValueError(f"HSTU cannot be built: {'; '.join(wrong)}.")
        self.max_length, self.hidden_size = max_length, hidden_size
        self.temperature = temperature
        self.last_bucket = num_time_buckets - 1 if time_bias else None
        self.item_embedding = nn.Embedding(num_items + 1, hidden_size, padding_idx=0)
        self.position_embedding = nn.Embedding(max_length, hidden_size)  # counts from the oldest
        self.embedding_dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, max_length, self.last_bucket, dropout, attention_dropout)
            for _ in range(num_blocks)
        )
        self.final_norm = nn.LayerNorm(hidden_size, eps=NORM_EPS) if temperature is None else None
        own = None if tied else nn.Embedding(num_items + 1, hidden_size, padding_idx=0)
        self.output_embedding = own
        self._initialise()

    def _initialise(self) -> None:
        """As the released code: deviation 0.02, but 1/sqrt(d) for positions and Xavier for ``out_proj``."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.startswith("final_norm"):
                    continue
                if name == "position_embedding.weight":
                    std = math.sqrt(1 / self.hidden_size)
                    nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
                elif name.endswith("out_proj.weight"):
                    nn.init.xavier_uniform_(parameter)
                elif name.endswith("out_proj.bias"):
                    parameter.zero_()
                else:
                    nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
            self.item_embedding.weight[0].zero_()
            if self.output_embedding is not None:
                self.output_embedding.weight[0].zero_()

    def packed(
        self, history: Tensor, length: Tensor, times: Tensor | None = None
    ) -> tuple[Tensor, Layout]:
        """Hidden states of the real positions only, row after row, oldest first.

        Args:
            history: (B, T) item ids, oldest first, padded on the right with 0.
            length: (B,) real items in each row; 0 is allowed.
            times: (B, T) seconds of the events; needed with ``time_bias``, not read without.

        Returns:
            States (N, d), and the layout whose ``pack`` picks the matching (N,) of any (B, T) grid.

        Raises:
            ValueError: T is above ``max_length``, or times are missing.
        """
        if history.shape[1] > self.max_length:
            raise ValueError(
                f"HSTU got histories of {history.shape[1]} items but has positions for "
                f"max_length={self.max_length}: keep the last {self.max_length} items of each row."
            )
        buckets = None
        if self.last_bucket is not None:
            if times is None:
                raise ValueError("HSTU with time_bias needs the times of the history's events.")
            buckets = time_buckets(times, self.last_bucket)
        layout = Layout.of(length, history.shape[1])
        place = torch.arange(layout.width, device=history.device).expand(layout.rows, -1)
        x: Tensor = self.item_embedding(layout.pack(history)) * math.sqrt(self.hidden_size)
        x = self.embedding_dropout(x + self.position_embedding(layout.pack(place)))
        for block in self.blocks:
            x = block(x, layout, buckets)
        if self.final_norm is not None:
            return self.final_norm(x), layout
        assert self.temperature is not None
        return F.normalize(x, dim=-1) / self.temperature, layout

    def last(self, history: Tensor, length: Tensor, times: Tensor | None = None) -> Tensor:
        """The state after each row's newest item: (B, d); zeros for an empty history."""
        states, layout = self.packed(history, length, times)
        return layout.newest(states, length)

    def item_vectors(self) -> Tensor:
        """The item table (I + 1, d) that scores; of length 1 with a temperature. Row 0 is zero."""
        table = (self.output_embedding or self.item_embedding).weight
        return table if self.temperature is None else F.normalize(table, dim=-1)
