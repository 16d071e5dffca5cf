"""Rows of users as they are now."""

from __future__ import annotations

import numpy as np
import pytest

from datamodules.requests import asking
from datamodules.types import Histories


def histories(*own: list[int], items: int = 5) -> Histories:
    flat = np.array([i for events in own for i in events], np.int32)
    offsets = np.cumsum([0, 0, *map(len, own)])
    return Histories(offsets, flat, np.zeros(len(flat), np.int8), np.arange(len(flat)), items)


def test_a_row_begins_behind_the_whole_history() -> None:
    rows = asking(histories([2, 1], [], [1, 3, 2]), [3, 2, 1])
    assert rows.user.tolist() == [3, 2, 1]
    assert rows.position.tolist() == [5, 2, 2]
    assert rows.target.tolist() == [4, 1, 3], "the first item that the user does not have"
    assert rows.candidates is None
    assert rows.groups.all()


def test_candidates_are_kept() -> None:
    candidates = np.array([[4, 5]], np.int32)
    rows = asking(histories([1]), [1], candidates)
    assert rows.candidates is candidates
    assert rows.target.tolist() == [4]


@pytest.mark.parametrize("user", [0, 3, -1])
def test_a_user_must_exist(user: int) -> None:
    with pytest.raises(ValueError, match="numbered 1 to 2"):
        asking(histories([1], [2]), [user])


def test_nothing_is_left_for_a_user_who_has_all() -> None:
    with pytest.raises(ValueError, match="has all 2 items already"):
        asking(histories([2, 1], items=2), [1])
