"""CTRL's second stage: texts are put aside, and SASRec is tuned to recommend.

Legend: B rows, N positions with a loss, d width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from datamodules.types import Batch
from lightning_modules.sasrec import SASRecModule


class CTRLModule(SASRecModule):
    """SASRec that has been aligned with texts, and one linear layer on its states (CTRL, arXiv 2306.02841).

    Args:
        num_items: given by the runner from the data.
        start: the checkpoint of ``CTRLAlignmentModule``, whose network is gone on with; its settings of the
            network must be this module's.
        options: of the network and the training, see ``SASRecModule``.

    Raises:
        ValueError: the start's network is another one.
    """

    def __init__(self, num_items: int, start: str | None = None, **options: Any) -> None:
        super().__init__(num_items, **options)
        size = self.network.hidden_size
        self.head = nn.Linear(size, size)
        if start is not None:
            self._take(start)

    def _take(self, path: str) -> None:
        """The network of a first stage."""
        prefix = "network."
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        theirs = {n[len(prefix) :]: v for n, v in state.items() if n.startswith(prefix)}
        mine = self.network.state_dict()
        wrong = sorted(
            name
            for name in mine.keys() | theirs.keys()
            if name not in mine or name not in theirs or mine[name].shape != theirs[name].shape
        )
        if wrong:
            raise ValueError(
                f"{path} is of another network ({', '.join(wrong[:3])}): give both stages the same "
                "max_length, hidden_size, num_blocks, norm and positions"
            )
        self.network.load_state_dict(theirs)

    def states(self, batch: Batch, where: Tensor) -> Tensor:
        """(N, d)."""
        found: Tensor = self.head(super().states(batch, where))
        return found

    def user_vectors(self, batch: Batch) -> Tensor:
        """(B, d); zeros for an empty history, which ranks nothing above anything."""
        made: Tensor = self.head(super().user_vectors(batch))
        return made.masked_fill((batch.length == 0)[:, None], 0)
