"""Review and ratings files of the three releases: what comes out, what is counted, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules import json_lines, line_blocks
from datamodules.amazon_reviews import order_within_seconds, repeated_lines
from datamodules.errors import DataFormatError
from datamodules.types import INTERACTION_SCHEMA
from tests.datamodules.amazon_files import (
    EVENTS,
    REVIEWS,
    Event,
    events_file,
    literals,
    load,
    put,
    ratings,
    review,
)
from tests.datamodules.amazon_files import (
    json_lines as written,
)

FORMATS = sorted(REVIEWS)
JSON_FORMATS = [(2014, "5core"), (2014, "full"), (2018, "5core"), (2018, "full"), (2023, "full")]
FEW = "kept: users with fewer than 5 events", "kept: items with fewer than 5 events"


def rows(frame: pl.DataFrame) -> list[tuple[Any, ...]]:
    return frame.cast({"user_id": pl.String, "item_id": pl.String}).rows()


def odd(skipped: dict[str, int]) -> dict[str, int]:
    """Without what any tiny file has."""
    return {k: n for k, n in skipped.items() if k not in FEW and "without metadata" not in k}


@pytest.mark.parametrize(("year", "kind"), FORMATS)
def test_every_format_of_every_release(tmp_path: Path, year: int, kind: str) -> None:
    put(tmp_path, year, kind, events_file(year, kind, EVENTS))
    raw = load(tmp_path, year, kind, metadata=False)
    assert rows(raw.interactions.frame) == EVENTS  # milliseconds are cut off
    assert odd(raw.skipped) == {}
    schema = raw.interactions.frame.schema
    assert list(schema) == list(INTERACTION_SCHEMA)
    assert schema["user_id"] == schema["item_id"] == pl.Categorical
    assert (schema["rating"], schema["timestamp"]) == (pl.Float32, pl.Int64)
    assert raw.catalog.frame["item_id"].to_list() == ["B000000001", "B000000002"]
    assert raw.skipped["kept: items without metadata"] == 2


@pytest.mark.parametrize(("year", "kind"), FORMATS)
def test_blocks_of_a_few_lines_give_the_same_categories(
    tmp_path: Path, year: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Event] = [(f"U{n % 17}", f"I{n % 23}", n % 5 + 1.0, 10**9 + n) for n in range(400)]
    put(tmp_path, year, kind, events_file(year, kind, events))
    whole = load(tmp_path, year, kind, metadata=False)
    monkeypatch.setattr(line_blocks, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(line_blocks, "_PIECE", 500)
    cut = load(tmp_path, year, kind, metadata=False)
    assert rows(cut.interactions.frame) == rows(whole.interactions.frame) == events
    assert cut.skipped == whole.skipped
    assert cut.interactions.frame["user_id"].n_unique() == 17


def test_reviews_of_2014_may_be_python_literals(tmp_path: Path) -> None:
    records = [review(2014, event, reviewerName="D'Arcy") for event in EVENTS]
    put(tmp_path, 2014, "full", literals(records))
    assert rows(load(tmp_path, 2014, "full", metadata=False).interactions.frame) == EVENTS


@pytest.mark.parametrize(("year", "kind"), JSON_FORMATS)
def test_exact_duplicates_are_lines_equal_in_every_byte(
    tmp_path: Path, year: int, kind: str
) -> None:
    text = "text" if year == 2023 else "reviewText"
    first = review(year, EVENTS[0])
    other = review(year, EVENTS[0], **{text: "Other words"})
    put(tmp_path, year, kind, written([first, other, first, review(year, EVENTS[1]), first]))
    raw = load(tmp_path, year, kind, metadata=False)
    name = REVIEWS[year, kind]
    pairs = {
        "kept: repeated (user, item) rows": 1,
        "kept: users with several events at one time": 1,
    }
    assert odd(raw.skipped) == {f"{name}: exact duplicate lines": 2, **pairs}
    assert rows(raw.interactions.frame) == [EVENTS[0], EVENTS[0], EVENTS[1]]
    kept = load(tmp_path, year, kind, metadata=False, duplicates="keep")
    pairs["kept: repeated (user, item) rows"] = 3
    assert odd(kept.skipped) == {"kept: exact duplicate lines": 2, **pairs}
    assert kept.interactions.frame.height == 5


def test_duplicates_must_be_drop_or_keep(tmp_path: Path) -> None:
    put(tmp_path, 2018, "5core", events_file(2018, "5core", EVENTS))
    with pytest.raises(ValueError, match='duplicates is \'no\'; expected "drop" or "keep"'):
        load(tmp_path, 2018, "5core", metadata=False, duplicates="no")


def test_lines_of_one_hash_are_still_compared() -> None:
    frame = pl.DataFrame({"a": [1, 2, 1, 3], "line": [7, 7, 7, 8]})
    repeated = repeated_lines(frame)
    assert repeated is not None
    assert repeated.to_list() == [2]
    assert repeated_lines(frame.head(2)) is None


@pytest.mark.parametrize(("year", "kind"), JSON_FORMATS)
@pytest.mark.parametrize("text", [None, "", "  "])
def test_reviews_without_text_are_kept_and_counted(
    tmp_path: Path, year: int, kind: str, text: str | None
) -> None:
    field = "text" if year == 2023 else "reviewText"
    records = [review(year, EVENTS[0], **{field: text}), *(review(year, e) for e in EVENTS[1:])]
    put(tmp_path, year, kind, written(records))
    raw = load(tmp_path, year, kind, metadata=False)
    assert odd(raw.skipped) == {"kept: reviews without text": 1}
    assert rows(raw.interactions.frame) == EVENTS


def test_milliseconds_order_the_events_of_one_second(tmp_path: Path) -> None:
    times = [
        ("A", "I1", 5900),
        ("B", "I1", 5900),
        ("A", "I2", 5100),
        ("A", "I3", 4999),
        ("B", "I2", 5901),
    ]
    base = 1_400_000_000_000
    lines = [f"{u},{i},5.0,{base + ms}" for u, i, ms in times]
    head = "user_id,parent_asin,rating,timestamp"
    put(tmp_path, 2023, "ratings", "\n".join([head, *lines]).encode())
    frame = load(tmp_path, 2023, "ratings", metadata=False).interactions.frame
    # A's two events of second 5 change places; nothing else moves.
    expected = [("A", "I2", 5), ("B", "I1", 5), ("A", "I1", 5), ("A", "I3", 4), ("B", "I2", 5)]
    second = base // 1000
    assert rows(frame) == [(u, i, 5.0, second + s) for u, i, s in expected]


@given(st.lists(st.tuples(st.sampled_from("ABC"), st.integers(0, 4000)), max_size=40))
def test_order_within_seconds_equals_a_sort_by_milliseconds(events: list[tuple[str, int]]) -> None:
    frame = pl.DataFrame(
        {
            "user_id": [u for u, _ in events],
            "time": [t for _, t in events],
            "row": range(len(events)),
        },
        schema={"user_id": pl.Categorical, "time": pl.Int64, "row": pl.Int64},
    ).with_columns(timestamp=pl.col("time") // 1000)
    moved = order_within_seconds(frame).rows()
    # The rule in words, one event at a time: each place of a (user, second) gets its next event.
    for place, (user, time, _, second) in zip(frame.rows(), moved, strict=True):
        assert (place[0], place[3]) == (user, second)
        assert time // 1000 == second
    by_time = sorted(range(len(events)), key=lambda k: (events[k][0], events[k][1], k))
    stable = sorted(moved, key=lambda row: (row[0], row[3]))
    assert [row[2] for row in stable] == by_time


BAD = [
    ({"overall": 6.0}, "rating off the scale: overall is 6.0, expected 1 to 5"),
    ({"overall": 0}, "rating off the scale"),
    ({"overall": 4.5}, "rating off the scale"),
    ({"overall": 4.9999999999}, "rating off the scale"),
    ({"overall": "5.0"}, "rating off the scale: overall is '5.0'"),
    ({"overall": True}, "rating off the scale"),
    ({"overall": None}, "rating off the scale: overall is missing"),
    ({"asin": None}, "bad id: asin is missing, expected letters and digits"),
    ({"asin": ""}, "bad id"),
    ({"asin": "B\t1"}, "bad id"),
    ({"asin": ["B1"]}, "bad id"),
    ({"asin": {"B": "1"}}, "bad id"),
    ({"asin": True}, "bad id"),
    ({"asin": 1.5}, "bad id"),
    ({"reviewerID": "\ud800"}, "bad id"),
    ({"unixReviewTime": None}, "bad timestamp: unixReviewTime is missing"),
    ({"unixReviewTime": -1}, "bad timestamp"),
    ({"unixReviewTime": 1_400_000_000_000}, "bad timestamp: .* expected seconds since 1970 within the years"),
    ({"unixReviewTime": 1e9}, "bad timestamp"),
    ({"unixReviewTime": "1400000000"}, "bad timestamp"),
    ({"unixReviewTime": 10**30}, "bad timestamp"),
    ({"unixReviewTime": True}, "bad timestamp"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD)
@pytest.mark.parametrize("year", [2014, 2018])
def test_a_bad_review_is_named_or_counted(
    tmp_path: Path, year: int, change: dict[str, Any], message: str
) -> None:
    records = [review(year, event) for event in EVENTS]
    records.insert(1, review(year, EVENTS[0], **change))
    put(tmp_path, year, "5core", written(records))
    with pytest.raises(DataFormatError, match=f"line 2: {message}") as error:
        load(tmp_path, year, "5core", metadata=False)
    assert "data.on_bad_row=skip" in str(error.value)
    raw = load(tmp_path, year, "5core", metadata=False, on_bad_row="skip")
    assert rows(raw.interactions.frame) == EVENTS
    assert odd(raw.skipped) == {f"{REVIEWS[year, '5core']}: {message.partition(':')[0]}": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"A,B,5.0", "broken row: 3 fields where 4 are expected"),
        (b"A,B,5.0,1400000000,", "broken row: 5 fields"),
        (b'"A,B,5.0,1400000000', "broken quotes"),
        (b"A,B,5.5,1400000000", "rating off the scale: '5.5'"),
        (b"A,B,nan,1400000000", "rating off the scale"),
        (b"A,B,,1400000000", "rating off the scale"),
        (b"A,,5.0,1400000000", "bad id: item_id is ''"),
        (b"A,B,5.0,1400000000.5", "bad timestamp"),
        (b"A,B,5.0,1400000000000", "bad timestamp"),
        (b"A,B,5.0,", "bad timestamp"),
        (b"A\xff,B,5.0,1400000000", "bytes of an unknown encoding"),
    ],
)
def test_a_bad_rating_line_is_named_or_counted(tmp_path: Path, line: bytes, message: str) -> None:
    put(tmp_path, 2014, "ratings", ratings(2014, EVENTS) + line + b"\n")
    with pytest.raises(DataFormatError, match=rf"ratings_Beauty\.csv\.gz, line 4: {message}"):
        load(tmp_path, 2014, "ratings", metadata=False)
    raw = load(tmp_path, 2014, "ratings", metadata=False, on_bad_row="skip")
    assert rows(raw.interactions.frame) == EVENTS
    assert odd(raw.skipped) == {f"ratings_Beauty.csv: {message.partition(':')[0]}": 1}


def test_quoted_ratings_are_read_as_what_they_mean(tmp_path: Path) -> None:
    put(tmp_path, 2014, "ratings", b'"A1","B1","4.0","1400000000"\nA2,B1,5.0,1400000000\n')
    frame = load(tmp_path, 2014, "ratings", metadata=False).interactions.frame
    assert rows(frame) == [("A1", "B1", 4.0, 1_400_000_000), ("A2", "B1", 5.0, 1_400_000_000)]


def test_the_ratings_of_another_release_are_refused(tmp_path: Path) -> None:
    put(tmp_path, 2023, "5core", ratings(2018, EVENTS))
    with pytest.raises(DataFormatError, match="line 1: the header is 'B000000001,A1XX"):
        load(tmp_path, 2023, "5core", metadata=False, on_bad_row="skip")
    put(tmp_path, 2018, "5core", written([review(2023, event) for event in EVENTS]))
    with pytest.raises(DataFormatError, match="there is no good row in the file"):
        load(tmp_path, 2018, "5core", metadata=False, on_bad_row="skip")


def test_whole_numbers_are_ids_in_both_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [review(2018, EVENTS[0], asin=7), review(2018, EVENTS[1])]
    put(tmp_path, 2018, "5core", written(records))
    fast = load(tmp_path, 2018, "5core", metadata=False).interactions.frame
    monkeypatch.setattr(json_lines, "_lines", lambda data: None)  # no block is read fast
    careful = load(tmp_path, 2018, "5core", metadata=False).interactions.frame
    assert rows(fast) == rows(careful)
    assert fast["item_id"].to_list() == ["7", "B000000002"]


def test_a_5_core_file_that_is_none_says_so(tmp_path: Path) -> None:
    users = ("A1", "A2", "A3", "A4", "A5")
    events: list[Event] = [(u, f"B{i}", 5.0, 10**9 + i) for u in users for i in range(5)]
    put(tmp_path, 2018, "5core", events_file(2018, "5core", events))
    assert not set(FEW) & set(load(tmp_path, 2018, "5core", metadata=False).skipped)
    put(tmp_path, 2018, "5core", events_file(2018, "5core", events[:-1]))
    skipped = load(tmp_path, 2018, "5core", metadata=False).skipped
    assert [skipped[what] for what in FEW] == [1, 1]
