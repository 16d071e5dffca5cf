"""Requests a second and latencies of ``make serve``, with batching and without.

``python -m tests.benchmarks.bench_serve NAME [key=value ...] [--requests N] [--concurrency 1,32,200]``, of a
finished experiment (LLMREC_RUNS as for ``make exp``). The real command is started on a free port, once as it
is and once with ``LIMITS=batch=1``, where every request is a call of the model. Each of so many clients keeps
one connection and asks for the ten best of a user of the test, one request after the other. Clients are
coroutines of this process on sockets of their own: what they take of the processor is taken from the service,
and is the same on both sides. The first requests of each connection count; a warm-up with all clients goes
before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import numpy as np
import polars as pl
from rich.console import Console
from rich.table import Table

from experiments import config
from experiments.recommend import chosen

SIDES = {"batches": "", "one by one": "batch=1"}


def users(experiment: config.Experiment) -> list[str]:
    """Raw ids of the users that were tested."""
    folder = chosen(experiment).folder
    assert folder is not None
    (scores,) = folder.glob("scores.*.parquet")
    column = pl.scan_parquet(scores).select(
        pl.col("user_id").cast(pl.String).unique(maintain_order=True)
    )
    return column.collect()["user_id"].to_list()  # type: ignore[no-any-return]


@contextmanager
def service(experiment: config.Experiment, limits: str) -> Iterator[int]:
    """The port of a service that is ready; its end must be clean."""
    with tempfile.NamedTemporaryFile() as screen:
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments.serve", experiment.name, *experiment.overrides],
            env={**os.environ, "PORT": "0", "LIMITS": limits}, stderr=screen,
        )  # fmt: skip
        try:
            yield _ready(process, Path(screen.name))
        finally:
            process.terminate()
            if status := process.wait(60):
                raise SystemExit(f"it ended with {status}:\n{Path(screen.name).read_text()}")


def _ready(process: subprocess.Popen[bytes], screen: Path) -> int:
    while process.poll() is None:
        text = screen.read_text()
        if "ready" in text:
            return int(re.findall(r"http://127\.0\.0\.1:(\d+)", text)[0])
        time.sleep(0.1)
    raise SystemExit(screen.read_text())


async def ask(port: int, who: list[str], requests: int, clients: int) -> tuple[float, np.ndarray]:
    """Seconds of all, and of each, (requests,)."""
    numbers, took = count(), np.zeros(requests)

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (n := next(numbers)) < requests:
            body = json.dumps({"user": who[n % len(who)]}).encode()
            head = (
                f"POST /recommend HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n\r\n"
            )
            start = time.perf_counter()
            writer.write(head.encode() + body)
            told = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(re.findall(rb"content-length: (\d+)", told)[0]))
            took[n] = time.perf_counter() - start
            if not told.startswith(b"HTTP/1.1 200"):
                raise SystemExit(told.decode())
        writer.close()

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - start, took


def calls(port: int) -> tuple[float, float]:
    """Asks and calls of the model so far."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as told:
        text = told.read().decode()
    return tuple(  # type: ignore[return-value]
        float(re.findall(rf"llmrec_batch_size_{what} (\S+)", text)[0]) for what in ("sum", "count")
    )


def main() -> None:
    """Measure both sides, and print their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("name", help="a finished experiment")
    parser.add_argument("overrides", nargs="*", help="those that it was run with")
    parser.add_argument("--requests", type=int, default=1000, help="of each concurrency above 1")
    parser.add_argument("--concurrency", default="1,32,200")
    arguments = parser.parse_args()
    experiment = config.load(config.full_name(arguments.name), arguments.overrides)
    who = users(experiment)
    table = Table(title=f"{experiment.name}: ten items for one of {len(who)} users a request")
    for column in (
        "model asked in",
        "clients",
        "requests/s",
        "p50 ms",
        "p95 ms",
        "p99 ms",
        "asks a call",
    ):
        table.add_column(column, justify="left" if column == "model asked in" else "right")
    rates: dict[int, list[float]] = {}
    for side, limits in SIDES.items():
        with service(experiment, limits) as port:
            for clients in map(int, arguments.concurrency.split(",")):
                requests = arguments.requests if clients > 1 else max(1, arguments.requests // 5)
                asyncio.run(ask(port, who, min(requests, 2 * clients), clients))
                before = calls(port)
                seconds, took = asyncio.run(ask(port, who, requests, clients))
                asks, made = (b - a for a, b in zip(before, calls(port), strict=True))
                rates.setdefault(clients, []).append(requests / seconds)
                spread = (f"{1000 * q:.0f}" for q in np.quantile(took, [0.5, 0.95, 0.99]))
                rate = f"{requests / seconds:.0f}"
                table.add_row(side, str(clients), rate, *spread, f"{asks / made:.1f}")
    console = Console(width=110)
    console.print(table)
    for clients, (batched, alone) in rates.items():
        console.print(f"{clients} clients: batches answer {batched / alone:.1f} times as many")


if __name__ == "__main__":
    main()
