"""From rows to batches of item ids, without a Python loop over users.

Legend: B rows, T history length (the longest of the batch, at most ``max_length``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from datamodules.samplers import hashed_integers
from datamodules.types import TRAIN, Batch, Rows

_TARGETS = (
    8  # stream of random numbers besides those of datamodules/samplers.py and BERT4Rec's, 1 to 7
)


@dataclass(frozen=True)
class TrainCollator:
    """History and the next item at each of its positions; only training events carry a loss.

    ``times``: also give the times of the history's events.
    """

    max_length: int
    times: bool = False

    def __call__(self, rows: Rows) -> Batch:
        """Rows whose ``stop`` is one past their last training event."""
        history, length = _gather(rows.histories.items, rows.start, rows.stop - 1, self.max_length)
        first = rows.stop - length  # (B,) where the targets begin: one after the history
        targets, _ = _gather(rows.histories.items, first, rows.stop, self.max_length)
        codes, _ = _gather(rows.histories.split, first, rows.stop, self.max_length)
        targets[codes != TRAIN] = 0
        if rows.filler is not None:
            targets[rows.filler] = 0
        batch = _batch(rows, history, length, rows.stop - 1 if self.times else None)
        batch.targets = torch.from_numpy(targets)
        batch.normaliser = torch.tensor(rows.normaliser, dtype=torch.float32)
        return batch


@dataclass(frozen=True)
class PairCollator:
    """Up to ``max_length`` training events of a user as targets, for methods that read no history.

    ``history`` holds the same events, so that shapes are those of sequences.
    """

    max_length: int

    def __call__(self, rows: Rows) -> Batch:
        """Rows whose ``stop`` is one past their last training event."""
        items, length = _gather(rows.histories.items, rows.start, rows.stop, self.max_length)
        codes, _ = _gather(rows.histories.split, rows.start, rows.stop, self.max_length)
        targets = np.where(codes == TRAIN, items, 0)
        if rows.filler is not None:
            targets[rows.filler] = 0
        batch = _batch(rows, items, length)
        batch.targets = torch.from_numpy(targets)
        batch.normaliser = torch.tensor(rows.normaliser, dtype=torch.float32)
        return batch


@dataclass(frozen=True)
class HistoryCollator:
    """The newest ``max_length`` events before each row's target, with ``times`` when they were."""

    max_length: int
    times: bool = False

    def __call__(self, rows: Rows) -> Batch:
        """Rows whose ``stop`` is the index of their target."""
        history = _gather(rows.histories.items, rows.start, rows.stop, self.max_length)
        return _batch(rows, *history, rows.stop if self.times else None)


def _gather(
    values: np.ndarray, start: np.ndarray, stop: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """The last ``width`` values of each stretch (B, T) int64, padded on the right with 0, and lengths."""
    length = np.minimum(stop - start, width)  # (B,)
    columns = np.arange(max(int(length.max(initial=0)), 1))
    real = columns < length[:, None]  # (B, T)
    index = np.where(real, (stop - length)[:, None] + columns, 0)
    return np.where(real, values[index], 0).astype(np.int64), length


def _batch(
    rows: Rows, history: np.ndarray, length: np.ndarray, timed_to: np.ndarray | None = None
) -> Batch:
    """``timed_to`` (B,): one past the last event of each history; None = without times."""
    times = None
    if timed_to is not None:
        found, _ = _gather(rows.histories.timestamps, rows.start, timed_to, history.shape[1])
        times = torch.from_numpy(found)
    return Batch(
        row=torch.from_numpy(rows.row.astype(np.int64)),
        user=torch.from_numpy(rows.user.astype(np.int64)),
        history=torch.from_numpy(history),
        length=torch.from_numpy(length.astype(np.int64)),
        times=times,
    )


@dataclass(frozen=True)
class OneTargetCollator:
    """One training event of each user, and what stands before it, for methods that pay for each state.

    ``sampled``: an event drawn anew in each epoch, as a pure function of (seed, epoch, user), all that have a
    history alike (a draw that is no training event gives way to the newest one); otherwise the newest.
    """

    max_length: int
    sampled: bool = True

    def __call__(self, rows: Rows) -> Batch:
        """Rows whose ``stop`` is one past their newest training event; other positions have target 0."""
        place = rows.stop - 1  # (B,) index of the target among all events
        if self.sampled:
            first = rows.start + 1
            drawn = hashed_integers(
                np.maximum(place - first + 1, 1), _TARGETS, rows.epoch, rows.user, seed=rows.seed
            )
            drawn = np.minimum(first + drawn, place)
            place = np.where(rows.histories.split[drawn] == TRAIN, drawn, place)
        history, length = _gather(rows.histories.items, rows.start, place, self.max_length)
        item = rows.histories.items[place].astype(np.int64)  # (B,)
        if rows.filler is not None:
            item = np.where(rows.filler, 0, item)
        targets = np.zeros_like(history)  # (B, T)
        targets[np.arange(len(item)), np.maximum(length - 1, 0)] = item
        batch = _batch(rows, history, length)
        batch.targets = torch.from_numpy(targets)
        batch.normaliser = torch.tensor(rows.normaliser, dtype=torch.float32)
        return batch
