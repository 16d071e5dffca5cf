"""Paired tests against brute force, scipy, scikit-learn and closed forms."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from experiments import significance
from experiments.significance import auc_draws, compare, mean_draws, user_draws


def ranked(path: Path, above: list[int], users: list[str]) -> Path:
    frame = pl.DataFrame({"row": range(len(above)), "user_id": users, "above": above})
    frame.with_columns(ties=pl.lit(0)).write_parquet(path)
    return path


def labelled(path: Path, scores: list[float], labels: list[bool], users: list[str]) -> Path:
    rows = range(len(scores))
    frame = pl.DataFrame({"row": rows, "user_id": users, "item_id": rows, "label": labels})
    frame.with_columns(pl.Series("score", scores, dtype=pl.Float32)).write_parquet(path)
    return path


def counted_pairs(scores: list[float], labels: list[bool], times: list[int]) -> float:
    """AUC by looking at every pair of a like and a dislike, as often as they were drawn."""
    rows = list(zip(scores, labels, times, strict=True))
    pairs = [
        (m * n, 1.0 if a > b else 0.5 if a == b else 0.0)
        for (a, x, m), (b, y, n) in itertools.product(rows, rows)
        if x and not y
    ]
    return sum(n * won for n, won in pairs) / sum(n for n, _ in pairs)


# ---------------------------------------------------------------- draws


@given(st.data())
def test_an_auc_draw_is_that_of_counting_pairs(data: st.DataObject) -> None:
    users = data.draw(st.integers(2, 5))
    rows = data.draw(st.integers(2, 12))

    def lists(of: st.SearchStrategy[int], size: int) -> list[int]:
        return data.draw(st.lists(of, min_size=size, max_size=size))

    scores = [float(s) for s in lists(st.integers(-2, 2), rows)]  # many ties
    labels = [True, False, *map(bool, lists(st.integers(0, 1), rows - 2))]
    user = lists(st.integers(0, users - 1), rows)
    weights = np.array([lists(st.integers(0, 3), users) for _ in range(3)], dtype=float).T
    found = auc_draws(np.array(scores), np.array(labels), np.array(user), weights)
    for d in range(3):
        times = [int(weights[u, d]) for u in user]
        both = {label for label, n in zip(labels, times, strict=True) if n}
        if both == {True, False}:
            assert found[d] == pytest.approx(counted_pairs(scores, labels, times))
        else:
            assert math.isnan(found[d])


def test_a_draw_of_means_is_that_of_the_repeated_rows() -> None:
    draw = np.random.default_rng(0)
    user, values = draw.integers(0, 7, size=40), draw.normal(size=(40, 2))
    user[:7] = range(7)
    sums = np.stack([np.bincount(user, v) for v in values.T], axis=1)
    (weights,) = user_draws(7, 20)
    found = mean_draws(sums, np.bincount(user).astype(float), weights)
    for d in range(20):
        repeated = np.repeat(values, weights[user, d].astype(int), axis=0)
        assert found[d] == pytest.approx(repeated.mean(0))


def test_draws_hold_as_many_users_as_there_are_and_do_not_depend_on_the_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (whole,) = user_draws(6, 50)
    assert whole.shape == (6, 50)
    assert (whole.sum(0) == 6).all()
    assert abs(whole.mean(1) - 1).max() < 0.6
    assert (whole != whole[:, :1]).any()
    monkeypatch.setattr(significance, "_BLOCK", 60)
    parts = list(user_draws(6, 50, rows=20))
    assert [p.shape[1] for p in parts] == [3] * 16 + [2]
    assert (np.concatenate(parts, axis=1) == whole).all()


# ---------------------------------------------------------------- p values


def test_holm_by_hand() -> None:
    # Sorted 0.01, 0.02, 0.03, 0.5: times 4, 3, 2, 1 = 0.04, 0.06, 0.06, 0.5.
    assert significance.holm([0.03, 0.5, 0.01, 0.02]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    # Never smaller than a smaller p's: 2 x 0.04, then 0.05 < 0.08. Never above 1.
    assert significance.holm([0.05, 0.04]) == pytest.approx([0.08, 0.08])
    assert significance.holm([0.9, 0.8]) == [1.0, 1.0]
    assert significance.holm([0.3]) == [0.3]
    assert significance.holm([]) == []


def test_the_p_of_draws_counts_the_rarer_side() -> None:
    draws = np.array([-1.0] * 3 + [1.0] * 96)
    assert significance.bootstrap_p(draws) == pytest.approx(2 * 4 / 100)
    assert significance.bootstrap_p(np.ones(99)) == pytest.approx(0.02)
    assert significance.bootstrap_p(np.zeros(99)) == 1.0


def test_the_signed_rank_test_takes_rounding_for_ties() -> None:
    # Six positive differences: of the 64 signs one is as extreme on either side.
    assert significance.signed_rank(np.array([1.0, 2, 3, 4, 5, 6])) == pytest.approx(2 / 64)
    assert significance.signed_rank(np.zeros(5)) == 1.0
    assert significance.signed_rank(np.array([1e-17, -1e-16, 0.0])) == 1.0


# ---------------------------------------------------------------- scores files


def test_ranked_rows_are_compared_over_users(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    names = [f"u{u}" for u in draw.integers(0, 30, size=90)]
    places = [draw.integers(0, 20, size=90).tolist() for _ in range(3)]
    seeds = [ranked(tmp_path / f"{i}.parquet", p, names) for i, p in enumerate(places[:2])]
    base = ranked(tmp_path / "base.parquet", places[2], names)
    ndcg, hit = compare(seeds, [base])
    assert (ndcg.metric, hit.metric) == ("ndcg@10", "hit@10")
    a, b, c = ((np.array(p) < 10).astype(float) for p in places)
    gap = (a + b) / 2 - c
    assert hit.ours == pytest.approx((a + b).mean() / 2)
    assert hit.difference == pytest.approx(gap.mean())
    own = [gap[[n == name for n in names]] for name in sorted(set(names))]
    assert hit.users == len(own)
    assert hit.p == pytest.approx(stats.wilcoxon([g.mean() for g in own]).pvalue)
    # An independent bootstrap of users, by a loop.
    repeated = []
    for _ in range(2000):
        drawn = [own[i] for i in draw.integers(0, len(own), size=len(own))]
        repeated.append(np.concatenate(drawn).mean())
    assert (hit.low, hit.high) == pytest.approx(np.quantile(repeated, (0.025, 0.975)), abs=0.015)
    assert ndcg.low < ndcg.difference < ndcg.high


def test_many_rows_of_few_users_count_as_few(tmp_path: Path) -> None:
    """Every row told twenty times by its user leaves the interval as it is."""
    ours, names = [0, 20, 0, 0, 20, 0, 20, 0], [f"u{i}" for i in range(8)]
    for copies in (1, 20):
        ranked(tmp_path / f"a{copies}", ours * copies, names * copies)
        ranked(tmp_path / f"b{copies}", [20] * 8 * copies, names * copies)
    once, often = (compare([tmp_path / f"a{n}"], [tmp_path / f"b{n}"])[1] for n in (1, 20))
    assert (often.low, often.high, often.p) == pytest.approx((once.low, once.high, once.p))


def test_a_constant_difference_is_no_certainty(tmp_path: Path) -> None:
    names = ["a", "a", "b", "c", "c", "c"]
    ours = ranked(tmp_path / "ours.parquet", [0] * 6, names)
    base = ranked(tmp_path / "base.parquet", [1] * 6, names)
    ndcg, hit = compare([ours], [base])
    gap = 1 - 1 / math.log2(3)
    # Three users: by Wilson's interval 3.8416 / 6.8416 of all others may differ by anything in -1 to 1.
    others = 1.96**2 / (3 + 1.96**2)
    ends = (gap - others * (gap + 1), gap + others * (1 - gap))
    assert (ndcg.difference, ndcg.low, ndcg.high) == pytest.approx((gap, *ends))
    assert (hit.difference, hit.low, hit.high, hit.p) == pytest.approx((0, -others, others, 1))


def test_labelled_rows_are_compared_by_the_mean_of_the_seeds_aucs(tmp_path: Path) -> None:
    draw = np.random.default_rng(2)
    names = [f"u{u}" for u in draw.integers(0, 40, size=120)]
    labels = (draw.random(120) < 0.6).tolist()
    good = [(draw.normal(size=120) + np.array(labels)).tolist() for _ in range(2)]
    noise = draw.integers(0, 3, size=120).astype(float).tolist()
    ours = [labelled(tmp_path / f"{i}.parquet", s, labels, names) for i, s in enumerate(good)]
    base = labelled(tmp_path / "base.parquet", noise, labels, names)
    (found,) = compare(ours, [base])
    own = [roc_auc_score(labels, np.float32(s)) for s in good]
    assert found.ours == pytest.approx(np.mean(own))
    assert found.theirs == pytest.approx(roc_auc_score(labels, noise))
    repeated = []
    rows = [np.flatnonzero([n == name for n in names]) for name in sorted(set(names))]
    for _ in range(400):
        drawn = np.concatenate([rows[i] for i in draw.integers(0, len(rows), size=len(rows))])
        y = np.array(labels)[drawn]
        aucs = [roc_auc_score(y, np.array(s)[drawn]) for s in (*good, noise)]
        repeated.append(np.mean(aucs[:2]) - aucs[2])
    spread = (found.low, found.high)
    assert spread == pytest.approx(np.quantile(repeated, (0.025, 0.975)), abs=0.03)
    assert found.p < 0.01
    ranks = [stats.spearmanr(np.float32(s), noise).statistic for s in good]
    assert found.correlation == pytest.approx(np.mean(ranks))
    (same,) = compare(ours, ours)
    assert same.correlation == pytest.approx(1)
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    a = ranked(tmp_path / "a", [0, 1], ["u", "v"])
    other = ranked(tmp_path / "b", [0, 1], ["u", "w"])
    one = ranked(tmp_path / "c", [0, 1], ["u", "u"])
    liked = labelled(tmp_path / "d", [0.0, 1.0], [True, False], ["u", "v"])
    swapped = labelled(tmp_path / "e", [0.0, 1.0], [False, True], ["u", "v"])
    alike = labelled(tmp_path / "f", [0.0, 1.0], [True, True], ["u", "v"])
    for ours, theirs, word in (
        (a, other, "the same rows"),
        (one, one, "at least two"),
        (a, liked, "one holds labelled rows"),
        (liked, swapped, "the same rows"),
        (alike, alike, "all liked or all disliked"),
    ):
        with pytest.raises(ValueError, match=word):
            compare([ours], [theirs])
