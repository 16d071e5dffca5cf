"""Rows of what is asked for: users as they are now, or as they were; histories that somebody makes up.

Legend: R rows, C candidates, U users, E items that are not wanted, I items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from datamodules.row_samples import take_rows
from datamodules.types import CONTEXT, EvalRows, Histories

NOBODY = (
    0  # the user of a history that belongs to none: methods read the padding's or a mean vector
)


def asking(
    histories: Histories,
    users: Sequence[int],
    candidates: np.ndarray | None = None,
    unwanted: np.ndarray | None = None,
) -> EvalRows:
    """One row a user, behind the whole history.

    Args:
        histories: of all users.
        users: (R,) internal ids.
        candidates: (R, C) items to choose among; None asks for the whole catalogue without the history.
        unwanted: (R, E) items that must not be ranked, 0 = none.

    Raises:
        ValueError: a user does not exist, or has every item already.
    """
    user = np.array(users, dtype=np.int64)
    if len(user) and not 1 <= user.min() <= user.max() <= histories.num_users:
        raise ValueError(f"users are numbered 1 to {histories.num_users}, got {list(users)}")
    start, stop = histories.offsets[user], histories.offsets[user + 1]
    return _rows(histories, user, start, stop, candidates, unwanted)


def asking_with(
    histories: Histories,
    events: Sequence[Sequence[int]],
    users: Sequence[int],
    candidates: np.ndarray | None = None,
    unwanted: np.ndarray | None = None,
) -> tuple[Histories, EvalRows]:
    """One row a history that is given, and the histories that the rows are of.

    The events are taken to be liked, and to be as new as the newest of the data.

    Args:
        histories: of the data.
        events: (R) lists of internal items, oldest first.
        users: (R,) whose vectors a method reads that has some; ``NOBODY`` where the history is of none.
        candidates, unwanted: as of ``asking``.

    Raises:
        ValueError: an item does not exist, or a history has every item already.
    """
    lengths = [len(own) for own in events]
    # The last event is a user's of its own: the place behind every history exists.
    flat = np.array([item for own in events for item in own] + [1], dtype=np.int32)
    if flat.min() < 1 or flat.max() > histories.num_items:
        raise ValueError(f"items are numbered 1 to {histories.num_items}, got {sorted(set(flat))}")
    offsets = np.cumsum([0, 0, *lengths, 1])
    own = Histories(
        offsets, flat, np.full(len(flat), CONTEXT, np.int8),
        np.full(len(flat), histories.timestamps.max(initial=0), np.int64), histories.num_items,
        None if histories.ratings is None else np.full(len(flat), np.inf, np.float32),
    )  # fmt: skip
    user = np.array(users, dtype=np.int64)
    return own, _rows(own, user, offsets[1:-2], offsets[2:-1], candidates, unwanted)


def asking_before(
    held_out: EvalRows,
    users: Sequence[int],
    candidates: np.ndarray | None = None,
    unwanted: np.ndarray | None = None,
) -> EvalRows:
    """Each user's newest held-out row, as evaluation sees it: behind what came before its target.

    Args:
        held_out: rows of a split.
        users: (R,) internal ids.
        candidates, unwanted: as of ``asking``; candidates need not hold the target.

    Raises:
        ValueError: a user has no held-out row.
    """
    order = np.lexsort((held_out.position, held_out.user))
    last = np.searchsorted(held_out.user[order], users, side="right") - 1
    found = order[np.maximum(last, 0)]
    if missing := [u for u, own in zip(users, held_out.user[found], strict=True) if u != own]:
        raise ValueError(f"user {missing[0]} has no held-out event to ask before")
    rows = take_rows(held_out, found)
    target = rows.target if candidates is None else candidates[:, 0].astype(np.int64)
    return replace(rows, candidates=candidates, unwanted=unwanted, target=target, label=None)


def asking_each(rows: EvalRows) -> EvalRows:
    """(R C,) labelled rows, one for each row and candidate, for methods that are asked about one item."""
    assert rows.candidates is not None
    candidates = rows.candidates
    each = take_rows(rows, np.repeat(np.arange(len(rows.user)), candidates.shape[1]))
    asked = candidates.astype(np.int64).flatten()
    return replace(each, target=asked, candidates=None, label=np.zeros(len(asked), dtype=bool))


def _rows(
    histories: Histories,
    user: np.ndarray,
    start: np.ndarray,
    stop: np.ndarray,
    candidates: np.ndarray | None,
    unwanted: np.ndarray | None,
) -> EvalRows:
    # A target has to be named, and nothing is made of it: the first candidate, or the first unseen item.
    if candidates is not None:
        target = candidates[:, 0].astype(np.int64)
    else:
        without = np.zeros((len(user), 0), np.int32) if unwanted is None else unwanted
        rows = zip(start, stop, without, user, strict=True)
        target = np.array([_first_unseen(histories, *row) for row in rows], dtype=np.int64)
    return EvalRows(
        user, stop, target, np.ones((len(user), 1), dtype=bool), ("all",), np.ones(len(user)),
        candidates, start=start, unwanted=unwanted,
    )  # fmt: skip


def _first_unseen(
    histories: Histories, start: int, stop: int, unwanted: np.ndarray, user: int
) -> int:
    unseen = np.ones(histories.num_items + 1, dtype=bool)
    unseen[0] = False
    unseen[histories.items[start:stop]] = False
    unseen[unwanted] = False
    if not unseen.any():
        who = f"user {user}" if user != NOBODY else "who has that history"
        raise ValueError(f"{who} has all {histories.num_items} items already")
    return int(unseen.argmax())
