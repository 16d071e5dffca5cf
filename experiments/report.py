"""What the terminal shows: plans, settings, data reports, results."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from datamodules.versioning import read_json
from experiments.config import Experiment, origin_of
from experiments.errors import UserError
from experiments.keys import flatten
from experiments.messages import short

COLUMNS = (
    "hit@1", "hit@5", "hit@10", "ndcg@10", "mrr", "auc", "uauc", "ece", "yes_rate", "refusal_rate",
)  # fmt: skip
# Overrides that say where the user's files lie: others of these names have another fingerprint.
PLACES = ("data.root=", "data.interactions=", "data.items=")
# Those that say where and how things are done, not what is meant.
_UNTOLD = (*PLACES, "data.cache=", "launch.", "logger", "stale")
STATE_STYLE = {"done": "green", "partial": "yellow", "stale": "magenta", "running": "cyan"}


def print_list(experiments: Sequence[tuple[str, str]]) -> None:
    """Every experiment with its header line."""
    width = max(len(name) for name, _ in experiments)
    for name, header in experiments:
        print(f"{name:<{width}}  {header}")  # noqa: T201


def print_plan(name: str, stages: Sequence[Any]) -> None:
    """One line a stage: state, folder, reason."""
    console = _console()
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
        print(f"{f'{key}: {_plain(value)}':<{width}}  # {origin_of(key, origins)}")  # noqa: T201


def print_data_report(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """``make data``: counts, filters, doubts, split, groups; expected counts beside ours.

    Returns:
        The manifest.
    """
    manifest: dict[str, Any] = read_json(folder / "manifest.json")
    for name, part in manifest.get("parts", {}).items():
        print_data_report(Path(part), config.get("parts", {}).get(name, {}))
    report, counts = manifest.get("report"), manifest["counts"]
    console = _console()
    table = Table(
        show_header=False,
        title=f"{manifest['recipe']['name']} (content {manifest['digest']})",
        title_justify="left",
    )
    table.add_column("")
    table.add_column("")
    expected = config.get("expected") or {}
    for name, count in counts.items():
        table.add_row(name, f"{count:,}{_against(count, expected.get(name))}")
    for section in _sections(manifest, report) if report else [_recipe_section(manifest)]:
        table.add_section()
        for name, text in section:
            table.add_row(escape(str(name)), escape(str(text)))
    console.print(table)
    console.print(f"source: {escape(manifest['source'])}\nfolder: {escape(str(folder))}")
    return manifest


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


def measured(experiment: Experiment, stages: Sequence[Any]) -> Iterator[Measured]:
    """The rows of every test stage that has been run."""
    for stage in stages:
        metrics = (read_json(stage.folder / "metrics.json") if stage.folder else None) or {}
        if not metrics and stage.done and stage.folder and stage.spec.get("run") == "test":
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


def print_results(experiment: Experiment, stages: Sequence[Any]) -> None:
    """The rows of every test stage, by group; rows of unlike fingerprints never share a table."""
    rows = list(measured(experiment, stages))

    def told(row: Measured, metric: str) -> str:
        if metric.endswith("/n"):
            return f"{(row.values.get(metric) or {'value': 0})['value']:.0f}"
        return cell(row.values.get(metric), interval=metric.endswith(("/ndcg@10", "/auc")))

    print_tables(rows, stages, told)
    labelled = any("all/auc" in r.values and "all/ndcg@10" not in r.values for r in rows)
    kind = "resamples users with their rows" if labelled else "takes rows as independent"
    console = _console()
    console.print(f"± is a 95 % interval that {kind}; random is the exact expectation of guessing")
    if own := [o for o in experiment.overrides if not o.startswith(_UNTOLD)]:
        console.print(
            f"{escape(experiment.name)} is meant with {escape(' '.join(own))}", soft_wrap=True
        )
    console.print("run folders:")
    for stage in stages:
        console.print(f"  {stage.name}: {escape(short(stage.folder))}", soft_wrap=True)


def print_tables(
    rows: Sequence[Measured],
    stages: Sequence[Any],
    told: Callable[[Measured, str], str],
    seeds: Callable[[Measured], str] | None = None,
) -> None:
    """One table a fingerprint, and what holds for them all: rows left out, rows made by older code.

    Args:
        rows: what is in the tables.
        stages: those that were tested; they say which rows were left out.
        told: a row's cell of a ``group/metric``, and of ``group/n``.
        seeds: a row's number of seeds; a column of its own.
    """
    console = _console()
    for fingerprint in dict.fromkeys(r.fingerprint for r in rows):
        here = [r for r in rows if r.fingerprint == fingerprint]
        rows_of = "validation" if "scored" in here[0].protocol else "test"
        console.print(_results_table(f"{rows_of}, fingerprint {fingerprint}", here, told, seeds))
    notes = (read_json(s.folder / "metrics.json") or {} for s in stages if s.folder)
    left_out = {k: v for note in notes for k, v in note.get("left_out", {}).items()}
    for row, reason in left_out.items():
        console.print(f"{escape(row)} is left out: {escape(reason)}")
    if any(r.older for r in rows):
        console.print('* made by older code; ARGS="stale=rerun" makes it anew')


def row_label(experiment: str, stage: str) -> str:
    """How a table calls the row of a test stage."""
    return experiment if stage == "evaluate" else f"{experiment} {stage}"


def cell(entry: dict[str, float | None] | None, interval: bool = False) -> str:
    """A value with four digits, or a dash where nothing was measured."""
    value = entry["value"] if entry else None
    if entry is None or value is None or math.isnan(value):
        return "-"
    error = entry["stderr"] if interval else None
    told = error is not None and not math.isnan(error)
    return f"{value:.4f} ±{1.96 * (error or 0):.3f}" if told else f"{value:.4f}"


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
    columns = [c for c in COLUMNS if any(f"all/{c}" in r.values for r in rows)]
    for column in (*(["seeds"] if seeds else []), *columns):
        table.add_column(column, justify="right")
    groups = dict.fromkeys(
        name.removesuffix("/n")
        for r in rows
        for name, entry in r.values.items()
        if name.endswith("/n") and entry["value"]  # a group without rows says nothing
    )
    for group in groups:
        table.add_section()
        for number, row in enumerate(rows):
            table.add_row(
                group.replace("_", " ") if number == 0 else "",
                escape(row.label) + (" *" if row.older else ""),
                told(row, f"{group}/n"),
                *([seeds(row)] if seeds else []),
                *(told(row, f"{group}/{c}") for c in columns),
            )
    return table


def _sections(manifest: dict[str, Any], report: dict[str, Any]) -> list[list[tuple[str, Any]]]:
    """The data report's blocks of (name, text)."""
    filters = [
        (f"after {step['description']}", _counts_text(step["after"])) for step in report["filters"]
    ]
    lengths = "  ".join(f"{q}: {n}" for q, n in report["history_length"].items())
    ratings = "  ".join(f"{r}: {n:,}" for r, n in report["ratings"].items()) or "none"
    return [
        [
            ("raw file", _counts_text(report["raw"])),
            *(
                (k if k.startswith("kept:") else f"skipped: {k}", f"{v:,}")
                for k, v in report["skipped"].items()
            ),
            *filters,
        ],
        [
            ("history length (quantiles)", lengths),
            ("ratings", ratings),
            ("repeated user-item pairs", f"{report['repeated_pairs']:,}"),
        ],
        _example_section(report.get("examples", {})),
        [(f"text: {k}", f"{v:,}") for k, v in report["text"].items()],
        _split_section(report["split"], manifest["counts"]["users"]),
        [(k.replace("_", " "), f"{v:,}") for k, v in report["groups"].items()],
        _recipe_section(manifest),
        [(f"sha256 {name}", digest) for name, digest in manifest["checksums"].items()],
    ]


def _recipe_section(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """What was done to the rows."""
    return [
        (k, v if isinstance(v, str) else "; ".join(_flat(v)) or "none")
        for k, v in manifest["recipe"].items()
    ]


def _flat(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [f"{k}: {', '.join(_flat(v))}" for k, v in value.items()]
    return [str(v) for v in value] if isinstance(value, list) else [str(value)]


def _example_section(parts: dict[str, dict[str, float]]) -> list[tuple[str, str]]:
    """Labelled examples by purpose."""
    return [
        (f"{code} examples", ", ".join(f"{_plain(v)} {k}" for k, v in counts.items()))
        for code, counts in parts.items()
    ]


def _split_section(split: dict[str, Any], users: int) -> list[tuple[str, str]]:
    """Events by purpose, what is new in them, and what time says about leakage."""
    names = {"cold_users": "users never trained on", "cold_items": "items never trained on"}
    names |= {"no_history": "without any history"}
    parts = [
        (code, ", ".join(f"{n:,} {names.get(k, k)}" for k, n in counts.items()))
        for code, counts in split.items()
        if isinstance(counts, dict) and counts["events"]
    ]
    held_out = split["test"]["users"]
    parts.append(("users without a test event", f"{users - held_out:,}"))
    times = {
        "leakage": "test targets older than the newest training event",
        "tied_last_two_users": "users whose last two events share a time",
        "tied_last_two_share": "the same, as a share",
        "tied_events_share": "events that share a time with another of their user",
    }
    told = [(text, _plain(split[k])) for k, text in times.items() if split[k] is not None]
    return [*parts, *(told or [("leakage and ties", "not known: the data has no times")])]


def _against(count: int, expected: int | None) -> str:
    if expected is None:
        return ""
    if count == expected:
        return " (as expected)"
    return f" [red](expected {expected:,}: {count - expected:+,})[/red]"


def _counts_text(counts: dict[str, int]) -> str:
    return ", ".join(f"{v:,} {k}" for k, v in counts.items())


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Plain cells under column names."""
    table = Table(title=escape(title), title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    _console().print(table)


def _console() -> Console:
    # A file or a pipe gets a width that no table has to be squeezed into.
    return Console(width=None if sys.stdout.isatty() else 180, highlight=False)
