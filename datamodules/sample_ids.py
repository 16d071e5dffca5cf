"""Filters that draw users or items by seed, as a function of each raw id.

The same ids are drawn on every machine, whatever the order of the file. Filters as in ``filters.py``.

Legend: N ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.lib.stride_tricks import sliding_window_view

from datamodules.samplers import hashed_integers

# Streams of random numbers; far from those of samplers.py and candidates.py, which may share a seed.
USERS, ITEMS = 201, 202
HASHES = 2**62  # a hash of an id is below this
_AT_ONCE = 2**19  # ids hashed together: keeps memory at some tens of megabytes


@dataclass(frozen=True)
class SampleUsers:
    """Keep some users, drawn by seed, with their whole histories.

    Exactly ``count`` of them, or each with probability ``fraction`` (so that the number is near that
    share, not equal to it). The draw is a hash of the raw id: the order of the file, and with
    ``fraction`` everything else in it too, makes no difference to whether a user is drawn, and more
    users of the same seed include the fewer.

    Raises:
        ValueError: not exactly one of ``count`` and ``fraction``, or an impossible one; on a call,
            fewer than ``count`` users.
    """

    count: int | None = None
    fraction: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check_sample("SampleUsers", self.count, self.fraction)

    def __call__(self, frame: pl.DataFrame) -> pl.DataFrame:
        """All rows of the drawn users."""
        draw = (USERS, self.count, self.fraction, self.seed)
        drawn = _drawn(frame["user_id"], "SampleUsers", *draw)
        return frame.filter(frame["user_id"].is_in(drawn.implode()))

    def describe(self) -> str:
        """For example ``1000 users, drawn by seed 0``."""
        return _describe_sample("users", self.count, self.fraction, self.seed)


@dataclass(frozen=True)
class SampleItems:
    """Keep the events of some items, drawn by seed as ``SampleUsers`` draws users.

    Histories lose the events of other items, and so do users that have no other ones.

    Raises:
        ValueError: as ``SampleUsers``.
    """

    count: int | None = None
    fraction: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check_sample("SampleItems", self.count, self.fraction)

    def __call__(self, frame: pl.DataFrame) -> pl.DataFrame:
        """All rows of the drawn items."""
        draw = (ITEMS, self.count, self.fraction, self.seed)
        drawn = _drawn(frame["item_id"], "SampleItems", *draw)
        return frame.filter(frame["item_id"].is_in(drawn.implode()))

    def describe(self) -> str:
        """For example ``10% of items, drawn by seed 0``."""
        return _describe_sample("items", self.count, self.fraction, self.seed)


def hash_ids(ids: pl.Series, *keys: int, seed: int) -> np.ndarray:
    """(N,) int64 in [0, 2**62): a pure function of each id's text, ``keys`` and ``seed``.

    The UTF-8 bytes are mixed in eight at a time, their number first, by ``hashed_integers``, which no
    release of Polars, NumPy or Python changes. Five million ids take a second or two.
    """
    parts = [_hash(ids[at : at + _AT_ONCE], keys, seed) for at in range(0, len(ids), _AT_ONCE)]
    return np.concatenate([np.empty(0, np.int64), *parts])


def _hash(ids: pl.Series, keys: tuple[int, ...], seed: int) -> np.ndarray:
    size = ids.str.len_bytes().to_numpy().astype(np.int64)
    text = np.frombuffer("".join(ids.to_list()).encode() + bytes(8), np.uint8)
    words = sliding_window_view(text, 8)  # the eight bytes from each place on
    at = np.cumsum(size) - size
    state = hashed_integers(HASHES, *keys, size, seed=seed)
    longer, done = np.flatnonzero(size > 0), 0
    while len(longer):
        word = words[at[longer] + done].view("<u8")[:, 0]
        beyond = 8 - np.minimum(size[longer] - done, 8)  # bytes that belong to the next id
        word = word << (8 * beyond).astype(np.uint64)
        state[longer] = hashed_integers(HASHES, state[longer], word.view(np.int64), seed=seed)
        done += 8
        longer = longer[size[longer] > done]
    return state


def _drawn(
    ids: pl.Series, name: str, stream: int, count: int | None, fraction: float | None, seed: int
) -> pl.Series:
    """The distinct ids that are drawn, in the column's own type."""
    text = ids.unique().cast(pl.String)
    table = pl.DataFrame({"id": text, "hash": hash_ids(text, stream, seed=seed)})
    if fraction is not None:
        return table.filter(pl.col("hash") < fraction * HASHES)["id"].cast(ids.dtype)
    if count is None or count > len(text):
        raise ValueError(
            f"{name}(count={count}) was given {len(text)} to draw from; ask for fewer, or leave "
            "this filter out."
        )
    # Equal hashes are all but impossible; the id then decides, so that the draw stays a function of ids.
    last = np.partition(table["hash"].to_numpy(), count - 1)[count - 1]
    return table.filter(pl.col("hash") <= last).sort("hash", "id")["id"][:count].cast(ids.dtype)


def _check_sample(name: str, count: int | None, fraction: float | None) -> None:
    good = (count is not None and count >= 1) or (fraction is not None and 0 < fraction <= 1)
    if not good or (count is not None and fraction is not None):
        raise ValueError(
            f"{name} got count={count}, fraction={fraction}; give exactly one of them: a count of "
            "1 or more, or a fraction above 0 and at most 1."
        )


def _describe_sample(what: str, count: int | None, fraction: float | None, seed: int) -> str:
    amount = f"{count}" if fraction is None else f"{100 * fraction:g}% of"
    return f"{amount} {what}, drawn by seed {seed}"
