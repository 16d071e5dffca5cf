"""What methods that know users share: pairs as training rows, and users that nobody has trained on.

Legend: B rows, T pairs of a row, N pairs with a loss, d width, U users, I items.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.types import TRAIN, Batch, Collator, Histories
from lightning_modules.id_batches import HistoryCollator, PairCollator
from lightning_modules.next_item import Loss, NextItemModule
from lightning_modules.static_shapes import are_static

# As ``max_length``: batches are padded to their longest history only, so this cuts none and costs nothing.
WHOLE_HISTORY = 2**31 - 1


def first_meetings(history: Tensor) -> tuple[Tensor, Tensor]:
    """A history as a set, for methods that read a binary user-item matrix.

    Args:
        history: (B, T) item ids, padded with 0.

    Returns:
        The ids in ascending order (B, T), and where an id stands for the first time and is not padding.
    """
    items = history.sort(dim=1).values
    before = F.pad(items[:, :-1], (1, 0))  # padding sorts to the front, and is no item
    return items, items != before


def learned_users(histories: Histories) -> np.ndarray:
    """(U + 1,) bool: users with a training event that has a history, which is one that carries a loss."""
    counts = histories.user_train_counts()  # (U + 1,)
    some = np.diff(histories.offsets) > 0
    first = histories.offsets[:-1][some]  # the first event of every user who has one
    counts[some] -= histories.split[first] == TRAIN
    learned: np.ndarray = counts > 0
    return learned


def known_or_mean(table: Tensor, users: Tensor, trained: Tensor) -> Tensor:
    """Users' vectors (B, d); those whom nobody has trained get the mean of the trained ones.

    Args:
        table: (U + 1, d).
        users: (B,).
        trained: (U + 1,) bool, who has a training event. If none has, the mean is zero.
    """
    vectors = F.embedding(users, table)  # (B, d)
    known = trained[users][:, None]  # (B, 1)
    if not are_static() and bool(known.all()):
        return vectors
    mean = trained.to(table) @ table / trained.sum().clamp(min=1)  # (d,)
    return torch.where(known, vectors, mean)


class UserItemModule(NextItemModule):
    """Scores a pair of a user and an item; histories are not read, so the order of events plays no part.

    A row of training is one pair (``max_length`` of them, if that is raised: fewer rows of more pairs);
    every training event is a pair once an epoch. A user without a training event has the mean of the
    trained users' vectors. Items without one are pushed down as negatives like all others.

    Args:
        num_items: I, given by the runner from the data.
        num_users: U, given by the runner from the data.
        max_length: pairs of a training row.
        loss: ``bpr`` by default; any of ``NextItemModule``'s.
        negatives: sampled items a pair, for every loss but ``ce``.
        options: ``NextItemModule``'s other arguments; ``windows`` is always ``all``.
    """

    sequential = False
    reads_histories = False
    reads_users = True
    trained_users: Tensor

    def __init__(
        self,
        num_items: int,
        num_users: int,
        max_length: int = 1,
        loss: Loss = "bpr",
        negatives: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(num_items, max_length, "all", loss, negatives, **options)
        self.num_users = num_users
        everyone = torch.arange(num_users + 1) > 0  # until ``setup`` has seen the data
        self.register_buffer("trained_users", everyone, persistent=False)

    def setup(self, stage: str) -> None:
        """Learn who has training events."""
        trained = self.histories.user_train_counts() > 0  # (U + 1,)
        self.trained_users = torch.from_numpy(trained).to(self.device)

    @abstractmethod
    def user_table(self) -> Tensor:
        """(U + 1, d); row 0 is padding."""

    def collator(self, training: bool) -> Collator:
        """Pairs in training."""
        return PairCollator(self.max_length) if training else HistoryCollator(self.max_length)

    def states(self, batch: Batch, where: Tensor) -> Tensor:
        """The pairs' users, (N, d)."""
        users = batch.user[:, None].expand_as(where)[where]  # (N,)
        return F.embedding(users, self.user_table())

    def user_vectors(self, batch: Batch) -> Tensor:
        """(B, d); the trained users' mean where a user has no training event."""
        return known_or_mean(self.user_table(), batch.user, self.trained_users)
