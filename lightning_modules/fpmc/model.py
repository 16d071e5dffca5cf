"""Factorised personalised Markov chains: two sums of dot products, one of the user, one of the newest item.

Rendle, Freudenthaler & Schmidt-Thieme, "Factorizing Personalized Markov Chains for Next-Basket
Recommendation" (WWW 2010), with baskets of one item and without its user-last-item term, which
moves no ranking: score(u, l, i) = <V_u, V_i> + <V_l, V_i'>.

Legend: N rows or positions, U users, I items, d width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FPMC(nn.Module):
    """Four tables; row 0 of each is padding and zero.

    Args:
        num_users, num_items: U and I.
        hidden_size: width d of every table.
        init_std: standard deviation of the first values.

    Raises:
        ValueError: ``hidden_size`` is below 1.
    """

    def __init__(
        self, num_users: int, num_items: int, hidden_size: int = 64, init_std: float = 0.1
    ) -> None:
        super().__init__()
        if hidden_size < 1:
            raise ValueError(f"hidden_size must be at least 1, got {hidden_size}")

        def table(rows: int) -> nn.Parameter:
            values = init_std * torch.randn(rows + 1, hidden_size)
            values[0] = 0
            return nn.Parameter(values)

        self.users = table(num_users)  # V_u
        self.user_items = table(num_items)  # V_i, which meets the user
        self.last_items = table(num_items)  # V_l
        self.next_items = table(num_items)  # V_i', which meets the newest item

    def states(self, users: Tensor, newest: Tensor) -> Tensor:
        """(N, 2 d) from users' vectors (N, d) and the items before the target (N,); 0 = none, zeros."""
        return torch.cat([users, F.embedding(newest, self.last_items)], dim=1)

    def item_vectors(self) -> Tensor:
        """(I + 1, 2 d)."""
        return torch.cat([self.user_items, self.next_items], dim=1)
