"""Filters that shorten histories, against plain-Python references and worked examples."""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime, timezone

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.reductions import DateRange, Newest
from datamodules.types import INTERACTION_SCHEMA

EVENTS = st.lists(
    st.tuples(st.sampled_from("abcd"), st.sampled_from("uvwxyz"), st.integers(0, 5)), max_size=40
)


def make(events: list[tuple[str, str, int | None]]) -> pl.DataFrame:
    """The rating is the row's number, so that kept rows can be told apart."""
    rows = [(user, item, row, time) for row, (user, item, time) in enumerate(events)]
    return pl.DataFrame(rows, schema=INTERACTION_SCHEMA, orient="row")


def both(frame: pl.DataFrame) -> list[pl.DataFrame]:
    return [frame, frame.with_columns(pl.col("user_id", "item_id").cast(pl.Categorical))]


def kept(frame: pl.DataFrame) -> list[int]:
    return [int(row) for row in frame["rating"]]


@settings(max_examples=60, deadline=None)
@given(EVENTS, st.integers(1, 4), st.booleans())
def test_newest_equals_sorting_each_user(events, count, timed):
    rows = defaultdict(list)
    for row, (user, _, time) in enumerate(events):
        rows[user].append((time if timed else 0, row))
    expected = sorted(row for mine in rows.values() for _, row in sorted(mine)[-count:])
    frame = make(events if timed else [(user, item, None) for user, item, _ in events])
    for each in both(frame):
        assert kept(Newest(count)(each)) == expected


def test_of_tied_events_the_later_in_the_file_is_newer():
    # Two of time 7 are newest; of the two of time 5, the second in the file is the third newest.
    events = [("u", "a", 7), ("u", "b", 5), ("u", "c", 5), ("u", "d", 7), ("v", "a", 1)]
    assert kept(Newest(3)(make(events))) == [0, 2, 3, 4]


def at(*when: int) -> int:
    return int(datetime(*when, tzinfo=timezone.utc).timestamp())  # type: ignore[arg-type,misc]


def test_a_date_range_is_half_open_and_utc():
    times = [at(2019, 12, 31, 23, 59, 59), at(2020, 1, 1), at(2020, 6, 1), at(2021, 1, 1)]
    frame = make([("u", "abcd"[row], time) for row, time in enumerate(times)])
    assert kept(DateRange("2020-01-01", "2021-01-01")(frame)) == [1, 2]
    assert kept(DateRange(start="2020-01-01")(frame)) == [1, 2, 3]
    assert kept(DateRange(end="2020-01-01")(frame)) == [0]
    # One hour east of Greenwich the year begins an hour earlier.
    assert kept(DateRange(end="2020-01-01T01:00:00+01:00")(frame)) == [0]
    assert kept(DateRange(start="2020-01-01T00:59:59+01:00")(frame)) == [0, 1, 2, 3]
    assert kept(DateRange(start="2020-01-01T00:00:00Z")(frame)) == [1, 2, 3]


def test_descriptions():
    assert DateRange("2020-01-01", "2021-01-01").describe() == "2020-01-01 <= time < 2021-01-01"
    assert DateRange(start="2020-01-01").describe() == "time >= 2020-01-01"
    assert DateRange(end="2020-01-01").describe() == "time < 2020-01-01"
    assert Newest(10).describe() == "newest 10 events of each user"


def test_times_that_are_missing():
    some = make([("u", "a", 1), ("u", "b", None)])
    with pytest.raises(ValueError, match=r"DateRange.*1 of 2 have none"):
        DateRange("2020-01-01")(some)
    with pytest.raises(ValueError, match=r"Newest\(count=1\).*1 of 2 have none"):
        Newest(1)(some)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: DateRange(), "give one of them"),
        (lambda: DateRange("2020-01-02", "2020-01-02"), "end after the start"),
        (lambda: DateRange("1.1.2020"), "DateRange got the date '1.1.2020'.*ISO format"),
        (lambda: Newest(0), "count=0"),
    ],
)
def test_bad_arguments(build, words):
    with pytest.raises(ValueError, match=words):
        build()
