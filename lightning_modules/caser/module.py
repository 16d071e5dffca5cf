"""Caser as a system: the network of ``model.py``, trained on the next item of every position.

Legend: B rows, T history length, N positions with a loss, I items, U users, d width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from datamodules.types import Batch
from lightning_modules.caser.model import Caser
from lightning_modules.next_item import NextItemModule
from lightning_modules.user_item import known_or_mean, learned_users


class CaserModule(NextItemModule):
    """Convolutional sequence embedding (Tang & Wang, WSDM 2018, arXiv 1809.07426).

    Every position predicts its next item, by default with the full softmax; the paper predicts the next
    T items with sampled binary cross-entropy (``loss=bce, negatives=3`` is its loss for T = 1).

    A user who was never trained on (new, or with no event that has a history) gets the mean of the trained
    users' vectors. An empty history is a window of padding, so that its scores come from the biases and the
    user alone.

    Args:
        num_items, num_users: of the data, given by the runner.
        window, hidden_size, vertical_filters, horizontal_filters, dropout: of the network, see ``Caser``.
        max_length, negatives, options: of the training and the evaluation, see ``NextItemModule``.
            ``max_length`` only says how many positions a training row has.
    """

    reads_users = True
    trained: Tensor

    def __init__(
        self,
        num_items: int,
        num_users: int,
        max_length: int = 50,
        window: int = 5,
        hidden_size: int = 50,
        vertical_filters: int = 4,
        horizontal_filters: int = 16,
        dropout: float = 0.5,
        negatives: int = 3,
        **options: Any,
    ) -> None:
        if max_length < window:
            raise ValueError(
                f"Caser needs max_length >= window, got max_length={max_length}, window={window}."
            )
        super().__init__(num_items, max_length, negatives=negatives, **options)
        self.network = Caser(
            num_items, num_users, window, hidden_size, vertical_filters, horizontal_filters, dropout
        )
        self.register_buffer(
            "trained", torch.zeros(num_users + 1, dtype=torch.bool), persistent=False
        )

    def setup(self, stage: str) -> None:
        """Count whose vectors are trained."""
        self.trained = torch.from_numpy(learned_users(self.histories)).to(self.device)  # (U + 1,)

    def states(self, batch: Batch, where: Tensor) -> Tensor:
        """(N, 2d + 1)."""
        features = self.network.every_window(batch.history)[where]  # (N, F)
        users = self.network.user_embedding(batch.user)  # (B, d)
        return self.network.states(features, users[where.nonzero()[:, 0]])

    def user_vectors(self, batch: Batch) -> Tensor:
        """(B, 2d + 1)."""
        features = self.network.last_window(batch.history, batch.length)  # (B, F)
        users = known_or_mean(
            self.network.user_embedding.weight, batch.user, self.trained
        )  # (B, d)
        return self.network.states(features, users)

    def item_vectors(self) -> Tensor:
        """(I + 1, 2d + 1); an item that was never trained on keeps what the softmax pushed it to."""
        return self.network.item_vectors()
