"""Metrics against brute force over tie orders, ir-measures, scikit-learn, and two processes."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import ir_measures
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import RR, R, Success, nDCG
from sklearn.metrics import roc_auc_score
from torch import Tensor

from lightning_modules.auc import bootstrap_errors
from lightning_modules.calibration import Calibration
from lightning_modules.metrics import LogitAUC, RankingMetrics, list_metrics, row_metrics
from lightning_modules.ranking import rank_candidates
from tests.ranks import in_ranks

KS = (1, 2, 3, 10)


def brute_force(scores: list[float], labels: list[bool], ks: tuple[int, ...]) -> dict[str, float]:
    """Mean of the textbook metrics over every order of the candidates that respects the scores."""
    orders = [
        order
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    positives, out = sum(labels), {}
    for k in ks:
        ideal = sum(1 / math.log2(1 + p) for p in range(1, min(k, positives) + 1))
        hits = [[labels[i] for i in order[:k]] for order in orders]
        out[f"hit@{k}"] = np.mean([any(h) for h in hits])
        out[f"recall@{k}"] = np.mean([sum(h) / positives for h in hits])
        gains = [sum(y / math.log2(2 + p) for p, y in enumerate(h)) for h in hits]
        out[f"ndcg@{k}"] = np.mean(gains) / ideal
        out[f"mrr@{k}"] = np.mean([1 / (h.index(True) + 1) if any(h) else 0.0 for h in hits])
    out["mrr"] = np.mean([1 / (1 + [labels[i] for i in order].index(True)) for order in orders])
    if positives < len(labels):
        out["auc"] = roc_auc_score(labels, np.nan_to_num(scores, posinf=99, neginf=-99))
    return {name: float(value) for name, value in out.items()}


@st.composite
def lists(draw: st.DrawFn) -> tuple[list[float], list[bool]]:
    n = draw(st.integers(1, 6))
    values = st.sampled_from([-math.inf, -1.0, 0.0, 2.0, math.inf])
    scores = draw(st.lists(values, min_size=n, max_size=n))
    labels = draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any))
    return scores, labels


@settings(max_examples=150, deadline=None)
@given(lists(), st.integers(0, 2))
def test_list_metrics_are_means_over_all_tie_orders(
    case: tuple[list[float], list[bool]], padding: int
) -> None:
    scores, labels = case
    mask = torch.tensor([[True] * len(scores) + [False] * padding])
    padded = torch.tensor([scores + [math.nan] * padding])  # padding may hold anything
    got = list_metrics(padded, torch.tensor([labels + [True] * padding]), mask, KS)
    expected = brute_force(scores, labels, KS)
    assert got.keys() == expected.keys() | {"auc"}
    for name, value in expected.items():
        assert got[name].item() == pytest.approx(value, abs=1e-12), name
    assert got["auc"].isnan().item() == all(labels)


@settings(max_examples=100, deadline=None)
@given(lists(), st.integers(0, 5))
def test_row_metrics_are_means_over_all_tie_orders(
    case: tuple[list[float], list[bool]], index: int
) -> None:
    scores = case[0]
    target = index % len(scores)
    ranks = rank_candidates(torch.tensor([scores]), target_index=torch.tensor([target]))
    got = row_metrics(ranks.above, ranks.ties, ranks.count, KS)
    expected = brute_force(scores, [i == target for i in range(len(scores))], KS)
    expected["uauc"] = expected.pop("auc", math.nan)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].item() == pytest.approx(value, abs=1e-12, nan_ok=True), name


def test_a_million_ties_cost_no_loop_and_no_digits() -> None:
    above, ties = torch.tensor([3]), torch.tensor([10**6])
    harmonic = math.fsum(1 / p for p in range(4, 10**6 + 5))
    got = row_metrics(above, ties, above + ties + 1, (10,))
    assert got["mrr"].item() == pytest.approx(harmonic / (10**6 + 1), rel=1e-12)
    assert got["hit@10"].item() == pytest.approx(7 / (10**6 + 1), rel=1e-12)
    assert got["uauc"].item() == pytest.approx(0.5 - 1.5 / (10**6 + 3), abs=1e-9)


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64])
def test_counts_may_come_from_numpy_in_any_integer_type(dtype: type) -> None:
    above, ties, count = (torch.from_numpy(np.array([x], dtype=dtype)) for x in (0, 1, 20_000_001))
    got = row_metrics(above, ties, count, (1,))
    assert got["hit@1"].item() == 0.5
    assert got["mrr"].item() == pytest.approx(0.75, rel=1e-15)
    assert got["uauc"].item() == pytest.approx(1 - 0.5 / 20_000_000, rel=1e-15)


def test_tie_free_lists_agree_with_ir_measures() -> None:
    rng = np.random.default_rng(0)
    rows, width = 40, 30
    scores = np.argsort(rng.random((rows, width)), axis=1).astype(np.float32) - 15
    labels = rng.random((rows, width)) < 0.15
    labels[:, 0] = True
    wanted = {"mrr": RR, "mrr@5": RR @ 5}
    for k in (1, 5, 10):
        wanted |= {f"hit@{k}": Success @ k, f"recall@{k}": R @ k, f"ndcg@{k}": nDCG @ k}
    truth = {str(b): {str(c): int(labels[b, c]) for c in range(width)} for b in range(rows)}
    run = {str(b): {str(c): float(scores[b, c]) for c in range(width)} for b in range(rows)}
    got = list_metrics(torch.from_numpy(scores), torch.from_numpy(labels), None, (1, 5, 10))
    expected = ir_measures.calc_aggregate(wanted.values(), truth, run)
    for name, measure in wanted.items():
        assert got[name].mean().item() == pytest.approx(expected[measure], abs=1e-6), name


def test_lists_without_positives_or_of_unlike_shapes() -> None:
    got = list_metrics(torch.rand(2, 3), torch.tensor([[False] * 3, [True] * 3]), ks=(1,))
    assert all(value[0].isnan() for value in got.values())
    assert got["hit@1"][1] == 1
    with pytest.raises(ValueError, match="must have one shape"):
        list_metrics(torch.rand(2, 3), torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"NaN score in 1 of 1 rows"):
        list_metrics(torch.tensor([[math.nan, 1.0]]), torch.tensor([[True, False]]))


def random_rows(n: int, seed: int = 0) -> tuple[Tensor, ...]:
    """above, ties, count (n,), groups (n, 2) and weights (n,) of users with one to three rows."""
    g = torch.Generator().manual_seed(seed)
    count = torch.randint(20, 40, (n,), generator=g)
    above = (torch.rand(n, generator=g) * count).long()
    ties = (torch.rand(n, generator=g) * (count - above)).long()
    groups = torch.stack([torch.ones(n).bool(), torch.rand(n, generator=g) < 0.3], dim=1)
    weight = 1 / torch.randint(1, 4, (n,), generator=g).double()
    return above, ties, count, groups, weight


def test_means_and_errors_are_those_of_the_rows_in_each_group() -> None:
    above, ties, count, groups, weight = random_rows(200)
    metric = RankingMetrics((1, 5), ("all", "cold_item"))
    for part in torch.arange(200).split(37):
        metric.update(above[part], ties[part], count[part], groups[part], weight[part])
    means, errors = metric.compute(), metric.stderr()
    rows = row_metrics(above, ties, count, (1, 5))
    assert len(means) == 2 * (len(rows) + 1)
    for g, group in enumerate(("all", "cold_item")):
        inside = groups[:, g].numpy()
        assert means[f"{group}/n"].item() == inside.sum()
        for name, row in rows.items():
            v = row.numpy()[inside]
            by_user = name == "uauc" or name.startswith("recall@")
            w = weight.numpy()[inside] if by_user else np.ones(len(v))
            mean = np.average(v, weights=w)
            n = len(v)
            error = math.sqrt(n / (n - 1) * (w**2 * (v - mean) ** 2).sum()) / w.sum()
            assert means[f"{group}/{name}"].item() == pytest.approx(mean, abs=1e-9)
            assert errors[f"{group}/{name}"].item() == pytest.approx(error, abs=1e-6)
            if not by_user:  # with equal weights this is the textbook formula
                assert error == pytest.approx(v.std(ddof=1) / math.sqrt(n))
    both = metric.compute_with_error()
    assert both["all/ndcg@5"] == (means["all/ndcg@5"], errors["all/ndcg@5"])


def test_recall_equals_hit_with_one_row_a_user_and_weighs_users_alike_otherwise() -> None:
    above, ties, count = torch.tensor([0, 0, 5]), torch.zeros(3), torch.full((3,), 10)
    groups = torch.ones(3, 1, dtype=torch.bool)
    metric = RankingMetrics((1,))
    metric.update(above, ties, count, groups)
    assert metric.compute()["all/recall@1"] == metric.compute()["all/hit@1"]
    metric.reset()
    metric.update(above, ties, count, groups, torch.tensor([0.5, 0.5, 1.0]))  # users A, A, B
    assert metric.compute()["all/recall@1"].item() == 0.5
    assert metric.compute()["all/hit@1"].item() == pytest.approx(2 / 3, abs=1e-9)


def test_an_empty_group_and_a_lone_candidate_give_nan() -> None:
    metric = RankingMetrics((1,), ("all", "cold_user"))
    metric.update(
        torch.tensor([0]), torch.tensor([0]), torch.tensor([1]), torch.tensor([[True, False]])
    )
    means = metric.compute()
    assert means["cold_user/n"] == 0
    assert means["cold_user/hit@1"].isnan()
    assert means["all/hit@1"] == 1
    assert means["all/uauc"].isnan()  # nothing to compare the target with
    assert metric.stderr()["all/hit@1"].isnan()  # one row has no spread


def test_wrong_rows_and_cutoffs_raise() -> None:
    one = torch.tensor([1])
    with pytest.raises(ValueError, match="count must include the target"):
        RankingMetrics((1,)).update(one, one, 2 * one, torch.ones(1, 1).bool())
    with pytest.raises(ValueError, match=r"groups is \(1, 2\), expected .* \(1, 1\)"):
        RankingMetrics((1,)).update(one, one, 9 * one, torch.ones(1, 2).bool())
    for ks in ((), (0,), (5, 5)):
        with pytest.raises(ValueError, match="distinct cutoffs"):
            RankingMetrics(ks)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_auc_equals_scikit_learn_for_ties_huge_logits_and_users(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 60))
    values = st.one_of(
        st.floats(-1e6, 1e6, width=32), st.sampled_from([40.0, 30.0, 20.0, 0.0, -0.0])
    )
    scores = torch.tensor(data.draw(st.lists(values, min_size=n, max_size=n)))
    labels = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    users = torch.tensor(data.draw(st.lists(st.integers(1, 4), min_size=n, max_size=n)))
    metric = LogitAUC()
    for part in torch.arange(n).split(7):
        padded = torch.cat([scores[part], torch.tensor([math.nan])])
        metric.update(
            padded,
            torch.cat([labels[part], torch.tensor([True])]),
            torch.cat([users[part], torch.tensor([9])]),
            torch.tensor([True] * len(part) + [False]),
        )
    got = metric.compute()
    two = bool(labels.any()) and not bool(labels.all())
    expected = roc_auc_score(labels, scores.double()) if two else math.nan
    assert got["auc"].item() == pytest.approx(expected, abs=1e-9, nan_ok=True)
    each = [
        roc_auc_score(labels[users == u], scores[users == u].double())
        for u in users.unique()
        if len(labels[users == u].unique()) == 2
    ]
    uauc = np.mean(each) if each else math.nan
    assert got["uauc"].item() == pytest.approx(uauc, abs=1e-9, nan_ok=True)
    assert got["users"] == len(each)
    assert got["users_one_class"] == len(users.unique()) - len(each)


def test_bootstrap_of_users_equals_scikit_learn_with_weights() -> None:
    generator = torch.Generator().manual_seed(3)
    users = torch.randint(1, 7, (80,), generator=generator)
    labels = torch.rand(80, generator=generator) < 0.5
    labels[users == 2] = True  # a user with one class has no AUC of its own
    scores = (torch.randn(80, generator=generator) + labels).round(decimals=1)  # some tie
    got = bootstrap_errors(scores, labels, users, draws=50, seed=5)

    ids = users.unique()
    drawn = torch.randint(len(ids), (50, len(ids)), generator=torch.Generator().manual_seed(5))
    pooled, means = [], []
    for chosen in drawn:
        rows = torch.cat([(users == ids[u]).nonzero()[:, 0] for u in chosen])
        pooled.append(roc_auc_score(labels[rows], scores[rows].double()))
        own = [(labels[users == ids[u]], scores[users == ids[u]].double()) for u in chosen]
        means.append(np.mean([roc_auc_score(*pair) for pair in own if len(pair[0].unique()) == 2]))
    assert got["auc"].item() == pytest.approx(np.std(pooled, ddof=1), abs=1e-12)
    assert got["uauc"].item() == pytest.approx(np.std(means, ddof=1), abs=1e-12)
    metric = LogitAUC()
    metric.update(scores, labels, users)
    whole = bootstrap_errors(scores, labels, users)
    assert metric.stderr() == whole
    # A user whose one pair comes eight times tells no more than with one.
    pairs = (scores[:12], labels[:12], torch.arange(12))
    often = bootstrap_errors(*(x.repeat_interleave(8) for x in pairs))
    assert often["auc"].item() == pytest.approx(bootstrap_errors(*pairs)["auc"].item(), abs=1e-12)


@pytest.mark.filterwarnings("error")
def test_users_with_one_label_each_have_no_interval_of_their_own() -> None:
    labels = torch.tensor([True, False, True, False])
    got = bootstrap_errors(torch.rand(4), labels, torch.tensor([1, 2, 3, 4]), draws=20)
    assert got["uauc"].isnan()
    assert got["auc"] >= 0


def test_logits_that_a_sigmoid_would_tie_are_told_apart() -> None:
    metric = LogitAUC()
    metric.update(torch.tensor([40.0, 30.0, 20.0]), torch.tensor([1, 0, 0]))
    assert metric.compute() == {"auc": 1.0, "n": 3.0}


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_auc_refuses_nan_and_half_given_users() -> None:
    metric = LogitAUC()
    metric.update(torch.tensor([1.0]), torch.tensor([1]), torch.tensor([3]))
    metric.update(torch.tensor([0.0]), torch.tensor([0]))
    with pytest.raises(ValueError, match="always or never"):
        metric.compute()
    metric.reset()
    assert metric.compute()["auc"].isnan()
    metric.update(torch.tensor([math.nan, 0.0]), torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="NaN score"):
        metric.compute()
    with pytest.raises(ValueError, match="vectors of 2 pairs"):
        metric.update(torch.zeros(3), torch.tensor([1, 0]))


def filled(rows: Tensor) -> tuple[RankingMetrics, LogitAUC]:
    """Both metrics, updated with these rows of the random data in uneven batches."""
    above, ties, count, groups, weight = random_rows(1_001)
    ranking, auc = RankingMetrics((1, 10), ("all", "cold_item")), LogitAUC()
    for part in rows.split(64):
        ranking.update(above[part], ties[part], count[part], groups[part], weight[part])
        auc.update(above[part] / 3, groups[part, 1], count[part])
    return ranking, auc


def calibrated(rows: Tensor) -> Calibration:
    """The same data's counts as log-odds, their second group as labels."""
    above, _, _, groups, _ = random_rows(1_001)
    metric = Calibration(refusals=True)
    for part in rows.split(64):
        metric.update((above[part] + 1).double().log() - 2, groups[part, 1], above[part] % 3 > 0)
    return metric


def one_rank(rank: int, folder: Path) -> None:
    """Rank 0 holds every third row, rank 1 the others; ``lopsided`` has no row at all on rank 1."""
    rows = torch.arange(1_001)
    ranking, auc = filled(rows[rows % 3 == 0] if rank == 0 else rows[rows % 3 != 0])
    _, lopsided = filled(rows if rank == 0 else rows[:0])
    results = {
        "errors": ranking.stderr(),  # before compute(): must sum over the ranks by itself
        "means": ranking.compute(),
        "auc": auc.compute(),
        "lopsided": lopsided.compute(),
        "calibration": calibrated(
            rows[rows % 3 == 0] if rank == 0 else rows[rows % 3 != 0]
        ).compute(),
    }
    torch.save(results, folder / f"{rank}.pt")


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_two_processes_equal_one_to_the_last_bit(tmp_path: Path) -> None:
    in_ranks(2, one_rank, tmp_path)
    ranking, auc = filled(torch.arange(1_001))
    expected = {
        "errors": ranking.stderr(),
        "means": ranking.compute(),
        "auc": auc.compute(),
        "lopsided": auc.compute(),
        "calibration": calibrated(torch.arange(1_001)).compute(),
    }
    for rank in (0, 1):
        got = torch.load(tmp_path / f"{rank}.pt")
        for part, values in expected.items():
            assert got[part].keys() == values.keys()
            for name, value in values.items():
                assert torch.equal(got[part][name], value), (rank, part, name)


def test_sums_do_not_depend_on_the_order_of_rows() -> None:
    order = torch.randperm(1_001, generator=torch.Generator().manual_seed(3))
    (one, _), (other, _) = filled(torch.arange(1_001)), filled(order)
    assert torch.equal(one.totals, other.totals)
