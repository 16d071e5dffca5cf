"""Tables and charts from run folders: what counts, what is refused, and the three forms of a table."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from experiments import charts, compare, compared, costs, plots
from experiments.artifacts import PlannedStage
from experiments.canvas import Box, Canvas, Dot
from experiments.compared import Asked
from experiments.errors import UserError
from experiments.intervals import Interval
from experiments.table_text import Line, Sheet, Value, latex

SASREC, GRU, EASE = "sasrec/movielens_100k", "gru4rec/movielens_100k", "ease/movielens_100k"
GROUPS = ("all", "cold_item", "warm_item", "cold_user", "warm_user")
USERS = 12
SVG = "{http://www.w3.org/2000/svg}"
Make = Callable[..., Path]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMREC_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def write(
    runs: Path, folder: str, experiment: str, places: dict[str, list[int]], *, seed: int = 0,
    stage: str = "evaluate", fingerprint: str = "f1", split: str = "LeaveOneOut()",
    inputs: dict[str, str] | None = None, overrides: tuple[str, ...] = (), run: str = "test",
    finished: str = "2026-01-01 00:00:00", **done: Any,
) -> Path:  # fmt: skip
    """A finished stage as it would be; ``places`` has, by row, each user's place of the target."""
    where = runs / folder
    where.mkdir(parents=True)
    drawn = {"seed": seed} if overrides[:1] == (f"seed={seed}",) else {}
    modules = {name: {"_target_": "x", **drawn} for name in places or {stage: 0}}
    spec = {"modules": modules, "seed": seed, "run": run, "select": None}
    job = {"experiment": experiment, "stage": stage, "overrides": list(overrides), "spec": spec,
           "inputs": inputs or {}}  # fmt: skip
    (where / "stage.json").write_text(json.dumps(job))
    rows = {}
    for name, found in places.items():
        hit = np.mean([p < 10 for p in found])
        ndcg = np.mean([1 / math.log2(p + 2) if p < 10 else 0 for p in found])
        told = {"hit@1": 0.1, "hit@10": hit, "ndcg@10": ndcg, "mrr": 0.2}
        values = {f"{g}/{m}": {"value": v, "stderr": 0.01} for g in GROUPS for m, v in told.items()}
        rows[name] = values | {f"{g}/n": {"value": len(found), "stderr": None} for g in GROUPS}
        users = [f"u{i}" for i in range(len(found))]
        frame = {
            "row": range(len(found)),
            "user_id": users,
            "above": found,
            "ties": [0] * len(found),
        }
        pl.DataFrame(frame).write_parquet(where / f"scores.{name}.parquet")
    protocol = {"name": "movielens-100k", "split": split, "candidates": "FullRanking()"}
    if places:
        note = {"fingerprint": fingerprint, "protocol": protocol, "rows": rows}
        (where / "metrics.json").write_text(json.dumps(note))
    told = {"commit": "abc", "finished": finished, "sources": {}, "seconds": 3600.0, "devices": 1,
            "device": "cpu, 2 threads", "peak_memory_mb": {"host": 2048},
            "throughput": {n: {"users_per_second": 50.0} for n in places}}  # fmt: skip
    (where / "done.json").write_text(json.dumps({**told, **done}))
    return where


def find(*words: str, seeds: tuple[int, ...] = (), runs: Path) -> list[Any]:
    return compared.find(compared.asked(words), seeds, runs)


# ---------------------------------------------------------------- which rows


def test_words_of_names() -> None:
    found = compared.asked([SASREC, "seed=1", "~stages.reference", f"{GRU}:evaluate"], ["data=x"])
    assert found == [
        Asked(SASREC, "", ("data=x", "seed=1", "~stages.reference")),
        Asked(GRU, "evaluate", ("data=x",)),
    ]
    with pytest.raises(UserError, match=r"did you mean 'sasrec/movielens_100k'\?"):
        compared.asked(["sasrec/movielens_100"])
    with pytest.raises(UserError, match="NAMES is missing"):
        compared.asked([])


def test_methods_in_the_order_asked_then_the_rows_without_a_model(runs: Path) -> None:
    write(runs, "a-1", SASREC, {"evaluate": [0] * USERS})
    write(runs, "b-1", GRU, {"evaluate": [3] * USERS})
    write(runs, "r-1", SASREC, {"random": [9] * USERS, "markov": [1] * USERS}, stage="reference")
    write(
        runs,
        "r-2",
        EASE,
        {"random": [9] * 3, "markov": [1] * 3},
        stage="reference",
        fingerprint="f2",
    )
    assert [r.label for r in find(GRU, SASREC, runs=runs)] == [GRU, SASREC, "markov", "random"]


def test_all_seeds_count_or_those_asked_for(runs: Path) -> None:
    for seed in (0, 1, 2):
        write(runs, f"a-{seed}", SASREC, {"evaluate": [seed] * USERS}, seed=seed,
              finished=f"2026-01-0{3 - seed} 00:00:00", overrides=(f"seed={seed}",))  # fmt: skip
    (row,) = find(SASREC, runs=runs)
    assert row.seeds == (0, 1, 2)
    (row,) = find(SASREC, seeds=(2, 0), runs=runs)
    assert row.seeds == (2, 0)
    assert row.values["all/ndcg@10"] == pytest.approx([1 / math.log2(4), 1])
    told = compared.value_of(row, "all/ndcg@10")
    assert told.value == pytest.approx(0.75)
    assert told.interval.half == pytest.approx(
        12.706 * 0.25
    )  # s of 0.5 and 1 is 0.5 / sqrt 2, over sqrt 2
    with pytest.raises(UserError, match=r"not finished.*\n  - make exp NAME=\S+ SEEDS=0,3$"):
        find(SASREC, seeds=(0, 3), runs=runs)


def test_a_row_that_draws_nothing_counts_for_every_seed(runs: Path) -> None:
    write(runs, "p-1", EASE, {"evaluate": [1] * USERS})
    assert [r.label for r in find(EASE, seeds=(0, 3), runs=runs)] == [EASE]
    write(runs, "fit-1", SASREC, {}, stage="train", run="fit")
    weights = {"weights": str(runs / "fit-1" / "best.ckpt")}
    write(runs, "a-1", SASREC, {"evaluate": [0] * USERS}, inputs=weights)
    with pytest.raises(UserError, match="SEEDS=0,3"):
        find(SASREC, seeds=(0, 3), runs=runs)


def test_of_one_seed_the_interval_is_that_of_the_run(runs: Path) -> None:
    write(runs, "a-1", SASREC, {"evaluate": [0] * USERS})
    (row,) = find(SASREC, runs=runs)
    assert str(compared.value_of(row, "all/ndcg@10")) == "1.0000 ±0.0196"


def test_what_is_not_finished_is_named_with_its_command(runs: Path) -> None:
    write(runs, "a-1", SASREC, {"evaluate": [0] * USERS}, overrides=("llm=big",))
    write(runs, "b-1", GRU, {"evaluate": [0] * USERS})
    (runs / "b-1" / "done.json").unlink()
    with pytest.raises(UserError) as raised:
        find(SASREC, GRU, EASE, "stages.evaluate.batch_size=7", runs=runs)
    assert str(raised.value).splitlines()[1:] == [
        f"  - make exp NAME={SASREC} (it was run with llm=big: write that behind its name)",
        f"  - make exp NAME={GRU}",
        f'  - make exp NAME={EASE} ARGS="stages.evaluate.batch_size=7"',
    ]


def test_unlike_protocols_are_refused_by_what_differs(runs: Path) -> None:
    write(runs, "a-1", SASREC, {"evaluate": [0] * USERS})
    write(runs, "b-1", GRU, {"evaluate": [0] * USERS}, fingerprint="f2", split="ByTime()")
    with pytest.raises(UserError, match=r"f1.*f2.*split \(LeaveOneOut\(\) against ByTime\(\)\)"):
        find(SASREC, GRU, runs=runs)


def test_of_a_row_of_two_protocols_the_newest_counts(runs: Path) -> None:
    write(runs, "a-1", SASREC, {"evaluate": [0] * USERS}, finished="2026-01-02 00:00:00")
    write(
        runs,
        "a-2",
        SASREC,
        {"evaluate": [0] * USERS},
        fingerprint="f2",
        finished="2026-01-01 00:00:00",
    )
    (row,) = find(SASREC, runs=runs)
    assert row.fingerprint == "f1"


def test_a_test_that_another_experiment_made_and_this_one_shares(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(runs, "a-1", GRU, {"evaluate": [0] * USERS})
    shared = PlannedStage("evaluate", {"run": "test"}, "1", folder, "done", "")
    monkeypatch.setattr(compared.artifacts, "plan", lambda *_: [shared])
    (row,) = find(SASREC, runs=runs)
    assert (row.label, row.scores) == (SASREC, (folder / "scores.evaluate.parquet",))


def test_a_stage_of_an_experiment(runs: Path) -> None:
    for stage in ("evaluate", "evaluate_text"):
        write(runs, stage, SASREC, {stage: [0] * USERS}, stage=stage)
    assert [r.label for r in find(f"{SASREC}:evaluate_text", runs=runs)] == [
        f"{SASREC} evaluate_text"
    ]
    with pytest.raises(UserError, match=r"no row 'other' \(evaluate, evaluate_text\)"):
        find(f"{SASREC}:other", runs=runs)


# ---------------------------------------------------------------- baseline and costs


def test_marks_against_the_baseline_are_holms(runs: Path) -> None:
    stats = pytest.importorskip("scipy.stats")
    good, base = list(range(USERS)), [p + 2 for p in range(USERS)]
    write(runs, "a-1", SASREC, {"evaluate": good})
    write(runs, "b-1", GRU, {"evaluate": base})
    rows = find(SASREC, GRU, runs=runs)
    sheet = compare.accuracy(rows, GRU)
    told = sheet.lines[0].cells["ndcg@10"]
    assert isinstance(told, Value)
    ndcg = [[1 / math.log2(p + 2) if p < 10 else 0 for p in one] for one in (good, base)]
    hits = [[float(p < 10) for p in one] for one in (good, base)]
    p = [stats.wilcoxon(np.subtract(*m).round(12)).pvalue for m in (ndcg, hits)]
    assert p[0] < p[1]
    assert told.p == pytest.approx(2 * p[0])
    assert told.mark == "⁺"
    assert str(sheet.lines[1].cells["ndcg@10"]).count("⁺") == 0
    assert any(f"than {GRU} with p < 0.05" in r for r in sheet.remarks)
    told = compare.accuracy(rows, SASREC).lines[1].cells["ndcg@10"]
    assert isinstance(told, Value)
    assert told.mark == "⁻"
    with pytest.raises(UserError, match="BASELINE='nobody' is no row of the table"):
        compare.accuracy(rows, "nobody")


def test_without_a_name_the_strongest_row_without_a_model_is_the_baseline(runs: Path) -> None:
    write(runs, "a-1", SASREC, {"evaluate": [0] * USERS})
    write(runs, "r-1", SASREC, {"random": [9] * USERS, "markov": [1] * USERS}, stage="reference")
    remarks = compare.accuracy(find(SASREC, runs=runs), "").remarks
    assert any("than markov" in r for r in remarks)


def test_costs_are_of_the_whole_chain(runs: Path) -> None:
    """Backbone -> fit -> test, the backbone read twice; the runs were moved since."""
    place = "/gone/runs"
    write(runs, "s.fit-0", SASREC, {}, stage="backbone", run="fit", seconds=1800, device="NVIDIA H100",
          devices=2, peak_memory_mb={"host": 1024, "gpu": 5120})  # fmt: skip
    write(runs, "s.fit-1", SASREC, {}, stage="train", run="fit", seconds=900,
          inputs={"backbone": f"{place}/s.fit-0/best.ckpt"})  # fmt: skip
    folder = write(runs, "s.test-2", SASREC, {"evaluate": [0] * USERS}, seconds=900,
                   inputs={"backbone": f"{place}/s.fit-0/best.ckpt",
                           "weights": f"{place}/s.fit-1/best.ckpt"})  # fmt: skip
    assert {f.name for f in costs.chain(folder)} == {"s.fit-0", "s.fit-1", "s.test-2"}
    file = folder / "scores.evaluate.parquet"
    found = costs.cost_of(file, shared=False)
    assert found == costs.Cost(
        cpu_hours=pytest.approx(2 * (0.25 + 0.25)), gpu_hours=pytest.approx(2 * 0.5),
        users_per_second=50, host_gib=2, gpu_gib=5,
    )  # fmt: skip
    assert costs.cost_of(file, shared=True) == costs.Cost(users_per_second=50)
    sheet = compare.accuracy(find(SASREC, runs=runs), "")
    told = [str(sheet.lines[0].cells[c]) for c in costs.COLUMNS]
    assert told == ["1", "1", "50", "2", "5"]
    assert set(costs.COLUMNS) <= set(sheet.columns)


# ---------------------------------------------------------------- forms

SHEET = Sheet(
    "A & B_1", ("ndcg@10", "note"),
    [Line("x|y_z", {"ndcg@10": Value(0.25, Interval(0.25, 0.2375, 0.2625), p=0.01, gain=1), "note": "=1+1"}),
     Line("random", {"ndcg@10": Value(None)}, reference=True)],
    ["100 % so"],
)  # fmt: skip


def test_markdown() -> None:
    assert SHEET.told("markdown").splitlines() == [
        "**A & B_1**", "",
        "| method |         ndcg@10 | note |",
        "|--------|----------------:|-----:|",
        "| x\\|y_z | 0.2500 ±0.0125⁺ | =1+1 |",
        "| random |               - |    - |",
        "", "100 % so",
    ]  # fmt: skip


def test_latex_is_escaped_and_balanced() -> None:
    text = SHEET.told("latex")
    assert r"\caption{A \& B\_1}" in text
    assert r"x\textbar{}y\_z & 0.2500 $\pm$0.0125$^{+}$ & =1+1 \\" in text
    rules = [w for w in ("toprule", "midrule", "bottomrule") for _ in range(text.count(w))]
    assert rules == [
        "toprule",
        "midrule",
        "midrule",
        "bottomrule",
    ]  # the second above the references
    assert re.findall(r"\\begin{(\w+)}", text) == re.findall(r"\\end{(\w+)}", text)[::-1]
    assert latex("50% of $x_1^2 {a} \\ #1 & ~") == (
        r"50\% of \$x\_1\textasciicircum{}2 \{a\} \textbackslash{} \#1 \& \textasciitilde{}"
    )


def test_csv_has_numbers_and_no_formula() -> None:
    rows = list(csv.reader(io.StringIO(SHEET.told("csv"))))
    assert rows == [
        ["method", "ndcg@10", "ndcg@10 ±", "ndcg@10 p", "note"],
        ["x|y_z", "0.25", "0.0125", "0.01", "'=1+1"],
        ["random", "", "", "", ""],
    ]


def test_an_uneven_interval_is_told_by_its_ends_in_every_form() -> None:
    even, uneven = Interval(0.25, 0.2375, 0.2625), Interval(0.0, 0.0, 0.0370)
    lines = [Line("a", {"hit@1": Value(0.25, even)}), Line("b", {"hit@1": Value(0.0, uneven)}),
             Line("random", {"hit@1": Value(0.0006)}, reference=True)]  # fmt: skip
    sheet = Sheet("t", ("hit@1",), lines)
    assert "| 0.0000 [0.0000, 0.0370] |" in sheet.told("markdown")
    assert "b & 0.0000 [0.0000, 0.0370] \\\\" in sheet.told("latex")
    assert list(csv.reader(io.StringIO(sheet.told("csv")))) == [
        ["method", "hit@1", "hit@1 ±", "hit@1 low", "hit@1 high"],
        ["a", "0.25", "0.0125", "0.2375", "0.2625"],
        ["b", "0", "", "0", "0.037"],
        ["random", "0.0006", "", "", ""],
    ]


def test_no_interval_is_told_as_zero() -> None:
    assert str(Value(0.0, Interval(0.0, 0.0, 0.00002))) == "0.0000 [0.00000, 0.00002]"
    assert str(Value(0.5, Interval(0.5, 0.49998, 0.50002))) == "0.5000 ±0.00002"


def test_chance_is_exact_and_rows_that_are_alike_are_not(runs: Path) -> None:
    """No hit of 12 rows, in each of two seeds; chance has the same standard errors."""
    for seed in (0, 1):
        folder = write(runs, f"a-{seed}", SASREC, {"evaluate": [50] * USERS}, seed=seed)
        alike(folder)
    alike(write(runs, "r-0", SASREC, {"random": [50] * USERS, "popularity": [50] * USERS}))
    rows = {r.label: r for r in find(SASREC, runs=runs)}
    high = 1.96**2 / (USERS + 1.96**2)
    for label in (SASREC, "popularity"):
        told = compared.value_of(rows[label], "all/hit@10")
        assert told.interval == Interval(0.0, 0.0, pytest.approx(high))
        assert str(told) == f"0.0000 [0.0000, {high:.4f}]"
    assert rows[SASREC].cell("all/hit@10") == f"0.0000 [0.0000, {high:.4f}]"
    assert str(compared.value_of(rows["random"], "all/hit@10")) == "0.0000"
    told = plots._interval(compared.value_of(rows["popularity"], "all/hit@10"))
    assert told == Interval(0.0, 0.0, pytest.approx(high))  # what a bar's whiskers are


def alike(folder: Path) -> None:
    """Standard errors of rows that all have the same value."""
    note = json.loads((folder / "metrics.json").read_text())
    for values in note["rows"].values():
        for name in values:
            values[name]["stderr"] = None if name.endswith("/n") else 0.0
    (folder / "metrics.json").write_text(json.dumps(note))


@pytest.mark.parametrize(("value", "told"), [(0.0123456, "0.0123"), (8.0, "8"), (1234.5, "1,234")])
def test_three_significant_digits(value: float, told: str) -> None:
    assert str(Value(value, digits=-1)) == told


# ---------------------------------------------------------------- charts


def test_the_command_writes_what_it_prints(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(runs, "a-1", SASREC, {"evaluate": [0] * USERS})
    out = tmp_path / "new folder" / "t.csv"
    monkeypatch.setenv("OUT", str(out))
    monkeypatch.setenv("FORMAT", "csv")
    monkeypatch.setenv("NAMES", SASREC)
    assert compare.main([]) == 0
    assert capsys.readouterr().out == out.read_text()
    monkeypatch.setenv("FORMAT", "latx")
    assert compare.main([]) == 2
    assert "did you mean 'latex'?" in capsys.readouterr().err


def test_charts_of_a_trained_row(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = write(runs, "s.fit-1", SASREC, {}, stage="train", run="fit")
    for version, lines in ((0, "0,1,9.0,\n1,2,8.0,0.1\n"), (1, "1,2,5.0,0.3\n2,3,4.0,0.4\n")):
        (fit / "csv" / f"version_{version}").mkdir(parents=True)
        log = f"epoch,step,train/loss,val/all/ndcg@10\n{lines}"
        (fit / "csv" / f"version_{version}" / "metrics.csv").write_text(log)
    assert plots._curve(plots.logged(fit), "train/loss") == [
        (1, Interval(9, 9, 9)), (2, Interval(5, 5, 5)), (3, Interval(4, 4, 4)),
    ]  # fmt: skip
    test = write(
        runs,
        "s.test-2",
        SASREC,
        {"evaluate": [0] * USERS},
        inputs={"weights": str(fit / "best.ckpt")},
    )
    bins = [{"count": 4, "mean_probability": 0.25, "share_liked": 0.5},
            {"count": 1, "mean_probability": 0.75, "share_liked": 1.0}]  # fmt: skip
    (test / "reliability.evaluate.json").write_text(json.dumps(bins))
    monkeypatch.setenv("OUT", str(tmp_path / "plots"))
    assert plots.main([SASREC]) == 0
    stems = {"cold_warm", "cost", "learning.sasrec.movielens_100k.train", "reliability"}
    names = {f.name for f in (tmp_path / "plots").iterdir()}
    assert names == {f"{s}.{kind}" for s in stems for kind in ("svg", "png")}
    for stem in stems:
        root = ET.parse(tmp_path / "plots" / f"{stem}.svg").getroot()
        words = {t.text for t in root.iter(f"{SVG}text")}
        assert {"train/loss", "epoch"} <= words if stem.startswith("learning") else SASREC in words


def test_marks_lie_where_their_axes_say() -> None:
    x = charts.placed(charts.logarithmic("x", [2.0, 300.0]), (0.0, 300.0))
    y = charts.placed(charts.linear("y", [0.1, 0.5]), (100.0, 0.0))
    assert (x.low, x.high, y.low, y.high) == (1, 1000, 0, 0.5)
    canvas = Canvas(300, 200)
    series = [charts.Series("a", [(10.0, Interval(0.25, 0.2, 0.3)), None], "#000000")]
    charts.scatter(canvas, series, x, y)
    (dot,) = [s for s in canvas.shapes if isinstance(s, Dot)]
    assert (dot.x, dot.y) == pytest.approx((100, 50))
    assert [x.told(t) for t in x.ticks] == ["1", "10", "100", "1,000"]
    assert [y.told(t) for t in y.ticks] == ["0.0", "0.1", "0.2", "0.3", "0.4", "0.5"]


def test_a_bar_of_height_zero_is_seen_and_one_that_was_not_measured_is_not() -> None:
    canvas, (span,) = charts.sheet("t", [])
    y = charts.placed(charts.linear("y", [1.0]), span)
    marks: list[charts.Mark | None] = [(0.0, Interval(v, v, v)) for v in (0.0, 0.5)]
    series = [charts.Series("a", [*marks, None], "#123456")]
    charts.bars(canvas, series, [("p", ""), ("q", ""), ("r", "")], y)
    boxes = [s for s in canvas.shapes if isinstance(s, Box)]
    assert [(b.y + b.height, b.height) for b in boxes] == [
        (y.at(0), 2), (y.at(0), pytest.approx(y.at(0) - y.at(0.5)))
    ]  # fmt: skip


def test_the_picture_has_what_the_text_has(tmp_path: Path) -> None:
    canvas = Canvas(40, 30)
    canvas.add(Dot(10, 20, 4, "#0072B2"))
    image = canvas.png()
    assert image.size == (80, 60)
    assert image.getpixel((20, 40)) == (0, 0x72, 0xB2)
    assert image.getpixel((60, 20)) == (255, 255, 255)
    files = canvas.write(tmp_path / "a.b")
    assert [f.name for f in files] == ["a.b.svg", "a.b.png"]
    circle = ET.parse(files[0]).getroot().find(f"{SVG}circle")
    assert circle is not None
    assert (circle.get("cx"), circle.get("cy"), circle.get("r")) == ("10.0", "20.0", "4.0")


def test_a_legend_never_leaves_the_sheet() -> None:
    names = [f"{n}/movielens_100k llm=smollm2_135m_nf4" for n in "abcdefgh"]
    rows = charts._rows(names)
    assert [n for row in rows for n, _ in row] == list(range(8))
    for row in rows:
        number, at = row[-1]
        assert at + charts.text_width(names[number], 12) + 18 <= charts.WIDTH
    assert charts.legend_height(names) == charts.LEGEND_ROW * len(rows)
