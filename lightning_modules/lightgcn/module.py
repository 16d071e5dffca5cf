"""LightGCN as a system: one propagation a training step, and one an evaluation.

Legend: B rows, T pairs of a row, N pairs with a loss, K negatives, U users, I items, d width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.types import Batch
from lightning_modules.lightgcn.model import LightGCN, normalised_graph
from lightning_modules.next_item import Loss
from lightning_modules.user_item import UserItemModule


class LightGCNModule(UserItemModule):
    """Light graph convolution (He et al., SIGIR 2020, arXiv 2002.02126) on the graph of training events.

    A user without a training event has no neighbours, and gets the mean of the trained users' vectors. An
    item without one keeps its own vector, which it gets as a negative alone, divided by K + 1.

    Args:
        num_items, num_users: given by the runner from the data.
        hidden_size, num_layers, init_std: of the network, see ``LightGCN``.
        l2: on layer 0, half the squared lengths of the user's, the item's and the negatives' vectors of each
            pair (equation 15 as in the paper's code, where it is 1e-4).
        max_length, loss, negatives, options: of the training, see ``UserItemModule``.

    Raises:
        ValueError: ``l2`` is negative.
    """

    def __init__(
        self,
        num_items: int,
        num_users: int,
        hidden_size: int = 64,
        num_layers: int = 3,
        init_std: float = 0.1,
        l2: float = 1e-4,
        max_length: int = 1,
        loss: Loss = "bpr",
        negatives: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(num_items, num_users, max_length, loss, negatives, **options)
        if l2 < 0:
            raise ValueError(f"l2 must be at least 0, got {l2}")
        self.l2 = l2
        self.network = LightGCN(num_users, num_items, hidden_size, num_layers, init_std)
        # Neither a buffer nor a weight: DDP would broadcast it, and cannot broadcast sparse tensors.
        self.graph: Tensor | None = None
        self._kept: tuple[Tensor, Tensor] | None = None  # tables of this step or evaluation

    def setup(self, stage: str) -> None:
        """Build the graph from the training events."""
        super().setup(stage)
        self.graph = normalised_graph(self.histories)

    def tables(self) -> tuple[Tensor, Tensor]:
        """Propagated users (U + 1, d) and items (I + 1, d); kept within a step and within an evaluation."""
        return self._propagate() if self._kept is None else self._kept

    def _propagate(self) -> tuple[Tensor, Tensor]:
        if self.graph is None:
            raise RuntimeError("LightGCNModule has no graph yet: setup() builds it from the data")
        # A copy made in an evaluation, in inference mode, could not be trained on.
        with torch.inference_mode(False):
            self.graph = self.graph.to(self.network.nodes.device)
        users, items = self.network(self.graph)
        return users, items

    def user_table(self) -> Tensor:
        """(U + 1, d), propagated."""
        return self.tables()[0]

    def item_vectors(self) -> Tensor:
        """(I + 1, d), propagated."""
        return self.tables()[1]

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """The pairs' loss on propagated vectors, plus L2 on layer 0; ``train/loss`` is the former alone."""
        self._kept = self._propagate()
        try:
            loss = super().training_step(batch, batch_index)
        finally:
            self._kept = None
        assert batch.normaliser is not None
        return loss + self.l2 * self._squares(batch) / batch.normaliser

    def _squares(self, batch: Batch) -> Tensor:
        """Half the squared lengths of all layer-0 vectors that the batch's pairs name, summed."""
        assert batch.targets is not None
        where = batch.targets > 0  # (B, T)
        users, items = self.network.split(self.network.nodes)
        named = [
            F.embedding(batch.user[:, None].expand_as(where)[where], users),
            F.embedding(batch.targets[where], items),
        ]
        drawn = self._negatives(batch, where)  # (N, K), (K,) shared by all pairs, or None
        squares = [vectors.square().sum() for vectors in named]
        if drawn is not None:
            pairs = len(named[0]) if drawn.ndim == 1 else 1
            squares.append(pairs * F.embedding(drawn, items).square().sum())
        return 0.5 * torch.stack(squares).sum()

    def _reset(self, split: str) -> None:
        """Propagate once for all batches, before anybody asks for the tables."""
        self._kept = self._propagate()
        super()._reset(split)

    def _log(self, split: str) -> dict[str, Tensor]:
        """Log, and forget the tables: the weights will move."""
        self._kept = None
        return super()._log(split)
