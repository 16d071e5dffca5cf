"""RECFORMER's fine-tuning on one data set, in two phases.

Legend: I items, d width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_modules.recformer.base import RecformerBase


class RecformerModule(RecformerBase):
    """Histories learn to point at items that do not move (Li et al., KDD 2023, arXiv 2305.13731).

    Phase 1 encodes all items anew at the start of each epoch. Phase 2, which is given ``phase1``, goes on
    from its best epoch and keeps that epoch's items. In both no gradient passes into the items; they are part
    of a checkpoint, and evaluation uses those that the epoch has learned with.

    Args:
        start: a checkpoint of the pre-training, whose weights phase 1 starts from.
        phase1: a checkpoint of phase 1: this is phase 2.
        options: see ``RecformerBase``; ``loss=ce`` is over the whole catalogue.

    Raises:
        ValueError: a setting that cannot work.
    """

    items: Tensor  # (I + 1, d)

    def __init__(
        self, *args: Any, start: str | None = None, phase1: str | None = None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        if start is not None and phase1 is not None:
            raise ValueError("start is for phase 1, phase1 for phase 2: give one of them")
        self.start, self.phase1 = start, phase1

    def setup(self, stage: str) -> None:
        """See ``RecformerBase``; then take what this phase starts from.

        Raises:
            ValueError: it lacks weights of the network, or items.
        """
        ready = self.network is not None
        super().setup(stage)
        if not ready and self._weights is None:
            self._take_start()

    def draw_more(self, width: int, vocabulary: int) -> None:
        """Items that nothing has encoded yet."""
        self.register_buffer("items", torch.zeros(self.num_items + 1, width))

    def _take_start(self) -> None:
        """Weights of the network and, in phase 2, the items."""
        path = self.phase1 or self.start
        if path is None:
            return
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        wanted: dict[str, Tensor] = {n: p for n, p in self.named_parameters() if p.requires_grad}
        wanted |= {"items": self.items} if self.phase1 else {}
        wrong = [n for n, p in wanted.items() if n not in state or state[n].shape != p.shape]
        if wrong:
            raise ValueError(
                f"{path} cannot be started from: {', '.join(sorted(wrong)[:3])} missing in it, or of another "
                "shape"
            )
        self.load_state_dict({n: state[n] for n in wanted}, strict=False)

    def on_train_epoch_start(self) -> None:
        """Phase 1: encode the items that this epoch points at."""
        if self.phase1 is None:
            self.items.copy_(super().item_vectors())

    def item_vectors(self) -> Tensor:
        """(I + 1, d) of length 1, as they were learned with; row 0 is zero."""
        if not bool(self.items.any()):  # nothing has been trained or loaded
            self.items.copy_(super().item_vectors())
        return self.items
