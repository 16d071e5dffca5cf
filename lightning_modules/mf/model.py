"""Matrix factorisation: two tables of vectors whose dot products are the scores.

Legend: U users, I items, d width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MatrixFactorisation(nn.Module):
    """A table of users and one of items, with or without an item bias.

    Args:
        num_users, num_items: U and I; row 0 of both tables is padding and zero.
        hidden_size: width d of both tables.
        item_bias: score <p_u, q_i> + b_i, the bias being a column of the item table that meets a 1.
        init_std: standard deviation of the vectors' first values; biases begin at 0.

    Raises:
        ValueError: ``hidden_size`` is below 1.
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        hidden_size: int = 64,
        item_bias: bool = True,
        init_std: float = 0.1,
    ) -> None:
        super().__init__()
        if hidden_size < 1:
            raise ValueError(f"hidden_size must be at least 1, got {hidden_size}")
        self.users = nn.Parameter(init_std * torch.randn(num_users + 1, hidden_size))
        self.items = nn.Parameter(init_std * torch.randn(num_items + 1, hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_items + 1, 1)) if item_bias else None
        with torch.no_grad():
            self.users[0] = 0
            self.items[0] = 0

    def user_table(self) -> Tensor:
        """(U + 1, d), or (U + 1, d + 1) ending in ones where items have a bias."""
        if self.bias is None:
            return self.users
        return torch.cat([self.users, self.users.new_ones(len(self.users), 1)], dim=1)

    def item_table(self) -> Tensor:
        """(I + 1, d), or (I + 1, d + 1) ending in the bias."""
        return self.items if self.bias is None else torch.cat([self.items, self.bias], dim=1)
