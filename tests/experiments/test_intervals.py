"""Intervals over seeds and of paired differences, against arithmetic and scipy."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from experiments import intervals
from lightning_modules.expected import expected_hit, expected_ndcg


def ranked(path: Path, above: list[int], ties: list[int] | None = None, first: int = 0) -> Path:
    rows = list(range(first, first + len(above)))
    frame = pl.DataFrame({
        "row": rows, "user_id": [f"u{r}" for r in rows],
        "above": above, "ties": ties or [0] * len(above),
    })  # fmt: skip
    frame.write_parquet(path)
    return path


@pytest.mark.parametrize("count", [*range(2, 13), 30])
def test_the_interval_over_seeds_is_students(count: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(count).normal(size=count).tolist()
    low, high = stats.t.interval(0.95, count - 1, np.mean(values), stats.sem(values))
    tolerance = 1e-3 if count <= 10 else 2e-3  # beyond ten seeds an expansion stands in
    assert intervals.over_seeds(values) == pytest.approx((high - low) / 2, rel=tolerance)


def test_a_paired_difference_by_hand(tmp_path: Path) -> None:
    ours = ranked(tmp_path / "a.parquet", [0, 1, 10, 2])
    theirs = ranked(tmp_path / "b.parquet", [1, 1, 0, 99])
    second = 1 / math.log2(3)
    gaps = [1 - second, 0.0, -1.0, 0.5]  # 1 / log2(1 + place), 0 behind the tenth
    found = intervals.paired([ours], [theirs])
    assert found is not None
    assert found.mean == pytest.approx(statistics.fmean(gaps))
    assert found.half == pytest.approx(1.96 * statistics.stdev(gaps) / 2)
    assert str(found).startswith(f"{statistics.fmean(gaps):+.4f} [")


def test_seeds_are_averaged_row_by_row(tmp_path: Path) -> None:
    seeds = [ranked(tmp_path / f"{i}.parquet", above) for i, above in enumerate(([0, 20], [20, 0]))]
    base = ranked(tmp_path / "b.parquet", [20, 20])
    found = intervals.paired(seeds, [base])
    assert found is not None
    assert found.mean == pytest.approx(0.5)
    assert found.half == 0  # each row gained one half


def test_ties_count_by_their_expectation(tmp_path: Path) -> None:
    ours = ranked(tmp_path / "a.parquet", [0, 0], [1, 1])
    base = ranked(tmp_path / "b.parquet", [20, 20])
    found = intervals.paired([ours], [base])
    assert found is not None
    assert found.mean == pytest.approx((1 + 1 / math.log2(3)) / 2)


def test_sampled_candidates_are_ranked_from_their_scores(tmp_path: Path) -> None:
    def listed(name: str, scores: list[list[float]]) -> Path:
        lines = [
            {"row": r, "user_id": f"u{r}", "score": s, "is_target": c == 0}
            for r, row in enumerate(scores)
            for c, s in enumerate(row)
        ]
        pl.DataFrame(lines).write_parquet(tmp_path / name)
        return tmp_path / name

    ours = listed("a", [[3.0, 1.0, 2.0], [1.0, 2.0, 1.0]])  # first; one above and one tied
    base = listed("b", [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])  # third, third
    found = intervals.paired([ours], [base])
    second = (1 / math.log2(3) + 0.5) / 2
    assert found is not None
    assert found.mean == pytest.approx((1 - 0.5 + second - 0.5) / 2)


def test_rows_of_a_sample_that_are_there_for_a_rare_group_alone_do_not_count(
    tmp_path: Path,
) -> None:
    drawn, further = [0, 3, 1], [9, 9]
    ours, base = ranked(tmp_path / "a", drawn + further), ranked(tmp_path / "b", [0, 0, 0, 0, 0])
    for file in (ours, base):
        pl.read_parquet(file).with_columns(all=pl.Series([True] * 3 + [False] * 2)).write_parquet(
            file
        )
    expected = intervals.paired(
        [ranked(tmp_path / "c", drawn)], [ranked(tmp_path / "d", [0, 0, 0])]
    )
    assert expected is not None
    assert intervals.paired([ours], [base]) == expected


def test_other_rows_are_refused_and_missing_files_tell_nothing(tmp_path: Path) -> None:
    ours = ranked(tmp_path / "a.parquet", [0, 1, 2])
    with pytest.raises(ValueError, match="the same rows"):
        intervals.paired([ours], [ranked(tmp_path / "b.parquet", [0, 1, 2], first=1)])
    with pytest.raises(ValueError, match="the same rows"):
        intervals.paired([ours], [ranked(tmp_path / "b.parquet", [0, 1])])
    assert intervals.paired([ours], [tmp_path / "none.parquet"]) is None
    assert intervals.paired([ours, tmp_path / "none.parquet"], [ours]) is None
    labelled = tmp_path / "labels.parquet"
    pl.DataFrame({"row": [0], "user_id": ["u"], "label": [True]}).write_parquet(labelled)
    assert intervals.paired([labelled], [ours]) is None


@pytest.mark.parametrize(("hits", "rows"), [(0, 8), (3, 8), (8, 8), (60, 141)])
def test_the_interval_of_a_share_is_wilsons(hits: int, rows: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    low, high = stats.binomtest(hits, rows).proportion_ci(method="wilson")
    found = intervals.of_share([1.0] * hits + [0.0] * (rows - hits))
    assert found.value == pytest.approx(hits / rows)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)  # 1.960 for 1.95996


def test_the_interval_of_a_change_by_hand() -> None:
    # 5 rows ours alone, 1 theirs alone, 4 alike: mean 4 / 12 and square 7 / 12 with the rows added.
    found = intervals.of_change([1.0] * 5 + [-1.0] + [0.0] * 4)
    half = 1.96 * math.sqrt((7 / 12 - (4 / 12) ** 2) / 12)
    assert found.value == pytest.approx(0.4)
    assert (found.low, found.high) == pytest.approx((4 / 12 - half, 4 / 12 + half))
    # Three rows that all agree prove little: 3 / 5 -+ 1.96 sqrt((4 / 5 - 9 / 25) / 5), cut at 1.
    few = intervals.of_change([1.0] * 3)
    assert few.low == pytest.approx(0.6 - 1.96 * math.sqrt(0.44 / 5))
    assert few.high == 1
    alike = intervals.of_change([0.0] * 8)
    assert alike.value == 0
    assert alike.high == -alike.low == pytest.approx(1.96 * math.sqrt(0.1 / 10))


@pytest.mark.parametrize("k", [1, 10, 37])
def test_rows_have_the_metrics_of_the_evaluation(k: int, tmp_path: Path) -> None:
    """The same numbers as with tensors, which this module does without."""
    draw = np.random.default_rng(k)
    above, ties = draw.integers(0, 40, 500), draw.choice([0, 0, 1, 5, 90], 500)
    file = ranked(tmp_path / "a.parquet", above.tolist(), ties.tolist())
    found = intervals.mean_by_row([file], (f"hit@{k}", f"ndcg@{k}"), further=False)
    assert found is not None
    found = found.sort("row")
    hit, ndcg = (f(above, ties, k).numpy() for f in (expected_hit, expected_ndcg))
    assert found[f"hit@{k}"].to_numpy() == pytest.approx(hit, abs=1e-12)
    assert found[f"ndcg@{k}"].to_numpy() == pytest.approx(ndcg, abs=1e-12)
