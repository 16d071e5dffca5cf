"""The gate against arithmetic, autograd and a hand-made case; the module on files; what cannot be fused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from datamodules.sources import DataSourceError
from datamodules.types import Batch
from lightning_modules.fusion import FusionModule
from lightning_modules.fusion.model import (
    EDGES,
    Gate,
    bin_names,
    bins_of,
    fit_gate,
    fit_temperature,
    log_softmax,
)

ITEMS, WIDTH = 40, 10
COLD = 20  # items 1..20 were trained on 0 to 4 times, the others 200 times and more
COUNTS = np.array([0, *(i % 5 for i in range(COLD)), *range(200, 200 + ITEMS - COLD)])

# ---------------------------------------------------------------- bins


def test_bins_by_hand() -> None:
    counts = np.array([0, 1, 4, 5, 9, 10, 49, 199, 200, 9999])
    assert bins_of(counts).tolist() == [0, 1, 1, 2, 2, 3, 4, 6, 7, 7]
    assert bin_names() == ["0", "1-4", "5-9", "10-19", "20-49", "50-99", "100-199", "200+"]
    assert bins_of(np.array([[0, 7]]), [0]).tolist() == [[0, 0]]
    assert bin_names([0]) == ["0+"]


@given(st.sets(st.integers(1, 50), max_size=6), st.integers(0, 60))
def test_a_bin_holds_what_its_name_says(inner: set[int], count: int) -> None:
    edges = [0, *sorted(inner)]
    name = bin_names(edges)[int(bins_of(np.array([count]), edges)[0])]
    low, _, high = name.partition("-")
    assert int(low.rstrip("+")) <= count
    assert name.endswith("+") or count <= int(high or low)


@pytest.mark.parametrize("edges", [[], [1, 2], [0, 5, 5], [0, 9, 3]])
def test_edges_ascend_from_nothing(edges: list[int]) -> None:
    with pytest.raises(ValueError, match="ascend from 0"):
        bins_of(np.zeros(1), edges)


# ---------------------------------------------------------------- temperatures and gate


def test_a_temperature_is_that_of_the_draws() -> None:
    """Targets drawn from softmax(scores / 2.5), the loss by torch; padding says nothing."""
    draw = np.random.default_rng(0)
    scores, real = draw.normal(size=(4000, 6)) * 8, np.ones((4000, 6), bool)
    real[:, 5] = draw.random(4000) < 0.5
    p = np.exp(log_softmax(scores / 2.5, real)) * real
    target = np.array([draw.choice(6, p=row / row.sum()) for row in p])
    found = fit_temperature(scores, real, target)
    assert found == pytest.approx(2.5, rel=0.05)
    shown = torch.from_numpy(np.where(real, scores, -np.inf))
    losses = {
        t: float(F.cross_entropy(shown / t, torch.from_numpy(target)))
        for t in (found * 0.99, found, found * 1.01)
    }
    assert min(losses, key=losses.__getitem__) == found


def test_scores_that_say_nothing_become_uniform() -> None:
    draw = np.random.default_rng(1)
    scores, target = draw.normal(size=(3000, 5)), draw.integers(5, size=3000)
    real = np.ones(scores.shape, bool)
    p = np.exp(log_softmax(scores / fit_temperature(-scores, real, scores.argmax(1)), real))
    assert p == pytest.approx(np.full(p.shape, 0.2), abs=0.02)  # the best item is never the target
    equal = fit_temperature(np.ones((3000, 5)), real, target)
    assert np.isfinite(equal)


def made(seed: int, rows: int = 400) -> dict[str, np.ndarray]:
    """The first model knows the target where it is warm, the second where it is cold."""
    draw = np.random.default_rng(seed)
    cold = np.stack([1 + draw.permutation(COLD)[: WIDTH // 2] for _ in range(rows)])
    warm = np.stack([COLD + 1 + draw.permutation(COLD)[: WIDTH // 2] for _ in range(rows)])
    items = np.sort(np.concatenate([cold, warm], axis=1), axis=1)  # (R, C)
    target = draw.integers(WIDTH, size=rows)
    noise = draw.normal(size=(2, rows, WIDTH))
    signal = 3.0 * (np.arange(WIDTH) == target[:, None])
    is_cold = items <= COLD
    first, second = noise[0] + signal * ~is_cold, 10 * (noise[1] + signal * is_cold)
    return {"items": items, "target": target, "first": first, "second": second}


def fitted(
    case: dict[str, np.ndarray], **options: Any
) -> tuple[Gate, list[np.ndarray], np.ndarray]:
    """A gate, both log-probabilities, and the candidates' bins."""
    real = np.ones(case["items"].shape, bool)
    both = [
        log_softmax(s / fit_temperature(s, real, case["target"]), real)
        for s in (case["first"], case["second"])
    ]
    bins = bins_of(COUNTS)[case["items"]]
    return fit_gate(*both, bins, real, case["target"], len(EDGES), **options), both, bins


@pytest.mark.parametrize("offsets", [True, False])
def test_the_gate_is_the_minimum_of_its_loss(offsets: bool) -> None:
    """The loss by torch; no step from the gate within what is allowed lowers it."""
    case = made(3)
    gate, both, bins = fitted(case, smoothness=2.0, offsets=offsets)
    first, second = map(torch.from_numpy, both)
    target = torch.from_numpy(case["target"])

    def loss(sharpness: float, weights: np.ndarray, shifts: np.ndarray) -> float:
        w, o = torch.from_numpy(weights)[bins], torch.from_numpy(shifts)[bins]
        scores = sharpness * (1 - w) * first + sharpness * w * second + o
        rough = sum(float((np.diff(v) ** 2).sum()) for v in (sharpness * weights, shifts))
        return float(F.cross_entropy(scores, target, reduction="sum")) + 2.0 * rough

    least = loss(gate.sharpness, gate.weights, gate.offsets)
    draw = np.random.default_rng(0)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(60):
            step = size * draw.normal(size=1 + 2 * len(EDGES))
            weights = (gate.weights + step[1 : 1 + len(EDGES)]).clip(0, 1)
            shifts = gate.offsets + step[1 + len(EDGES) :] * offsets
            assert loss(gate.sharpness + step[0], weights, shifts) >= least - 1e-6
    assert gate.offsets.sum() == pytest.approx(0, abs=1e-9)
    assert offsets or not gate.offsets.any()


def test_the_gate_is_the_same_every_time_and_bins_that_nobody_met_lie_between() -> None:
    gate, *_ = fitted(made(0))
    again, *_ = fitted(made(0))
    assert np.array_equal(gate.weights, again.weights)
    low, *between, high = gate.weights[[1, 2, 3, 4, 5, 6, 7]]
    assert low > 0.9
    assert high < 0.1
    assert between == pytest.approx(np.linspace(low, high, 7)[1:-1].tolist(), abs=1e-3)


# ---------------------------------------------------------------- the module on files

PROTOCOL = {"name": "made", "content": "c1", "candidates": "Uniform(9)"}


def write(
    folder: Path, case: dict[str, np.ndarray], model: str, protocol: dict[str, Any], **columns: Any
) -> Path:
    """What a test stage leaves of a model."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, width = case["items"].shape
    row = np.repeat(np.arange(rows), width)
    target = (np.arange(width) == case["target"][:, None]).ravel()
    frame = pl.DataFrame({
        "row": row, "user_id": [f"u{r}" for r in row], "weight": np.ones(len(row)),
        "item_id": [f"i{i}" for i in case["items"].ravel()], "score": case[model].ravel().astype(np.float32),
        "is_target": target,
    })  # fmt: skip
    file = folder / f"scores.{model}.parquet"
    frame.with_columns(**columns).sample(fraction=1, shuffle=True, seed=1).write_parquet(file)
    (folder / "metrics.json").write_text(json.dumps({"protocol": protocol}))
    return file


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """The module's inputs: validation rows and others to test."""
    found = {}
    for split, seed, extra in (("valid", 0, {"scored": "valid"}), ("test", 1, {})):
        for model in ("first", "second"):
            folder = tmp_path / f"{model}-{split}"
            file = write(folder, made(seed), model, {**PROTOCOL, **extra})
            found[f"{model}_{split}"] = str(file)
    return found


CATALOG = pl.DataFrame({"item_id": [f"i{i}" for i in range(1, ITEMS + 1)]})


def fused(files: dict[str, str], **options: Any) -> FusionModule:
    module = FusionModule(CATALOG, **files, **options)
    histories = SimpleNamespace(train_counts=lambda: COUNTS)
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(histories=histories))  # type: ignore[assignment]
    module.setup("test")
    return module


def batch(rows: np.ndarray, candidates: np.ndarray, target: np.ndarray) -> Batch:
    row = torch.from_numpy(rows)
    return Batch(
        row, row + 1, row[:, None], torch.ones_like(row), target=torch.from_numpy(target),
        candidates=torch.from_numpy(candidates),
    )  # fmt: skip


def test_a_model_of_cold_items_and_one_of_warm_ones_are_better_together(
    files: dict[str, str],
) -> None:
    module, case = fused(files), made(1)
    assert module.gate is not None
    # Cold candidates (0, and 1 to 4 events) are the second model's, warm ones (200 and more) the first's.
    assert module.gate.weights[:2].min() > 0.9
    assert module.gate.weights[-1] < 0.1
    # The second model's scores are 10 times as large for the same log-odds.
    assert module.temperatures[1] / module.temperatures[0] == pytest.approx(10, rel=0.2)
    rows = np.arange(400)[::-1].copy()
    order = np.random.default_rng(0).permutation(WIDTH)
    candidates = np.pad(case["items"][rows][:, order], ((0, 0), (2, 0)))  # another order, padded
    target = case["items"][rows, case["target"][rows]]
    counts, scores = module.rank(batch(rows, candidates, target))
    assert counts is not None
    assert scores is not None
    hit = float((counts.above == 0).double().mean())
    alone = [float((case[m].argmax(1) == case["target"]).mean()) for m in ("first", "second")]
    assert hit > max(alone) + 0.2, (hit, alone)
    # The scores are the formula's: sharpness ((1 - w) log p1 + w log p2) + offset, w by the candidate.
    logs = [
        torch.log_softmax(torch.from_numpy(case[m].astype(np.float32)).double() / t, 1)
        for m, t in zip(("first", "second"), module.temperatures, strict=True)
    ]
    bins = bins_of(COUNTS)[case["items"]]
    w, o = torch.from_numpy(module.gate.weights)[bins], torch.from_numpy(module.gate.offsets)[bins]
    expected = module.gate.sharpness * ((1 - w) * logs[0] + w * logs[1]) + o  # (R, C)
    expected = expected[torch.from_numpy(rows)][:, torch.from_numpy(order)]
    torch.testing.assert_close(scores[:, 2:], expected.float(), rtol=1e-4, atol=1e-4)
    (remark,) = module.remarks()
    assert "400 validation rows: 0: " in remark


def test_of_a_sample_of_validation_rows_those_drawn_count(
    files: dict[str, str], tmp_path: Path
) -> None:
    """With rows added whose targets say the opposite, for a rare group's sake, nothing changes."""
    plain = fused(files).gate
    case, odd = made(0), made(9, 100)
    odd["target"] = (odd["target"] + 1) % WIDTH
    both = {k: np.concatenate([case[k], odd[k]]) for k in case}
    drawn = np.repeat(np.arange(500) < 400, WIDTH)
    given = dict(files)
    for model in ("first", "second"):
        protocol = {**PROTOCOL, "scored": "valid"}
        file = write(tmp_path / f"s-{model}", both, model, protocol, all=pl.Series(drawn))
        given[f"{model}_valid"] = str(file)
    found = fused(given).gate
    assert plain is not None
    assert found is not None
    assert found.weights == pytest.approx(plain.weights, abs=1e-9)


def test_rows_and_candidates_of_other_data_are_refused(files: dict[str, str]) -> None:
    module, case = fused(files), made(1)
    rows, items = np.arange(3), case["items"][:3]
    target = items[:, 0]
    with pytest.raises(DataSourceError, match="the rows and candidates of its own data"):
        module.rank(batch(rows + 400, items, target))
    for other in (
        np.roll(items, 1, axis=0),
        items[:, :-1],
        np.pad(items, ((0, 0), (0, 1)), "edge"),
    ):
        with pytest.raises((DataSourceError, ValueError), match="its own data"):
            module.score(module.encode(batch(rows, items, target)), torch.from_numpy(other))
    with pytest.raises(DataSourceError, match="its own data"):
        module.score(rows, torch.arange(1, 11))


# ---------------------------------------------------------------- what cannot be fused


def refused(files: dict[str, str], **options: Any) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller reads the message
        FusionModule(CATALOG, **files, **options)
    return str(caught.value)


def test_settings_that_cannot_be(files: dict[str, str]) -> None:
    assert "smoothness" in refused(files, smoothness=-1.0)
    assert "ascend from 0" in refused(files, edges=[3])


def test_files_that_are_missing_damaged_or_of_another_kind(
    files: dict[str, str], tmp_path: Path
) -> None:
    broken = Path(files["second_test"])
    lines = pl.read_parquet(broken)
    one = pl.DataFrame({"row": [0], "user_id": ["u"]})
    for content, words in (
        (
            one.with_columns(above=pl.lit(0), ties=pl.lit(0)),
            ("whole catalogues", "UniformCandidates"),
        ),
        (one.with_columns(item_id=pl.lit("i1"), score=pl.lit(1.0), label=True), ("holds labels",)),
        (one.drop("row"), ("no scored rows",)),
        (lines.with_columns(score=pl.lit(float("inf"))), ("no finite numbers",)),
        (lines.with_columns(item_id=pl.lit("x9")), ("'x9'", "does not have")),
    ):
        content.write_parquet(broken)
        said = refused(files)
        assert str(broken) in said
        assert all(word in said for word in words), said
    broken.write_bytes(b"PAR1")
    assert "cannot be read" in refused(files)
    broken.unlink()
    assert "is missing" in refused(files)
    lines.write_parquet(broken)
    (broken.parent / "metrics.json").unlink()
    assert "no readable metrics.json" in refused(files)


def test_other_candidates_rows_or_protocols(files: dict[str, str]) -> None:
    other = Path(files["second_test"])
    case = made(1)
    swapped = {**case, "items": np.where(case["items"] == case["items"][0, 0], 40, case["items"])}
    for scored in (made(2), made(1, 399), swapped):
        write(other.parent, scored, "second", PROTOCOL)
        assert "do not hold the same candidates of the same rows" in refused(files)
    write(other.parent, case, "second", {**PROTOCOL, "candidates": "Uniform(19)"})
    said = refused(files)
    assert "differ in candidates (Uniform(9) against Uniform(19))" in said
    # Both tests are alike, but on other data than the validation.
    for model in ("first", "second"):
        write(Path(files[f"{model}_test"]).parent, case, model, {**PROTOCOL, "content": "c2"})
    assert "differ in content (c1 against c2)" in refused(files)


def test_weights_are_not_chosen_on_the_rows_that_are_tested(files: dict[str, str]) -> None:
    given = {k: files[k.replace("valid", "test")] for k in files}
    assert "must not be chosen on the rows that are tested" in refused(given)
