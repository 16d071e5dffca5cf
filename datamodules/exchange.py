"""Negatives that are other rows' positives: no item is more often right than wrong.

Wrong answers that are drawn let a model tell labels from the item alone, however they are drawn: a user's own
items never are among them. Targets that change places do not: each is as often wrong as it is right.

Legend: R rows, I items.
"""

from __future__ import annotations

import numpy as np

from datamodules.samplers import contains, hashed_integers, hashed_order

# Streams of random numbers; far from those of candidates.py, which may have the same seed.
ORDER, PARTNERS = 201, 202
_ROUNDS = 50  # in which many rows change places at once


def exchanged_targets(
    user: np.ndarray, target: np.ndarray, taken: np.ndarray, num_items: int, count: int, seed: int
) -> np.ndarray:
    """(R, count): in each column all targets, none in a row whose user took it, or twice in a row.

    Args:
        user, target: (R,) internal ids.
        taken: sorted keys ``user * (num_items + 1) + item`` of what users took.
        num_items: I.
        count: of columns.
        seed: of the order.

    Raises:
        ValueError: a row is left for which no other has a target that both can exchange.
    """
    found = np.zeros((len(user), 0), dtype=target.dtype)
    for _ in range(count):
        column = _exchanged(user, target, taken, num_items, found, seed)
        found = np.column_stack([found, column])
    return found


def _exchanged(
    user: np.ndarray,
    target: np.ndarray,
    taken: np.ndarray,
    num_items: int,
    before: np.ndarray,
    seed: int,
) -> np.ndarray:
    """(R,) one column more: a random order of the targets, of which misplaced ones then change places.

    Args:
        before: (R, columns) that there are.
    """
    rows, column = before.shape
    given = target[hashed_order(rows, ORDER, column, seed=seed)]

    def fits(row: np.ndarray, item: np.ndarray) -> np.ndarray:
        twice = (before[row] == item[:, None]).any(axis=1)
        return ~contains(taken, user[row] * (num_items + 1) + item) & ~twice

    everyone = np.arange(rows)
    for turn in range(_ROUNDS):
        bad = np.flatnonzero(~fits(everyone, given))
        if not len(bad):
            return given
        other = hashed_integers(rows, PARTNERS, column, turn, bad, seed=seed)
        good = fits(bad, given[other]) & fits(other, given[bad])
        first, second = _apart(bad[good], other[good])
        given[first], given[second] = given[second], given[first]
    for row in np.flatnonzero(~fits(everyone, given)):
        if fits(np.array([row]), given[[row]])[0]:
            continue  # what it held has gone to a row before it
        here = np.full(rows, row)
        able = np.flatnonzero(fits(here, given) & fits(everyone, np.full(rows, given[row])))
        if not len(able):
            raise ValueError(
                f"user {user[row]} took so much that no other row's target can be a wrong answer of all "
                "their rows: take by: popularity, or fewer rows of a user."
            )
        pick = able[int(hashed_integers(len(able), PARTNERS, column, _ROUNDS, row, seed=seed)[0])]
        given[row], given[pick] = given[pick], given[row]
    return given


def _apart(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pairs (N,) in which no row stands that stands in a pair before."""
    pairs = np.column_stack([first, second])
    _, place = np.unique(pairs, return_index=True)
    firsts = np.zeros(pairs.size, dtype=bool)
    firsts[place] = True
    alone = firsts.reshape(pairs.shape).all(axis=1)
    return first[alone], second[alone]
