"""Time and memory of one training step's loss and optimizer, for a small and a large catalogue.

``python -m tests.benchmarks.bench_losses``. Each line is a process of its own (peak memory is a process's):
forward, backward and optimizer step for 3,000 positions of width 64, the best of some repeats.

Legend: N positions, I items, d width, K negatives.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from lightning_modules import losses
from lightning_modules.losses import rows_used
from lightning_modules.optimizers import TableAdamW
from lightning_modules.scalable_softmax import scalable_softmax

N, D, K = 3000, 64, 256
SMALL, LARGE = 12_102, 1_000_000
# name, items, loss, optimizer
LINES = [
    ("plain cross-entropy, float32", SMALL, "plain", "adamw"),
    ("chunked, float32", SMALL, "ce", "adamw"),
    ("chunked, bfloat16 products", SMALL, "ce_bf16", "adamw"),
    ("scalable_ce", SMALL, "scalable", "adamw"),
    ("sampled_ce, 256 shared", SMALL, "sampled", "adamw"),
    ("chunked, float32", LARGE, "ce", "adamw"),
    ("scalable_ce", LARGE, "scalable", "adamw"),
    ("scalable_ce, row-wise Adagrad", LARGE, "scalable", "rowwise"),
    ("sampled_ce, 256 shared", LARGE, "sampled", "adamw"),
    ("sampled_ce, 256 shared, row-wise Adagrad", LARGE, "sampled", "rowwise"),
]


def _plain(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(states @ table[1:].T, targets - 1, reduction="sum")


def _sampled(sparse: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def loss(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        negatives = torch.randint(1, len(table), (K,))
        if sparse:
            table, targets, negatives, _ = rows_used(table, targets, negatives)
        return losses.sampled_softmax(states, table, targets, negatives, None)

    return loss


def measure(items: int, which: str, optimizer: str, repeats: int, threads: int) -> dict[str, float]:
    """Seconds of the best step and GiB of memory that steps added."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    rowwise = optimizer == "rowwise"
    functions: dict[str, Callable[..., Tensor]] = {
        "plain": _plain,
        "ce": losses.chunked_softmax,
        "ce_bf16": lambda *a: losses.chunked_softmax(*a, matmul_dtype=torch.bfloat16),
        "scalable": scalable_softmax,
        "sampled": _sampled(rowwise),
    }
    loss = functions[which]
    table = nn.Parameter(0.02 * torch.randn(items + 1, D))
    states, targets = torch.randn(N, D), torch.randint(1, items + 1, (N,))
    groups: list[dict[str, Any]] = [{"params": [table], "rowwise": rowwise}]
    steps = (TableAdamW if rowwise else AdamW)(groups, lr=1e-3, fused=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        loss(states.requires_grad_(), table, targets).backward()
        steps.step()
        steps.zero_grad(set_to_none=True)
        best = min(best, time.perf_counter() - started)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": best, "gib": (after - before) / 2**20}


def main(argv: list[str]) -> None:
    """Print the table, or measure one line for it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--line", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.line is not None:
        _, items, which, optimizer = LINES[arguments.line]
        found = measure(items, which, optimizer, arguments.repeats, arguments.threads)
        print(json.dumps(found))
        return
    table = Table(title=f"{N:,} positions, width {D}, {arguments.threads} threads")
    for column in ("items", "loss", "ms a step", "against the first", "memory added, GiB"):
        table.add_column(column, justify="left" if column == "loss" else "right")
    first: dict[int, float] = {}
    for number, (name, items, *_) in enumerate(LINES):
        command = [sys.executable, "-m", "tests.benchmarks.bench_losses", "--line", str(number)]
        command += ["--repeats", str(arguments.repeats), "--threads", str(arguments.threads)]
        print(f"{items:,} items: {name} ...", file=sys.stderr, flush=True)
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = json.loads(told.splitlines()[-1])
        base = first.setdefault(items, found["seconds"])
        table.add_row(
            f"{items:,}", name, f"{1000 * found['seconds']:,.0f}",
            f"{base / found['seconds']:.1f} x", f"{found['gib']:.2f}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
