"""Calibration of log-odds by hand, against torchmetrics and scikit-learn, and over two ranks' sums."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, log_loss
from torchmetrics.classification import BinaryCalibrationError

from lightning_modules.calibration import AnswerRates, Calibration


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_four_rows_by_hand() -> None:
    metric = Calibration(bins=2)
    rows = torch.tensor([logit(p) for p in (0.2, 0.4, 0.9, 0.7)], dtype=torch.float64)
    metric.update(rows, torch.tensor([0, 1, 1, 0]))
    got = {name: value.item() for name, value in metric.compute().items()}
    # below a half: mean 0.3, share 1/2; above: mean 0.8, share 1/2; two of four rows each
    assert got["ece"] == pytest.approx(0.5 * 0.2 + 0.5 * 0.3, abs=1e-9)
    assert got["brier"] == pytest.approx((0.04 + 0.36 + 0.01 + 0.49) / 4, abs=1e-9)
    nats = -(math.log(0.8) + math.log(0.4) + math.log(0.9) + math.log(0.3)) / 4
    assert got["log_loss"] == pytest.approx(nats, abs=1e-9)
    assert got["yes_rate"] == 0.5
    below, above = metric.curve
    assert (below["bin"], below["above"], below["up_to"], below["count"]) == (1, 0.0, 0.5, 2)
    assert below["mean_probability"] == pytest.approx(0.3, abs=1e-9)
    assert above["mean_probability"] == pytest.approx(0.8, abs=1e-9)
    assert below["share_liked"] == above["share_liked"] == 0.5


def test_an_edge_belongs_to_the_bin_below_and_certainty_to_the_last() -> None:
    metric = Calibration(bins=2)
    metric.update(torch.tensor([0.0, 1000.0, -1000.0]), torch.tensor([True, True, False]))
    got = metric.compute()
    assert [line["count"] for line in metric.curve] == [2, 1]  # 0 and 0.5; 1
    assert got["log_loss"].item() == pytest.approx(math.log(2) / 3, abs=1e-9)
    assert got["yes_rate"].item() == pytest.approx(1 / 3)  # a margin of 0 is no yes
    metric.update(torch.tensor([-1000.0]), torch.tensor([True]))
    assert metric.compute()["log_loss"].item() == pytest.approx((math.log(2) + 1000) / 4)


@st.composite
def pairs(draw: st.DrawFn, most: float = 30) -> tuple[list[float], list[bool]]:
    n = draw(st.integers(1, 60))
    margins = draw(st.lists(st.floats(-most, most), min_size=n, max_size=n))
    return margins, draw(st.lists(st.booleans(), min_size=n, max_size=n))


@settings(max_examples=100, deadline=None)
@given(pairs(), st.integers(1, 20))
def test_sums_of_ranks_are_those_of_one_to_the_last_bit(
    case: tuple[list[float], list[bool]], bins: int
) -> None:
    margins, labels = torch.tensor(case[0]), torch.tensor(case[1])
    whole, *ranks = (Calibration(bins) for _ in range(3))
    whole.update(margins, labels)
    order = torch.randperm(len(margins), generator=torch.Generator().manual_seed(len(margins)))
    for rank, metric in enumerate(ranks):
        metric.update(margins[order][rank::2], labels[order][rank::2])
    joined = Calibration(bins)
    joined.per_bin = sum(m.per_bin for m in ranks)  # type: ignore[assignment]
    joined.totals = sum(m.totals for m in ranks)  # type: ignore[assignment]
    joined._update_count = 1
    assert {k: v.item() for k, v in joined.compute().items()} == {
        k: v.item() for k, v in whole.compute().items()
    }
    assert joined.curve == whole.curve


@settings(max_examples=40, deadline=None)
@given(pairs(most=12))  # scikit-learn clips what is surer than float64 can tell
def test_torchmetrics_and_scikit_learn_agree(case: tuple[list[float], list[bool]]) -> None:
    margins, labels = torch.tensor(case[0], dtype=torch.float64), torch.tensor(case[1])
    p = margins.sigmoid()
    metric = Calibration()
    metric.update(margins, labels)
    got = {name: value.item() for name, value in metric.compute().items()}
    assert got["brier"] == pytest.approx(brier_score_loss(labels, p, pos_label=1), abs=1e-8)
    assert got["log_loss"] == pytest.approx(log_loss(labels, p, labels=[0, 1]), abs=1e-6)
    scaled = p * 15
    if bool(((scaled - scaled.round()).abs() < 1e-4).any()):
        return  # torchmetrics' bins are closed below, in float32
    theirs = BinaryCalibrationError(n_bins=15, norm="l1")(p, labels.int()).item()
    assert got["ece"] == pytest.approx(theirs, abs=1e-5)


def test_rows_that_say_nothing_are_refused_or_nan() -> None:
    with pytest.raises(ValueError, match="NaN"):
        Calibration().update(torch.tensor([math.nan]), torch.tensor([True]))
    with pytest.raises(ValueError, match="at least 1 bin"):
        Calibration(0)
    empty = Calibration()
    empty.update(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    assert all(value.isnan() for value in empty.compute().values())
    assert empty.curve == []


def test_refusals_are_counted_beside_calibration() -> None:
    metric, plain = Calibration(refusals=True), Calibration()
    margins, labels = torch.tensor([2.0, -1.0, 0.5, 3.0]), torch.tensor([True, False, False, True])
    for part in (slice(0, 3), slice(3, 4)):
        answered = torch.tensor([True, False, False, True])
        metric.update(margins[part], labels[part], answered[part])
        plain.update(margins[part], labels[part])
    found = {name: value.item() for name, value in metric.compute().items()}
    assert found.pop("refusal_rate") == 0.5
    assert found == {name: value.item() for name, value in plain.compute().items()}
    assert metric.curve == plain.curve
    with pytest.raises(ValueError, match="do not tell if they were answered"):
        metric.update(margins, labels)
    assert Calibration(refusals=True).compute()["refusal_rate"].isnan()


def test_rates_of_answers_by_hand() -> None:
    rates = AnswerRates()
    rates.update(torch.tensor([1.0, -1.0, 0.0]))
    rates.update(torch.tensor([0.0]))
    assert {k: v.item() for k, v in rates.compute().items()} == {
        "yes_rate": 0.25,
        "refusal_rate": 0.5,
    }
    lists = AnswerRates(asks_yes=False)
    lists.update(torch.tensor([1.0, 0.0]))
    assert {k: v.item() for k, v in lists.compute().items()} == {"refusal_rate": 0.5}
