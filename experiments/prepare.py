"""Many categories of one data config, each in a process of its own: the command behind ``make prepare``.

``NAME=amazon_2023 ARGS="data.category=all"`` (or ``data.category=[Gift_Cards,Software]``), ``JOBS`` at a
time. In a Slurm array each task takes its share: the same command, nothing else to be told. What is done is
skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from datamodules.amazon_releases import categories, find_release
from datamodules.sources import cache_root
from datamodules.versioning import read_json
from experiments import artifacts, config
from experiments.errors import UserError
from experiments.messages import print_error, say
from experiments.run import request
from experiments.source_graph import REPO

KEY = "data.category="


@dataclass(frozen=True)
class Outcome:
    """One category: its counts, or why there are none."""

    category: str
    counts: dict[str, int]
    seconds: float
    peak_mb: float
    error: str = ""


def chosen(name: str, overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The categories that were asked for, and the other overrides.

    Raises:
        UserError: no category was named, or the data has none.
    """
    asked = [o for o in overrides if o.startswith(KEY)]
    rest = [o for o in overrides if not o.startswith(KEY)]
    data = config.composed(name, rest).config.get("data", {})
    if "release" not in data or "category" not in data:
        raise UserError(f"{name} has no categories; make data NAME={name} prepares it")
    if len(asked) != 1:
        raise UserError('name the categories: ARGS="data.category=all" or "data.category=[A,B]"')
    text = asked[0].removeprefix(KEY)
    if text == "all":
        return list(categories(int(data["release"]))), rest
    release = find_release(data["release"])
    try:
        named = [release.category(c) for c in text.strip("[]").split(",") if c.strip()]
    except ValueError as error:
        raise UserError(str(error)) from error
    if not named:
        raise UserError(f"{asked[0]} names no category: data.category=all or data.category=[A,B]")
    return list(dict.fromkeys(named)), rest


def share(names: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """What this process does: everything, or its part in a Slurm array.

    The tasks of a range of numbers deal all names out among them. In any other array (``--array=3,7``, as
    when some tasks are submitted again) a task's number is that of one name, counted from 0.

    Raises:
        UserError: a number that is none, or no name's.
    """
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return list(names)
    task, first, last, count = (
        _number(environment, f"SLURM_ARRAY_TASK_{key}") for key in ("ID", "MIN", "MAX", "COUNT")
    )
    step = max(1, _number(environment, "SLURM_ARRAY_TASK_STEP", "1"))
    if last == first + (count - 1) * step and (count > 1 or first == 0):
        return list(names[(task - first) // step :: count])
    say(f"the array is no range of numbers: this task does category number {task} alone")
    if not 0 <= task < len(names):
        raise UserError(
            f"task {task} of the array has no category: there are {len(names)}, numbered from 0; submit "
            f"--array=0-{len(names) - 1}"
        )
    return [names[task]]


def _number(environment: Mapping[str, str], name: str, default: str = "") -> int:
    text = environment.get(name) or default
    if not text.strip().isdecimal():
        raise UserError(f"{name} is {text!r}, expected a whole number")
    return int(text)


def prepare_all(
    name: str, names: Sequence[str], overrides: Sequence[str], jobs: int
) -> Iterator[Outcome]:
    """Every category in a child process, ``jobs`` at a time, as they end."""
    with ThreadPoolExecutor(jobs) as pool:
        waiting = {
            pool.submit(_run_child, [name, *overrides, f"{KEY}{category}"]): category
            for category in names
        }
        for future in as_completed(waiting):
            # Here, not in the pool's threads: Hydra's state is one for the whole process.
            yield _outcome(name, waiting[future], overrides, *future.result())


def _run_child(words: Sequence[str]) -> tuple[subprocess.CompletedProcess[str], float]:
    """A finished child, and how many seconds it took."""
    command = [sys.executable, "-m", "experiments.prepare", "--one", *words]
    start = time.monotonic()
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    return done, time.monotonic() - start


def _outcome(
    name: str,
    category: str,
    overrides: Sequence[str],
    done: subprocess.CompletedProcess[str],
    seconds: float,
) -> Outcome:
    if done.returncode:
        return Outcome(category, {}, seconds, float("nan"), _reason(done.stderr))
    peak = next((x for x in done.stdout.splitlines() if x.startswith("peak_mb=")), "peak_mb=nan")
    data = config.composed(name, [*overrides, f"{KEY}{category}"]).config["data"]
    note = artifacts.prepared_data(data, cache_root())
    assert note is not None
    manifest: dict[str, Any] = read_json(Path(note["folder"]) / "manifest.json")
    return Outcome(category, manifest["counts"], seconds, float(peak.partition("=")[2]))


def _reason(stderr: str) -> str:
    """What a child said from its last "error:" on, remedy and all, on one line."""
    told = [line.strip() for line in stderr.splitlines() if line.strip()]
    begins = [number for number, line in enumerate(told) if line.startswith("error:")]
    return " ".join(told[begins[-1] :] if begins else told[-1:]) or "no reason was given"


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(title="prepared", title_justify="left")
    for column in ("category", "users", "items", "interactions", "seconds", "peak GB"):
        left = column == "category"
        table.add_column(column, justify="left" if left else "right", no_wrap=left)
    for o in sorted(outcomes, key=lambda o: o.category):
        counts = [
            f"{o.counts[k]:,}" if o.counts else "-" for k in ("users", "items", "interactions")
        ]
        peak = "failed" if o.error else f"{o.peak_mb / 1024:.2f}"
        table.add_row(o.category, *counts, f"{o.seconds:.1f}", peak)
    return table


def _one(words: Sequence[str]) -> int:
    """The child: prepare, then say how much memory it took."""
    import resource

    from experiments import check

    status = check.main(["--report", *words])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scale = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    print(f"peak_mb={peak / scale:.0f}", flush=True)  # noqa: T201
    return status


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 all prepared, 2 some were not (named, with the reason)."""
    if argv[:1] == ["--one"]:
        return _one(argv[1:])
    try:
        name, overrides = request(list(argv))
        name = config.full_name(name)
        names, rest = chosen(name, overrides)
        mine = share(names, os.environ)
        jobs = max(1, _number(os.environ, "JOBS", "1"))
    except UserError as error:
        print_error(error)
        return 2
    say(f"{name}: {len(mine)} of {len(names)} categories, {jobs} at a time")
    outcomes = []
    for outcome in prepare_all(name, mine, rest, jobs):
        outcomes.append(outcome)
        told = outcome.error or f"{outcome.counts['interactions']:,} interactions"
        say(f"[{len(outcomes)}/{len(mine)}] {outcome.category}: {told} ({outcome.seconds:.0f} s)")
    Console().print(_table(outcomes))
    failed = [o.category for o in outcomes if o.error]
    if failed:
        say(
            f"{len(failed)} of {len(mine)} failed, see above: data.category=[{','.join(sorted(failed))}]"
        )
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
