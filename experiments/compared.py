"""Rows of several experiments for one table, found in the run folders; nothing is planned or run."""

from __future__ import annotations

import os
import shlex
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from datamodules.sources import cache_root
from datamodules.versioning import read_json
from experiments import artifacts, baseline, config
from experiments.costs import chain
from experiments.errors import UserError
from experiments.keys import flatten, nearest
from experiments.results import Row, collect, rows_of, telling
from experiments.table_text import Value

Key = tuple[str, str, tuple[str, ...]]
Tests = dict[tuple[Path, str], tuple[float, float]]  # scores and metric -> corrected p, difference


@dataclass(frozen=True)
class Asked:
    """One word of NAMES: an experiment, a test stage of it or all, and the overrides that follow it."""

    name: str
    stage: str = ""
    overrides: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """What runs it."""
        given = f' ARGS="{shlex.join(self.overrides)}"' if self.overrides else ""
        return f"make exp NAME={self.name}{given}"


def asked(words: Sequence[str], shared: Sequence[str] = ()) -> list[Asked]:
    """The experiments of NAMES: ``NAME``, ``NAME:STAGE``, each with the overrides that stand behind it.

    Args:
        words: for instance ``["a/b", "c/d:evaluate", "seed=1"]``.
        shared: overrides of all of them.

    Raises:
        UserError: there is none, or one does not exist.
    """
    found: list[Asked] = []
    for word in words:
        if found and ("=" in word or word.startswith("~")):
            last = found[-1]
            found[-1] = replace(last, overrides=(*last.overrides, config.as_text(word)))
            continue
        name, _, stage = word.partition(":")
        name = config.full_name(name)
        known = [*config.names(), *config.data_names()]
        if name not in known:
            raise UserError(f"{name!r} of NAMES is no experiment{nearest(name, known)}")
        found.append(Asked(name, stage, tuple(map(config.as_text, shared))))
    if not found:
        raise UserError(
            'NAMES is missing: make compare NAMES="sasrec/movielens_100k gru4rec/movielens_100k"'
        )
    return list(dict.fromkeys(found))


def request(words: Sequence[str]) -> list[Asked]:
    """What the command line, or NAMES (or NAME) and ARGS, ask for.

    Raises:
        UserError: as ``asked``, or quotes that do not close.
    """
    text = os.environ.get("NAMES", "").strip() or os.environ.get("NAME", "")
    try:
        shared = shlex.split(os.environ.get("ARGS", ""))
        return asked(list(words) or shlex.split(text), shared)
    except ValueError as error:
        raise UserError(f"NAMES={text!r} or ARGS cannot be read: {error}") from error


def find(wanted: Sequence[Asked], seeds: Sequence[int], runs: Path) -> list[Row]:
    """The methods asked for in the order asked, then the rows without a model of the same protocol.

    Of a row that was measured by several protocols, as data or metrics changed, the newest counts.

    Args:
        wanted: as ``asked`` has it.
        seeds: those that count; none stands for all that were run.
        runs: where run folders lie.

    Raises:
        UserError: something is not finished, or two rows were measured by unlike protocols.
    """
    everything = [r for r in collect(runs) if not r.validation]
    methods: list[Row] = []
    missing: list[str] = []
    for one in wanted:
        rows = list(rows_asked(one, seeds, everything))
        if not rows:
            missing.append(_unfinished(one, seeds, everything))
        methods += [r for r in rows if r.scores not in [m.scores for m in methods]]
    if missing:
        raise UserError("\n  - ".join(["not finished, so that there is no table:", *missing]))
    require_alike(methods)
    files = {f for m in methods for f in m.scores}
    beside = [
        r for r in everything
        if r.reference and r.fingerprint == methods[0].fingerprint and not files & set(r.scores)
    ]  # fmt: skip
    return [*methods, *sorted(beside, key=lambda r: (r.label, r.overrides))]


def tables(
    wanted: Sequence[Asked], seeds: Sequence[int], runs: Path
) -> list[tuple[list[Row], list[Row]]]:
    """All that was tested, validation as well, a table for each protocol: methods, and rows without a model.

    Args:
        wanted, seeds, runs: as of ``find``.

    Raises:
        UserError: of an experiment nothing is finished.
    """
    everything = list(collect(runs))
    found = [(one, list(rows_asked(one, seeds, everything))) for one in wanted]
    if missing := [_unfinished(one, seeds, everything) for one, rows in found if not rows]:
        raise UserError(
            "\n  - ".join(["not finished, so that there is nothing to tell:", *missing])
        )
    methods = list({r.scores: r for _, rows in found for r in rows}.values())
    told = []
    for fingerprint in dict.fromkeys(r.fingerprint for r in methods):
        ours = [r for r in methods if r.fingerprint == fingerprint]
        files = {f for r in ours for f in r.scores}
        beside = [
            r for r in everything
            if r.reference and r.fingerprint == fingerprint and not files & set(r.scores)
        ]  # fmt: skip
        told.append((ours, sorted(beside, key=lambda r: (r.label, r.overrides))))
    return told


def rows_asked(one: Asked, seeds: Sequence[int], everything: Sequence[Row]) -> Iterator[Row]:
    """The finished rows of one experiment, of each the newest protocol; none where nothing is finished.

    Args:
        one: what is asked for.
        seeds: those that count; none stands for all that were run.
        everything: what run folders hold.
    """
    told = telling(list(one.overrides))
    named = [r for r in everything if r.experiment == one.name and _has(r, one.stage)]
    rows = [r for r in named if not r.reference and r.overrides == told]
    if not rows:
        experiment = config.load(one.name, one.overrides)
        tests = baseline.tests_of(experiment)
        rows = list(_shared(experiment, one.stage)) if tests else named
    newest: dict[Key, Row] = {}
    for row in sorted(filter(None, (_of_seeds(r, seeds) for r in rows)), key=_finished):
        newest[row.experiment, row.label, row.overrides] = row
    for row in newest.values():
        yield replace(row, label=" ".join([row.label, *told]), overrides=())


def _shared(experiment: config.Experiment, stage: str) -> Iterator[Row]:
    """Its finished tests where another experiment, which shares them, made their folders."""
    stages = [s for s in artifacts.plan(experiment, cache_root()) if s.done]
    rows = rows_of({int(experiment.config["seed"]): (experiment, stages)})
    yield from (r for r in rows if not (r.reference or r.validation) and _has(r, stage))


def _has(row: Row, stage: str) -> bool:
    return not stage or stage == row.name_in_file


def _of_seeds(row: Row, seeds: Sequence[int]) -> Row | None:
    """A row with these seeds alone; None where one of them was not run. A row that draws nothing stays."""
    if not seeds or not row.seeds or not _draws(row):
        return row
    at = {_seed(f): i for i, f in enumerate(row.scores)}
    if any(s not in at for s in seeds):
        return None
    kept = [at[s] for s in seeds]
    values = {m: [told[i] for i in kept] for m, told in row.values.items()}
    files = tuple(row.scores[i] for i in kept)
    return replace(row, seeds=tuple(seeds), values=values, scores=files)


def _draws(row: Row) -> bool:
    """Whether a seed changes it: something was trained for it, or its module is given a seed."""
    jobs = (read_json(f / "stage.json") or {} for f in chain(row.scores[0].parent))
    specs = [job["spec"] for job in jobs if "spec" in job]
    keys = [key for spec in specs for key, _ in flatten(spec["modules"])]
    return any(s["run"] == "fit" for s in specs) or any(k.endswith(".seed") for k in keys)


def _seed(file: Path) -> int:
    return int((read_json(file.with_name("stage.json")) or {})["spec"]["seed"])


def _finished(row: Row) -> str:
    done = (read_json(f.with_name("done.json")) or {} for f in row.scores)
    return max(str(d.get("finished", "")) for d in done)


def _unfinished(one: Asked, seeds: Sequence[int], everything: Sequence[Row]) -> str:
    """Why there is no row of it, and the command that makes one."""
    others = [r for r in everything if r.experiment == one.name and not r.reference]
    stages = sorted({r.name_in_file for r in others})
    if one.stage and others and one.stage not in stages:
        return f"{one.name} has no row {one.stage!r} ({', '.join(stages)})"
    given = f" SEEDS={','.join(map(str, seeds))}{',' * (len(seeds) == 1)}" if seeds else ""
    variants = sorted({" ".join(r.overrides) for r in others if r.overrides})
    hint = (
        f" (it was run with {'; '.join(variants)}: write that behind its name)" if variants else ""
    )
    return f"{one.command}{given}{hint}"


def require_alike(rows: Sequence[Row]) -> None:
    """Refuse rows of unlike fingerprints in one table.

    Raises:
        UserError: it says what differs.
    """
    first = rows[0]
    for row in rows[1:]:
        if row.fingerprint != first.fingerprint:
            raise UserError(
                f"{first.label} (fingerprint {first.fingerprint}) and {row.label} (fingerprint "
                f"{row.fingerprint}) cannot stand in one table: they differ in "
                f"{baseline.differing(first.protocol, row.protocol)}. Compare them apart, or pick rows of "
                "one protocol with NAME:STAGE"
            )


def chosen_baseline(rows: Sequence[Row], name: str) -> Row | None:
    """The row that BASELINE names by its label, its experiment, its test stage or its name in the table.

    Raises:
        UserError: no row is called so.
    """
    if not name:
        return None
    for told in (lambda r: r.label, lambda r: r.experiment, lambda r: r.name_in_file):
        found = [
            r for r in rows if told(r) == name and not (r.reference and told(r) == r.experiment)
        ]
        if found:
            return found[0]
    known = [r.label for r in rows]
    raise UserError(
        f"BASELINE={name!r} is no row of the table ({', '.join(known)}){nearest(name, known)}"
    )


def head(metric: str) -> str:
    """``cold item ndcg@10`` of ``cold_item/ndcg@10``; of all rows the metric alone."""
    group, _, name = metric.partition("/")
    return name if group == "all" else f"{group.replace('_', ' ')} {name}"


def title_of(rows: Sequence[Row]) -> str:
    """The data, and the protocol that all rows share."""
    return f"{rows[0].protocol['name']}, fingerprint {rows[0].fingerprint}"


def value_of(row: Row, metric: str, tests: Tests | None = None) -> Value:
    """The mean over seeds, and its interval."""
    told = row.values.get(metric, [])
    values = [v for v in told if v is not None]
    if not values or len(values) < len(told):
        return Value(None)
    p, gain = (tests or {}).get((row.scores[0], metric), (None, 0.0))
    return Value(statistics.fmean(values), row.interval(metric), p=p, gain=gain)
