"""FPMC as a system: the user's taste and the newest item, trained on the next item.

Legend: B rows, T history length, N positions with a loss, d width, U users, I items.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.types import Batch
from lightning_modules.fpmc.model import FPMC
from lightning_modules.next_item import Loss, NextItemModule, Windows
from lightning_modules.user_item import known_or_mean, learned_users


class FPMCModule(NextItemModule):
    """Factorised personalised Markov chain (Rendle et al., WWW 2010).

    Of a history it reads the newest item alone; ``max_length`` only says how many targets a training row
    carries. A user who was never trained (a user's first event is no target) has the mean of the trained
    users' vectors; an empty history has no item part.

    Args:
        num_items, num_users: given by the runner from the data.
        hidden_size, init_std: of the four tables, see ``FPMC``.
        max_length: targets of a training row.
        windows: ``all`` learns every training event.
        loss: ``bpr`` is the paper's.
        options: ``NextItemModule``'s other arguments.
    """

    reads_users = True
    trained_users: Tensor

    def __init__(
        self,
        num_items: int,
        num_users: int,
        hidden_size: int = 64,
        init_std: float = 0.1,
        max_length: int = 50,
        windows: Windows = "all",
        loss: Loss = "bpr",
        **options: Any,
    ) -> None:
        super().__init__(num_items, max_length, windows, loss, **options)
        self.network = FPMC(num_users, num_items, hidden_size, init_std)
        everyone = torch.arange(num_users + 1) > 0  # until ``setup`` has seen the data
        self.register_buffer("trained_users", everyone, persistent=False)

    def setup(self, stage: str) -> None:
        """Learn who has a training event that is not their first."""
        self.trained_users = torch.from_numpy(learned_users(self.histories)).to(self.device)

    def states(self, batch: Batch, where: Tensor) -> Tensor:
        """(N, 2 d)."""
        users = batch.user[:, None].expand_as(where)[where]  # (N,)
        return self.network.states(F.embedding(users, self.network.users), batch.history[where])

    def user_vectors(self, batch: Batch) -> Tensor:
        """(B, 2 d)."""
        last = (batch.length - 1).clamp(min=0)[:, None]  # (B, 1); an empty history reads padding
        users = known_or_mean(self.network.users, batch.user, self.trained_users)
        return self.network.states(users, batch.history.gather(1, last)[:, 0])

    def item_vectors(self) -> Tensor:
        """(I + 1, 2 d)."""
        return self.network.item_vectors()
