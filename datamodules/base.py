"""``SequenceDataModule``: prepare once, then hand each method the rows it asked for.

Legend: U users, N interactions, R rows, B batch rows, T history length.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.candidates import Candidates, FullRanking
from datamodules.filters import Filter
from datamodules.groups import QuantileGroups
from datamodules.prepare import Groups, Prepared, Recipe, prepare
from datamodules.samplers import EvalBatchSampler, GlobalBatchSampler, RowBatch, sample_negatives
from datamodules.sources import cache_root
from datamodules.splits import LeaveOneOut, Split
from datamodules.types import (
    TEST,
    TRAIN,
    VALID,
    Batch,
    Collator,
    EvalRows,
    Histories,
    RawData,
    Rows,
)


class Method(Protocol):
    """What a data module asks of the module it feeds."""

    # Newest events of a history that the method reads.
    max_length: int
    # Train on every stretch of ``max_length`` targets of a history, instead of the newest one alone.
    all_windows: bool
    # Sampled items a position of a training batch; 0: the loss needs none.
    num_negatives: int

    def collator(self, training: bool) -> Collator:
        """Turns rows into a batch (runs in loader workers)."""
        ...

    def row_lengths(self, events: np.ndarray) -> np.ndarray:
        """(R,) cost of rows with so many events in their history, for length buckets."""
        ...


class SequenceDataModule(pl.LightningDataModule):
    """Users' histories, splits and candidates of one data set, shared by every method.

    Args:
        name: names the data set in folders and tables.
        root: a folder with the raw files; None uses the cache, then the official source.
        filters: applied to the raw rows in this order.
        split: what each event is for.
        candidates: what each target is ranked among.
        groups: which rows count as cold and warm.
        mask_seen: leave the items of a row's own history out of its ranking.
        on_bad_row: ``error`` stops at the first bad row; ``skip`` leaves it out and counts it.
        expected: users, items, interactions after filtering, as published; checked by the data report.
        cache: where prepared data is kept (default: ``LLMREC_CACHE`` or the user's cache folder).
    """

    def __init__(
        self,
        name: str,
        root: str | None = None,
        filters: Sequence[Filter] = (),
        split: Split | None = None,
        candidates: Candidates | None = None,
        groups: Groups | None = None,
        mask_seen: bool = True,
        on_bad_row: str = "error",
        expected: dict[str, int] | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__()
        if on_bad_row not in ("error", "skip"):
            raise ValueError(f"on_bad_row is {on_bad_row!r}, expected 'error' or 'skip'")
        self.root = Path(root).expanduser() if root else None
        self.recipe = Recipe(
            name=name,
            filters=tuple(filters),
            split=split or LeaveOneOut(),
            candidates=candidates or FullRanking(),
            groups=groups or QuantileGroups(),
        )
        self.mask_seen = mask_seen
        self.on_bad_row = on_bad_row
        self.expected = expected or {}
        self.cache = Path(cache).expanduser() if cache else cache_root()
        self.batch_size = 128
        self.num_workers = 0
        self.seed = 0
        self._prepared: Prepared | None = None
        self._rows: dict[int, EvalRows] = {}

    @abstractmethod
    def load_raw(self) -> RawData:
        """Fetch and parse the release."""

    @abstractmethod
    def asked(self) -> dict[str, Any]:
        """Plain values that, with the recipe, name the prepared folder."""

    @property
    def prepared(self) -> Prepared:
        """The prepared folder, made on first use."""
        if self._prepared is None:
            asked = {**self.asked(), "on_bad_row": self.on_bad_row, "files": _stats(self.root)}
            self._prepared = prepare(self.recipe, self.load_raw, asked, self.cache)
        return self._prepared

    @property
    def histories(self) -> Histories:
        """Every user's events in time order."""
        return self.prepared.histories

    def rows(self, code: int) -> EvalRows:
        """Held-out rows of ``VALID`` or ``TEST``."""
        if code not in self._rows:
            self._rows[code] = self.prepared.rows(code)
        return self._rows[code]

    @property
    def group_names(self) -> tuple[str, ...]:
        """The groups that metrics are given for; the first is ``all``."""
        return self.rows(TEST).group_names

    @property
    def sampled_candidates(self) -> bool:
        """Whether targets are ranked among sampled candidates instead of the whole catalogue."""
        return self.rows(TEST).candidates is not None

    def protocol(self) -> dict[str, Any]:
        """Everything about the data that two comparable numbers must share."""
        return {
            **self.recipe.describe(),
            "content": self.prepared.digest,
            "mask_seen": self.mask_seen,
        }

    def prepare_data(self) -> None:
        """Lightning calls this on one process before the others go on."""
        _ = self.prepared

    def train_dataloader(self) -> DataLoader[Batch]:
        """Global batches of training rows in length buckets, the same on every number of devices."""
        trainer, method = self._trainer(), self._method()
        rows = TrainRows(self.histories, method.max_length, method.all_windows)
        sampler = GlobalBatchSampler(
            lengths=method.row_lengths(rows.stop - rows.start - 1),
            batch_size=self.batch_size,
            seed=self.seed,
            shuffle=True,
            bucket=True,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            micro_batches=trainer.accumulate_grad_batches,
            target_counts=rows.target_counts,
        )
        collate = method.collator(training=True)
        if method.num_negatives:
            collate = AttachNegatives(collate, method.num_negatives)
        dataset = _TrainDataset(rows, self.seed)
        return self._loader(dataset, sampler, collate)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Validation rows, each exactly once over all devices."""
        return self._eval_loader(VALID)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Test rows, each exactly once over all devices."""
        return self._eval_loader(TEST)

    def raw_users(self, users: np.ndarray) -> list[str]:
        """Raw ids of internal user ids."""
        raw: list[str] = self.prepared.users["user_id"].gather(users - 1).to_list()
        return raw

    def raw_items(self, items: np.ndarray) -> list[str]:
        """Raw ids of internal item ids."""
        raw: list[str] = self.prepared.items["item_id"].gather(items - 1).to_list()
        return raw

    def _eval_loader(self, code: int) -> DataLoader[Batch]:
        trainer, method = self._trainer(), self._method()
        rows = self.rows(code)
        start = self.histories.offsets[rows.user]
        sampler = EvalBatchSampler(
            lengths=method.row_lengths(rows.position - start),
            batch_size=self.batch_size,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        dataset = _EvalDataset(self.histories, rows, self.seed)
        attach = AttachTargets(method.collator(training=False), rows, self.mask_seen)
        return self._loader(dataset, sampler, attach)

    def _loader(
        self, dataset: Dataset[Rows], sampler: Iterable[RowBatch], collate: Collator
    ) -> DataLoader[Batch]:
        return DataLoader(
            dataset,  # type: ignore[arg-type]
            batch_size=None,  # the sampler's element is a whole batch of row numbers
            sampler=sampler,
            collate_fn=collate,  # type: ignore[arg-type]
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

    def _method(self) -> Method:
        module: Any = self._trainer().lightning_module
        return module


class TrainRows:
    """Which stretches of history are learned from.

    A row ends one past a training event and carries up to ``max_length`` targets before that. It starts
    at its user's first event: the method's collator cuts what it cannot use. With ``all_windows`` a
    history gives as many rows as it takes to make every training event a target once, counted from its
    newest; without, one row.
    """

    def __init__(self, histories: Histories, max_length: int, all_windows: bool) -> None:
        self.histories = histories
        users = histories.users  # (N,)
        learned = histories.split == TRAIN
        learned &= np.arange(len(learned)) > histories.offsets[users]  # the first has no history
        last = np.full(histories.num_users + 1, -1, np.int64)  # (U + 1,) last training event
        np.maximum.at(last, users[learned], np.flatnonzero(learned))
        user = np.flatnonzero(last >= 0)
        start, stop = histories.offsets[user], last[user] + 1
        rows = -(-(stop - start - 1) // max_length) if all_windows else np.ones_like(user)
        nth = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)
        start, stop = np.repeat(start, rows), np.repeat(stop, rows) - nth * max_length
        total = np.concatenate([[0], np.cumsum(learned)])
        targets = total[stop] - total[np.maximum(start, stop - max_length)]
        some = targets > 0  # a stretch of context alone teaches nothing
        self.user = np.repeat(user, rows)[some]  # (R,)
        self.start, self.stop = start[some], stop[some]
        self.target_counts = targets[some]  # (R,) positions that carry a loss


class _TrainDataset(Dataset[Rows]):
    def __init__(self, rows: TrainRows, seed: int) -> None:
        self.rows, self.seed = rows, seed

    def __getitem__(self, batch: RowBatch) -> Rows:
        rows, row = self.rows, batch.row
        return Rows(
            rows.histories, row, rows.user[row], rows.start[row], rows.stop[row],
            batch.epoch, self.seed, batch.filler, batch.normaliser,
        )  # fmt: skip


class _EvalDataset(Dataset[Rows]):
    def __init__(self, histories: Histories, rows: EvalRows, seed: int) -> None:
        self.histories, self.rows, self.seed = histories, rows, seed

    def __getitem__(self, batch: RowBatch) -> Rows:
        row = batch.row
        user = self.rows.user[row]
        start = self.histories.offsets[user]
        return Rows(self.histories, row, user, start, self.rows.position[row], 0, self.seed)


class AttachNegatives:
    """Adds sampled items that the user has not trained on: (B, T, K), the same on every rank."""

    def __init__(self, collate: Collator, count: int) -> None:
        self.collate, self.count = collate, count

    def __call__(self, rows: Rows) -> Batch:
        """The method's batch with negatives."""
        batch = self.collate(rows)
        shape = (batch.history.shape[1], self.count)
        drawn = sample_negatives(rows.histories, rows.user, rows.epoch, rows.seed, shape)
        return replace(batch, negatives=torch.from_numpy(drawn).long())


class AttachTargets:
    """Adds to a method's batch what evaluation needs of every method alike."""

    def __init__(self, collate: Collator, rows: EvalRows, mask_seen: bool) -> None:
        self.collate, self.rows, self.mask_seen = collate, rows, mask_seen

    def __call__(self, rows: Rows) -> Batch:
        """The method's batch with targets, groups, weights and what must not be ranked."""
        held_out, row = self.rows, rows.row
        candidates = held_out.candidates
        newest = np.maximum(rows.stop - 1, rows.start)  # the target's own place without a history
        return replace(
            self.collate(rows),
            target=torch.from_numpy(held_out.target[row]),
            groups=torch.from_numpy(held_out.groups[row]),
            weight=torch.from_numpy(held_out.weight[row]),
            time=torch.from_numpy(rows.histories.timestamps[newest]),
            candidates=None if candidates is None else torch.from_numpy(candidates[row]).long(),
            seen=_seen_pairs(rows) if self.mask_seen and candidates is None else None,
        )


def _seen_pairs(rows: Rows) -> torch.Tensor:
    """(S, 2) pairs (batch row, item) of every earlier event of the row's user."""
    counts = rows.stop - rows.start  # (B,)
    owner = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    items = rows.histories.items[rows.start[owner] + within]
    return torch.from_numpy(np.stack([owner, items.astype(np.int64)], axis=1))


def _stats(root: Path | None) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a local folder's files: when they change, so does the prepared folder."""
    if root is None or not root.is_dir():
        return []
    files = sorted(f for f in root.rglob("*") if f.is_file())
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
