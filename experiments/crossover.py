"""``make crossover``: hit@1 by how often the target was trained on, and which method is ahead where.

Reads the scores files of a finished run, of any kind of ranking. Variables: BASELINE (a row of the run; its
first method is the default), SEEDS.

Legend: N rows of the test, G groups.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from datamodules.prepared import Prepared
from datamodules.sources import cache_root
from datamodules.versioning import read_json
from experiments import artifacts, messages, report
from experiments.artifacts import PlannedStage
from experiments.canvas import Canvas
from experiments.config import Experiment
from experiments.errors import UserError
from experiments.intervals import Interval, of_change, of_share, paired_rows, scores_columns
from experiments.keys import nearest
from experiments.line_plot import Line, line_plot
from experiments.results import Row, Runs, rows_of
from experiments.significance import holm, signed_rank
from lightning_modules.fusion.model import EDGES, bin_names, bins_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bools = NDArray[np.bool_]

METRIC = "hit@1"
LEVEL = 0.05  # of p, corrected for the number of tests in the table
PLOT = "crossover"  # .svg and .png, in the folder of the last method's test


@dataclass(frozen=True)
class Cell:
    """One method on the rows of one bin."""

    n: int
    hit: Interval | None = None  # None without rows
    gain: Interval | None = None  # over the baseline; None of the baseline itself
    p: float | None = None  # of no gain: Wilcoxon's signed-rank test, corrected


Table = dict[str, list[Cell]]  # by method: all rows, then each bin


def tell(experiments: Mapping[int, Experiment]) -> None:
    """Print the table and a sentence for each method, and draw the plot.

    Args:
        experiments: one experiment, by seed.

    Raises:
        UserError: it has not been run to its end, tests no method that ranks, or has no row BASELINE.
    """
    runs = {seed: (e, artifacts.plan(e, cache_root())) for seed, e in experiments.items()}
    _require_finished(runs)
    (experiment, stages), *_ = runs.values()
    methods = chosen(rows_of(runs))
    base = name_of(methods[0])
    targets = targets_of(methods[0].scores[0], _training_counts(stages, methods[0]))
    table = cells(methods, bin_members(targets))
    names = bin_names()
    _print(experiment.name, methods, names, table)
    for other in list(table)[1:]:
        messages.put(sentence(other, base, names, table[other][1:]))
    for plot in chart(experiment.name, table).write(methods[-1].scores[0].with_name(PLOT)):
        messages.put(f"plot: {messages.short(plot)}")


def chart(title: str, table: Table) -> Canvas:
    """A line for each method of a table, over the bins."""
    first = next(iter(table.values()))
    notes = [f"n = {cell.n}" for cell in first[1:]]
    return line_plot(
        f"{METRIC} by training events of the target: {title}",
        "training events of the target", f"{METRIC}, 95 % interval",
        list(zip(bin_names(), notes, strict=True)),
        [Line(name, [cell.hit for cell in found[1:]]) for name, found in table.items()],
    )  # fmt: skip


def measured(methods: Sequence[Row]) -> Table | None:
    """Each method of one protocol, by its label, on the bins, against the first; None without the data.

    Args:
        methods: that rank.

    Raises:
        UserError: a file is missing or holds other rows.
    """
    job = read_json(methods[0].scores[0].with_name("stage.json")) or {}
    note = artifacts.prepared_data(job["spec"]["data"], cache_root())
    if note is None:
        return None
    targets = targets_of(methods[0].scores[0], training_counts(Path(note["folder"])))
    return cells(methods, bin_members(targets), lambda row: row.label)


def _require_finished(runs: Runs) -> None:
    for seed, (experiment, stages) in runs.items():
        missing = [s.name for s in stages if s.spec["run"] == "test" and not s.done]
        if missing:
            words = shlex.join(o for o in experiment.overrides if not o.startswith("seed="))
            given = (f" SEEDS={seed}," if len(runs) > 1 else "") + (
                f' ARGS="{words}"' if words else ""
            )
            raise UserError(
                f"{experiment.name} has not been run to its end ({', '.join(missing)} missing): make exp "
                f"NAME={experiment.name}{given}"
            )


def name_of(row: Row) -> str:
    """What a row is called in the run: its test stage, or its name among reference rows."""
    return row.scores[0].name.removeprefix("scores.").removesuffix(".parquet")


def chosen(rows: Sequence[Row]) -> list[Row]:
    """The methods of a run, of one protocol; the one that the others are compared with stands first.

    Raises:
        UserError: there is no method that ranks, or no row that is called BASELINE.
    """
    tested = [r for r in rows if not r.validation] or list(rows)
    methods = [r for r in tested if not r.reference]
    if not methods or f"all/{METRIC}" not in methods[0].values:
        raise UserError(
            "the run tests no method that ranks candidates: there is no crossover to tell"
        )
    known = {name_of(r): r for r in (*methods, *tested)}
    named = os.environ.get("BASELINE", "").strip() or name_of(methods[0])
    if named not in known:
        raise UserError(
            f"BASELINE={named!r} is no row of the run ({', '.join(known)}){nearest(named, list(known))}"
        )
    base = known[named]
    rest = [r for r in methods if r is not base and r.fingerprint == base.fingerprint]
    return [base, *rest]


def _training_counts(stages: Sequence[PlannedStage], row: Row) -> pl.DataFrame:
    """Columns item_id and count: training events of each item of the row's data."""
    (spec,) = (s.spec for s in stages if s.folder == row.scores[0].parent)
    note = artifacts.prepared_data(spec["data"], cache_root())
    assert note is not None  # a finished test has data
    return training_counts(Path(note["folder"]))


def training_counts(folder: Path) -> pl.DataFrame:
    """The same of prepared data."""
    prepared = Prepared(folder)
    counts = prepared.histories.train_counts()[1:]
    return prepared.items.select(
        pl.col("item_id").cast(pl.String), pl.Series("count", counts, pl.Int64)
    )


def targets_of(file: Path, counts: pl.DataFrame) -> pl.DataFrame:
    """A line for each row, by row: count, and the groups that its file has."""
    names = scores_columns(file)
    lines = pl.scan_parquet(file)
    lines = (
        lines.rename({"target_id": "item_id"})
        if "target_id" in names
        else lines.filter("is_target")
    )
    flags = [
        n for n, kind in lines.collect_schema().items() if kind == pl.Boolean and n != "is_target"
    ]
    found = lines.select("row", pl.col("item_id").cast(pl.String), *flags).collect()
    return found.join(counts, on="item_id", how="left", validate="m:1").sort("row")


def bin_members(targets: pl.DataFrame, edges: Sequence[int] = EDGES) -> list[Bools]:
    """Which rows (N,) count, first in all, then in each bin.

    Rows that a sample holds for a rare group's sake count where they bend nothing: in bins whose rows, as far
    as they were drawn at random, are all of rare groups.

    Args:
        targets: N lines with ``count``, and ``all`` and groups where there are any.
    """
    bins = bins_of(targets["count"].to_numpy(), edges)
    groups = [n for n, kind in targets.schema.items() if kind == pl.Boolean and n != "all"]
    member = targets.select(groups).to_numpy().reshape(targets.height, len(groups))  # (N, G)
    drawn = np.ones(targets.height, bool)
    if "all" in targets.columns:
        drawn = targets["all"].to_numpy()
    whole = np.flatnonzero(member[~drawn].any(0))  # groups that were not only drawn from
    rare: Bools = np.asarray(member[:, whole].any(1))  # (N,)
    found = [drawn]
    for number in range(len(edges)):
        inside = bins == number
        found.append(inside if rare[inside & drawn].all() else inside & drawn)
    return found


def cells(
    methods: Sequence[Row], members: Sequence[Bools], called: Callable[[Row], str] = name_of
) -> Table:
    """Each method on each set of rows, against the first of them.

    Args:
        methods: rows of one protocol.
        members: (N,) each.
        called: the name of a method in the table.

    Raises:
        UserError: a file is missing or holds other rows.
    """
    base = methods[0]
    table: Table = {}
    for row in methods:
        try:
            both = paired_rows(row.scores, base.scores, (METRIC,), further=True)
        except ValueError as error:
            raise UserError(str(error)) from error
        if both is None or both.height != len(members[0]):
            raise UserError(f"{row.scores[0]} is missing or holds other rows: make exp tests anew")
        hits, theirs = (both[c].to_numpy() for c in (METRIC, f"{METRIC}_b"))  # (N,)
        gaps = None if row is base else hits - theirs
        table[called(row)] = [_cell(hits, gaps, m) for m in members]
    tested = [(n, i) for n, found in table.items() for i, c in enumerate(found) if c.p is not None]
    for (name, i), p in zip(tested, holm([table[n][i].p or 0.0 for n, i in tested]), strict=True):
        table[name][i] = replace(table[name][i], p=p)
    return table


def _cell(hits: NDArray[np.float64], gaps: NDArray[np.float64] | None, member: Bools) -> Cell:
    n = int(member.sum())
    if n == 0:
        return Cell(0)
    hit = of_share(hits[member].tolist())
    if gaps is None:
        return Cell(n, hit)
    return Cell(n, hit, of_change(gaps[member].tolist()), signed_rank(gaps[member]))


def sentence(name: str, base: str, names: Sequence[str], found: Sequence[Cell]) -> str:
    """Where one of two methods is ahead of the other beyond chance.

    Args:
        name, base: the methods.
        names: of the bins.
        found: the first method's cell of each bin.
    """
    ahead, behind = _ranges(names, found, 1), _ranges(names, found, -1)
    if not ahead and not behind:
        return f"{name} against {base}: no bin differs beyond chance (p >= {LEVEL})"
    told = [
        f"{who} wins at {' and '.join(where)}"
        for who, where in ((name, ahead), (base, behind))
        if where
    ]
    return (
        f"{name} against {base}: {', '.join(told)} training events of the target; elsewhere no bin differs "
        f"beyond chance (p >= {LEVEL})"
    )


def _ranges(names: Sequence[str], found: Sequence[Cell], sign: int) -> list[str]:
    """Neighbouring bins that one side wins, joined: ``0-9``, ``50+``."""
    wins = [
        c.gain is not None and c.p is not None and c.p < LEVEL and sign * c.gain.value > 0
        for c in found
    ]
    told = []
    for won, run in groupby(zip(names, wins, strict=True), key=lambda pair: pair[1]):
        bins = [name for name, _ in run]
        first, last = bins[0].rstrip("+").partition("-")[0], bins[-1].rpartition("-")[2]
        if won:
            open_ended = last.endswith("+")
            told.append(
                f"{first}+" if open_ended else first if first == last else f"{first}-{last}"
            )
    return told


def _print(title: str, methods: Sequence[Row], names: Sequence[str], table: Table) -> None:
    base = name_of(methods[0])
    heads = (
        "training events",
        "n",
        "method",
        f"{METRIC} [95 % interval]",
        f"less {base}'s",
        "p (Holm)",
    )
    protocol = methods[0].protocol
    scored = f", {protocol['scored']} rows" if methods[0].validation else ""
    report.print_table(
        f"{title}: {METRIC} by the target's training events, fingerprint {methods[0].fingerprint}{scored}",
        heads, list(_lines(methods, names, table)),
    )  # fmt: skip
    messages.put(
        "bins are fixed; intervals are Wilson's for a share, Agresti & Min's for a paired difference; p is "
        "by Wilcoxon's signed-rank test, Holm's correction for all tests of the table; rows are taken as "
        "independent"
    )
    if any(len(r.scores) > 1 for r in methods):
        messages.put("a row's hit is its mean over the seeds")
    if any(r.older for r in methods):
        messages.put('* made by older code; make exp with ARGS="stale=rerun" makes it anew')


def _lines(methods: Sequence[Row], names: Sequence[str], table: Table) -> Iterator[list[str]]:
    for place, name in enumerate(("all", *names)):
        for number, row in enumerate(methods):
            cell = table[name_of(row)][place]
            p = "-" if cell.p is None else f"{cell.p:.4f}" if cell.p >= 1e-4 else "<0.0001"
            opening = [name, str(cell.n)] if number == 0 else ["", ""]
            label = name_of(row) + (" *" if row.older else "")
            yield [*opening, label, _told(cell.hit, ".4f"), _told(cell.gain, "+.4f"), p]


def _told(found: Interval | None, form: str) -> str:
    if found is None:
        return "-"
    return f"{found.value:{form}} [{found.low:{form}}, {found.high:{form}}]"
