"""``make verify``: what was published beside what was reached here, with a verdict.

An experiment's ``expected`` lists numbers: ``metric``, ``value``, ``source``, the ``tolerance`` that still
counts as the same number (0 where it is left out), ``row`` where several stages are tested (the label in the
table) and ``at_least: true`` where more is no failure. Ours is the mean over the seeds that were run.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments import config, reproduction
from experiments.errors import UserError
from experiments.intervals import over_seeds
from experiments.messages import say
from experiments.report import print_table
from experiments.results import Row, collect

PASS, FAIL, NOT_RUN, CUT_SHORT = "PASS", "FAIL", "not run", "cut short"
COLUMNS = ("experiment", "metric", "published", "ours", "difference", "tolerance", "verdict")


@dataclass(frozen=True)
class Verdict:
    """One published number and ours."""

    experiment: str
    metric: str
    value: float
    source: str
    tolerance: float
    at_least: bool
    ours: tuple[float, ...]  # one a seed; none = not run
    older: bool = False
    fingerprint: str = "-"
    budget: str = ""  # the time that training was given, where it was given less than it asks for

    @property
    def difference(self) -> float:
        """Ours, the mean over seeds, less the published value."""
        return statistics.fmean(self.ours) - self.value

    @property
    def told(self) -> str:
        """PASS, FAIL, not run, or cut short: a failure of a run that had no time to end."""
        if not self.ours:
            return NOT_RUN
        allowed = self.tolerance + 1e-9  # 0.52 is within 0.02 of 0.5
        short = self.difference < -allowed
        far = not self.at_least and self.difference > allowed
        missed = CUT_SHORT if self.budget else FAIL
        return missed if short or far else PASS

    def cells(self) -> list[str]:
        """As ``COLUMNS``."""
        mean = f"{statistics.fmean(self.ours):.4f}" if self.ours else "-"
        if len(self.ours) > 1:
            half = over_seeds(self.ours)  # 0 where all agree, which is no certainty
            mean += f"{f' ±{half:.4f}' if half else ''} ({len(self.ours)} seeds)"
        return [
            self.experiment, self.metric, f"{'≥ ' if self.at_least else ''}{self.value:g} ({self.source})",
            mean + (f" ({self.budget})" if self.budget else "") + ("*" if self.older else ""),
            f"{self.difference:+.4f}" if self.ours else "-",
            f"{self.tolerance:g}", self.told,
        ]  # fmt: skip


def verdicts(names: Sequence[str], runs: Path) -> Iterator[Verdict]:
    """A verdict for each number that these experiments expect; rows with overrides do not count.

    But for the time that training may take: such a row counts where there is no other.
    """
    rows = [r for r in collect(runs) if not (r.reference or r.validation)]
    rows = sorted((r for r in rows if _budget(r) is not None), key=lambda r: bool(r.overrides))
    for name in names:
        for entry in config.load(name).config.get("expected") or []:
            label = entry.get("row") or name
            row = next((r for r in rows if (r.experiment, r.label) == (name, label)), None)
            values = (row.values.get(entry["metric"]) or []) if row else []
            yield Verdict(
                label, str(entry["metric"]), float(entry["value"]), str(entry["source"]),
                float(entry.get("tolerance") or 0), bool(entry.get("at_least")),
                tuple(v for v in values if v is not None),
                row is not None and row.older, row.fingerprint if row else "-",
                (_budget(row) or "") if row else "",
            )  # fmt: skip


def _budget(row: Row) -> str | None:
    """The time that a row's training was given; "" where it was as shipped, None where more was changed."""
    given = [re.fullmatch(r"\+*stages\.\w+\.trainer\.max_time=(.+)", o) for o in row.overrides]
    times = [f"max_time {match[1]}" for match in given if match]
    return ", ".join(times) if len(times) == len(given) else None


def verify(name: str, runs: Path, repo: Path) -> int:
    """Print the verdicts of one experiment, or write those of all; 1 if any is FAIL.

    Raises:
        UserError: the experiment states no expected number, or has not been run.
    """
    if not name:
        return _write_all(runs, repo)
    found = list(verdicts([name], runs))
    if not found:
        raise UserError(f"{name} expects no number: list some under `expected:` in its file")
    if all(v.told == NOT_RUN for v in found):
        raise UserError(f"{name} has not been run to its end here: make exp NAME={name}")
    print_table(name, COLUMNS[1:], [v.cells()[1:] for v in found])
    if any(v.older for v in found):
        say('* made by older code; make exp with ARGS="stale=rerun" makes it anew')
    return int(any(v.told == FAIL for v in found))


def _write_all(runs: Path, repo: Path) -> int:
    found = list(verdicts(config.names(), runs))
    target = reproduction.write(repo, reproduction.VERIFY, list(_section(found)))
    every = (PASS, FAIL, CUT_SHORT, NOT_RUN)
    counts = {told: sum(v.told == told for v in found) for told in every}
    say(f"wrote experiments/{target.name}: " + ", ".join(f"{n} {t}" for t, n in counts.items()))
    return int(counts[FAIL] > 0)


def _section(found: Sequence[Verdict]) -> Iterator[str]:
    yield "≥ means that more is no failure, max_time marks runs whose training was given less time than it"
    yield "asks for (days:hours:minutes:seconds)."
    yield ""
    yield "| " + " | ".join((*COLUMNS, "fingerprint")) + " |"
    yield "|---" * (len(COLUMNS) + 1) + "|"
    for verdict in found:
        yield "| " + " | ".join((*verdict.cells(), verdict.fingerprint)) + " |"
