"""``StageDataModule``: what the runner asks of all data, be they histories or instructions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.prepared import Prepared
from datamodules.samplers import EvalBatchSampler, GlobalBatchSampler, RowBatch
from datamodules.sources import cache_root
from datamodules.types import TEST


class _Numbers(Dataset[torch.Tensor]):
    """Hands a batch of numbers on."""

    def __getitem__(self, numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.long)


class StageDataModule(pl.LightningDataModule):
    """Prepared once, named by its content, handed out in batches that do not depend on devices.

    Args:
        name: names the data in folders and tables.
        cache: where prepared data is kept (default: ``LLMREC_CACHE`` or the user's cache folder).
    """

    name: str

    def __init__(self, name: str, cache: str | None = None) -> None:
        super().__init__()
        self.name = name
        self.cache = Path(cache).expanduser() if cache else cache_root()
        self.batch_size = 128
        self.num_workers = 0
        self.seed = 0
        self.test_code = TEST  # the split that a test scores; VALID to choose between methods

    @property
    @abstractmethod
    def prepared(self) -> Prepared:
        """The prepared folder, made on first use."""

    @abstractmethod
    def protocol(self) -> dict[str, Any]:
        """Everything about the data that two comparable numbers must share."""

    @abstractmethod
    def validation_rows(self) -> int:
        """How many rows an epoch can be selected on."""

    def remarks(self) -> list[str]:
        """What a user should know of the data before the first stage, one line each."""
        return []

    def prepare_data(self) -> None:
        """Lightning calls this on one process before the others go on."""
        _ = self.prepared

    def predict_dataloader(self) -> DataLoader[Any]:
        """Of a method that goes through numbered things their numbers, of others the test's rows."""
        trainer = self._trainer()
        module: Any = trainer.lightning_module
        if not hasattr(module, "predict_batches"):
            rows: DataLoader[Any] = self.test_dataloader()
            return rows
        each = max(1, self.batch_size // trainer.world_size)
        batches = module.predict_batches(each, trainer.global_rank, trainer.world_size)
        # Ranks meet before the first batch and behind the last: one that has nothing to do must come, too.
        return DataLoader(_Numbers(), batch_size=None, sampler=batches or [[]])

    def _train_batches(
        self,
        lengths: np.ndarray,
        target_counts: np.ndarray,
        bucket: bool = False,
        together: int = 1,
    ) -> GlobalBatchSampler:
        """Global batches of shuffled training rows, the same on every number of devices.

        Args:
            lengths: (R,) of the rows.
            target_counts: (R,) what of each carries a loss.
            bucket: batches of like lengths.
            together: rows one after the other that stand in one batch.
        """
        trainer = self._trainer()
        return GlobalBatchSampler(
            lengths=lengths,
            batch_size=self.batch_size,
            seed=self.seed,
            shuffle=True,
            bucket=bucket,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            micro_batches=trainer.accumulate_grad_batches,
            target_counts=target_counts,
            together=together,
        )

    def _eval_batches(self, lengths: np.ndarray) -> EvalBatchSampler:
        """Rows of these lengths (R,), each exactly once over all devices."""
        trainer = self._trainer()
        return EvalBatchSampler(
            lengths=lengths,
            batch_size=self.batch_size,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )

    def _loader(
        self, dataset: Dataset[Any], sampler: Iterable[RowBatch], collate: Callable[[Any], Any]
    ) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=None,  # the sampler's element is a whole batch of row numbers
            sampler=sampler,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            # Its own generator: a loader's start must not advance the stream that dropout draws from.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _trainer(self) -> pl.Trainer:
        if self.trainer is None:
            raise RuntimeError(
                "loaders need a trainer: pass this data module to Trainer.fit or .test"
            )
        return self.trainer
