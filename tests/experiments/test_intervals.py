"""Intervals over seeds and of paired differences, against arithmetic and scipy."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from experiments import intervals
from lightning_modules.expected import expected_hit, expected_ndcg
from lightning_modules.metrics import RankingMetrics


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
    assert found.value == pytest.approx(statistics.fmean(gaps))
    assert found.half == pytest.approx(1.96 * statistics.stdev(gaps) / 2)
    assert str(found).startswith(f"{statistics.fmean(gaps):+.4f} [")


def test_seeds_are_averaged_row_by_row(tmp_path: Path) -> None:
    seeds = [ranked(tmp_path / f"{i}.parquet", above) for i, above in enumerate(([0, 20], [20, 0]))]
    base = ranked(tmp_path / "b.parquet", [20, 20])
    found = intervals.paired(seeds, [base])
    assert found is not None
    assert found.value == pytest.approx(0.5)
    # Each row gained one half; 3.8416 / (2 + 3.8416) of all others may have lost or gained up to one.
    others = 1.96**2 / (2 + 1.96**2)
    assert (found.low, found.high) == pytest.approx((0.5 - 1.5 * others, 0.5 + 0.5 * others))
    assert str(found) == "+0.5000 [-0.4864, +0.8288]"


def test_ties_count_by_their_expectation(tmp_path: Path) -> None:
    ours = ranked(tmp_path / "a.parquet", [0, 0], [1, 1])
    base = ranked(tmp_path / "b.parquet", [20, 20])
    found = intervals.paired([ours], [base])
    assert found is not None
    assert found.value == pytest.approx((1 + 1 / math.log2(3)) / 2)


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
    assert found.value == pytest.approx((1 - 0.5 + second - 0.5) / 2)


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


@pytest.mark.parametrize(("value", "rows"), [(0.0, 48), (1.0, 48), (0.0, 1), (1.0, 10_000)])
def test_no_hits_and_nothing_but_hits_have_wilsons(value: float, rows: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    low, high = stats.binomtest(int(value) * rows, rows).proportion_ci(method="wilson")
    found = intervals.of_alike(value, rows)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)
    assert found.value == value
    assert found.half is None


def entry(value: float | None, error: float | None) -> dict[str, float | None]:
    return {"value": value, "stderr": error}


def test_a_metric_over_rows() -> None:
    values = {"all/n": entry(96, None), "all/hit@1": entry(0.25, 0.05), "all/hit@10": entry(0.0, 0.0),
              "all/mrr": entry(0.5, 1e-6), "all/auc": entry(1.0, 0.0), "all/ece": entry(0.1, None),
              "cold/n": entry(0, None), "cold/mrr": entry(None, None)}  # fmt: skip
    found = intervals.of_metric(values, "all/hit@1")
    assert found is not None
    assert (found.low, found.high) == pytest.approx((0.25 - 0.098, 0.25 + 0.098))  # 1.96 x 0.05
    assert found.half == pytest.approx(0.098)
    others = 1.96**2 / (96 + 1.96**2)  # 0 of 96
    none, alike = (intervals.of_metric(values, f"all/{m}") for m in ("hit@10", "mrr"))
    assert none is not None
    assert (none.low, none.high) == (0, pytest.approx(others))
    # Every row has its target second: sums that are rounded leave an error, which is no spread.
    assert alike is not None
    assert (alike.low, alike.high) == pytest.approx((0.5 - others / 2, 0.5 + others / 2))
    for told in ("all/auc", "all/ece", "cold/mrr", "all/ndcg@5"):
        assert intervals.of_metric(values, told) is None, told


def test_means_over_users_count_users() -> None:
    """Of labelled rows: 40 of them, by 9 users who each like all that they are predicted to like."""
    values = {"all/n": entry(40, None), "all/users": entry(9, None), "all/uauc": entry(1.0, 0.0)}
    found = intervals.of_metric(values, "all/uauc")
    assert found is not None
    assert found.low == pytest.approx(9 / (9 + 1.96**2))


def test_rows_that_are_alike_have_rounding_errors_below_the_bound() -> None:
    above, ties = torch.full((3,), 2), torch.zeros(3, dtype=torch.int64)
    for count in (3, 30, 3000):
        metric = RankingMetrics((1, 5))
        rows = [t.repeat(count // 3) for t in (above, ties, above + 9)]
        metric.update(*rows, torch.ones(count, 1, dtype=torch.bool), torch.full((count,), 1 / 3))
        values = {n: entry(m.item(), e.item()) for n, (m, e) in metric.compute_with_error().items()}
        values["all/n"] = entry(count, None)
        found = intervals.of_metric(values, "all/ndcg@5")  # each 1 / log2(4)
        assert found is not None
        assert found.high == pytest.approx(0.5 + 0.5 * 1.96**2 / (count + 1.96**2), abs=1e-6)
        third = intervals.of_metric(values, "all/mrr")
        assert third is not None
        assert third.low == pytest.approx(count / (count + 1.96**2) / 3, abs=1e-6)


def test_seeds_that_agree_have_the_interval_of_their_rows() -> None:
    def run(value: float, error: float) -> dict[str, dict[str, float | None]]:
        return {"all/n": entry(96, None), "all/hit@1": entry(value, error)}

    unlike = intervals.of_seeds([run(0.1, 0.01), run(0.2, 0.01)], "all/hit@1")
    assert unlike is not None
    assert unlike.value == pytest.approx(0.15)
    assert unlike.half == pytest.approx(
        12.706 * 0.05
    )  # s of 0.1 and 0.2 is 0.1 / sqrt 2, over sqrt 2
    agreed = intervals.of_seeds([run(0.2, 0.01)] * 3, "all/hit@1")
    assert agreed is not None
    assert agreed.half == pytest.approx(0.0196)
    assert intervals.of_seeds([run(0.0, 0.0)] * 3, "all/hit@1") == intervals.of_alike(0.0, 96)
    assert intervals.of_seeds([run(0.1, 0.01), {}], "all/hit@1") is None


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
