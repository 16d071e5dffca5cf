"""The crossover report: which rows count in which bin, its numbers by hand, its sentence, its plot."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from experiments import crossover, line_plot
from experiments.baseline import Baseline
from experiments.config import Experiment
from experiments.crossover import Cell
from experiments.errors import UserError
from experiments.intervals import Interval
from experiments.results import Row

NAMES = ["0", "1-4", "5-9", "10+"]
PLACES = [(name, "n = 1") for name in NAMES]


def row(
    label: str, file: Path, *, reference: bool = False, fingerprint: str = "f", **more: str
) -> Row:
    return Row(
        label, "x/y", (), reference, fingerprint, {"name": "d", **more}, (0,), {"all/hit@1": [0.5]},
        (), False, (file,),
    )  # fmt: skip


def ranked(path: Path, above: list[int], ties: list[int] | None = None) -> Path:
    rows = range(len(above))
    frame = {"row": rows, "user_id": [f"u{r}" for r in rows], "above": above}
    pl.DataFrame({**frame, "ties": ties or [0] * len(above)}).write_parquet(path)
    return path


# ---------------------------------------------------------------- rows by bin


def test_every_row_is_in_the_bin_of_its_count() -> None:
    counts = [0, 4, 1, 5, 500, 0]
    members = crossover.bin_members(pl.DataFrame({"count": counts}), [0, 1, 5, 10, 100])
    assert [np.flatnonzero(m).tolist() for m in members] == [
        [0, 1, 2, 3, 4, 5], [0, 5], [1, 2], [3], [], [4],
    ]  # fmt: skip


def test_rows_of_a_sample_for_a_rare_group_count_where_they_bend_nothing() -> None:
    """Counts up to 4 are cold; of the items with 5 some are, and some are not."""
    targets = pl.DataFrame({
        "count":     [0, 0, 3, 3, 5, 5, 5, 20, 20],
        "all":       [True, False, True, False, True, True, False, True, True],
        "cold_item": [True, True, True, True, True, False, True, False, False],
        "warm_item": [False, False, False, False, False, False, False, True, True],
    })  # fmt: skip
    members = crossover.bin_members(targets, [0, 1, 5, 10])
    assert [np.flatnonzero(m).tolist() for m in members] == [
        [0, 2, 4, 5, 7, 8],  # all: drawn at random
        [0, 1], [2, 3],  # of cold items alone: all of them
        [4, 5],  # some are not cold: those drawn
        [7, 8],
    ]  # fmt: skip


@pytest.mark.parametrize("full", [True, False])
def test_targets_are_found_in_either_kind_of_file(full: bool, tmp_path: Path) -> None:
    """Whole catalogues have a line a row, candidate lists a line a candidate."""
    counts = pl.DataFrame({"item_id": ["a", "b", "c"], "count": [0, 7, 12]})
    rows = {"row": [1, 0], "cold_item": [False, True], "above": [0, 1], "target_id": ["c", "a"]}
    lists = {
        "row": [1, 1, 0], "cold_item": [False, False, True], "item_id": ["b", "c", "a"],
        "is_target": [False, True, True],
    }  # fmt: skip
    file = tmp_path / "scores.x.parquet"
    pl.DataFrame(rows if full else lists).write_parquet(file)
    found = crossover.targets_of(file, counts).select("row", "cold_item", "count")
    assert found.rows() == [(0, True, 0), (1, False, 12)]


# ---------------------------------------------------------------- numbers


def test_cells_by_hand(tmp_path: Path) -> None:
    base = row("x/y base", ranked(tmp_path / "scores.base.parquet", [0, 9, 9, 9, 9, 9, 9, 9]))
    ours = row("x/y", ranked(tmp_path / "scores.evaluate.parquet", [0] * 7 + [1], [1] + [0] * 7))
    members = [np.ones(8, bool), np.arange(8) < 2, np.zeros(8, bool)]
    table = crossover.cells([base, ours], members)
    assert list(table) == ["base", "evaluate"]
    everywhere, two, nothing = table["evaluate"]
    assert nothing == Cell(0)
    assert table["base"][0].gain is None
    assert table["base"][0].p is None
    assert (everywhere.n, two.n) == (8, 2)
    assert two.hit is not None
    assert two.hit.value == pytest.approx((0.5 + 1) / 2)  # one of two that are tied; a hit
    assert two.gain is not None
    assert two.gain.value == pytest.approx((0.5 - 1 + 1 - 0) / 2)
    assert everywhere.gain is not None
    assert everywhere.gain.value == pytest.approx((-0.5 + 6) / 8)
    stats = pytest.importorskip("scipy.stats")
    p = [stats.wilcoxon(g).pvalue for g in ([-0.5, 1, 1, 1, 1, 1, 1, 0], [-0.5, 1])]
    assert p[0] < p[1]
    assert everywhere.p == pytest.approx(min(1, 2 * p[0]))  # Holm: the smaller of two
    assert two.p == pytest.approx(max(everywhere.p, p[1]))


def test_files_that_are_gone_or_hold_other_rows(tmp_path: Path) -> None:
    base = row("x/y base", ranked(tmp_path / "scores.base.parquet", [0, 1]))
    other = row("x/y", ranked(tmp_path / "scores.evaluate.parquet", [0, 1, 2]))
    with pytest.raises(UserError, match="the same rows"):
        crossover.cells([base, other], [np.ones(2, bool)])
    with pytest.raises(UserError, match="missing or holds other rows"):
        crossover.cells([base], [np.ones(3, bool)])
    other.scores[0].unlink()
    with pytest.raises(UserError, match="missing or holds other rows"):
        crossover.cells([base, other], [np.ones(2, bool)])


# ---------------------------------------------------------------- methods


def test_the_first_method_or_the_one_named_is_the_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    def file(name: str) -> Path:
        return Path(f"scores.{name}.parquet")

    rows = [
        row("x/y validate", file("validate"), scored="valid"), row("x/y a", file("a")),
        row("x/y", file("evaluate")), row("x/y odd", file("odd"), fingerprint="g"),
        row("popularity", file("popularity"), reference=True),
    ]  # fmt: skip

    def names() -> list[str]:
        return [crossover.name_of(r) for r in crossover.chosen(rows)]

    monkeypatch.delenv("BASELINE", raising=False)
    assert names() == ["a", "evaluate"]
    monkeypatch.setenv("BASELINE", "evaluate")
    assert names() == ["evaluate", "a"]
    monkeypatch.setenv("BASELINE", "popularity")
    assert names() == ["popularity", "a", "evaluate"]
    monkeypatch.setenv("BASELINE", "evaluat")
    with pytest.raises(UserError, match="did you mean 'evaluate'"):
        names()
    with pytest.raises(UserError, match="no method that ranks"):
        crossover.chosen(rows[-1:])


def test_rows_that_a_later_stage_chooses_by_need_no_baseline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """BASELINE=markov is not to be found among validation rows, and need not be."""
    rows = [
        row("x/y validate", Path("v"), fingerprint="v", scored="valid"), row("x/y", Path("e")),
        row("markov", Path("m"), reference=True),
    ]  # fmt: skip
    monkeypatch.setattr("experiments.baseline.rows_of", lambda runs: rows)
    none: dict[int, tuple[Experiment, list[object]]] = {}
    pairs = list(Baseline("markov").pairs(none))  # type: ignore[arg-type]
    assert [(a.label, b.label) for a, b in pairs] == [("x/y", "markov")]


# ---------------------------------------------------------------- the sentence


def found(*gains: float | None, p: float = 0.01) -> list[Cell]:
    """Cells with these gains: 0 is one beyond nothing, None has no rows."""
    zero = Interval(0.5, 0.4, 0.6)
    return [
        Cell(0) if g is None else Cell(9, zero, Interval(g, -1, 1), p if g else 1.0) for g in gains
    ]


@pytest.mark.parametrize(
    ("gains", "told"),
    [((0, 0, 0, 0), "llm against cf: no bin differs beyond chance"),
     ((None, None, None, None), "no bin differs"),
     ((0.2, 0.1, 0, -0.1), "llm wins at 0-4, cf wins at 10+ training events"),
     ((0.2, 0, 0, 0), "llm wins at 0 training events"),
     ((0, 0.1, 0.1, 0), "llm wins at 1-9 training events"),
     ((0.1, 0, 0.3, -0.2), "llm wins at 0 and 5-9, cf wins at 10+ training"),
     ((-0.1, -0.1, -0.1, -0.1), "cf wins at 0+ training")],
)  # fmt: skip
def test_the_sentence_says_who_wins_where(gains: tuple[float | None, ...], told: str) -> None:
    assert told in crossover.sentence("llm", "cf", NAMES, found(*gains))


def test_a_gain_within_chance_is_no_win() -> None:
    said = crossover.sentence("llm", "cf", NAMES, found(0.9, 0.9, -0.9, 0.9, p=0.05))
    assert "no bin differs beyond chance" in said


# ---------------------------------------------------------------- the plot

SVG = "{http://www.w3.org/2000/svg}"


def test_the_plot_shows_every_point_at_its_place() -> None:
    points = [Interval(0.5, 0.4, 0.6), None, Interval(0.0, 0.0, 0.3), Interval(0.25, 0.2, 0.3)]
    lines = [line_plot.Line("a <b>", points), line_plot.Line("c & d", [None] * 4)]
    root = ET.fromstring(line_plot.line_plot("T & t", "x", "y", PLACES, lines).svg())
    circles = root.findall(f".//{SVG}circle")
    assert len(circles) == 3
    # Ticks of 0.1, the least of 1, 2, 5 x 10^k of which six are enough for 0.6, where the axis ends.
    ticks = [t for t in root.iter(f"{SVG}text") if t.get("text-anchor") == "end"]
    assert [t.text for t in ticks] == ["0.0", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6"]
    heights = [float(t.get("y", "")) - 4 for t in ticks]  # a label stands below its line
    expected = np.interp((0.5, 0.0, 0.25), np.arange(7) / 10, heights)
    assert [float(c.get("cy", "")) for c in circles] == pytest.approx(expected, abs=0.1)
    names = [t for t in root.iter(f"{SVG}text") if t.text in NAMES]
    middle = [float(names[n].get("x", "")) for n in (0, 2, 3)]
    shift = [float(c.get("cx", "")) - x for c, x in zip(circles, middle, strict=True)]
    assert shift == pytest.approx([-4.5] * 3, abs=0.2)  # the first of two lines, 9 pixels apart
    texts = [t.text for t in root.iter(f"{SVG}text")]
    assert {"T & t", "a <b>", "c & d", "0", "1-4", "10+", "n = 1", "x", "y"} <= set(texts)


@pytest.mark.parametrize("top", [1.0, 0.97, 0.5, 0.031, 0.001])
def test_an_axis_has_few_ticks_and_holds_all(top: float) -> None:
    lines = [line_plot.Line("a", [Interval(0, 0, top)])]
    root = ET.fromstring(line_plot.line_plot("t", "x", "y", PLACES[:1], lines).svg())
    ticks = [t.text or "" for t in root.iter(f"{SVG}text") if t.get("text-anchor") == "end"]
    values = [float(t) for t in ticks]
    assert 3 <= len(values) <= 7
    assert len(set(ticks)) == len(ticks)
    assert values[-1] >= top > values[-2]
    assert np.diff(values) == pytest.approx([values[1]] * (len(values) - 1))


def test_a_plot_without_any_point_is_a_plot() -> None:
    canvas = line_plot.line_plot("t", "x", "y", PLACES, [line_plot.Line("a", [None] * 4)])
    assert not ET.fromstring(canvas.svg()).findall(f".//{SVG}circle")
