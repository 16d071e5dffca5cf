"""What ``BASELINE`` names: a row of the experiment itself, or another experiment that has been run."""

from __future__ import annotations

import os
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datamodules.sources import cache_root
from experiments import artifacts, config
from experiments.artifacts import PlannedStage
from experiments.config import Experiment
from experiments.errors import UserError
from experiments.keys import flatten, nearest
from experiments.report import row_label
from experiments.results import Row, Runs, rows_of

# Overrides that say what is measured, and so hold for the baseline as well.
PROTOCOL_KEYS = ("data", "split", "preset")


@dataclass(frozen=True)
class Baseline:
    """What the rows of an experiment are compared with.

    Args:
        name: label of a row of the experiment itself, or another experiment; empty for the strongest
            reference row.
        runs: of the other experiment, for every seed; None where it is a row of the experiment itself.
    """

    name: str
    runs: Runs | None = None

    def pairs(self, runs: Runs) -> Iterator[tuple[Row, Row]]:
        """Each row of a method with its baseline; none where there are no reference rows to choose from.

        Args:
            runs: of the methods; any of the seeds.

        Raises:
            UserError: the baseline was measured by another protocol, or was left out.
        """
        rows = rows_of(runs)
        if any(not (r.reference or r.validation) for r in rows):
            rows = [r for r in rows if not r.validation]  # scored for a later stage to choose by
        if self.runs is None:
            among = [r for r in rows if r.reference or r.label == self.name]
        else:
            among = rows_of({seed: self.runs[seed] for seed in runs})
        for row in rows:
            base = None if row.reference else self.of(row, among)
            if base is not None and base.scores != row.scores:
                yield row, base

    def of(self, row: Row, among: Sequence[Row]) -> Row | None:
        """The baseline of one row, chosen from reference rows or those of an experiment."""
        alike = [r for r in among if r.fingerprint == row.fingerprint]
        if self.runs is not None:
            if not alike:
                raise UserError(_unlike(row, among[0]))
            return alike[0]
        if not self.name:
            return max(alike, key=strength, default=None)
        named = [r for r in alike if r.label == self.name]
        if not named:
            raise UserError(f"BASELINE={self.name} is left out of the rows beside {row.label}")
        return named[0]


def find_all(experiments: Mapping[int, Experiment]) -> list[Baseline]:
    """The baselines that BASELINE names, with semicolons between them.

    Raises:
        UserError: as ``find``, or one is named twice.
    """
    texts = [t.strip() for t in os.environ.get("BASELINE", "").split(";") if t.strip()]
    if twice := [t for t in texts if texts.count(t) > 1]:
        raise UserError(f"BASELINE names {twice[0]} twice: leave one of them out")
    return [find(experiments, text) for text in texts or [""]]


def find(experiments: Mapping[int, Experiment], text: str) -> Baseline:
    """The baseline that a text names: a reference row, a test stage, or an experiment with overrides.

    An experiment is taken as its files are now, with the seeds asked for and with those overrides that say
    what is measured.

    Args:
        experiments: what is to be compared with it, by seed.
        text: empty for the strongest reference row.

    Raises:
        UserError: there is none of that name, it is the experiment itself, or not all seeds of it
            have been run.
    """
    if not text:
        return Baseline("")
    try:
        name, *own = shlex.split(text)
    except ValueError as error:
        raise UserError(f"BASELINE={text!r} cannot be read: {error}") from error
    first = next(iter(experiments.values()))
    rows = {row: row for row in _references(first)}
    rows |= {stage: row_label(first.name, stage) for stage in tests_of(first)}
    if name in rows and not own:
        return Baseline(rows[name])
    if name not in config.names():
        raise UserError(
            f"BASELINE={name!r} is neither a row of {first.name} ({', '.join(rows)}) nor an "
            f"experiment{nearest(name, [*rows, *config.names()])}"
        )
    shared = shared_overrides(first)
    words = [*shared, *map(config.as_text, own)]
    runs = {}
    missing = []
    for seed, experiment in experiments.items():
        other = config.load(name, [*words, f"seed={seed}"])
        if other.config == experiment.config:
            raise UserError(f"BASELINE={name} is the experiment itself: name another one")
        runs[seed] = other, tested(other)
        if not runs[seed][1]:
            missing.append(str(seed))
    if missing:
        given = f' ARGS="{shlex.join(words)}"' if words else ""
        raise UserError(
            f"BASELINE {name} has not been run to its end for seed {', '.join(missing)}: "
            f"make exp NAME={name} SEEDS={os.environ.get('SEEDS', '').strip()}{given}"
        )
    return Baseline(name, runs)


def shared_overrides(experiment: Experiment) -> list[str]:
    """Those that hold for another experiment that is compared with it, as well."""
    return [o for o in experiment.overrides if setting(o).split(".")[0] in PROTOCOL_KEYS]


def tested(experiment: Experiment) -> list[PlannedStage]:
    """The finished tests of its methods, without the reference rows.

    Raises:
        UserError: the experiment has reference rows alone.
    """
    tests = tests_of(experiment)
    if not tests:
        raise UserError(
            f"BASELINE {experiment.name} has rows without a model alone: name one of them, "
            f"{', '.join(_references(experiment))}"
        )
    planned = artifacts.plan(experiment, cache_root())
    return [stage for stage in planned if stage.name in tests and stage.done]


def tests_of(experiment: Experiment) -> list[str]:
    """The stages that test a model."""
    stages = experiment.stages.items()
    return [name for name, node in stages if node.get("run") == "test" and "module" in node]


def _references(experiment: Experiment) -> list[str]:
    """The rows without a model of an experiment, by name."""
    stages = (s.get("modules") or {} for s in experiment.stages.values())
    return [name for modules in stages for name, node in modules.items() if node is not None]


def strength(row: Row) -> float:
    """What the strongest reference row has most of."""
    values = row.values.get("all/ndcg@10") or row.values.get("all/auc") or []
    told = [v for v in values if v is not None]
    return statistics.fmean(told) if told else -1.0


def _unlike(row: Row, base: Row) -> str:
    """Why two rows cannot be compared: the settings of their protocols that differ."""
    return (
        f"{row.label} (fingerprint {row.fingerprint}) and BASELINE {base.label} (fingerprint "
        f"{base.fingerprint}) differ in {differing(row.protocol, base.protocol)}: choose a BASELINE of the "
        "same protocol"
    )


def differing(ours: dict[str, Any], theirs: dict[str, Any], shown: int = 3) -> str:
    """The settings of two protocols that differ, each with both values."""
    a, b = dict(flatten(ours)), dict(flatten(theirs))
    keys = [k for k in a | b if a.get(k) != b.get(k)]
    told = [f"{k} ({a.get(k, 'none')} against {b.get(k, 'none')})" for k in keys[:shown]]
    more = f" and {len(keys) - shown} more" if len(keys) > shown else ""
    return ", ".join(told) + more


def setting(override: str) -> str:
    """The dotted key that an override sets."""
    return override.lstrip("+~").partition("=")[0].partition("@")[0]
