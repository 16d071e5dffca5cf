"""Pictures with captions: what a projector between a vision tower and a language model learns from.

Legend: R rows, B rows of a batch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch.utils.data import DataLoader, Dataset

from datamodules.samplers import RowBatch
from datamodules.stage_data import StageDataModule
from datamodules.types import TRAIN, VALID

if TYPE_CHECKING:
    from PIL import Image


class CaptionedPicture(Protocol):
    """One row; its picture is decoded when it is asked for."""

    @property
    def picture(self) -> Image.Image:
        """RGB."""
        ...

    @property
    def caption(self) -> str:
        """What the picture shows, in words."""
        ...

    @property
    def attributes(self) -> Mapping[str, str]:
        """Name -> value of what is known of the picture; empty where nothing is."""
        ...


@dataclass(frozen=True)
class CaptionRows:
    """Rows as a method's collator is handed them."""

    rows: Sequence[CaptionedPicture]  # B
    filler: np.ndarray | None = (
        None  # (B,) bool: rows that only keep ranks in step and carry no loss
    )
    normaliser: float = 1.0  # divide the summed loss by this: see samplers.py


class CaptionMethod(Protocol):
    """What this data asks of the module it feeds."""

    def collator(self, training: bool) -> Callable[[CaptionRows], Any]:
        """Turns rows into a batch (runs in loader workers): the only place where pictures are read."""
        ...

    def row_lengths(self, rows: CaptionRows) -> np.ndarray:
        """(R,) tokens of each row, the picture's included."""
        ...

    def target_counts(self, rows: CaptionRows) -> np.ndarray:
        """(R,) tokens of each row that carry a loss."""
        ...


class CaptionData(StageDataModule):
    """Batches of captioned pictures; heirs say where the rows come from."""

    @property
    @abstractmethod
    def attribute_values(self) -> dict[str, list[str]]:
        """What each attribute may be, over all rows, in the order in which captions name them."""

    @abstractmethod
    def captioned(self, code: int) -> Sequence[CaptionedPicture]:
        """The rows of ``TRAIN`` or of ``VALID``."""

    def validation_rows(self) -> int:
        """Held-out rows."""
        return len(self.captioned(VALID))

    def protocol(self) -> dict[str, Any]:
        """How the rows were made, and their content."""
        return {**self.prepared.protocol, "content": self.prepared.digest}

    def remarks(self) -> list[str]:
        """Counts."""
        counts = self.prepared.manifest["counts"]
        told = ", ".join(f"{count:,} {split}" for split, count in counts.items())
        return [f"captioned pictures: {told}"]

    def train_dataloader(self) -> DataLoader[Any]:
        """Global batches, the same on every number of devices."""
        method = self._method()
        every = CaptionRows(self.captioned(TRAIN))
        sampler = self._train_batches(method.row_lengths(every), method.target_counts(every))
        return self._loader(_Chosen(every.rows), sampler, method.collator(training=True))

    def val_dataloader(self) -> DataLoader[Any]:
        """Held-out rows, each exactly once over all devices."""
        method = self._method()
        every = CaptionRows(self.captioned(VALID))
        sampler = self._eval_batches(method.row_lengths(every))
        return self._loader(_Chosen(every.rows), sampler, method.collator(training=False))

    def _method(self) -> CaptionMethod:
        module: Any = self._trainer().lightning_module
        return module


class _Chosen(Dataset[CaptionRows]):
    """Hands a sampler's batch of row numbers on as ``CaptionRows``."""

    def __init__(self, rows: Sequence[CaptionedPicture]) -> None:
        self.rows = rows

    def __getitem__(self, batch: RowBatch) -> CaptionRows:
        return CaptionRows([self.rows[i] for i in batch.row], batch.filler, batch.normaliser)
