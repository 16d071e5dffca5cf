"""What a frozen tower sees of pictures, kept on the CPU up to a number of bytes."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

MOST_BYTES = 2**31  # of kept states; the oldest go first


class KeptStates:
    """Tensors by name; the newest one stays, however large it is.

    Args:
        most_bytes: of all tensors, at most.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.most_bytes = most_bytes
        self._kept: dict[Hashable, Tensor] = {}
        self.bytes = 0

    def __contains__(self, name: Hashable) -> bool:
        return name in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._kept)

    def __getitem__(self, name: Hashable) -> Tensor:
        return self._kept[name]

    @torch.inference_mode(False)  # seen in a validation, they may still be trained with
    def update(self, made: Mapping[Any, Tensor]) -> None:
        """Keep some, copied to the CPU and off any larger tensor that they are parts of."""
        for name, states in made.items():
            own = states.detach().cpu().clone()
            self.bytes += own.nbytes - (self._kept[name].nbytes if name in self._kept else 0)
            self._kept[name] = own
            while self.bytes > self.most_bytes and len(self._kept) > 1:
                self.bytes -= self._kept.pop(next(iter(self._kept))).nbytes
