"""What a sweep came to: a table of its trials, best first, of a grid one table, the command of the best."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from datamodules.versioning import read_json
from experiments import messages, report, sweep_plots, sweep_space
from experiments.baseline import PROTOCOL_KEYS
from experiments.config import Experiment
from experiments.intervals import of_metric
from experiments.source_graph import changed_since
from experiments.sweep_space import TEST, Space
from experiments.sweep_study import Tried
from experiments.sweep_trial import Target
from experiments.table_text import Line, Sheet, Value

ORDER = ("done", "pruned", "running", "waiting", "failed")
OLDER = " *"  # behind the number of a trial whose code has changed since


def best(tried: Sequence[Tried], space: Space) -> Tried | None:
    """The finished trial of the best value; of equals the first."""
    done = [t for t in tried if t.state == "done" and t.value is not None]
    return max(done, key=lambda t: (space.better * (t.value or 0.0), -t.place), default=None)


def tell(
    folder: Path, experiment: Experiment, space: Space, aim: Target, tried: Sequence[Tried]
) -> None:
    """Print the tables; write them, as Markdown and CSV, and the plot, as SVG and PNG, to the folder."""
    remarks = list(_remarks(experiment, space, tried))
    title = f"{experiment.name}: {_counts(tried)}, {aim.metric} of {aim.stage} on {space.on}"
    sheets = {"trials": _trials(title, space, aim, tried, experiment, remarks)}
    if space.sampler == "grid":
        sheets["grid"] = _grid(title, space, aim, tried, remarks)
    files = []
    for name, sheet in sheets.items():
        shown = [c for c in sheet.columns if c != "overrides"]  # too wide for a terminal
        rows = [[li.label, *(str(li.cells.get(c, "-")) for c in shown)] for li in sheet.lines]
        report.print_table(sheet.title, [sheet.corner, *shown], rows)
        for form, ending in (("markdown", "md"), ("csv", "csv")):
            file = folder / f"{name}.{ending}"
            file.write_text(sheet.told(form), encoding="utf-8")
            files.append(file)
    if any(t.value is not None for t in tried):
        files += sweep_plots.drawn(experiment.name, space, aim.metric, tried).write(
            folder / "sweep"
        )
    for remark in remarks:
        messages.put(remark)
    messages.say("written: " + ", ".join(messages.short(f) for f in files))


def words_of(trial: Tried, experiment: Experiment, space: Space) -> list[str]:
    """The overrides that make ``make exp`` repeat a trial."""
    return [*experiment.overrides, *sweep_space.override_words(trial.point, space.axes)]


def _counts(tried: Sequence[Tried]) -> str:
    counts = {state: sum(t.state == state for t in tried) for state in ORDER}
    told = [f"{count} {state}" for state, count in counts.items() if count]
    return f"{len(tried)} trials ({', '.join(told)})" if told else "no trials yet"


def _remarks(experiment: Experiment, space: Space, tried: Sequence[Tried]) -> list[str]:
    found = []
    first = best(tried, space)
    if space.on == TEST:
        found.append(
            "an ablation table: every value is of the test set, so nothing may be chosen by it"
        )
    elif first is not None:
        words = shlex.quote(shlex.join(words_of(first, experiment, space)))
        found.append(f"the best, trial {first.place}: make exp NAME={experiment.name} ARGS={words}")
    if any(a.key.partition(".")[0] in PROTOCOL_KEYS for a in space.axes):
        found.append("the trials differ in what is measured: values of unlike data do not compare")
    if any(_older(t) for t in tried):
        found.append("* made by older code than there is now")
    found += [f"trial {t.place} failed: {t.why}" for t in tried if t.state == "failed"]
    return found


def _older(trial: Tried) -> bool:
    done = read_json(Path(trial.folder) / "done.json") if trial.folder else None
    return bool(done and changed_since(done.get("sources", {})))


def _value(trial: Tried | None, space: Space, aim: Target) -> Value | str:
    """A trial's value, with its interval where a test has told one; else its state."""
    if trial is None or trial.value is None:
        return trial.state if trial else "-"
    span = None
    if trial.folder and not aim.fit:
        rows = (read_json(Path(trial.folder) / "metrics.json") or {}).get("rows", {})
        span = of_metric(rows.get(aim.stage, {}), aim.metric)
    return Value(trial.value, span, note=f"epoch {trial.epochs}" if trial.state == "pruned" else "")


def _trials(
    title: str, space: Space, aim: Target, tried: Sequence[Tried], experiment: Experiment,
    remarks: Sequence[str],
) -> Sheet:  # fmt: skip
    labels = space.labels()
    ordered = list(tried)
    if space.on != TEST:
        ordered.sort(
            key=lambda t: (ORDER.index(t.state), -space.better * (t.value or 0.0), t.place)
        )
    lines = []
    for t in ordered:
        words = dict(w.split("=", 1) for w in sweep_space.override_words(t.point, space.axes))
        cells: dict[str, Value | str] = {aim.metric: _value(t, space, aim), "state": t.state}
        for key, label in labels.items():
            number = t.point.get(key)
            plain = isinstance(number, float)
            cells[label] = Value(number, digits=-1) if plain else words.get(key, "-")
        cells["seconds"] = Value(t.seconds, digits=0)
        cells["overrides"] = shlex.join(words_of(t, experiment, space))
        lines.append(Line(f"{t.place}{OLDER if _older(t) else ''}", cells))
    columns = [aim.metric, *labels.values(), "seconds", "state", "overrides"]
    return Sheet(title, columns, lines, remarks, corner="trial")


def _grid(
    title: str, space: Space, aim: Target, tried: Sequence[Tried], remarks: Sequence[str]
) -> Sheet:
    """One table: the last axis across, all others down; a single axis down."""
    by_point = {
        tuple(w.partition("=")[2] for w in sweep_space.override_words(t.point, space.axes)): t
        for t in tried
        if len(t.point) == len(space.axes)
    }
    labels = list(space.labels().values())
    down, across = (space.axes[:-1], space.axes[-1]) if len(space.axes) > 1 else (space.axes, None)
    columns = {text: (text,) for text in across.grid()} if across else {aim.metric: ()}
    lines = []
    for texts in product(*(axis.grid() for axis in down)):
        cells = {
            f"{labels[-1]}={column}" if across else column: _value(
                by_point.get((*texts, *last)), space, aim
            )
            for column, last in columns.items()
        }
        lines.append(Line(", ".join(texts), cells))
    names = [f"{labels[-1]}={c}" if across else c for c in columns]
    return Sheet(title, names, lines, remarks, corner=", ".join(labels[: len(down)]))
