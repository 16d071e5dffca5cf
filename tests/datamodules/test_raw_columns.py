"""Columns of raw interactions as arrays."""

from __future__ import annotations

from collections import Counter

import numpy as np
import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from datamodules.raw_columns import id_codes, occurs_again, pair_codes


@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 9), max_size=60))
def test_what_occurs_again_is_what_is_counted_twice(numbers: list[int]) -> None:
    times = Counter(numbers)
    found = occurs_again(pl.Series(numbers, dtype=pl.UInt64))
    assert found.to_list() == [times[n] > 1 for n in numbers]


@given(st.lists(st.sampled_from("abcdefgh"), max_size=40), st.booleans())
def test_codes_are_equal_where_ids_are(ids: list[str], categories: bool) -> None:
    column = pl.Series(ids, dtype=pl.String)
    codes = id_codes(column.cast(pl.Categorical) if categories else column)
    assert sorted(set(codes.tolist())) == list(range(len(set(ids))))
    assert len(set(zip(ids, codes.tolist(), strict=True))) == len(set(ids))


def test_pairs_are_numbered_by_user_then_item() -> None:
    user, item = np.array([1, 0, 1], np.int32), np.array([0, 2, 2], np.int32)
    assert pair_codes(user, item).tolist() == [3, 2, 5]
