"""Which events a row is made of, and what every method's batch gets besides its own tensors.

Legend: U users, N interactions, R rows, B batch rows, T history length, K negatives, S seen pairs.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import Dataset

from datamodules.candidates import training_candidates
from datamodules.examples import ExampleTable
from datamodules.samplers import RowBatch, sample_negatives
from datamodules.types import TRAIN, Batch, Collator, EvalRows, Histories, Rows


class TrainRows:
    """Which stretches of history are learned from.

    A row ends one past a training event and carries up to ``max_length`` targets before that. It starts
    at its user's first event: the method's collator cuts what it cannot use. With ``all_windows`` a
    history gives as many rows as it takes to make every training event a target once, counted from its
    newest; without, one row. Only a method that reads no history (``sequential`` false) can learn a user's
    first event, too. With ``newest_target`` a row's last event is its only target.
    """

    def __init__(
        self,
        histories: Histories,
        max_length: int,
        all_windows: bool,
        sequential: bool = True,
        newest_target: bool = False,
    ) -> None:
        self.histories = histories
        users = histories.users  # (N,)
        learned = histories.split == TRAIN
        if sequential:
            learned &= np.arange(len(learned)) > histories.offsets[users]
        last = np.full(histories.num_users + 1, -1, np.int64)  # (U + 1,) last training event
        np.maximum.at(last, users[learned], np.flatnonzero(learned))
        user = np.flatnonzero(last >= 0)
        start, stop = histories.offsets[user], last[user] + 1
        rows = -(-(stop - start - sequential) // max_length) if all_windows else np.ones_like(user)
        nth = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)
        start, stop = np.repeat(start, rows), np.repeat(stop, rows) - nth * max_length
        total = np.concatenate([[0], np.cumsum(learned)])
        targets = total[stop] - total[np.maximum(start, stop - max_length)]
        some = targets > 0  # a stretch of context alone teaches nothing
        self.user = np.repeat(user, rows)[some]  # (R,)
        self.start, self.stop = start[some], stop[some]
        # (R,) positions that carry a loss
        self.target_counts = np.ones_like(targets[some]) if newest_target else targets[some]

    def keep(self, rows: np.ndarray) -> None:
        """Learn from these rows alone."""
        self.user, self.target_counts = self.user[rows], self.target_counts[rows]
        self.start, self.stop = self.start[rows], self.stop[rows]


class TrainDataset(Dataset[Rows]):
    """Hands a sampler's batch of training row numbers on as ``Rows``.

    ``candidates``: items that each row's newest event is chosen among; 0: the rows have none.
    """

    def __init__(self, rows: TrainRows, seed: int, candidates: int = 0) -> None:
        self.rows, self.seed, self.candidates = rows, seed, candidates

    def every(self) -> Rows:
        """All rows at once."""
        return self[RowBatch.every(len(self.rows.user))]

    def __getitem__(self, batch: RowBatch) -> Rows:
        rows, row = self.rows, batch.row
        user, stop = rows.user[row], rows.stop[row]
        drawn = None
        if self.candidates:
            newest = rows.histories.items[stop - 1]
            drawn = training_candidates(
                rows.histories, user, newest, self.candidates, batch.epoch, self.seed
            )
        return Rows(
            rows.histories, row, user, rows.start[row], stop,
            batch.epoch, self.seed, batch.filler, batch.normaliser, candidates=drawn,
        )  # fmt: skip


class ExampleDataset(Dataset[Rows]):
    """Hands a sampler's batch of labelled training examples on as ``Rows``."""

    def __init__(
        self, histories: Histories, examples: ExampleTable, seed: int, liked_above: float | None
    ) -> None:
        self.histories, self.examples, self.seed = histories, examples, seed
        self.liked_above = liked_above

    def __getitem__(self, batch: RowBatch) -> Rows:
        part = self.examples.take(batch.row)
        return Rows(
            self.histories, batch.row, part.user, part.start, part.stop, batch.epoch, self.seed,
            batch.filler, batch.normaliser, part.target, part.label, self.liked_above,
        )  # fmt: skip


class EvalDataset(Dataset[Rows]):
    """Hands a sampler's batch of held-out row numbers on as ``Rows``."""

    def __init__(
        self, histories: Histories, rows: EvalRows, seed: int, liked_above: float | None = None
    ) -> None:
        self.histories, self.rows, self.seed = histories, rows, seed
        self.liked_above = liked_above

    def every(self) -> Rows:
        """All rows at once."""
        return self[RowBatch.every(len(self.rows.user))]

    def __getitem__(self, batch: RowBatch) -> Rows:
        rows, row = self.rows, batch.row
        user = rows.user[row]
        return Rows(
            histories=self.histories,
            row=row,
            user=user,
            start=self.histories.offsets[user] if rows.start is None else rows.start[row],
            stop=rows.position[row],
            epoch=0,
            seed=self.seed,
            target=rows.target[row],
            label=None if rows.label is None else rows.label[row],
            liked_above=self.liked_above,
            candidates=None if rows.candidates is None else rows.candidates[row],
        )


class AttachNegatives:
    """Adds sampled items that the user has not trained on: (B, T, K), the same on every rank."""

    def __init__(self, collate: Collator, count: int, sequential: bool = True) -> None:
        self.collate, self.count, self.sequential = collate, count, sequential

    def __call__(self, rows: Rows) -> Batch:
        """The method's batch with negatives."""
        batch = self.collate(rows)
        shape = (batch.history.shape[1], self.count)
        # Where each window begins in its user's history (B,); targets follow one event later.
        begins = rows.stop - self.sequential - batch.length.numpy() - rows.start
        drawn = sample_negatives(rows.histories, rows.user, rows.epoch, rows.seed, shape, begins)
        return replace(batch, negatives=torch.from_numpy(drawn).long())


class AttachLabels:
    """Adds what a yes/no method learns from: the item asked about, its label, which events were liked."""

    def __init__(self, collate: Collator) -> None:
        self.collate = collate

    def __call__(self, rows: Rows) -> Batch:
        """The method's batch with ``target`` (B,), ``liked`` (B, T) and, where known ``label`` (B,)."""
        assert rows.target is not None
        batch = self.collate(rows)
        length = batch.length.numpy()  # (B,) the newest events that the method reads
        columns = np.arange(batch.history.shape[1])
        real = columns < length[:, None]  # (B, T)
        liked = real
        if rows.liked_above is not None:
            assert rows.histories.ratings is not None
            index = np.where(real, (rows.stop - length)[:, None] + columns, 0)
            liked = real & (rows.histories.ratings[index] > rows.liked_above)
        return replace(
            batch,
            target=torch.from_numpy(rows.target.astype(np.int64)),
            label=None if rows.label is None else torch.from_numpy(rows.label.copy()),
            liked=torch.from_numpy(liked),
            normaliser=torch.tensor(rows.normaliser, dtype=torch.float32),
        )


class AttachTargets:
    """Adds to a method's batch what evaluation needs of every method alike."""

    def __init__(self, collate: Collator, rows: EvalRows, mask_seen: bool) -> None:
        self.collate, self.rows, self.mask_seen = collate, rows, mask_seen

    def __call__(self, rows: Rows) -> Batch:
        """The method's batch with targets, groups, weights and what must not be ranked."""
        held_out, row = self.rows, rows.row
        candidates = held_out.candidates
        ranked = candidates is None and held_out.label is None  # in the whole catalogue
        newest = np.maximum(rows.stop - 1, rows.start)  # the target's own place without a history
        return replace(
            self.collate(rows),
            target=torch.from_numpy(held_out.target[row]),
            groups=torch.from_numpy(held_out.groups[row]),
            weight=torch.from_numpy(held_out.weight[row]),
            time=torch.from_numpy(rows.histories.timestamps[newest]),
            candidates=None if candidates is None else torch.from_numpy(candidates[row]).long(),
            seen=self._not_ranked(rows) if ranked else None,
        )

    def _not_ranked(self, rows: Rows) -> torch.Tensor | None:
        """(S, 2) pairs (batch row, item) of what was seen and of what is not wanted."""
        pairs = [_seen_pairs(rows)] if self.mask_seen else []
        if self.rows.unwanted is not None:
            items = torch.from_numpy(self.rows.unwanted[rows.row]).long()  # (B, E)
            owner = torch.arange(len(items))[:, None].expand_as(items)
            pairs.append(torch.stack([owner, items], dim=2).flatten(0, 1))
        return torch.cat(pairs) if pairs else None


def _seen_pairs(rows: Rows) -> torch.Tensor:
    """(S, 2) pairs (batch row, item) of every earlier event of the row's user."""
    counts = rows.stop - rows.start  # (B,)
    owner = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    items = rows.histories.items[rows.start[owner] + within]
    return torch.from_numpy(np.stack([owner, items.astype(np.int64)], axis=1))
