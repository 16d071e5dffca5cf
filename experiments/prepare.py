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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from datamodules.amazon_releases import categories
from datamodules.sources import cache_root
from datamodules.versioning import read_json
from experiments import artifacts, config
from experiments.errors import UserError
from experiments.report import print_error, say
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
    return [c.strip() for c in text.strip("[]").split(",") if c.strip()], rest


def share(names: Sequence[str], environment: dict[str, str]) -> list[str]:
    """What this process does: everything, or every n-th in a Slurm array of n tasks."""
    task = environment.get("SLURM_ARRAY_TASK_ID")
    if task is None:
        return list(names)
    first, count = (int(environment[f"SLURM_ARRAY_TASK_{k}"]) for k in ("MIN", "COUNT"))
    step = int(environment.get("SLURM_ARRAY_TASK_STEP", 1))
    return list(names[(int(task) - first) // step :: count])


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
        told = [x for x in done.stderr.splitlines() if x.strip()]
        last = next((x for x in reversed(told) if "error:" in x), told[-1] if told else "no reason")
        return Outcome(category, {}, seconds, float("nan"), last)
    peak = next((x for x in done.stdout.splitlines() if x.startswith("peak_mb=")), "peak_mb=nan")
    data = config.composed(name, [*overrides, f"{KEY}{category}"]).config["data"]
    note = artifacts.prepared_data(data, cache_root())
    assert note is not None
    manifest: dict[str, Any] = read_json(Path(note["folder"]) / "manifest.json")
    return Outcome(category, manifest["counts"], seconds, float(peak.partition("=")[2]))


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(title="prepared", title_justify="left")
    for column in ("category", "users", "items", "interactions", "seconds", "peak GB"):
        table.add_column(column, justify="left" if column == "category" else "right")
    for o in sorted(outcomes, key=lambda o: o.category):
        counts = [
            f"{o.counts[k]:,}" if o.counts else "-" for k in ("users", "items", "interactions")
        ]
        table.add_row(o.category, *counts, f"{o.seconds:.1f}", f"{o.peak_mb / 1024:.2f}")
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
        mine = share(names, dict(os.environ))
        jobs = max(1, int(os.environ.get("JOBS") or 1))
    except (UserError, ValueError) as error:
        print_error(error)
        return 2
    say(f"{name}: {len(mine)} of {len(names)} categories, {jobs} at a time")
    outcomes = []
    for outcome in prepare_all(name, mine, rest, jobs):
        outcomes.append(outcome)
        told = outcome.error or f"{outcome.counts['interactions']:,} interactions"
        say(f"[{len(outcomes)}/{len(mine)}] {outcome.category}: {told} ({outcome.seconds:.0f} s)")
    Console().print(_table(outcomes))
    return 2 if any(o.error for o in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
