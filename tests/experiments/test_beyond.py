"""What lists are like besides right: arithmetic on tiny tables, and laws that hold for all of them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array

from experiments import beyond, beyond_columns

COUNTS = st.lists(st.integers(0, 50), min_size=1, max_size=40).filter(any)


def test_exposure_and_coverage_by_hand() -> None:
    lists = np.array([[0, 1], [0, 2], [0, -1]])
    shown = beyond.exposure(lists, 5)
    assert shown.tolist() == [3, 1, 1, 0, 0]
    assert beyond.coverage(shown) == 3 / 5


def test_gini_by_hand() -> None:
    assert beyond.gini(np.array([0, 0, 0, 7])) == pytest.approx(
        3 / 4
    )  # one item has all: 1 - 1 / I
    # Half of the mean absolute difference over the mean: pairs of (1, 2, 3) differ by 1, 1, 2.
    assert beyond.gini(np.array([3, 1, 2])) == pytest.approx(2 * (1 + 1 + 2) / 9 / (2 * 2))
    with pytest.raises(ValueError, match="no exposure"):
        beyond.gini(np.zeros(3, np.int64))


@given(COUNTS)
def test_gini_lies_between_0_and_1_and_knows_no_unit(counts: list[int]) -> None:
    shown = np.array(counts)
    found = beyond.gini(shown)
    assert 0 <= found < 1
    assert beyond.gini(shown * 3) == pytest.approx(found, abs=1e-9)
    differences = np.abs(shown[:, None] - shown[None, :]).mean()
    assert found == pytest.approx(differences / (2 * shown.mean()), abs=1e-9)


@given(st.integers(1, 30), st.integers(1, 9))
def test_gini_is_0_where_all_are_shown_alike(items: int, times: int) -> None:
    assert beyond.gini(np.full(items, times)) == pytest.approx(0, abs=1e-12)


@given(st.integers(0, 1000), st.integers(2, 12), st.integers(1, 20))
def test_coverage_never_falls_with_longer_lists(seed: int, items: int, rows: int) -> None:
    draw = np.random.default_rng(seed)
    whole = np.stack([draw.permutation(items) for _ in range(rows)])
    covered = [beyond.coverage(beyond.exposure(whole[:, :k], items)) for k in range(1, items + 1)]
    assert covered == sorted(covered)
    assert covered[-1] == 1


def test_percentiles_are_midranks() -> None:
    found = beyond.popularity_percentiles(np.array([5, 0, 5, 9]))
    assert found.tolist() == [(1 + 2 / 2) / 4, (0 + 1 / 2) / 4, (1 + 2 / 2) / 4, (3 + 1 / 2) / 4]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30))
def test_a_random_item_has_a_percentile_of_one_half(counts: list[int]) -> None:
    assert beyond.popularity_percentiles(np.array(counts)).mean() == pytest.approx(0.5)


def test_information_by_hand() -> None:
    found = beyond.information(np.array([0, 2, 3]))  # shares 1/8, 3/8, 4/8 with one added to each
    assert found == pytest.approx([3, -math.log2(3 / 8), 1])
    assert beyond.mean_shown(np.array([[0, 2], [2, -1]]), found) == pytest.approx((3 + 1 + 1) / 3)


def test_diversity_by_hand() -> None:
    """Items: {a, b}, {b, c}, {}, {a, b}."""
    words = csr_array(np.array([[1, 1, 0], [0, 1, 1], [0, 0, 0], [1, 1, 0]]))
    assert beyond.diversity(np.array([[0, 1]]), words) == pytest.approx(1 - 1 / 3)
    assert beyond.diversity(np.array([[0, 3]]), words) == 0
    # The pair with the undescribed item does not count; the list of one item has no pair.
    lists = np.array([[0, 1, 2], [0, 1, 3], [0, -1, -1]])
    expected = (2 / 3 + (2 / 3 + 0 + 2 / 3) / 3) / 2
    assert beyond.diversity(lists, words) == pytest.approx(expected)
    assert math.isnan(beyond.diversity(np.array([[2, -1]]), words))


def test_diversity_of_embeddings_by_hand() -> None:
    """Items: east (twice as long), north, west, no text, north-east."""
    vectors = np.array([[2, 0], [0, 1], [-1, 0], [0, 0], [1, 1]], np.float32)

    def of(*lists: list[int]) -> float:
        return beyond.embedding_diversity(np.array(lists), vectors)

    assert of([0, 1]) == 1
    assert of([0, 2]) == 2
    assert of([0, 0, 0]) == 0
    assert of([0, 4]) == pytest.approx(1 - math.sqrt(0.5))
    # Pairs with the item without a text do not count; lists without a pair do not either.
    assert of([0, 1, 3]) == 1
    assert of([0, 1, 2], [0, 2, -1], [1, 3, -1], [1, -1, -1]) == pytest.approx((4 / 3 + 2) / 2)
    for alone in ([0], [3, 3], [2, -1]):
        assert math.isnan(of(alone))


@given(st.integers(0, 1000), st.integers(2, 6))
def test_diversity_of_embeddings_is_the_mean_cosine_distance(seed: int, k: int) -> None:
    distance = pytest.importorskip("scipy.spatial.distance")
    draw = np.random.default_rng(seed)
    vectors, lists = draw.normal(size=(9, 3)).astype(np.float32), draw.integers(0, 9, (5, k))
    expected = np.mean([distance.pdist(vectors[row], "cosine").mean() for row in lists])
    assert beyond.embedding_diversity(lists, vectors) == pytest.approx(expected, abs=1e-6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beyond, "_BLOCK", 2)
        assert beyond.embedding_diversity(lists, vectors) == pytest.approx(expected, abs=1e-6)


def test_a_gap_is_between_groups_that_are_large_enough() -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b, c = [0.1, 0.2, 0.3], [0.4, 0.5, 0.9], [99.0]
    groups = [*"aaa", *"bbb", "c", None]
    found = beyond.gap(np.array([*a, *b, *c, 50.0]), groups, least=3)
    assert found is not None
    assert (found.best, found.worst) == ("b", "a")
    assert found.difference == pytest.approx(0.6 - 0.2)
    assert found.p == pytest.approx(stats.kruskal(a, b).pvalue)
    assert beyond.gap(np.array([*a, *b]), [*"aaabbb"], least=4) is None
    even = beyond.gap(np.ones(6), [*"aaabbb"], least=3)
    assert even == beyond.Gap("a", "b", 0, 1)


# ---------------------------------------------------------------- reading

IDS = pl.DataFrame({"item_id": ["x", "y", "z"]}).with_row_index("index")


def test_lists_of_sampled_candidates_and_of_whole_catalogues(tmp_path: Path) -> None:
    """The best k of each row; ties in the file's order, rows of a rare group alone left out."""
    sampled, whole = tmp_path / "s.parquet", tmp_path / "w.parquet"
    pl.DataFrame({
        "row": [0, 0, 0, 4, 4, 9], "item_id": ["x", "y", "z", "z", "x", "y"],
        "score": [0.1, 0.9, 0.9, 1.0, 2.0, 5.0], "all": [True] * 5 + [False],
    }).write_parquet(sampled)  # fmt: skip
    found = beyond_columns.top_lists(sampled, IDS, 2)
    assert found is not None
    assert found.tolist() == [[1, 2], [0, 2]]
    pl.DataFrame({
        "row": [0, 1], "top_items": [["z", "y", "x"], ["y"]],
        "top_scores": [[3.0, 2.0, 1.0], [7.0]],
    }).write_parquet(whole)  # fmt: skip
    found = beyond_columns.top_lists(whole, IDS, 2)
    assert found is not None
    assert found.tolist() == [[2, 1], [1, -1]]


def test_chance_and_labelled_rows_have_no_lists(tmp_path: Path) -> None:
    file = tmp_path / "s.parquet"
    rows = {"row": [0, 0], "item_id": ["x", "y"], "score": [0.0, 0.0]}
    pl.DataFrame(rows).write_parquet(file)
    assert beyond_columns.top_lists(file, IDS, 2) is None
    pl.DataFrame({**rows, "score": [0.0, 1.0], "label": [True, False]}).write_parquet(file)
    assert beyond_columns.top_lists(file, IDS, 2) is None


def test_what_describes_items() -> None:
    items = pl.DataFrame({
        "title": ["Red pen", "red ink", None],
        "categories": [["a", "b", "a"], None, ["b"]],
    })  # fmt: skip
    words, by = beyond_columns._described(items)
    assert (by, words.toarray().tolist()) == ("categories", [[1, 1], [0, 0], [0, 1]])
    words, by = beyond_columns._described(
        items.with_columns(categories=pl.lit([], pl.List(pl.String)))
    )
    assert by == "title words"
    assert words.toarray().sum(1).tolist() == [2, 2, 0]
    assert beyond.diversity(np.array([[0, 1]]), words) == pytest.approx(1 - 1 / 3)


def test_ages_are_grouped_as_movielens_does() -> None:
    ages = pl.Series([1, 17, 18, 55, 56, None])
    assert beyond_columns.age_groups(ages).to_list() == [
        "under 18", "under 18", "18-24", "50-55", "56+", None,
    ]  # fmt: skip


def test_users_own_aucs(tmp_path: Path) -> None:
    file = tmp_path / "s.parquet"
    pl.DataFrame({
        "user_id": ["a"] * 3 + ["b"] * 2 + ["c"],
        "score": [0.3, 0.2, 0.3, 1.0, 2.0, 5.0],
        "label": [True, False, False, True, False, True],
    }).write_parquet(file)  # fmt: skip
    found = beyond_columns._user_aucs(file)
    assert found.rows() == [("a", (1 + 0.5) / 2), ("b", 0.0)]  # c has no dislike
