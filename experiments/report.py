"""What the terminal shows: plans, settings, results."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from datamodules.versioning import read_json
from experiments.config import Experiment, caption, origin_of
from experiments.errors import UserError
from experiments.intervals import ALIKE, CHANCE, Interval, of_metric
from experiments.keys import flatten
from experiments.messages import harmless, short
from experiments.table_text import spread

COLUMNS = (
    "hit@1", "hit@3", "hit@5", "hit@10", "ndcg@10", "mrr", "auc", "uauc", "ece", "yes_rate",
    "refusal_rate",
)  # fmt: skip
# Of a whole catalogue few targets are among the first three; of few candidates most are among the first ten.
_CATALOGUE_ALONE, _CANDIDATES_ALONE = "hit@10", "hit@3"
# Overrides that say where the user's files lie: others of these names have another fingerprint.
PLACES = ("data.root=", "data.interactions=", "data.items=")
# Those that say where and how things are done, not what is meant.
_UNTOLD = (*PLACES, "data.cache=", "launch.", "logger", "stale")
WIDE = 120  # columns of a terminal that has room for an interval in every cell
STATE_STYLE = {"done": "green", "partial": "yellow", "stale": "magenta", "running": "cyan"}


def print_list(experiments: Sequence[tuple[str, str]]) -> None:
    """Every experiment with its header line."""
    width = max(len(name) for name, _ in experiments)
    for name, line in experiments:
        print(f"{name:<{width}}  {line}")  # noqa: T201


def print_plan(name: str, stages: Sequence[Any]) -> None:
    """One line a stage: state, folder, reason."""
    console = open_console()
    console.print(f"[bold]{escape(name)}[/bold]")
    for number, stage in enumerate(stages, start=1):
        style = STATE_STYLE.get(stage.state, "default")
        line = f"  {number}. {stage.name:<12} [{style}]{stage.state:<8}[/{style}]"
        console.print(f"{line} {escape(short(stage.folder))}\n     {escape(stage.why)}")


def print_config(experiment: Experiment, origins: dict[str, str]) -> None:
    """Every resolved value with the file or override it came from."""
    leaves = list(flatten(experiment.config))
    width = min(64, max(len(f"{k}: {v}") for k, v in leaves))
    for key, value in leaves:
        print(f"{f'{key}: {plain(value)}':<{width}}  # {origin_of(key, origins)}")  # noqa: T201


@dataclass(frozen=True)
class Measured:
    """One row of a test stage, as the stage's folder has it."""

    stage: str
    label: str
    reference: bool  # one of the rows without a model that many experiments share
    fingerprint: str
    protocol: dict[str, Any]
    values: dict[str, dict[str, Any]]  # group/metric -> value and standard error
    scores: Path
    older: bool  # made by code that has changed since

    def interval(self, metric: str) -> Interval | None:
        """Over the rows of the test; chance is exact, and has none."""
        exact = self.reference and self.label == CHANCE
        return None if exact else of_metric(self.values, metric)


def measured(experiment: Experiment, stages: Sequence[Any]) -> Iterator[Measured]:
    """The rows of every test stage that has been run."""
    for stage in stages:
        metrics = (read_json(stage.folder / "metrics.json") if stage.folder else None) or {}
        if (
            not metrics.get("rows")
            and stage.done
            and stage.folder
            and stage.spec.get("run") == "test"
        ):
            raise UserError(
                f"{short(stage.folder)}/metrics.json is missing or damaged: delete that folder, and the same "
                "command tests anew"
            )
        single = "module" in experiment.stages[stage.name]
        for row, values in metrics.get("rows", {}).items():
            label = row_label(experiment.name, stage.name) if single else row
            yield Measured(
                stage.name, label, not single, metrics["fingerprint"], metrics["protocol"], values,
                stage.folder / f"scores.{row}.parquet", stage.state == "stale",
            )  # fmt: skip


def print_results(
    experiment: Experiment,
    stages: Sequence[Any],
    others: Sequence[tuple[Experiment, Sequence[Any]]] = (),
) -> None:
    """The rows of every test stage, by group; rows of unlike fingerprints never share a table.

    Args:
        experiment, stages: what was run.
        others: experiments that it lists as ``beside``, with those of their tests that are done.
    """
    rows = list(measured(experiment, stages))
    remarks = _add_others(rows, others)
    console = open_console()

    def told(row: Measured, metric: str) -> str:
        if metric.endswith("/n"):
            return f"{(row.values.get(metric) or {'value': 0})['value']:.0f}"
        wanted = console.width >= WIDE or metric.endswith(("/ndcg@10", "/auc"))
        return cell(row.values.get(metric), row.interval(metric) if wanted else None)

    print_tables(rows, stages, told)
    told_of = caption(experiment.name, experiment.overrides)
    console.print(escape(f"{experiment.name}: {told_of}"), soft_wrap=True)
    for remark in remarks:
        console.print(escape(remark), soft_wrap=True)
    labelled = any(is_labelled(r.values) for r in rows)
    kind = "resamples users with their rows" if labelled else "takes rows as independent"
    console.print(
        escape(
            f"± is a 95 % interval that {kind}, {ALIKE}; {CHANCE} is the exact expectation of guessing"
        ),
        soft_wrap=True,
    )
    if own := [o for o in experiment.overrides if not o.startswith(_UNTOLD)]:
        console.print(
            f"{escape(experiment.name)} is meant with {escape(' '.join(own))}", soft_wrap=True
        )
    console.print("run folders:")
    for stage in stages:
        console.print(f"  {stage.name}: {escape(short(stage.folder))}", soft_wrap=True)


def _add_others(
    rows: list[Measured], others: Sequence[tuple[Experiment, Sequence[Any]]]
) -> list[str]:
    """Add other experiments' rows that were measured as ours were; why those of the rest are not there."""
    fingerprints, files = {r.fingerprint for r in rows}, {r.scores for r in rows}
    missing, unlike = [], []
    for other, tested in others:
        found = [row for row in measured(other, tested) if row.scores not in files]
        alike = [row for row in found if row.fingerprint in fingerprints]
        rows += alike
        files |= {row.scores for row in alike}
        missing += [other.name] * (not tested)
        unlike += [other.name] * (bool(found) and not alike)
    told = {
        "not run (make exp NAME=... adds a row)": missing,
        "measured by another protocol, and so not shown": unlike,
    }
    return [f"{why}: {', '.join(names)}" for why, names in told.items() if names]


def print_tables(
    rows: Sequence[Measured],
    stages: Sequence[Any],
    told: Callable[[Measured, str], str],
    seeds: Callable[[Measured], str] | None = None,
) -> None:
    """One table a fingerprint, and what holds for them all: ties of groups, rows left out or of older code.

    Args:
        rows: what is in the tables.
        stages: those that were tested; they say which rows were left out.
        told: a row's cell of a ``group/metric``, and of ``group/n``.
        seeds: a row's number of seeds; a column of its own.
    """
    console = open_console()
    for fingerprint in dict.fromkeys(r.fingerprint for r in rows):
        here = [r for r in rows if r.fingerprint == fingerprint]
        rows_of = "validation" if "scored" in here[0].protocol else "test"
        console.print(_results_table(f"{rows_of}, fingerprint {fingerprint}", here, told, seeds))
    from experiments.data_report import group_notes  # it prints by this module

    for note in group_notes(r.scores.parent for r in rows):
        console.print(escape(note), soft_wrap=True)
    notes = (read_json(s.folder / "metrics.json") or {} for s in stages if s.folder)
    left_out = {k: v for note in notes for k, v in note.get("left_out", {}).items()}
    for row, reason in left_out.items():
        console.print(f"{escape(row)} is left out: {escape(reason)}")
    if any(r.older for r in rows):
        console.print('* made by older code; ARGS="stale=rerun" makes it anew')


def is_labelled(metrics: Container[str]) -> bool:
    """Whether metrics are of rows that are liked or not, and not of ranked ones."""
    return "all/auc" in metrics and "all/ndcg@10" not in metrics


def columns_of(rows: Sequence[Container[str]]) -> list[str]:
    """The metrics that a table of rows with these names (``group/metric``) shows."""
    sampled = any("all/auc" in names for names in rows)
    idle = _CATALOGUE_ALONE if sampled else _CANDIDATES_ALONE
    return [c for c in COLUMNS if c != idle and any(f"all/{c}" in names for names in rows)]


def groups_of(values: Iterable[tuple[str, float | None]]) -> list[str]:
    """The groups that have rows, of all ``group/metric`` and their values; an empty one says nothing."""
    return list(dict.fromkeys(n.removesuffix("/n") for n, v in values if n.endswith("/n") and v))


def row_label(experiment: str, stage: str) -> str:
    """How a table calls the row of a test stage."""
    return experiment if stage == "evaluate" else f"{experiment} {stage}"


def cell(entry: dict[str, float | None] | None, interval: Interval | None = None) -> str:
    """A value with four digits and its interval with three, or a dash where nothing was measured."""
    value = entry["value"] if entry else None
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.4f}{spread(interval, 3)}"


def _results_table(
    title: str,
    rows: Sequence[Measured],
    told: Callable[[Measured, str], str],
    seeds: Callable[[Measured], str] | None,
) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("rows")
    table.add_column("method", overflow="fold")
    table.add_column("n", justify="right")
    columns = columns_of([r.values for r in rows])
    for column in (*(["seeds"] if seeds else []), *columns):
        table.add_column(column, justify="right")
    groups = groups_of((n, e["value"]) for r in rows for n, e in r.values.items())
    for group in groups:
        table.add_section()
        for number, row in enumerate(rows):
            table.add_row(
                group.replace("_", " ") if number == 0 else "",
                escape(row.label) + (" *" if row.older else ""),
                told(row, f"{group}/n"),
                *([seeds(row)] if seeds else []),
                *(escape(told(row, f"{group}/{c}")) for c in columns),
            )
    return table


def plain(value: Any) -> str:
    """A value in a few characters: four digits, thousands apart."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Plain cells under column names, made ``harmless``: titles and answers may hold anything."""
    table = Table(title=escape(harmless(title)), title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(harmless(cell)) for cell in row))
    open_console().print(table)


def open_console() -> Console:
    """Where tables are printed."""
    # A file or a pipe gets a width that no table has to be squeezed into.
    return Console(width=None if sys.stdout.isatty() else 220, highlight=False)
