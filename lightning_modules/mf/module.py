"""Matrix factorisation as systems: trained on pairs, or solved for.

Legend: B rows, T history length, C items of a block, U users, I items, d width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from datamodules.types import Batch
from lightning_modules.base import UntrainedModule
from lightning_modules.mf.als import Regularisation, ridge, training_sets
from lightning_modules.mf.model import MatrixFactorisation
from lightning_modules.next_item import Loss, dot_products
from lightning_modules.user_item import WHOLE_HISTORY, UserItemModule, first_meetings


class BPRMFModule(UserItemModule):
    """Matrix factorisation by Bayesian personalised ranking (Rendle et al., UAI 2009, arXiv 1205.2618).

    The paper's L2 penalty on the vectors of each sampled triple is the optimizer's weight decay here, which
    shrinks all vectors at every step. Users without a training event have the trained users' mean.

    Args:
        num_items, num_users: given by the runner from the data.
        hidden_size, item_bias, init_std: of the tables, see ``MatrixFactorisation``.
        max_length, loss, negatives, options: of the training, see ``UserItemModule``.
    """

    def __init__(
        self,
        num_items: int,
        num_users: int,
        hidden_size: int = 64,
        item_bias: bool = True,
        init_std: float = 0.1,
        max_length: int = 1,
        loss: Loss = "bpr",
        negatives: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(num_items, num_users, max_length, loss, negatives, **options)
        self.network = MatrixFactorisation(num_users, num_items, hidden_size, item_bias, init_std)

    def user_table(self) -> Tensor:
        """(U + 1, d), with a column of ones where items have a bias."""
        return self.network.user_table()

    def item_vectors(self) -> Tensor:
        """(I + 1, d), with the bias as the last column where there is one."""
        return self.network.item_table()


class IALSModule(UntrainedModule):
    """Weighted matrix factorisation by alternating ridge regressions, with frequency-scaled L2.

    Hu, Koren & Volinsky, ICDM 2008; Rendle et al., RecSys 2022 (arXiv 2110.14037): well tuned, it is as good
    as any method of its kind. A row's user vector is not looked up but solved for, from the set of all
    events before its target: w = (sum_i h_i h_i^T + alpha H^T H + l2 (n + alpha I)^nu E)^-1 sum_i h_i over
    its n items, so that unseen users are rows like all others. An empty history has the zero vector;
    so has an item without a training event.

    Args:
        num_items: I, given by the runner from the data.
        hidden_size: width d.
        iterations: how often users, then items, are solved for.
        alpha: weight of each of the U x I pairs as a negative; an observed pair has weight 1.
        l2, nu: regularisation of a row with n pairs is l2 (n + alpha I)^nu.
        init_std: the items' first vectors have this length on average.
        seed: what they are drawn by.
        block_size: items scored at a time when the whole catalogue is ranked.

    Raises:
        ValueError: a setting out of range.
    """

    items: Tensor
    gram: Tensor

    def __init__(
        self,
        num_items: int,
        hidden_size: int = 64,
        iterations: int = 16,
        alpha: float = 1.0,
        l2: float = 0.005,
        nu: float = 1.0,
        init_std: float = 0.1,
        seed: int = 0,
        block_size: int = 16_384,
    ) -> None:
        super().__init__(WHOLE_HISTORY, block_size)
        if min(hidden_size, iterations) < 1 or min(alpha, l2, init_std) <= 0:
            raise ValueError(
                "hidden_size and iterations must be at least 1, alpha, l2 and init_std above 0, got "
                f"{hidden_size}, {iterations}, {alpha}, {l2} and {init_std}"
            )
        self.num_items, self.hidden_size, self.iterations = num_items, hidden_size, iterations
        self.by = Regularisation(alpha, l2, nu)
        self.init_std, self.seed = init_std, seed

    def setup(self, stage: str) -> None:
        """Solve for users and items in turn, on the CPU: it comes before the trainer moves the module."""
        items_of, users_of = training_sets(self.histories)
        draw = torch.Generator().manual_seed(self.seed)
        items = torch.randn(self.num_items + 1, self.hidden_size, generator=draw)  # (I + 1, d)
        items *= self.init_std / self.hidden_size**0.5
        items[0] = 0
        for _ in range(self.iterations):
            items = users_of.solve(items_of.solve(items, self.by), self.by)
        self.register_buffer("items", items.to(self.device), persistent=False)
        self.register_buffer("gram", (items.T @ items).to(self.device), persistent=False)

    def user_vectors(self, batch: Batch) -> Tensor:
        """Solutions for the rows' histories, (B, d)."""
        # A solve needs the digits, and has no half precision.
        with torch.autocast(self.items.device.type, enabled=False):
            return ridge(self.items, self.gram, *first_meetings(batch.history), self.by)

    def item_vectors(self) -> Tensor:
        """(I + 1, d)."""
        return self.items

    def encode(self, batch: Batch) -> Tensor:
        """User vectors (B, d)."""
        return self.user_vectors(batch)

    def score(self, state: Tensor, items: Tensor) -> Tensor:
        """Dot products (B, C)."""
        return dot_products(state, self.items[items])
