"""The items that a held-out item is ranked among: the whole catalogue, or a drawn set.

A drawn row is the target and K negatives, without repeats, none from the user's WHOLE history
(TRAIN, VALID, TEST or CONTEXT), in random order. It is a pure function of (seed, code, user,
target) and of the user's history, so adding or reordering rows changes no other row.

Legend: R rows, U users, I items, K negatives, C = K + 1 candidates, D draws in one round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from datamodules.exchange import exchanged_targets
from datamodules.samplers import contains, distinct, event_keys, hashed_integers, train_keys
from datamodules.types import TRAIN, Histories

# Streams of random numbers; far from those of samplers.py, which may have the same seed.
DRAWS, RACE, COLUMNS, EPOCHS = 101, 102, 103, 104
CELLS = 2**21  # numbers worked on at once: keeps memory at some tens of megabytes


class Candidates(Protocol):
    """Draws the candidates of evaluation rows."""

    def draw(
        self, histories: Histories, user: np.ndarray, target: np.ndarray, code: int
    ) -> np.ndarray | None:
        """(R, C) int32 item ids with the target among them, or None for the whole catalogue."""
        ...


@dataclass(frozen=True)
class FullRanking:
    """Rank every item of the catalogue (minus the seen ones, which the seen mask says)."""

    def draw(
        self, histories: Histories, user: np.ndarray, target: np.ndarray, code: int
    ) -> np.ndarray | None:
        """None: nothing is drawn or stored."""
        return None


@dataclass(frozen=True)
class UniformCandidates:
    """The target and ``count`` items that the user has no event with, all equally likely.

    Raises:
        ValueError: ``count`` below 1; on a call, a user with too few items to draw from.
    """

    count: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        _check_count("UniformCandidates", self.count)

    def draw(
        self, histories: Histories, user: np.ndarray, target: np.ndarray, code: int
    ) -> np.ndarray | None:
        """(R, count + 1) int32 item ids in random order, the target among them."""
        weights = np.ones(histories.num_items + 1, dtype=np.int64)
        return draw_candidates(histories, user, target, weights, self.count, code, self.seed)


@dataclass(frozen=True)
class PopularityCandidates:
    """The target and ``count`` unseen items, drawn one by one in proportion to training events.

    Items without a training event cannot be drawn as negatives; a target may be one of them.

    Raises:
        ValueError: ``count`` below 1; on a call, a user with too few items to draw from.
    """

    count: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        _check_count("PopularityCandidates", self.count)

    def draw(
        self, histories: Histories, user: np.ndarray, target: np.ndarray, code: int
    ) -> np.ndarray | None:
        """(R, count + 1) int32 item ids in random order, the target among them."""
        weights = histories.train_counts()
        return draw_candidates(histories, user, target, weights, self.count, code, self.seed)


def _check_count(name: str, count: int) -> None:
    if count < 1:
        raise ValueError(f"{name} got count={count}; expected at least 1 negative.")


def draw_candidates(
    histories: Histories,
    user: np.ndarray,
    target: np.ndarray,
    weights: np.ndarray,
    count: int,
    code: int,
    seed: int,
) -> np.ndarray:
    """(R, count + 1) int32: each target with ``count`` negatives, columns shuffled.

    Arguments:
        user, target: (R,) internal ids.
        weights: (I + 1,) whole numbers; an item is drawn in proportion to its weight.

    Raises:
        ValueError: a row has fewer than ``count`` items of positive weight to draw from.
    """
    user, target = user.astype(np.int64), target.astype(np.int64)
    seen = event_keys(histories)
    # The target counts as seen even if a caller asks about an item outside the history.
    asked = user * (histories.num_items + 1) + target
    seen = distinct(np.concatenate([seen, asked]))
    weights = np.where(np.arange(len(weights)) == 0, 0, weights)
    _check_enough(seen, weights, user, count)
    return _drawn(seen, weights, user, target, count, (code, seed))


def exchange_candidates(
    histories: Histories, user: np.ndarray, target: np.ndarray, count: int, seed: int
) -> np.ndarray:
    """(R, count + 1) int32: each target with ``count`` of the others, in random order.

    None is an item that the row's user trains on. Over all rows an item is ``count`` times as often wrong as
    it is right. Unlike drawn negatives they depend on what rows there are.

    Raises:
        ValueError: see ``exchanged_targets``.
    """
    user, target = user.astype(np.int64), target.astype(np.int64)
    keys, items = train_keys(histories), histories.num_items
    negatives = exchanged_targets(user, target, keys, items, count, seed)
    return _shuffled(user, target, negatives, (TRAIN, seed))


def training_candidates(
    histories: Histories, user: np.ndarray, target: np.ndarray, count: int, epoch: int, seed: int
) -> np.ndarray:
    """(B, count) int32: each training target among items that its user has not trained on, in random order.

    A pure function of (seed, epoch, user, target): the same whatever the rank and the batch. Held-out items
    can be drawn: a model that never met them as wrong answers would know them.

    Arguments:
        user, target: (B,) internal ids; the target is an item that the user trains on.
        count: candidates of a row, at least 2.

    Raises:
        ValueError: a user has too few items left.
    """
    user, target = user.astype(np.int64), target.astype(np.int64)
    keys, num_items = train_keys(histories), histories.num_items
    first = user * (num_items + 1)
    taken = np.searchsorted(keys, first + num_items, "right") - np.searchsorted(keys, first)
    if len(user) and int(taken.max()) > num_items - count + 1:
        worst = int(taken.argmax())
        raise ValueError(
            f"{count} candidates were asked for, but user {user[worst]} has trained on {taken[worst]} of "
            f"{num_items} items: ask for at most {num_items - taken[worst] + 1}."
        )
    weights = np.ones(num_items + 1, dtype=np.int64)
    weights[0] = 0
    stream = int(hashed_integers(2**62, EPOCHS, epoch, seed=seed))
    return _drawn(keys, weights, user, target, count - 1, (TRAIN, stream))


def _drawn(
    seen: np.ndarray,
    weights: np.ndarray,
    user: np.ndarray,
    target: np.ndarray,
    count: int,
    stream: tuple[int, int],
) -> np.ndarray:
    """(R, count + 1) int32: targets and ``count`` unseen items, columns shuffled."""
    negatives = _negatives(seen, weights, user, target, count, stream)
    return _shuffled(user, target, negatives, stream)


def _shuffled(
    user: np.ndarray, target: np.ndarray, negatives: np.ndarray, stream: tuple[int, int]
) -> np.ndarray:
    """(R, K + 1) int32: targets (R,) and negatives (R, K) of a row in random order."""
    code, seed = stream
    table = np.column_stack([target, negatives])  # (R, C)
    keys = (COLUMNS, code, user[:, None], target[:, None], np.arange(table.shape[1]))
    order = np.argsort(hashed_integers(2**62, *keys, seed=seed), axis=1, kind="stable")
    return np.take_along_axis(table, order, axis=1).astype(np.int32)


def _check_enough(seen: np.ndarray, weights: np.ndarray, user: np.ndarray, count: int) -> None:
    if not len(user):
        return
    owner, item = np.divmod(seen, len(weights))
    taken = np.bincount(owner[weights[item] > 0], minlength=int(user.max()) + 1)
    usable = int((weights > 0).sum())
    free = usable - taken[user]  # (R,)
    worst = int(free.argmin())
    if free[worst] < count:
        raise ValueError(
            f"{count} negatives were asked for, but user {user[worst]} has a history with "
            f"{taken[user[worst]]} of the {usable} items that can be drawn, which leaves "
            f"{free[worst]} ({(free < count).sum()} of {len(user)} rows have too few); lower count "
            f"to at most {free[worst]}, or use FullRanking."
        )


def _negatives(
    seen: np.ndarray,
    weights: np.ndarray,
    user: np.ndarray,
    target: np.ndarray,
    count: int,
    stream: tuple[int, int],
) -> np.ndarray:
    """(R, count) int64: successive draws without replacement, in the order they were drawn.

    Draws with replacement come first: leaving out seen and repeated items makes them draws without.
    Rows that too few draws fill get four times as many (the same ones and more), and rows that even
    as many draws as there are items do not fill are finished by ``_race``.
    """
    negatives = np.zeros((len(user), count), dtype=np.int64)
    short, width = np.arange(len(user)), count + count // 2 + 16
    fill, finished = _draw, False
    while len(short) and not finished:
        if width > 4 * len(weights):
            fill, finished, width = _race, True, len(weights)
        step = max(1, CELLS // width)
        for at in range(0, len(short), step):
            some = short[at : at + step]
            args = (seen, weights, user[some], target[some], negatives[some], stream)
            negatives[some] = fill(*args, width)
        short, width = short[negatives[short, -1] == 0], 4 * width
    return negatives


def _draw(
    seen: np.ndarray,
    weights: np.ndarray,
    user: np.ndarray,
    target: np.ndarray,
    negatives: np.ndarray,
    stream: tuple[int, int],
    width: int,
) -> np.ndarray:
    """Rows made anew from ``width`` draws with replacement; zeros where these are too few."""
    code, seed = stream
    total = np.cumsum(weights)
    keys = (DRAWS, code, user[:, None], target[:, None], np.arange(width))
    ticket = hashed_integers(int(total[-1]), *keys, seed=seed)
    items = np.searchsorted(total, ticket, side="right")  # (R, D)
    fresh = _first_in_row(items) & ~contains(seen, user[:, None] * len(weights) + items)
    rank = np.cumsum(fresh, axis=1)
    row, draw = np.nonzero(fresh & (rank <= negatives.shape[1]))
    result = np.zeros_like(negatives)
    result[row, rank[row, draw] - 1] = items[row, draw]
    return result


def _first_in_row(items: np.ndarray) -> np.ndarray:
    """(R, D) bool: no earlier column of the row holds the same item."""
    width = items.shape[1]
    tagged = np.sort(items * width + np.arange(width), axis=1)  # by item, then column
    item, column = np.divmod(tagged, width)
    first = np.ones(items.shape, dtype=bool)
    first[:, 1:] = item[:, 1:] != item[:, :-1]
    result = np.empty_like(first)
    np.put_along_axis(result, column, first, axis=1)
    return result


def _race(
    seen: np.ndarray,
    weights: np.ndarray,
    user: np.ndarray,
    target: np.ndarray,
    negatives: np.ndarray,
    stream: tuple[int, int],
    width: int,
) -> np.ndarray:
    """Fill the zeros at the end of each row of ``negatives`` (R, count) by a race of all items.

    An item of weight w arrives after an exponential time of rate w; the order of arrival is the
    order of successive draws without replacement (Efraimidis & Spirakis 2006), so this continues
    the same distribution exactly.
    """
    code, seed = stream
    ids, count = np.arange(width), negatives.shape[1]
    keys = (RACE, code, user[:, None], target[:, None], ids)
    uniform = (hashed_integers(2**53, *keys, seed=seed) + 0.5) / 2**53  # in (0, 1)
    with np.errstate(divide="ignore"):
        arrival = -np.log(uniform) / weights  # (R, I + 1), infinite for weight 0
    arrival[contains(seen, user[:, None] * len(weights) + ids)] = np.inf
    np.put_along_axis(arrival, negatives, np.inf, axis=1)  # drawn already; a zero hits the padding
    early = np.argpartition(arrival, count - 1, axis=1)[:, :count]
    by_time = np.argsort(np.take_along_axis(arrival, early, axis=1), axis=1)
    arrived = np.take_along_axis(early, by_time, axis=1)  # (R, count)
    have = (negatives > 0).sum(axis=1, keepdims=True)  # (R, 1)
    place = np.arange(count) - have  # (R, count), below 0 where filled already
    return np.where(place < 0, negatives, np.take_along_axis(arrived, np.maximum(place, 0), axis=1))
