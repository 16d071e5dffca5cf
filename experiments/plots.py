"""The command behind ``make plots``: charts of finished experiments as SVG and PNG, from run folders alone.

``python -m experiments.plots [NAME[:STAGE] [key=value ...] ...]``. Variables: NAMES, ARGS and SEEDS as for
``make compare``; OUT, the folder (``plots/`` beside the run folders). Written are cold_warm (quality of cold
and warm rows), cost (quality against speed), learning.* (loss and validation by epoch, a chart for each
training stage) and reliability (of scores that are log-odds).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl

from datamodules.versioning import read_json
from experiments import artifacts, charts, compared, costs, seeds
from experiments.canvas import GREY, Canvas, Stroke
from experiments.charts import COLOURS, PLAIN, Mark, Series
from experiments.command import exit_status
from experiments.errors import UserError
from experiments.intervals import Interval, of_share
from experiments.messages import put, say, short
from experiments.results import Row
from experiments.table_text import Value

GROUPS = ("all", "cold_item", "warm_item", "cold_user", "warm_user")
LOSS = "train/loss"
VALIDATION = ("val/all/ndcg@10", "val/all/auc", "val/loss")  # the first that was logged


def main(argv: Sequence[str]) -> int:
    """Exit status, see ``exit_status``."""
    return exit_status(lambda: _run(argv))


def _run(argv: Sequence[str]) -> None:
    asked = seeds.requested([]) if os.environ.get("SEEDS", "").strip() else ()
    rows = compared.find(compared.request(argv), asked, artifacts.runs_root())
    given = os.environ.get("OUT", "").strip()
    folder = Path(given).expanduser() if given else artifacts.runs_root() / "plots"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, canvas in drawn(rows):
            for file in canvas.write(folder / name):
                put(short(file))
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error


def drawn(rows: Sequence[Row]) -> Iterator[tuple[str, Canvas]]:
    """Name and sheet of every chart that these rows have something for.

    Args:
        rows: as ``compared.find`` has them.
    """
    yield "cold_warm", cold_warm(rows)
    if any(_speed(r) for r in rows):
        yield "cost", quality_by_speed(rows)
    yield from learning(rows)
    curves = [(r, c) for r in rows if (c := _reliability(r))]
    if curves:
        yield "reliability", reliability(curves)


def main_metric(rows: Sequence[Row]) -> str:
    """What is drawn: the AUC of labelled rows, ndcg@10 of ranked ones."""
    return "auc" if rows[0].labelled else "ndcg@10"


def coloured(rows: Sequence[Row]) -> list[str]:
    """A colour for each method, a grey for each row without a model."""
    methods = iter(range(len(rows)))
    plain = iter(range(len(rows)))
    return [
        PLAIN[next(plain) % len(PLAIN)] if r.reference else COLOURS[next(methods) % len(COLOURS)]
        for r in rows
    ]


def _interval(told: Value) -> Interval | None:
    if told.value is None:
        return None
    return told.interval or Interval(told.value, told.value, told.value)


def cold_warm(rows: Sequence[Row]) -> Canvas:
    """Bars of the main metric for all rows of the test, and for its cold and warm ones."""
    metric = main_metric(rows)
    series = []
    for row, colour in zip(rows, coloured(rows), strict=True):
        found = (_interval(compared.value_of(row, f"{g}/{metric}")) for g in GROUPS)
        series.append(Series(row.label, [None if f is None else (0.0, f) for f in found], colour))
    counts = (compared.value_of(rows[0], f"{g}/n").value for g in GROUPS)
    notes = [f"n = {n or 0:,.0f}" for n in counts]
    places = list(zip((g.replace("_", " ") for g in GROUPS), notes, strict=True))
    canvas, (span,) = charts.sheet(f"Cold and warm rows: {rows[0].protocol['name']}", series)
    highs = [m[1].high for s in series for m in s.marks if m]
    y = charts.placed(charts.linear(f"{metric}, 95 % interval", highs or [1.0]), span)
    charts.bars(canvas, series, places, y)
    return canvas


def _speed(row: Row) -> float | None:
    return costs.cost_cells(row.scores, row.reference)["users/s"].value


def quality_by_speed(rows: Sequence[Row]) -> Canvas:
    """The main metric against the users a second of the test, on a logarithmic axis."""
    metric = main_metric(rows)
    series = []
    for row, colour in zip(rows, coloured(rows), strict=True):
        speed, told = _speed(row), _interval(compared.value_of(row, f"all/{metric}"))
        if speed and told:
            series.append(Series(row.label, [(speed, told)], colour))
    canvas, (span,) = charts.sheet(f"Quality against speed: {rows[0].protocol['name']}", series)
    marks = [m for s in series for m in s.marks if m]
    x = charts.logarithmic("users a second in the test (logarithmic)", [m[0] for m in marks])
    y = charts.linear(f"{metric}, 95 % interval", [m[1].high for m in marks])
    charts.scatter(canvas, series, charts.placed(x, _across()), charts.placed(y, span))
    return canvas


def _across() -> tuple[float, float]:
    return (charts.LEFT, charts.WIDTH - charts.RIGHT)


def learning(rows: Sequence[Row]) -> Iterator[tuple[str, Canvas]]:
    """A chart for each training stage: loss above, the metric that chose the weights below, by epoch."""
    stages: dict[tuple[str, str], dict[Path, int]] = {}
    for row in rows:
        for folder in (f for file in row.scores for f in costs.chain(file.parent)):
            job = read_json(folder / "stage.json") or {}
            if job.get("spec", {}).get("run") == "fit":
                found = stages.setdefault((job["experiment"], job["stage"]), {})
                found[folder] = job["spec"]["seed"]
    for (experiment, stage), folders in stages.items():
        canvas = learning_chart(f"{experiment} {stage}", folders)
        if canvas is None:
            say(f"{experiment} {stage} logged fewer than two epochs: there is no curve to draw")
        else:
            yield f"learning.{experiment.replace('/', '.')}.{stage}", canvas


def learning_chart(title: str, folders: dict[Path, int]) -> Canvas | None:
    """The chart of one training stage; None where it logged fewer than two epochs.

    Args:
        title: without ``Learning:``.
        folders: of its runs, with their seeds.
    """
    logs = {folder: logged(folder) for folder in folders}
    spec = (read_json(next(iter(folders)) / "stage.json") or {})["spec"]
    chosen = str((spec.get("select") or {}).get("metric"))
    found = {c for log in logs.values() for c in log.columns}
    usual = [m for m in (chosen, *VALIDATION) if m in found]
    names = [m for m in (LOSS, *usual[:1]) if any(_curve(log, m) for log in logs.values())]
    if not names:
        return None
    numbers = list(folders.values())
    legend = [Series(f"seed {s}", [], COLOURS[i % len(COLOURS)]) for i, s in enumerate(numbers)]
    canvas, spans = charts.sheet(f"Learning: {title}", legend, plots=len(names))
    for name, span in zip(names, spans, strict=True):
        series = [
            Series(one.name, _curve(log, name), one.colour)
            for one, log in zip(legend, logs.values(), strict=True)
        ]
        marks = [m for s in series for m in s.marks if m]
        x = charts.linear("epoch", [m[0] for m in marks], zero=False, whole=True)
        y = charts.linear(name, [m[1].value for m in marks], zero=False)
        charts.scatter(
            canvas, series, charts.placed(x, _across()), charts.placed(y, span), joined=True
        )
    return canvas


def logged(folder: Path) -> pl.DataFrame:
    """What a fit wrote down, all attempts of it; of an epoch that was done again the last counts."""
    files = sorted(folder.glob("csv/version_*/metrics.csv"), key=lambda f: int(f.parent.name[8:]))
    texts = (f.read_bytes() for f in files)
    whole = [t[: t.rfind(b"\n") + 1] for t in texts]  # a fit may be writing the last line
    frames = [pl.read_csv(t, infer_schema_length=None) for t in whole if t]
    return pl.concat(frames, how="diagonal_relaxed") if frames else pl.DataFrame()


def _curve(log: pl.DataFrame, name: str) -> list[Mark]:
    """(epoch, value) of a column, epochs from 1; nothing where there are fewer than two."""
    if name not in log.columns or "epoch" not in log.columns:
        return []
    last = log.drop_nulls(name).group_by("epoch").agg(pl.col(name).last()).sort("epoch")
    points = [(epoch + 1.0, Interval(v, v, v)) for epoch, v in last.select("epoch", name).rows()]
    return points if len(points) > 1 else []


def _reliability(row: Row) -> list[dict[str, float]]:
    """The bins of a row's first seed, where its scores are log-odds."""
    name = row.name_in_file
    return read_json(row.scores[0].with_name(f"reliability.{name}.json"), list) or []


def reliability(curves: Sequence[tuple[Row, list[dict[str, float]]]]) -> Canvas:
    """The chart of several rows."""
    colours = coloured([r for r, _ in curves])
    return reliability_chart(
        [(row.label, bins, c) for (row, bins), c in zip(curves, colours, strict=True)]
    )


def reliability_chart(curves: Sequence[tuple[str, list[dict[str, float]], str]]) -> Canvas:
    """The share of likes against the probability that was told, with the diagonal of perfect calibration.

    Args:
        curves: name, bins and colour of each.
    """
    most = max(b["count"] for _, bins, _ in curves for b in bins)
    series = [
        Series(
            name,
            [(b["mean_probability"], _share(int(b["count"]), b["share_liked"])) for b in bins],
            colour, [2.5 + 5.5 * (b["count"] / most) ** 0.5 for b in bins],
        )
        for name, bins, colour in curves
    ]  # fmt: skip
    entries = [*series, Series("perfect calibration", [], GREY)]
    canvas, (span,) = charts.sheet("Reliability: dots grow with the rows of their bin", entries)
    x = charts.placed(charts.linear("mean probability of a like", [1.0]), _across())
    y = charts.placed(charts.linear("share liked, 95 % interval", [1.0]), span)
    canvas.add(Stroke([(x.at(0), y.at(0)), (x.at(1), y.at(1))], GREY, 1.2, dashed=True))
    charts.scatter(canvas, series, x, y, joined=True)
    return canvas


def _share(rows: int, share: float) -> Interval:
    liked = round(rows * share)
    return of_share([1.0] * liked + [0.0] * (rows - liked))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
