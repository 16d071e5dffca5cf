"""Preparing review files: speed and memory, ours against the usual pandas route, and of the parts.

``make bench-data`` writes synthetic files in Amazon's 2023 format (kept in ``--folder`` and used again),
then measures, each in a process of its own: raw files to prepared cache at full size; the same and
pandas (of ``make bench-peers``) in turns on a file that both can hold; filters on ten million
interactions; candidate drawing; opening a ready cache, alone and in two processes that share it.
Seconds are of the work, without imports; peak memory is of the whole process.

Legend: L lines, N interactions, U users, I items.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
PEER_PYTHON = ROOT / ".venv-peers" / "rectools" / "bin" / "python"
CATEGORY = "All_Beauty"
MINIMUM = 5
RELEASE_LINES = 571_540_000  # all categories of 2023
GiB = 2**30


def peak_memory() -> float:
    """GiB, the most this process has held."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count the process that started this one as well
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / GiB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GiB


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came out."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def data_module(folder: Path, cache: Path) -> Any:
    """What a user writes: one category, iterative 5-core, leave-one-out."""
    from datamodules.amazon import AmazonDataModule
    from datamodules.filters import KCore

    return AmazonDataModule(
        release=2023, category=CATEGORY, reviews="full", root=str(folder), cache=str(cache),
        filters=[KCore(MINIMUM, MINIMUM)],
    )  # fmt: skip


def run_prepare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Raw files to a prepared folder, in an empty cache."""
    data = data_module(arguments.folder, arguments.cache)
    seconds, prepared = timed(lambda: data.prepared)
    return {"seconds": seconds, "counts": prepared.manifest["counts"]}


def run_pandas(arguments: argparse.Namespace) -> dict[str, Any]:
    """The usual route: read_json, k-core by groupby, factorize, and the titles of what is left."""
    import pandas as pd

    def work() -> dict[str, int]:
        frame = pd.read_json(arguments.folder / f"{CATEGORY}.jsonl", lines=True)
        frame = frame[["user_id", "parent_asin", "rating", "timestamp"]].drop_duplicates()
        while True:
            users = frame.groupby("user_id")["user_id"].transform("size")
            items = frame.groupby("parent_asin")["parent_asin"].transform("size")
            kept = frame[(users >= MINIMUM) & (items >= MINIMUM)]
            if len(kept) == len(frame):
                break
            frame = kept
        frame = frame.assign(
            user=pd.factorize(frame["user_id"])[0], item=pd.factorize(frame["parent_asin"])[0]
        ).sort_values(["user", "timestamp"], kind="stable")
        meta = pd.read_json(arguments.folder / f"meta_{CATEGORY}.jsonl", lines=True)
        titles = meta[meta["parent_asin"].isin(set(frame["parent_asin"]))][["parent_asin", "title"]]
        assert len(titles) == frame["item"].nunique()
        return {
            "users": int(frame["user"].nunique()),
            "items": int(frame["item"].nunique()),
            "interactions": len(frame),
        }

    seconds, counts = timed(work)
    return {"seconds": seconds, "counts": counts}


def run_filters(arguments: argparse.Namespace) -> dict[str, Any]:
    """Filters on ``--events`` interactions, ids as categories and as strings: seconds by name."""
    import polars as pl
    from synthetic_reviews import draw_codes, item_names, user_names

    from datamodules.filters import Dedup, KCore, count

    size = arguments.events
    rng = np.random.default_rng(0)
    user = draw_codes(rng, size, max(1, size * 12 // 100), 0.6)
    item = draw_codes(rng, size, max(1, size * 3 // 100), 0.9)
    frame = pl.DataFrame(
        {
            "user_id": user_names(int(user.max()) + 1).gather(user),
            "item_id": item_names(int(item.max()) + 1).gather(item),
            "rating": rng.integers(1, 6, size).astype(np.float32),
            "timestamp": rng.integers(10**9, 17 * 10**8, size),
        }
    )
    coded = frame.with_columns(pl.col("user_id", "item_id").cast(pl.Categorical))
    found = {}
    for kind, each in (("categories", coded), ("strings", frame)):
        for name, work in (("k-core", KCore(5, 5)), ("dedup", Dedup()), ("count", count)):
            found[f"{name}, ids as {kind}"] = timed(lambda w=work, f=each: w(f))[0]
    return {"seconds": found}


def run_candidates(arguments: argparse.Namespace) -> dict[str, Any]:
    """100 negatives of 100,000 items for 200,000 users: seconds by way of drawing."""
    from datamodules.candidates import PopularityCandidates, UniformCandidates
    from datamodules.types import TEST, TRAIN, Histories

    users, items, length = 200_000, 100_000, 10
    rng = np.random.default_rng(0)
    bought = 1 + (items * rng.random(users * length) ** 3).astype(np.int32)
    split = np.tile(np.array([TRAIN] * (length - 1) + [TEST], np.int8), users)
    histories = Histories(
        offsets=np.concatenate([[0], np.arange(users + 1) * length]),
        items=bought, split=split, timestamps=np.arange(users * length), num_items=items,
    )  # fmt: skip
    rows = (histories, np.arange(1, users + 1), bought[split == TEST].astype(np.int64), TEST)
    ways = {"uniform": UniformCandidates(100), "popularity": PopularityCandidates(100)}
    return {"seconds": {name: timed(lambda w=way: w.draw(*rows))[0] for name, way in ways.items()}}


def memory_use() -> dict[str, float]:
    """GiB of this process: Rss counts shared pages in full, Pss divides them among their users."""
    rollup = Path("/proc/self/smaps_rollup")
    if not rollup.is_file():
        return {}
    pairs = (line.split() for line in rollup.read_text().splitlines()[1:])
    return {p[0][:-1]: int(p[1]) * 1024 / GiB for p in pairs if p[0] in ("Rss:", "Pss:")}


def run_open(arguments: argparse.Namespace) -> dict[str, Any]:
    """Open a ready cache, then read every history; wait for a line before the memory is looked at."""
    data = data_module(arguments.folder, arguments.cache)
    before = memory_use()
    opened, histories = timed(lambda: data.histories)
    arrays = [histories.offsets, histories.items, histories.split, histories.timestamps]
    arrays += [] if histories.ratings is None else [histories.ratings]
    read, _ = timed(lambda: [float(np.asarray(array).sum()) for array in arrays])
    print("ready", flush=True)
    sys.stdin.readline()
    grown = {name: value - before[name] for name, value in memory_use().items()}
    size = sum(array.nbytes for array in arrays) / GiB
    # The other process must not go away while this one looks.
    print(json.dumps({"opened": opened, "read": read, "grown": grown, "arrays": size}), flush=True)
    sys.stdin.readline()
    return {}


SIDES = {
    "prepare": run_prepare, "pandas": run_pandas, "filters": run_filters,
    "candidates": run_candidates, "open": run_open,
}  # fmt: skip


def start(side: str, arguments: argparse.Namespace, **more: Path) -> subprocess.Popen[str]:
    """One side as a process of its own."""
    python = str(arguments.peer_python) if side == "pandas" else sys.executable
    words = [python, __file__, "--side", side, "--events", str(arguments.events)]
    for name, value in more.items():
        words += [f"--{name}", str(value)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(words, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def finish(side: str, process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a side reports on its last line."""
    out, error = process.communicate()
    if process.returncode:
        raise SystemExit(f"{side} failed with status {process.returncode}:\n{error[-3000:]}")
    result: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return result


def prepare_once(side: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Ours in an empty cache, or pandas."""
    cache = arguments.folder / f"cache-{folder.name}"
    shutil.rmtree(cache, ignore_errors=True)
    return finish(side, start(side, arguments, folder=folder, cache=cache))


def open_together(arguments: argparse.Namespace, folder: Path, number: int) -> list[dict[str, Any]]:
    """So many processes that have the same cache open at the same time."""
    cache = arguments.folder / f"cache-{folder.name}"
    running = [start("open", arguments, folder=folder, cache=cache) for _ in range(number)]
    found: list[dict[str, Any]] = []
    for step in ("all have read", "all have looked"):
        lines = [each.stdout.readline() for each in running if each.stdout]
        if not all(lines):
            errors = [each.communicate()[1][-3000:] for each in running]
            raise SystemExit(f"opening the cache failed before {step}:\n" + "\n".join(errors))
        found = [] if step == "all have read" else [json.loads(line) for line in lines]
        for each in running:
            assert each.stdin
            each.stdin.write("\n")
            each.stdin.flush()
    for each in running:
        finish("open", each)
    return found


def row(what: str, seconds: float, lines: int | None = None, memory: float | None = None) -> str:
    """One line of the table."""
    rate = f"{lines / seconds:12,.0f}" if lines else f"{'':12}"
    peak = f"{memory:8.2f}" if memory is not None else f"{'':8}"
    return f"{what:<52}{seconds:9.2f} {rate} {peak}"


def compare(arguments: argparse.Namespace) -> list[str]:
    """Rows of ours and pandas in turns on the same file, and their ratio."""
    folder = files(arguments, arguments.pandas_lines)
    results: dict[str, list[dict[str, Any]]] = {"prepare": [], "pandas": []}
    for _ in range(arguments.rounds):
        for side, found in results.items():
            found.append(prepare_once(side, arguments, folder))
    ours, peer = ([r["counts"] for r in found] for found in results.values())
    same = {k: ours[0][k] for k in peer[0]} == peer[0]
    seconds = {side: median(r["seconds"] for r in found) for side, found in results.items()}
    memory = {side: max(r["peak"] for r in found) for side, found in results.items()}
    names = {"prepare": "ours", "pandas": "pandas"}
    table = [
        row(f"{names[s]}, {arguments.pandas_lines:,} lines, median of {arguments.rounds}",
            seconds[s], arguments.pandas_lines, memory[s])
        for s in results
    ]  # fmt: skip
    ratio, share = seconds["pandas"] / seconds["prepare"], memory["pandas"] / memory["prepare"]
    agree = "the same" if same else f"DIFFERENT: {ours[0]} and {peer[0]}"
    table.append(f"    pandas / ours: {ratio:.1f} in time, {share:.1f} in memory; counts: {agree}")
    return table


def files(arguments: argparse.Namespace, lines: int) -> Path:
    """The folder with synthetic files of that size, written on first use (by a process of its own)."""
    folder: Path = arguments.folder / f"lines-{lines}"
    code = "import sys, synthetic_reviews as s; from pathlib import Path; "
    code += "s.write_files(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))"
    words = [sys.executable, "-c", code, str(folder), CATEGORY, str(lines)]
    seconds, _ = timed(
        lambda: subprocess.run(words, cwd=Path(__file__).parent, check=True, text=True)
    )
    size = sum(file.stat().st_size for file in folder.iterdir()) / GiB
    print(f"{folder}: {lines:,} lines, {size:.2f} GiB with metadata ({seconds:.0f} s)", flush=True)
    return folder


def measure(arguments: argparse.Namespace) -> list[str]:
    """The table's rows."""
    folder = files(arguments, arguments.lines)
    whole = prepare_once("prepare", arguments, folder)
    hours = RELEASE_LINES / (arguments.lines / whole["seconds"]) / 3600
    title = f"raw to cache, {arguments.lines:,} lines"
    table = [row(title, whole["seconds"], arguments.lines, whole["peak"])]
    table.append(f"    {whole['counts']}; all of 2023 at that rate: {hours:.1f} hours")
    for number in (1, 2):
        found = open_together(arguments, folder, number)
        slowest = max(each["opened"] for each in found)
        table.append(row(f"open that cache, {number} at a time", slowest))
        grown = "; ".join(f"{k} +{v:.3f}" for k, v in found[0]["grown"].items())
        read, size = max(each["read"] for each in found), found[0]["arrays"]
        table.append(
            f"    {size:.3f} GiB of arrays read in {read:.2f} s; each process: {grown} GiB"
        )
    if not arguments.no_peer:
        table += compare(arguments)
    for side, what in (
        ("filters", f"{arguments.events:,} events"),
        ("candidates", "200,000 x 100"),
    ):
        result = finish(side, start(side, arguments))
        lines = arguments.events if side == "filters" else None
        table += [row(f"{what}: {name}", s, lines) for name, s in result["seconds"].items()]
    return table


def parse(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else "")
    scratch = Path(tempfile.gettempdir()) / "llmrec-bench-data"
    parser.add_argument("--folder", type=Path, default=scratch, help="scratch files, kept")
    parser.add_argument("--lines", type=int, default=5_000_000, help="reviews in the large file")
    parser.add_argument(
        "--pandas-lines", type=int, default=500_000, help="reviews in the small one"
    )
    parser.add_argument("--events", type=int, default=10_000_000, help="interactions to filter")
    parser.add_argument("--rounds", type=int, default=2, help="turns of ours and pandas")
    parser.add_argument("--peer-python", type=Path, default=PEER_PYTHON, help="one that has pandas")
    parser.add_argument("--no-peer", action="store_true", help="leave pandas out")
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Measure everything, or be one of the measured processes."""
    arguments = parse(argv)
    if arguments.side is not None:
        result = SIDES[arguments.side](arguments)
        print(json.dumps({**result, "peak": peak_memory()}))
        return
    asked = [str(arguments.peer_python), "-c", "import pandas"]
    if not arguments.no_peer and (
        not arguments.peer_python.exists() or subprocess.run(asked, check=False).returncode
    ):
        raise SystemExit(
            f"{arguments.peer_python} has no pandas: run make bench-peers first, name another with "
            "--peer-python, or leave it out with --no-peer."
        )
    table = measure(arguments)
    print(f"{'':<52}{'seconds':>9} {'lines/s':>12} {'peak GiB':>8}")
    print("\n".join(table))


if __name__ == "__main__":
    main(sys.argv[1:])
