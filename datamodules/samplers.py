"""Which rows a step sees, and which negatives: functions of a seed, never of a rank or a worker.

A global batch (all rows of one optimizer step) is composed before it is cut into shards, one for
each rank and micro batch, so devices and micro batches change a result only by rounding
and by the draws of dropout.

Use the samplers as ``DataLoader(dataset, sampler=sampler, batch_size=None)``: the dataset is then
indexed with a ``RowBatch``, and Lightning calls ``set_epoch``.

Legend: R rows, U users, I items, N events, B batch rows, T history length, K negatives, W ranks,
M micro batches.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from datamodules.types import TRAIN, Histories

POOL_BATCHES = 50  # batches in a pool that is sorted by length: little padding, still random
# Streams of random numbers, so that the same seed never gives two uses the same numbers.
SHUFFLE_ROWS, SHUFFLE_BATCHES, NEGATIVES = 1, 2, 3
_TRAIN_KEYS: dict[int, np.ndarray] = {}  # id(Histories) -> its sorted keys; see train_keys


def _mix(state: np.ndarray) -> np.ndarray:
    """One output of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014), elementwise on uint64."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def hashed_integers(
    high: int | np.ndarray, *keys: int | np.integer | np.ndarray, seed: int
) -> np.ndarray:
    """Uniform integers in ``[0, high)``, a pure function of ``seed`` and ``keys``.

    Arguments:
        high: exclusive bound, at least 1; broadcast against the keys.
        keys: integers or integer arrays, broadcast together. Give the small shapes first: each key
            is mixed into what came before it, so only later keys work on the full shape.
        seed: any integer.

    Returns:
        int64 array of the broadcast shape. The bias of the modulus is below ``high / 2**64``.
    """
    # 1-d inside: NumPy scalars would warn about the wrap-around that the mixing relies on.
    state = _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64))
    shape = np.broadcast_shapes(np.shape(high), *map(np.shape, keys))
    for key in keys:
        state = _mix(state ^ np.asarray(key, dtype=np.int64).astype(np.uint64))
    drawn = state % np.asarray(high, dtype=np.uint64)
    return np.broadcast_to(drawn, shape or (1,)).reshape(shape).astype(np.int64)


def hashed_order(count: int, *keys: int, seed: int) -> np.ndarray:
    """(count,) int64: a permutation that is a pure function of ``seed`` and ``keys``."""
    return np.argsort(hashed_integers(2**62, *keys, np.arange(count), seed=seed), kind="stable")


def others(items: np.ndarray) -> np.ndarray:
    """(N,) another one of items (N,) for each of them, always the same; N is at least 2."""
    order = hashed_order(len(items), seed=0)
    found = np.empty_like(items)
    found[order] = np.roll(items[order], 1)
    return found


def contains(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Bool array of ``wanted``'s shape: is each value among the sorted ``keys``?"""
    if not len(keys):
        return np.zeros(wanted.shape, dtype=bool)
    return keys[np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)] == wanted


def distinct(numbers: np.ndarray) -> np.ndarray:
    """The different numbers, sorted; on millions of them many times as fast as ``np.unique``'s hash table."""
    ordered = np.sort(numbers)
    return ordered[
        np.append(np.ones(min(1, len(ordered)), dtype=bool), ordered[1:] != ordered[:-1])
    ]


def event_keys(histories: Histories, code: int | None = None) -> np.ndarray:
    """Sorted distinct ``user * (I + 1) + item`` of all events, or of those with one split code."""
    keys = histories.users.astype(np.int64) * (histories.num_items + 1) + histories.items
    return distinct(keys if code is None else keys[histories.split == code])


def train_keys(histories: Histories) -> np.ndarray:
    """``event_keys`` of the training events, made once for each ``Histories`` object.

    Loader workers that are forked share the parent's copy if it has been asked for before.
    """
    name = id(histories)
    if name not in _TRAIN_KEYS:
        _TRAIN_KEYS[name] = event_keys(histories, TRAIN)
        # Runs before the id can be given to another object.
        weakref.finalize(histories, _TRAIN_KEYS.pop, name, None).atexit = False
    return _TRAIN_KEYS[name]


def sample_negatives(
    histories: Histories,
    user: np.ndarray,
    epoch: int,
    seed: int,
    shape: tuple[int, int],
    begins: np.ndarray | None = None,
) -> np.ndarray:
    """Items that each user has not trained on, uniform, independent of each other.

    A pure function of (seed, epoch, user, place in the history, draw): the same whatever the rank,
    the batch around the user, the window it is cut into, or the padded length T.

    Arguments:
        user: (B,) internal user ids.
        shape: (T, K), positions and draws a position.
        begins: (B,) place in the user's history of each row's first position; None = 0.

    Returns:
        (B, T, K) int32 item ids in 1..I.

    Raises:
        ValueError: a user has trained on every item.
    """
    keys, num_items = train_keys(histories), histories.num_items
    user = np.asarray(user, dtype=np.int64)
    first = user * (num_items + 1)
    begin, end = np.searchsorted(keys, first), np.searchsorted(keys, first + num_items, "right")
    if (end - begin >= num_items).any():
        raise ValueError(
            f"User {user[end - begin >= num_items][0]} has trained on all {num_items} items, so "
            "there is no negative to draw; leave such users out, or use a loss over the whole "
            "catalogue."
        )

    def draw(attempt: int, *cell: np.ndarray) -> np.ndarray:
        hashed = hashed_integers(num_items, NEGATIVES, epoch, attempt, *cell, seed=seed)
        return (1 + hashed).astype(np.int32)

    draws = np.arange(shape[1])
    places = np.arange(shape[0]) + (0 if begins is None else np.asarray(begins)[:, None])
    positions = np.broadcast_to(places, (len(user), shape[0]))[:, :, None]  # (B, T, 1)
    items = draw(0, user[:, None, None], positions, draws)  # (B, T, K)
    rejected = np.empty(items.shape, dtype=bool)
    own = np.zeros(num_items + 1, dtype=bool)  # a table is many times faster than a search
    for row in range(len(user)):
        trained = keys[begin[row] : end[row]] - first[row]
        own[trained] = True
        rejected[row] = own[items[row]]
        own[trained] = False
    todo = np.nonzero(rejected)  # row, position, draw
    attempt = 0
    while len(todo[0]):  # only the rejected cells are drawn again
        attempt += 1
        which, t, k = todo
        items[todo] = draw(attempt, user[which], positions[which, t, 0], k)
        again = contains(keys, first[todo[0]] + items[todo])
        todo = tuple(index[again] for index in todo)
    return items


@dataclass(frozen=True)
class RowBatch:
    """The rows of one micro batch on one rank.

    ``normaliser`` divides the SUM of the loss over this shard's positions. It is (targets of the
    global batch) / (W * M), so the mean over ranks (DDP) and micro batches (gradient accumulation)
    of the shards' losses is exactly the global sum over the global count.
    """

    row: np.ndarray  # (b,) int64
    filler: np.ndarray  # (b,) bool: only keeps ranks in step, carries no loss
    normaliser: float = 1.0
    epoch: int = 0

    @classmethod
    def every(cls, count: int) -> RowBatch:
        """All of ``count`` rows at once."""
        return cls(np.arange(count), np.zeros(count, dtype=bool))


def _check_shards(batch_size: int, rank: int, world_size: int, micro_batches: int = 1) -> None:
    if batch_size < 1 or micro_batches < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"Got batch_size={batch_size}, rank={rank}, world_size={world_size}, micro_batches="
            f"{micro_batches}; expected batch_size and micro_batches of at least 1 and a rank from "
            "0 to world_size - 1."
        )


def global_batches(
    lengths: np.ndarray,
    batch_size: int,
    seed: int,
    epoch: int,
    shuffle: bool,
    bucket: bool,
    together: int = 1,
) -> list[np.ndarray]:
    """Every row once, in batches of ``batch_size`` (the last one cut may be smaller), longest rows first.

    With ``bucket``, pools of ``POOL_BATCHES`` batches of the shuffled order are sorted by length
    before they are cut, and the batches are shuffled afterwards. Where a row has a loss at every
    position this must not be done: a batch of short rows would weigh as much as one of long rows, and
    each step would see histories of one length alone. Rows that follow one another stay ``together``, as
    many as it says.
    """
    if together > 1:
        longest = lengths.reshape(-1, together).max(axis=1)
        groups = global_batches(longest, batch_size // together, seed, epoch, shuffle, bucket)
        return [(g[:, None] * together + np.arange(together)).ravel() for g in groups]
    rows = len(lengths)
    order = hashed_order(rows, SHUFFLE_ROWS, epoch, seed=seed) if shuffle else np.arange(rows)
    pool = np.arange(rows) // (POOL_BATCHES * batch_size if bucket else batch_size)
    order = order[np.lexsort((-lengths[order], pool))]  # stable: equal lengths stay shuffled
    batches = [order[i : i + batch_size] for i in range(0, rows, batch_size)]
    if shuffle and bucket:
        turn = hashed_order(len(batches), SHUFFLE_BATCHES, epoch, seed=seed)
        batches = [batches[i] for i in turn]
    return batches


class GlobalBatchSampler:
    """Training batches of one rank: M ``RowBatch``es for each global batch.

    Every rank makes equally many steps and every row comes once an epoch over all ranks. A shard
    that would be empty holds one row marked as filler. There is no state but the epoch, and how many
    micro batches the next iteration leaves out because they were learned from before (``skip``).

    Arguments:
        lengths: (R,) length of each row, in whatever unit is padded (events or tokens).
        batch_size: rows of one optimizer step over ALL ranks and micro batches.
        target_counts: (R,) positions with a loss in each row; None means one each.
        together: rows one after the other that stand in one batch.

    Raises:
        ValueError: no rows, impossible sizes, or a row without targets.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        bucket: bool = False,
        rank: int = 0,
        world_size: int = 1,
        micro_batches: int = 1,
        target_counts: np.ndarray | None = None,
        together: int = 1,
    ) -> None:
        _check_shards(batch_size, rank, world_size, micro_batches)
        if together < 1 or batch_size % together or len(lengths) % together:
            raise ValueError(
                f"{together} rows each are to stand in one batch, but there are {len(lengths)} rows in "
                f"batches of {batch_size}: give a batch size that is a multiple of {together}."
            )
        self.together = together
        self.lengths = np.asarray(lengths, dtype=np.int64)
        counts = np.ones(len(lengths)) if target_counts is None else np.asarray(target_counts)
        if not len(lengths) or len(counts) != len(lengths) or counts.min() < 1:
            raise ValueError(
                f"Got {len(lengths)} rows and {len(counts)} target counts, "
                f"{int((counts < 1).sum())} of them below 1; expected at least one row and as many "
                "counts as rows, each 1 or more: leave out rows that have nothing to learn from."
            )
        self.target_counts = counts
        self.batch_size, self.seed, self.shuffle, self.bucket = batch_size, seed, shuffle, bucket
        self.rank, self.world_size, self.micro_batches = rank, world_size, micro_batches
        self.epoch = self.skip = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Micro batches an epoch, the same on every rank."""
        return -(-len(self.lengths) // self.batch_size) * self.micro_batches

    def __iter__(self) -> Iterator[RowBatch]:
        """Micro batches of this rank, those of one global batch in a row."""
        skip, self.skip = self.skip, 0
        yield from itertools.islice(self._every(), skip, None)

    def _every(self) -> Iterator[RowBatch]:
        for batch in global_batches(
            self.lengths, self.batch_size, self.seed, self.epoch, self.shuffle, self.bucket,
            self.together,
        ):  # fmt: skip
            total = float(self.target_counts[batch].sum())
            normaliser = total / (self.world_size * self.micro_batches)
            # Ranks deal out neighbours in length, so that none waits for another's long rows.
            for part in np.array_split(batch, self.micro_batches):
                mine = part[self.rank :: self.world_size]
                row = mine if len(mine) else batch[:1]
                yield RowBatch(row, np.full(len(row), not len(mine)), normaliser, self.epoch)


class EvalBatchSampler:
    """Evaluation batches of one rank: every row exactly once over the ranks, nothing repeated.

    Ranks may have unequal numbers of batches (one may have none), so no collective may run inside
    an evaluation step. Longest rows come first: too long a row fails at once, not at the end.

    Arguments:
        lengths: (R,) length of each row.
        batch_size: rows of one batch on one rank.
    """

    def __init__(
        self, lengths: np.ndarray, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        _check_shards(batch_size, rank, world_size)
        longest_first = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
        self.rows = longest_first[rank::world_size]
        self.batch_size = batch_size

    def __len__(self) -> int:
        """Batches of this rank."""
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[RowBatch]:
        """Batches of this rank, longest rows first."""
        for start in range(0, len(self.rows), self.batch_size):
            row = self.rows[start : start + self.batch_size]
            yield RowBatch(row, np.zeros(len(row), dtype=bool))
