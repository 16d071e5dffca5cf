"""Caser as a system: the network of ``model.py``, trained on the next item of every position.

Legend: B rows, T history length, N positions with a loss, I items, U users, d width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from datamodules.types import TRAIN, Batch, Histories
from lightning_modules.caser.model import Caser
from lightning_modules.next_item import Loss, NextItemModule, Schedule, Windows


def learned_users(histories: Histories) -> np.ndarray:
    """(U + 1,) bool: users with a training event that has a history, which is one that carries a loss."""
    counts = histories.user_train_counts()  # (U + 1,)
    some = np.diff(histories.offsets) > 0
    first = histories.offsets[:-1][some]  # the first event of every user who has one
    counts[some] -= histories.split[first] == TRAIN
    learned: np.ndarray = counts > 0
    return learned


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
        max_length, windows, loss, negatives, gbce_calibration, label_smoothing, learning_rate, weight_decay,
            betas, warmup, schedule, block_size, bpr_max_penalty: of the training and the evaluation, see
            ``NextItemModule``. ``max_length`` only says how many positions a training row has.
    """

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
        windows: Windows = "newest",
        loss: Loss = "ce",
        negatives: int = 3,
        gbce_calibration: float = 0.75,
        label_smoothing: float = 0.0,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.98),
        warmup: float = 0.0,
        schedule: Schedule = "constant",
        block_size: int = 16_384,
        bpr_max_penalty: float = 1.0,
    ) -> None:
        if max_length < window:
            raise ValueError(
                f"Caser needs max_length >= window, got max_length={max_length}, window={window}."
            )
        super().__init__(
            num_items, max_length, windows, loss, negatives, gbce_calibration, label_smoothing,
            learning_rate, weight_decay, betas, warmup, schedule, block_size, bpr_max_penalty,
        )  # fmt: skip
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
        return self.network.states(features, self._users(batch.user))

    def item_vectors(self) -> Tensor:
        """(I + 1, 2d + 1); an item that was never trained on keeps what the softmax pushed it to."""
        return self.network.item_vectors()

    def _users(self, user: Tensor) -> Tensor:
        """Vectors (B, d) of the users, the trained ones' mean (zeros without any) for all others."""
        table = self.network.user_embedding.weight  # (U + 1, d)
        share = self.trained / self.trained.sum().clamp(min=1)  # (U + 1,)
        mean = share.to(table.dtype) @ table  # (d,)
        return torch.where(self.trained[user][:, None], table[user], mean)
