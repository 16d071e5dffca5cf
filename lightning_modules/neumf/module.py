"""NeuMF as a system: pairs and sampled negatives, told apart one by one.

Legend: B rows, N pairs with a loss, C items of one block, K negatives, w width of a user's vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.neumf.model import Branches, NeuMF
from lightning_modules.user_item import UserItemModule


class NeuMFModule(UserItemModule):
    """Neural collaborative filtering (He et al., WWW 2017, arXiv 1708.05031).

    The loss is binary cross-entropy on each pair and its K sampled negatives (equation 7); scores are logits.
    They are no dot products: ``item_vectors`` is the table of all branches' item vectors, for models that
    build on it. The authors' pre-training of the branches is left out. Users without a training event
    have the trained users' mean.

    Args:
        num_items, num_users: given by the runner from the data.
        branches, hidden_size, layers, dropout, init_std: of the network, see ``NeuMF``.
        max_length, negatives, options: of the training, see ``UserItemModule``.
        loss: ``bce``: pairs are told apart one by one.

    Raises:
        ValueError: another loss, which would need scores that are dot products.
    """

    def __init__(
        self,
        num_items: int,
        num_users: int,
        branches: Branches = "neumf",
        hidden_size: int = 32,
        layers: Sequence[int] = (64, 32, 16),
        dropout: float = 0.0,
        init_std: float = 0.01,
        max_length: int = 1,
        loss: Literal["bce"] = "bce",
        negatives: int = 4,
        **options: Any,
    ) -> None:
        if loss != "bce":
            raise ValueError(f"NeuMF learns pairs one by one: loss is bce, got {loss}")
        super().__init__(num_items, num_users, max_length, loss, negatives, **options)
        self.network = NeuMF(num_users, num_items, branches, hidden_size, layers, dropout, init_std)

    def user_table(self) -> Tensor:
        """(U + 1, w)."""
        return self.network.users

    def item_vectors(self) -> Tensor:
        """(I + 1, w); scores are not dot products with them."""
        return self.network.items

    def score(self, state: Tensor, items: Tensor) -> Tensor:
        """Logits (B, C)."""
        return self.network.score(state, items)

    def loss_sum(self, states: Tensor, targets: Tensor, negatives: Tensor | None) -> Tensor:
        """Binary cross-entropy of targets (N,) and negatives (N, K) or (K,); accidental hits carry none."""
        assert negatives is not None
        negatives = negatives.expand(len(targets), negatives.shape[-1])  # (N, K)
        items = torch.cat([targets[:, None], negatives], dim=1)  # (N, 1 + K)
        logits = self.score(states, items).float()
        hit = F.pad(negatives == targets[:, None], (1, 0))  # (N, 1 + K)
        sign = torch.ones_like(logits)
        sign[:, 0] = -1
        return F.softplus(sign * logits).masked_fill(hit, 0).sum()
