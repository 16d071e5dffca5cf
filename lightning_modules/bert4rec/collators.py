"""Cloze batches: which events of a window are hidden, as a function of the seed and never of a rank.

Legend: B rows, T window length (the longest of the batch, at most ``max_length``), I items.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from datamodules.samplers import hashed_integers
from datamodules.types import Batch, Rows
from lightning_modules.id_batches import PairCollator

# Streams of random numbers besides those of datamodules/samplers.py, which are 1 to 3.
MASKS, LAST_ONLY, MOVES, DISTANCES = 4, 5, 6, 7
_UNIT = 2**53  # a draw below share * _UNIT happens with probability share


@dataclass(frozen=True)
class ClozeCollator:
    """Windows with some training events replaced by [MASK] (id I + 1), and those events as targets.

    A window hides each training event with probability ``mask_probability``, at least one; or, with
    probability ``last_only``, its newest training event alone, which is the evaluation's question. Events
    that are not for training are never hidden, only read. With probability ``moved`` all windows of a user
    end 1 to ``max_length`` - 1 events earlier, so that an epoch's events are not always at the same places
    and histories end anywhere. The draws are a pure function of (seed, epoch, user, place in the history).

    The normaliser is ``mask_probability`` times the training events of the global batch: the number hidden
    in the mean if no window hid its newest alone. It does not depend on the draws, so no rank has to know
    what the others hid, and every hidden event weighs the same.
    """

    max_length: int
    mask_probability: float
    last_only: float
    moved: float = 0.0

    def __call__(self, rows: Rows) -> Batch:
        """Rows whose ``stop`` is one past their last training event; unhidden places have target 0."""
        rows = replace(rows, stop=rows.stop - self._distance(rows))
        batch = PairCollator(self.max_length)(rows)
        assert batch.targets is not None
        assert batch.normaliser is not None
        hidden = torch.from_numpy(
            self._hidden(rows, batch.length.numpy(), batch.targets.numpy() > 0)
        )
        return replace(
            batch,
            history=batch.history.masked_fill(hidden, rows.histories.num_items + 1),
            targets=batch.targets.masked_fill(~hidden, 0),
            normaliser=batch.normaliser * self.mask_probability,
        )

    def _distance(self, rows: Rows) -> np.ndarray:
        """(B,) events by which windows end earlier; at least one event is left."""
        who = (rows.epoch, rows.user)
        moves = hashed_integers(_UNIT, MOVES, *who, seed=rows.seed) < self.moved * _UNIT  # (B,)
        far = 1 + hashed_integers(max(1, self.max_length - 1), DISTANCES, *who, seed=rows.seed)
        left: np.ndarray = np.minimum(np.where(moves, far, 0), rows.stop - rows.start - 1)
        return left

    def _hidden(self, rows: Rows, length: np.ndarray, learned: np.ndarray) -> np.ndarray:
        """(B, T) bool, of the training events ``learned`` (B, T); none in a row without any."""
        width = learned.shape[1]
        end = rows.stop - rows.start  # (B,) places count from the user's first event
        place = (end - length)[:, None] + np.arange(width)  # (B, T)
        draws = hashed_integers(
            _UNIT, MASKS, rows.epoch, rows.user[:, None], place, seed=rows.seed
        )  # (B, T)
        hidden = learned & (draws < self.mask_probability * _UNIT)
        lowest = np.where(learned, draws, _UNIT).argmin(axis=1)  # (B,)
        newest = width - 1 - learned[:, ::-1].argmax(axis=1)  # (B,)
        turn = hashed_integers(_UNIT, LAST_ONLY, rows.epoch, rows.user, end, seed=rows.seed)  # (B,)
        last_only = turn < self.last_only * _UNIT
        single = last_only | ~hidden.any(axis=1)
        one = np.arange(width) == np.where(last_only, newest, lowest)[:, None]  # (B, T)
        return np.where(single[:, None], one & learned, hidden)
