"""``make table``: a paper's tables, each published number beside what the same cell has here.

Variables: PAPER (a file of ``papers/``), SIZE (``paper``, or ``cpu`` for small models and data), TABLE (one
of them alone), SEEDS (those that count, and are run), ARGS (overrides of all cells), RUN=1 (do here what is
missing) or SLURM=1 (hand it in, with the variables of ``make slurm``). Without those two the commands are
printed. Where all tables were asked for, ARGS change nothing that is measured and something has been run, the
paper's section of ``REPRODUCTION.md`` is written. No torch here.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments import artifacts, baseline, compared, published, reproduction, seeds
from experiments.command import exit_status, switched
from experiments.compared import Asked
from experiments.errors import UserError
from experiments.keys import nearest
from experiments.messages import put, say, short
from experiments.published import Cell, Grid
from experiments.report import print_table
from experiments.results import Row, collect, telling
from experiments.run import request
from experiments.source_graph import REPO
from experiments.table_text import Value

TESTED = "evaluate"  # the stage of a cell that names none
COLUMNS = ("method", "column", "paper", "ours", "difference", "n", "seeds", "fingerprint")
LIKE = {
    "paper": "as published",
    "cpu": "small models and data; the paper's numbers are orientation, this is no reproduction",
}
# What a run of a cell must not take from this command.
OWN = (
    "NAME", "NAMES", "ARGS", "BASELINE", "PAPER", "SIZE", "TABLE", "RUN", "SLURM", "OUT", "FORMAT",
)  # fmt: skip
NOWHERE = "no experiment"


@dataclass(frozen=True)
class Filled:
    """A cell, and what was measured for it."""

    cell: Cell
    asked: Asked | None  # None: there is no experiment
    row: Row | None  # None: it has not been run

    @property
    def ours(self) -> Value:
        """The mean over seeds, or of the one seed; without a number where nothing was measured."""
        return compared.value_of(self.row, self.cell.metric) if self.row else Value(None)

    def texts(self) -> list[str]:
        """As ``COLUMNS``; what there is not is a dash."""
        known, ours, row = self.cell.published, self.ours, self.row
        apart = "-" if known is None or ours.value is None else f"{ours.value - known:+.4f}"
        counts = row.values.get(f"{self.cell.metric.partition('/')[0]}/n", []) if row else []
        told = [int(c) for c in counts if c]
        return [
            self.cell.row,
            self.cell.column + (f" (beside {self.cell.like})" if self.cell.like else ""),
            "-" if known is None else f"{known:.4f}",
            f"{ours}{'*' if row and row.older else ''}" if self.asked else NOWHERE,
            apart,
            str(told[0]) if told else "-",
            row.seed_count if row else "-",
            row.fingerprint if row else "-",
        ]


Tables = Sequence[tuple[Grid, Sequence[Filled]]]


def main() -> int:
    """Exit status: 0 done, 2 failed (the reason is on the screen), 130 stopped."""
    return exit_status(work)


def work() -> None:
    """What the variables ask for.

    Raises:
        UserError: one cannot be, or a run failed.
    """
    paper, size = _paper(), _choice("SIZE", published.SIZES[0], published.SIZES)
    grids = published.grids(paper, size)
    only = os.environ.get("TABLE", "").strip()
    if only:
        known = [g.table for g in grids]
        grids = [g for g in grids if g.table == _choice("TABLE", "", known)]
    shared, wanted = request([])[1], seeds.requested([])
    run, slurm = switched("RUN"), switched("SLURM")
    if run and slurm:
        raise UserError("RUN=1 runs here and SLURM=1 on a cluster: leave one of them out")
    environment = {k: v for k, v in os.environ.items() if k not in OWN}
    say(f"{paper}, SIZE={size}: looking for its cells in {short(artifacts.runs_root())} ...")
    filled = fill(grids, shared, wanted, artifacts.runs_root())
    failed = []
    if run or slurm:
        failed = list(_start(missing(filled), "slurm" if slurm else "run", environment))
        if run:
            filled = fill(grids, shared, wanted, artifacts.runs_root())
    told = published.read(paper)
    put(f"{told['title']}, SIZE={size}: {LIKE[size]}")
    _print(filled)
    for remark in remarks(told, size, filled):
        put(remark)
    left = missing(filled)
    if left and not slurm:
        put(f"\nnot run ({len(left)} commands; RUN=1 starts them here, SLURM=1 on a cluster):")
        for one in left:
            put(f"  {command_of(one, wanted)}")
    done = any(f.row for _, cells in filled for f in cells)
    if done and not only and not telling(list(shared)):
        file = reproduction.write(
            REPO, reproduction.key_of(paper, size), list(section(told, size, filled))
        )
        say(f"wrote its section of {short(file)}")
    if failed:
        raise UserError("\n  - ".join(["these failed, their reasons stand above:", *failed]))


def fill(
    grids: Sequence[Grid], shared: Sequence[str], wanted: Sequence[int], runs: Path
) -> list[tuple[Grid, list[Filled]]]:
    """The cells of tables with what run folders have for them.

    Args:
        grids: tables.
        shared: overrides of all cells.
        wanted: seeds that count; none for all that were run.
        runs: where run folders lie.
    """
    everything = [r for r in collect(runs) if not r.validation]
    rows: dict[str, tuple[Asked, Row | None]] = {}

    def found(cell: Cell) -> Filled:
        if not cell.run:
            return Filled(cell, None, None)
        if cell.run not in rows:
            (one,) = compared.asked(shlex.split(cell.run), shared)
            one = Asked(one.name, one.stage or TESTED, one.overrides)
            row = next(compared.rows_asked(one, wanted, everything), None) if everything else None
            rows[cell.run] = one, row
        return Filled(cell, *rows[cell.run])

    return [(grid, [found(cell) for cell in grid.cells]) for grid in grids]


def missing(filled: Tables) -> list[Asked]:
    """The experiments whose cells have not been run, each once."""
    cells = [f for _, found in filled for f in found]
    left = [Asked(f.asked.name, "", f.asked.overrides) for f in cells if f.asked and not f.row]
    return list(dict.fromkeys(left))


def command_of(one: Asked, wanted: Sequence[int]) -> str:
    """What runs a cell."""
    listed = ",".join(map(str, wanted)) + "," * (len(wanted) == 1)
    return one.command + (f" SEEDS={listed}" if wanted else "")


def _start(todo: Sequence[Asked], module: str, environment: dict[str, str]) -> Iterator[str]:
    """Run, or hand in, one after the other; the commands that failed."""
    for number, one in enumerate(todo, start=1):
        say(f"[{number}/{len(todo)}] {one.command}")
        words = [sys.executable, "-m", f"experiments.{module}", *(["exp"] * (module == "run"))]
        child = subprocess.Popen([*words, one.name, *one.overrides], env=environment)
        try:
            status = child.wait()
        except KeyboardInterrupt:
            child.wait()  # it was interrupted as well, and saves what it can
            raise
        if status in (75, 130):
            raise UserError("stopped; the same command goes on where it stood")
        if status:
            yield one.command


def remarks(paper: dict[str, object], size: str, filled: Tables) -> Iterator[str]:
    """What a reader must know: sources, how protocols differ, which cells have no experiment and why."""
    cells = [f for _, found in filled for f in found]
    differs = paper["differs"]
    assert isinstance(differs, dict)
    yield f"source: {paper['source']}"
    yield f"differs: {' '.join(str(differs[size]).split())}"
    protocols = {f.row.fingerprint: f.row.protocol for f in cells if f.row}
    for fingerprint, protocol in protocols.items():
        keys = ("name", "split", "candidates", "examples", "filters", "test_rows", "ties")
        told = [f"{k} {protocol[k]}" for k in keys if protocol.get(k)]
        yield f"fingerprint {fingerprint}: {', '.join(told)}"
    for grid, found in filled:
        for column in dict.fromkeys(f.cell.column for f in found):
            here = [f.row for f in found if f.cell.column == column and f.row]
            kinds = list({r.fingerprint: r for r in here}.values())
            if len(kinds) > 1:
                apart = baseline.differing(kinds[0].protocol, kinds[1].protocol)
                yield (
                    f"table {grid.table}, {column}: rows of {len(kinds)} fingerprints, which differ in "
                    f"{apart}; compare rows of one alone"
                )
    reasons: dict[str, list[str]] = {}
    for grid, found in filled:
        if grid.why:
            reasons.setdefault(grid.why, []).append(f"table {grid.table}")
        for one in found:
            if one.cell.why:
                reasons.setdefault(one.cell.why, []).append(f"{grid.table} {one.cell.row}")
    for why, where in reasons.items():
        yield f"no experiment for {', '.join(dict.fromkeys(where))}: {why}"
    yield f"{_counts(cells)}; * made by older code"


def _counts(cells: Sequence[Filled]) -> str:
    done = sum(f.row is not None for f in cells)
    none = sum(f.asked is None for f in cells)
    return f"{len(cells)} cells: {done} run, {len(cells) - done - none} not run, {none} without an experiment"


def section(paper: dict[str, object], size: str, filled: Tables) -> Iterator[str]:
    """A paper's part of ``REPRODUCTION.md`` at one size, in Markdown."""
    yield f"### SIZE={size}: {LIKE[size]}"
    yield ""
    for grid, found in filled:
        yield f"Table {grid.table}: {grid.told}"
        yield ""
        if not found:
            yield f"None at this size: {grid.why}."
            yield ""
            continue
        yield "| " + " | ".join(COLUMNS) + " |"
        yield "|---" * len(COLUMNS) + "|"
        for one in found:
            yield "| " + " | ".join(one.texts()) + " |"
        yield ""
    for remark in remarks(paper, size, filled):
        yield f"* {remark}"


def _print(filled: Tables) -> None:
    for grid, found in filled:
        if found:
            title = f"table {grid.table}: {grid.told}"
            print_table(title, COLUMNS, [one.texts() for one in found])


def _paper() -> str:
    given = os.environ.get("PAPER", "").strip()
    if not given:
        raise UserError(f"PAPER is missing: make table PAPER={'|'.join(published.names())}")
    published.read(given)
    return given


def _choice(name: str, default: str, known: Sequence[str]) -> str:
    given = os.environ.get(name, "").strip() or default
    if given not in known:
        raise UserError(
            f"{name}={given!r}, expected one of {', '.join(known)}{nearest(given, known)}"
        )
    return given


if __name__ == "__main__":
    sys.exit(main())
