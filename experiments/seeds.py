"""``SEEDS=5 make exp``: an experiment over several seeds, its table, and paired tests against a baseline.

Each seed is an ordinary run of the experiment; what no seed changes (reference rows) lies in folders that all
of them share, and is done once. Variables: SEEDS, BASELINE.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from experiments import baseline, messages, report
from experiments.artifacts import PlannedStage
from experiments.config import Experiment
from experiments.errors import UserError
from experiments.report import Measured
from experiments.results import Row, Runs, rows_of

LARGEST = 2**32 - 1  # that random generators take
COLUMNS = (
    "method",
    "metric",
    "ours",
    "baseline",
    "difference [95 % interval]",
    "p",
    "p (Holm)",
    "rank corr.",
)


def requested(overrides: Sequence[str]) -> tuple[int, ...]:
    """The seeds that SEEDS asks for: ``5`` is 0 to 4, ``0,3,7`` those three; none where it is not set.

    Raises:
        UserError: it cannot be read, or does not go with the overrides or with BASELINE.
    """
    text = os.environ.get("SEEDS", "").strip()
    if not text:
        if os.environ.get("BASELINE", "").strip():
            raise UserError("BASELINE goes with SEEDS: add SEEDS=5, or SEEDS=1 for seed 0 alone")
        return ()
    if any(baseline.setting(o) == "seed" for o in overrides):
        raise UserError(f"SEEDS={text} and seed=... in ARGS exclude each other: leave one out")
    seeds = _numbers(text)
    if not seeds or len(set(seeds)) < len(seeds) or max(seeds) > LARGEST:
        raise UserError(
            f"SEEDS={text!r} is neither a number of seeds (SEEDS=5 is 0 to 4) nor a list of different "
            f"ones up to {LARGEST} (SEEDS=0,3,7)"
        )
    return seeds


def _numbers(text: str) -> tuple[int, ...]:
    if re.fullmatch(r"[0-9]{1,3}", text):
        return tuple(range(int(text)))
    listed = re.fullmatch(r"[0-9]{1,10}( *, *[0-9]{1,10})* *,?", text)
    return tuple(int(n) for n in text.split(",") if n.strip()) if listed and "," in text else ()


def run(
    experiments: Mapping[int, Experiment], finish: Callable[[Experiment], list[PlannedStage]]
) -> int:
    """Run the experiment of each seed, then print the table and the paired tests.

    Args:
        experiments: by seed.
        finish: does what is missing of one of them.

    Raises:
        UserError: a seed failed, or the baseline cannot be compared with.
    """
    against = baseline.find_all(experiments)
    runs: dict[int, tuple[Experiment, list[PlannedStage]]] = {}
    for seed, experiment in experiments.items():
        messages.say(f"seed {seed} ({len(runs) + 1} of {len(experiments)})")
        done = ", ".join(map(str, runs)) or "none"
        state = f"seeds done: {done}; the same command goes on with seed {seed}"
        try:
            runs[seed] = experiment, finish(experiment)
        except UserError as error:
            raise UserError(f"{error} (seed {seed}; {state})") from error
        except SystemExit as ended:  # a stage that has said what is wrong
            raise UserError(f"seed {seed} failed, the reason stands above; {state}") from ended
        except KeyboardInterrupt:
            messages.say(state)
            raise
        # What cannot be compared is told after the first seed, not after the last.
        pairs = [pair for one in against for pair in one.pairs(runs)]
    _print_table(runs)
    _print_tests(pairs, against[0].name)
    return 0


def _print_table(runs: Runs) -> None:
    rows = {r.scores[0]: r for r in rows_of(runs)}
    first = {m.scores: m for run in runs.values() for m in report.measured(*run)}

    def told(one: Measured, metric: str) -> str:
        row = rows[one.scores]
        if metric.endswith("/n"):  # of cold and warm rows, where a seed draws what is learned from
            counts = sorted({int(n or 0) for n in row.values.get(metric, [0])})
            return " to ".join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))
        return row.cell(metric)

    report.print_tables(
        [replace(first[s], fingerprint=r.fingerprint, older=r.older) for s, r in rows.items()],
        [stage for _, stages in runs.values() for stage in stages],
        told,
        lambda one: rows[one.scores].seed_count,
    )
    if any(", " in r.fingerprint for r in rows.values()):
        messages.put("a seed draws what is learned from, too: each has a fingerprint of its own")
    if any(len(r.seeds) > 1 for r in rows.values()):
        messages.put("± is half of the 95 % interval of the mean over seeds (Student's t)")
    messages.put(
        "rows without a number of seeds draw nothing; random is the exact expectation of guessing"
    )


def _print_tests(pairs: Sequence[tuple[Row, Row]], named: str) -> None:
    """One table for each baseline; Holm's correction is for all tests of all tables."""
    from experiments import significance  # scipy and, for the files, polars and torch are slow

    found = []
    for row, base in pairs:
        if gone := [f for f in (*row.scores, *base.scores) if not f.is_file()]:
            raise UserError(f"{gone[0]} is missing: delete its folder and run the command again")
        try:
            found += [(row, base, c) for c in significance.compare(row.scores, base.scores)]
        except ValueError as error:
            raise UserError(str(error)) from error
    if not found:
        messages.put("no paired test: there is no row to compare with (BASELINE=... names one)")
        return
    lacking = {
        "p (Holm)": len(found) == 1,
        "rank corr.": all(c.correlation is None for *_, c in found),
    }
    shown = [i for i, name in enumerate(COLUMNS) if not lacking.get(name)]
    tables: dict[str, list[list[str]]] = {}
    corrected = significance.holm([c.p for *_, c in found])
    for (row, base, c), held in zip(found, corrected, strict=True):
        count = f" ({base.seed_count} seeds)" if len(base.seeds) > 1 else ""
        why = "" if named else ", the strongest row without a model"
        title = f"against {base.label}{count}{why}, {c.users:,} users"
        span = f"{c.difference:+.4f} [{c.low:+.4f}, {c.high:+.4f}]"
        alike = "-" if c.correlation is None else f"{c.correlation:.4f}"
        cells = [
            row.label,
            c.metric,
            f"{c.ours:.4f}",
            f"{c.theirs:.4f}",
            span,
            _p(c.p),
            _p(held),
            alike,
        ]
        tables.setdefault(title, []).append([cells[i] for i in shown])
    for title, lines in tables.items():
        report.print_table(title, [COLUMNS[i] for i in shown], lines)
    pooled = {c.metric == "auc" for *_, c in found}
    by = {True: "the same draws (AUC)", False: "Wilcoxon's signed-rank test over users"}
    messages.put(
        "paired tests of means over seeds; the interval draws users with all their rows anew "
        f"({significance.DRAWS:,} times); p is by {' or '.join(by[p] for p in sorted(pooled))}"
        + ("" if lacking["rank corr."] else "; rank corr. is Spearman's, of the scores of all rows")
    )


def _p(value: float) -> str:
    return "<0.0001" if value < 0.0001 else f"{value:.4f}"
