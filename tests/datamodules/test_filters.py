"""Filters against a plain-Python reference and worked examples."""

from __future__ import annotations

from collections import Counter

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.filters import Dedup, KCore, MinRating, apply_filters
from datamodules.types import INTERACTION_SCHEMA

Event = tuple[str, str, float | None, int | None]
PAIRS = st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("uvwxyz")), max_size=40)


def make(events: list[Event]) -> pl.DataFrame:
    return pl.DataFrame(events, schema=INTERACTION_SCHEMA, orient="row")


def from_pairs(pairs: list[tuple[str, str]]) -> pl.DataFrame:
    return make([(user, item, 1.0, time) for time, (user, item) in enumerate(pairs)])


def categorical(frame: pl.DataFrame) -> pl.DataFrame:
    """The same rows with categories whose numbers have holes: others stand before them."""
    other = make([(f"!{i}", f"?{i}", 1.0, 0) for i in range(3)])
    mixed = pl.concat([other, frame]).with_columns(
        pl.col("user_id", "item_id").cast(pl.Categorical)
    )
    return mixed[3:]


def peel(
    pairs: list[tuple[str, str]], user: int, item: int, iterative: bool, counted: list[bool]
) -> list[int]:
    """Reference: drop rows below a minimum, one pass or until nothing falls out."""
    alive = list(range(len(pairs)))
    while True:
        users = Counter(pairs[i][0] for i in alive if counted[i])
        items = Counter(pairs[i][1] for i in alive if counted[i])
        kept = [i for i in alive if users[pairs[i][0]] >= user and items[pairs[i][1]] >= item]
        if not iterative or kept == alive:
            return kept
        alive = kept


@settings(max_examples=60, deadline=None)
@given(PAIRS, st.integers(0, 4), st.integers(0, 4), st.booleans())
def test_k_core_equals_peeling(pairs, user, item, iterative):
    expected = peel(pairs, user, item, iterative, [True] * len(pairs))
    for frame in (from_pairs(pairs), categorical(from_pairs(pairs))):
        assert KCore(user, item, iterative)(frame)["timestamp"].to_list() == expected


@settings(max_examples=60, deadline=None)
@given(PAIRS, st.data(), st.integers(0, 3), st.integers(0, 3), st.booleans())
def test_k_core_counts_only_good_ratings_but_keeps_all(pairs, data, user, item, iterative):
    ratings = data.draw(st.lists(st.integers(1, 5), min_size=len(pairs), max_size=len(pairs)))
    events = [(u, i, r, t) for t, ((u, i), r) in enumerate(zip(pairs, ratings, strict=True))]
    expected = peel(pairs, user, item, iterative, [rating >= 3 for rating in ratings])
    kept = KCore(user, item, iterative, count_from=3)(make(events))
    assert kept["timestamp"].to_list() == expected


def test_a_llmrec_counts_from_three_in_one_pass():
    # u has two ratings of 3 or more, so its 1 stays; v has one, so both its rows go.
    frame = make(
        [("u", "a", 3, 0), ("u", "b", 1, 1), ("u", "a", 5, 2), ("v", "a", 4, 3), ("v", "b", 2, 4)]
    )
    core = KCore(user=2, iterative=False, count_from=3)
    assert core(frame)["timestamp"].to_list() == [0, 1, 2]
    assert core.describe() == "k-core: users >= 2, items >= 0, one pass, counting ratings >= 3"


def test_a_low_rating_that_falls_takes_no_count_with_it():
    # z has no counted row, so u's 1 falls; u's two counted rows, and with them everything else, stay.
    pairs = [("u", "a", 5), ("u", "b", 5), ("u", "z", 1), ("v", "a", 5), ("v", "b", 5)]
    frame = make([(user, item, rating, t) for t, (user, item, rating) in enumerate(pairs)])
    assert KCore(2, 2, count_from=3)(frame)["timestamp"].to_list() == [0, 1, 3, 4]


def test_one_pass_leaves_a_user_below_the_minimum():
    # Item z occurs once, so u2 falls from two rows to one: a fixed point removes u2 as well.
    pairs = [("u1", "x"), ("u1", "y"), ("u2", "x"), ("u2", "z"), ("u3", "x"), ("u3", "y")]
    assert KCore(2, 2, iterative=False)(from_pairs(pairs))["timestamp"].to_list() == [0, 1, 2, 4, 5]
    assert KCore(2, 2)(from_pairs(pairs))["timestamp"].to_list() == [0, 1, 4, 5]


def test_min_rating_keeps_the_threshold_itself():
    frame = make([("u", "a", 3.5, 0), ("u", "b", 4.0, 1), ("u", "c", 5.0, 2)])
    assert MinRating(4.0)(frame)["item_id"].to_list() == ["b", "c"]


@pytest.mark.parametrize("rating", [None, float("nan")])
def test_missing_ratings_are_refused_where_they_count(rating):
    frame = make([("u", "a", rating, 0), ("u", "b", 4.0, 1)])
    with pytest.raises(ValueError, match=r"MinRating.*1 of 2 have none"):
        MinRating(4.0)(frame)
    with pytest.raises(ValueError, match=r"KCore\(count_from=3\).*1 of 2 have none"):
        KCore(count_from=3)(frame)
    assert KCore(user=2)(frame).height == 2


@pytest.mark.parametrize(("keep", "expected"), [("first", [2, 1]), ("last", [0, 1])])
def test_dedup_goes_by_time_and_keeps_file_order(keep, expected):
    # (u, a) at times 9, 3, 3: the first in time is row 2 (tie with row 3: the file's order).
    frame = make([("u", "a", 0, 9), ("u", "b", 1, 5), ("u", "a", 2, 3), ("u", "a", 3, 3)])
    kept = Dedup(keep)(frame)
    assert kept["rating"].to_list() == sorted(expected)


def test_dedup_without_times_goes_by_file_order():
    frame = make([("u", "a", 0, None), ("v", "a", 1, None), ("u", "a", 2, None)])
    assert Dedup("first")(frame)["rating"].to_list() == [0, 1]
    assert Dedup("last")(frame)["rating"].to_list() == [1, 2]
    with pytest.raises(ValueError, match=r"1 of 2 have none"):
        Dedup("last")(make([("u", "a", 0, 1), ("u", "a", 0, None)]))


@settings(max_examples=60, deadline=None)
@given(PAIRS, st.data(), st.sampled_from(["first", "last"]))
def test_dedup_leaves_the_first_or_last_of_each_pair(pairs, data, keep):
    times = data.draw(st.lists(st.integers(0, 3), min_size=len(pairs), max_size=len(pairs)))
    rows: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for row, pair in enumerate(pairs):
        rows.setdefault(pair, []).append((times[row], row))
    expected = sorted((min if keep == "first" else max)(mine)[1] for mine in rows.values())
    events = [(u, i, row, times[row]) for row, (u, i) in enumerate(pairs)]
    for frame in (make(events), categorical(make(events))):
        assert Dedup(keep)(frame)["rating"].to_list() == expected


def counts(users: int, items: int, interactions: int) -> dict[str, int]:
    return {"users": users, "items": items, "interactions": interactions}


def test_steps_count_before_and_after():
    frame = make([("u", "a", 5, 0), ("u", "a", 5, 1), ("u", "b", 2, 2), ("v", "a", 4, 3)])
    kept, steps = apply_filters(frame, [Dedup("first"), MinRating(3)])
    assert kept["timestamp"].to_list() == [0, 3]
    assert [(s.before, s.after) for s in steps] == [
        (counts(2, 2, 4), counts(2, 2, 3)),
        (counts(2, 2, 3), counts(2, 1, 2)),
    ]
    assert [s.description for s in steps] == ["first of repeated (user, item)", "rating >= 3"]


def test_no_filter_changes_nothing():
    frame = from_pairs([("u", "a"), ("v", "b")])
    kept, steps = apply_filters(frame, [])
    assert kept.equals(frame)
    assert steps == []


def test_the_filter_that_empties_the_data_is_named():
    frame = make([("u", "a", 5, 0), ("v", "b", 2, 1)])
    with pytest.raises(ValueError, match=r"users >= 9.*removed all 2 interactions"):
        apply_filters(frame, [MinRating(1), KCore(user=9), MinRating(0)])
    with pytest.raises(ValueError, match="given no interactions"):
        apply_filters(frame.clear(), [])


def test_bad_arguments():
    with pytest.raises(ValueError, match="user=-1"):
        KCore(user=-1)
    with pytest.raises(ValueError, match="'newest'"):
        Dedup("newest")  # type: ignore[arg-type]
