"""SASRec, ours against those of RecTools, RePlay and RecBole, side by side in one run.

``make bench`` (after ``make bench-peers``), or ``python -m tests.benchmarks.bench_sequential``. Each
side is a process of its own, in its own environment; they run in turns with the same number of threads,
the same training rows, the same settings (width, depth, length, dropout, batch, learning rate, full
softmax) and the same lines that measure quality: NDCG@10 over the whole catalogue, seen items left out.
The clock stands still while quality is measured. Told are

* seconds per epoch (RecBole's extrapolated from some of its steps, see ``sequential_recbole``);
* seconds of training until the common quality: 95 % of the lowest of the sides' best NDCG@10 on the
  validation rows. Ours is also shown as it is shipped, where that is not the comparison's settings;
* seconds to evaluate all test users with the system's own code, warm;
* peak memory of the process;
* what limits our own step: its share of the machine's measured peak, and where its time goes.

Peers' results are kept in ``.bench-cache`` by version, settings, data, processor, threads and code.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from tests.benchmarks.sequential_measure import (
    Rows,
    cache_name,
    cpu_model,
    digest,
    environment,
    say,
)
from tests.benchmarks.sequential_report import OURS, SHIPPED, print_comparison

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = HERE / ".bench-cache"
PEERS = {"rectools": "rectools", "replay": "replay-rec", "recbole": "recbole"}  # side: package


@dataclass(frozen=True)
class Settings:
    """What all sides have in common."""

    hidden: int
    blocks: int
    heads: int
    dropout: float
    max_length: int
    batch_size: int
    learning_rate: float


@dataclass(frozen=True)
class DataSet:
    """One comparison. ``shipped``: the experiment has other settings, and gets a row of its own."""

    experiment: str
    settings: Settings
    epochs: int
    rounds: int
    peers: tuple[str, ...] = ("rectools", "replay")
    shipped: bool = False
    needs: str = ""  # the option that names the data, and the override that it becomes
    override: str = ""


DATA = {
    "movielens_100k": DataSet(
        "sasrec/movielens_100k", Settings(64, 2, 1, 0.2, 50, 128, 1e-3), epochs=60, rounds=2,
        peers=("rectools", "replay", "recbole"), shipped=True,
    ),
    "movielens_1m": DataSet(
        "sasrec/movielens_1m", Settings(64, 2, 1, 0.1, 200, 128, 1e-3), epochs=5, rounds=1,
        shipped=True, needs="ml1m_root", override="data.root",
    ),
    "beauty": DataSet(
        "sasrec/beauty", Settings(64, 2, 1, 0.6, 50, 512, 5e-4), epochs=5, rounds=1,
        shipped=True, needs="beauty_file", override="data.interactions",
    ),
}  # fmt: skip


# Running the sides -----------------------------------------------------------------------------------


def python_of(peer: str, folder: Path) -> Path:
    """The interpreter of a peer's environment."""
    return folder / peer / "bin" / "python"


@cache
def versions(peer: str, python: Path) -> dict[str, str]:
    """Of the peer and of torch in its environment, by side name and ``torch``."""
    code = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]))"
    words = [str(python), "-c", code, PEERS[peer], "torch"]
    found = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    return dict(zip((peer, "torch"), found, strict=True))


def run_side(words: list[str], job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Start a side, pass its progress on, and read its result.

    Raises:
        SystemExit: it failed; its last lines are shown.
    """
    asked, result, log = folder / "job.json", folder / "result.json", []
    asked.write_text(json.dumps(job))
    child = subprocess.Popen(
        [*words, str(asked), str(result)], cwd=folder, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=environment(job["threads"]) | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert child.stdout
    try:
        for line in child.stdout:
            log.append(line)
            if line.startswith("bench: "):
                sys.stderr.write(line)
                sys.stderr.flush()
        status = child.wait()
    finally:  # Ctrl-C: no side is left behind
        if child.poll() is None:
            child.terminate()
    if status:
        raise SystemExit(f"{job['name']} failed:\n" + "".join(log[-40:]))
    found: dict[str, Any] = json.loads(result.read_text())
    result.unlink()
    return found


def peer_result(
    peer: str, job: dict[str, Any], turn: int, arguments: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """Measured now, or read where the same was measured before."""
    python = python_of(peer, arguments.environments)
    script = HERE / f"sequential_{peer}.py"
    code = [file.read_text() for file in (script, HERE / "sequential_measure.py")]
    facts = {
        "peer": peer, "versions": versions(peer, python), "turn": turn, "cpu": cpu_model(),
        "code": code, **{k: v for k, v in job.items() if k not in ("rows", "name")},
    }  # fmt: skip
    file = CACHE / cache_name(peer, facts)
    if file.is_file() and not arguments.refresh:
        found: dict[str, Any] = json.loads(file.read_text())
        say(f"{job['name']}: measured before, {found['when']} (--refresh measures anew)")
        return {**found, "cached": True}
    found = run_side([str(python), str(script)], job, folder)
    CACHE.mkdir(exist_ok=True)
    file.write_text(json.dumps(found))
    return found


def compare(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All sides on one data set, in turns: side -> results of its turns, and the split's facts."""
    from tests.benchmarks.sequential_ours import export, fit_parts

    data, path = DATA[name], getattr(arguments, DATA[name].needs, None)
    overrides = [f"{data.override}={Path(path).expanduser().resolve()}"] if path else []
    say(f"{name}: {data.experiment}, {data.settings}")
    rows: Rows = export(fit_parts(data.experiment, overrides)[0])
    rounds = arguments.rounds or (1 if arguments.quick else data.rounds)
    epochs = arguments.epochs or (2 if arguments.quick else data.epochs)
    steps = arguments.steps or (10 if arguments.quick else 200)
    peers = [peer for peer in data.peers if peer in arguments.peers]
    results: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        file = folder / "rows.npz"
        np.savez(file, allow_pickle=False, **rows)
        job: dict[str, Any] = {
            "settings": asdict(data.settings), "epochs": epochs, "every": 1, "steps": steps,
            "threads": arguments.threads, "seed": 0, "data": digest(rows), "rows": str(file),
        }  # fmt: skip
        for turn in range(rounds):
            last = turn == rounds - 1
            mine: dict[str, Any] = {
                "experiment": data.experiment, "overrides": overrides, "name": f"{name} {OURS}",
                "profile": (5 if arguments.quick else 20) if last else 0,
            }  # fmt: skip
            words = [sys.executable, "-m", "tests.benchmarks.sequential_ours"]
            results.setdefault(OURS, []).append(run_side(words, job | mine, folder))
            for peer in peers:
                theirs = job | {"name": f"{name} {peer}"}
                found = peer_result(peer, theirs, turn, arguments, folder)
                results.setdefault(peer, []).append(found)
            if data.shipped:
                own_epochs = epochs if arguments.epochs or arguments.quick else None
                mine |= {"settings": None, "epochs": own_epochs, "name": f"{name} {SHIPPED}"}
                mine["profile"] = 0
                results.setdefault(SHIPPED, []).append(run_side(words, job | mine, folder))
    return {"data": name, "settings": asdict(data.settings), "epochs": epochs, "sides": results}


# Command line ----------------------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else "")
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--ml1m-root", help="folder with the SASRec papers' ml-1m.txt")
    parser.add_argument("--beauty-file", help="the S3-Rec authors' Beauty.txt or Beauty.txt.gz")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--epochs", type=int, help="of every side (default: by data set)")
    parser.add_argument("--rounds", type=int, help="turns of all sides (default: by data set)")
    parser.add_argument("--steps", type=int, help="of RecBole that are timed (default 200)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="does it run? figures mean nothing")
    parser.add_argument("--refresh", action="store_true", help="measure cached peers anew")
    parser.add_argument("--json", type=Path, help="also write everything that was measured")
    parser.add_argument(
        "--environments", type=Path, default=ROOT / ".venv-peers", help="made by make bench-peers"
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Compare on every data set that is there; the others are named with the reason."""
    arguments = parse(argv)
    missing = [p for p in arguments.peers if not python_of(p, arguments.environments).exists()]
    if missing:
        raise SystemExit(f"no environment of {', '.join(missing)}: run make bench-peers first.")
    console, found = Console(width=160), []
    for name in arguments.data:
        needs = DATA[name].needs
        if needs and getattr(arguments, needs) is None:
            console.print(f"{name} is left out: --{needs.replace('_', '-')} was not given")
            continue
        found.append(compare(name, arguments))
        print_comparison(console, found[-1])
        if arguments.json:
            machine = {"cpu": cpu_model(), "threads": arguments.threads}
            arguments.json.write_text(json.dumps({"machine": machine, "results": found}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
