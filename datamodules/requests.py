"""Rows of users as they are now: what would be next, without a known target.

Legend: R rows, C candidates, U users.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from datamodules.types import EvalRows, Histories


def asking(
    histories: Histories, users: Sequence[int], candidates: np.ndarray | None = None
) -> EvalRows:
    """One row a user, behind the whole history.

    Args:
        histories: of all users.
        users: (R,) internal ids.
        candidates: (R, C) items to choose among; None asks for the whole catalogue without the history.

    Raises:
        ValueError: a user does not exist, or has every item already.
    """
    user = np.array(users, dtype=np.int64)
    if len(user) and not 1 <= user.min() <= user.max() <= histories.num_users:
        raise ValueError(f"users are numbered 1 to {histories.num_users}, got {list(users)}")
    stop = histories.offsets[user + 1]
    # A target has to be named, and nothing is made of it: the first candidate, or the first unseen item.
    if candidates is not None:
        target = candidates[:, 0].astype(np.int64)
    else:
        target = np.array([_first_unseen(histories, u) for u in user], dtype=np.int64)
    return EvalRows(
        user, stop, target, np.ones((len(user), 1), dtype=bool), ("all",), np.ones(len(user)),
        candidates,
    )  # fmt: skip


def _first_unseen(histories: Histories, user: int) -> int:
    start, stop = histories.offsets[user], histories.offsets[user + 1]
    unseen = np.ones(histories.num_items + 1, dtype=bool)
    unseen[0] = False
    unseen[histories.items[start:stop]] = False
    if not unseen.any():
        raise ValueError(f"user {user} has all {histories.num_items} items already")
    return int(unseen.argmax())
