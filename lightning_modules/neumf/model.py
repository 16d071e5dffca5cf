"""NeuMF: a generalised dot product beside a perceptron on the pair of vectors.

He et al., "Neural Collaborative Filtering" (WWW 2017, arXiv 1708.05031), section 3.4.

Legend: B rows, C items of a block, U users, I items, d width of a branch's vectors, w width of all
branches' vectors (d or 2 d), h width of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.static_shapes import are_static

Branches = Literal["neumf", "gmf", "mlp"]

_BLOCK_CELLS = 2**22  # activations of one block of items: 16 MiB in float32


class NeuMF(nn.Module):
    """Logits of pairs. Each branch has its own user and item vectors, side by side in one table.

    gmf: sum_k a_k p_k q_k (equation 9); mlp: ReLU layers on [p'; q'] (equation 10); neumf: one output
    layer over both (equation 12), with the bias of the authors' code.

    Args:
        num_users, num_items: U and I; row 0 of both tables is padding and zero.
        branches: ``neumf`` (both), ``gmf`` or ``mlp``.
        hidden_size: width d of each branch's vectors.
        layers: widths of the perceptron's layers.
        dropout: after each of its layers.
        init_std: standard deviation of the vectors' first values.

    Raises:
        ValueError: a size below 1, no layers for a perceptron, or an unknown ``branches``.
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        branches: Branches = "neumf",
        hidden_size: int = 32,
        layers: Sequence[int] = (64, 32, 16),
        dropout: float = 0.0,
        init_std: float = 0.01,
    ) -> None:
        super().__init__()
        if branches not in ("neumf", "gmf", "mlp"):
            raise ValueError(f"branches is {branches!r}, expected neumf, gmf or mlp")
        if min([hidden_size, *layers]) < 1 or (branches != "gmf" and not layers):
            raise ValueError(
                "hidden_size and layers must be at least 1, and a perceptron needs a layer, "
                f"got {hidden_size} and {list(layers)}"
            )
        self.gmf_size = 0 if branches == "mlp" else hidden_size
        self.mlp_size = 0 if branches == "gmf" else hidden_size
        width = self.gmf_size + self.mlp_size  # w
        self.users = nn.Parameter(init_std * torch.randn(num_users + 1, width))
        self.items = nn.Parameter(init_std * torch.randn(num_items + 1, width))
        with torch.no_grad():
            self.users[0] = 0
            self.items[0] = 0
        sizes = [2 * hidden_size, *layers] if self.mlp_size else []
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(self.gmf_size + (sizes[-1] if sizes else 0), 1)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Logits (B, C) of users' vectors (B, w) with items' (C, w) or (B, C, w), all at once."""
        if items.ndim == 2:
            items = items[None]  # (1, C, w), the same for all rows
        out, d = self.output.weight[0], self.gmf_size  # (d + h,)
        logits = self.output.bias.expand(users.shape[0], items.shape[1])  # (B, C)
        if self.gmf_size:
            logits = logits + ((users[:, None, :d] * out[:d]) @ items[..., :d].mT)[:, 0]
        if self.mlp_size:
            logits = logits + self._perceptron(users[:, d:], items[..., d:]) @ out[d:]
        return logits

    def _perceptron(self, users: Tensor, items: Tensor) -> Tensor:
        """(B, C, h) from (B, d) and (1 or B, C, d); the pair's first layer is a sum of one term of each."""
        first, *others = self.layers
        assert isinstance(first, nn.Linear)
        d = self.mlp_size
        own = F.linear(users, first.weight[:, :d], first.bias)  # (B, h)
        x: Tensor = own[:, None] + F.linear(items, first.weight[:, d:])  # (B, C, h)
        for layer in others:
            x = layer(self.dropout(F.relu(x)))
        hidden: Tensor = self.dropout(F.relu(x))
        return hidden

    def score(self, users: Tensor, items: Tensor) -> Tensor:
        """Logits (B, C) of users' vectors (B, w) with item ids (C,) or (B, C), in bounded blocks of items."""
        if are_static():
            return self(users, F.embedding(items, self.items))
        widest = max(self.items.shape[1], *(layer.out_features for layer in self._linear()))
        step = max(1, _BLOCK_CELLS // (max(1, len(users)) * widest))
        parts = [self(users, F.embedding(part, self.items)) for part in items.split(step, dim=-1)]
        return torch.cat(parts, dim=1)

    def _linear(self) -> list[nn.Linear]:
        return [m for m in (*self.layers, self.output) if isinstance(m, nn.Linear)]
