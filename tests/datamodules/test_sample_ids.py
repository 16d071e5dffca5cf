"""Drawn users and items: whole histories, exact counts, the same draw whatever the file's order."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.sample_ids import SampleItems, SampleUsers, hash_ids
from datamodules.types import INTERACTION_SCHEMA

EVENTS = st.lists(
    st.tuples(st.sampled_from("abcdefgh"), st.sampled_from("uvwxyz")), min_size=1, max_size=40
)
TEXTS = st.lists(st.text(alphabet="aé漢😀Z9", max_size=40), max_size=8)
MASK = 2**64 - 1


def make(pairs: list[tuple[str, str]]) -> pl.DataFrame:
    rows = [(user, item, 1.0, time) for time, (user, item) in enumerate(pairs)]
    return pl.DataFrame(rows, schema=INTERACTION_SCHEMA, orient="row")


def users(count: int) -> pl.DataFrame:
    return make([(f"user{i}", "a") for i in range(count)])


def mix(state: int) -> int:
    """SplitMix64 with Python's whole numbers."""
    state = (state + 0x9E3779B97F4A7C15) & MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def chain(seed: int, *keys: int) -> int:
    state = mix(seed & MASK)
    for key in keys:
        state = mix(state ^ (key & MASK))
    return state % 2**62


def reference(text: str, key: int, seed: int) -> int:
    """The documented hash, one id at a time: a word's bytes stand at its high end."""
    data = text.encode()
    state = chain(seed, key, len(data))
    for at in range(0, len(data), 8):
        word = data[at : at + 8]
        state = chain(seed, state, int.from_bytes(bytes(8 - len(word)) + word, "little"))
    return state


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.integers(0, 9), st.integers(-5, 5))
def test_the_hash_is_the_documented_one(texts, key, seed):
    found = hash_ids(pl.Series(texts, dtype=pl.String), key, seed=seed)
    assert found.tolist() == [reference(text, key, seed) for text in texts]


def test_ids_that_share_bytes_have_hashes_of_their_own(monkeypatch):
    texts = [
        "",
        "\0",
        "\0\0",
        "a",
        "a\0",
        "abcdefgh",
        "abcdefgh\0",
        "abcdefghi",
        "bcdefghi",
        "A" * 99,
    ]
    hashes = hash_ids(pl.Series(texts), seed=0)
    assert len(set(hashes.tolist())) == len(texts)
    monkeypatch.setattr("datamodules.sample_ids._AT_ONCE", 3)
    assert hash_ids(pl.Series(texts), seed=0).tolist() == hashes.tolist()


@settings(max_examples=60, deadline=None)
@given(EVENTS, st.data(), st.integers(0, 3), st.sampled_from([SampleUsers, SampleItems]))
def test_exactly_count_with_all_their_rows_in_any_order(pairs, data, seed, sample):
    column = 0 if sample is SampleUsers else 1
    count = data.draw(st.integers(1, len({pair[column] for pair in pairs})))
    shuffled = data.draw(st.permutations(pairs))
    kept = sample(count=count, seed=seed)(make(pairs))
    drawn = set(kept.to_series(column))
    assert len(drawn) == count
    expected = [row for row, pair in enumerate(pairs) if pair[column] in drawn]
    assert kept["timestamp"].to_list() == expected
    assert set(sample(count=count, seed=seed)(make(shuffled)).to_series(column)) == drawn
    codes = make(pairs).with_columns(pl.col("user_id", "item_id").cast(pl.Categorical))
    assert sample(count=count, seed=seed)(codes)["timestamp"].to_list() == expected


def test_the_id_decides_between_equal_hashes(monkeypatch):
    monkeypatch.setattr(
        "datamodules.sample_ids.hash_ids", lambda ids, *keys, seed: np.zeros(len(ids), np.int64)
    )
    for pairs in ([("b", "x"), ("c", "x"), ("a", "x")], [("a", "x"), ("c", "x"), ("b", "x")]):
        assert set(SampleUsers(count=2)(make(pairs))["user_id"]) == {"a", "b"}


def test_more_users_of_a_seed_include_the_fewer_and_seeds_differ():
    few, more = (set(SampleUsers(count=n)(users(500))["user_id"]) for n in (50, 200))
    other = set(SampleUsers(count=50, seed=1)(users(500))["user_id"])
    assert few < more
    assert few != other


def test_a_fraction_draws_each_user_whatever_the_others_are():
    large = set(SampleUsers(fraction=0.3)(users(4000))["user_id"])
    small = set(SampleUsers(fraction=0.3)(users(1000))["user_id"])
    # 4000 draws of probability 0.3: mean 1200, standard deviation sqrt(4000 * 0.3 * 0.7) = 29.
    assert abs(len(large) - 1200) < 5 * 29
    assert small == {f"user{i}" for i in range(1000)} & large
    assert SampleUsers(fraction=1.0)(users(20)).height == 20


def test_users_and_items_of_the_same_name_are_drawn_independently():
    frame = make([(f"{i}", f"{i}") for i in range(2000)])
    by_user = set(SampleUsers(count=1000)(frame)["user_id"])
    by_item = set(SampleItems(count=1000)(frame)["item_id"])
    # Hypergeometric: mean 500, standard deviation sqrt(2000 / 16) = 11.
    assert abs(len(by_user & by_item) - 500) < 5 * 12


def test_descriptions():
    assert SampleUsers(count=1000).describe() == "1000 users, drawn by seed 0"
    assert SampleItems(fraction=0.1, seed=7).describe() == "10% of items, drawn by seed 7"


@pytest.mark.parametrize(
    "arguments",
    [{}, {"count": 0}, {"fraction": 0.0}, {"fraction": 1.5}, {"count": 1, "fraction": 0.5}],
)
def test_bad_arguments(arguments):
    for sample in (SampleUsers, SampleItems):
        with pytest.raises(ValueError, match="give exactly one"):
            sample(**arguments)


def test_more_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"SampleUsers\(count=6\) was given 5"):
        SampleUsers(count=6)(users(5))
