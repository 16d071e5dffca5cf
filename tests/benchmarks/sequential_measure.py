"""What all sides of the sequential benchmark share, so that each is measured by the very same lines.

It is read by our environment and by those of the peers: numpy alone, and torch where a function says so.

Legend: R held-out rows, N events, I items.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

K = 10
EVAL_BATCH = 256  # rows that every side evaluates at a time
SHARE = 0.95  # of the lowest best: no side's luckiest epoch decides what the common quality is
Trace = Sequence[tuple[int, float, float]]  # epoch, seconds of training so far, NDCG@10
Rows = dict[str, np.ndarray]


def say(text: str) -> None:
    """A line of progress: the driver passes on what begins like this, and logs the rest."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


# Quality ---------------------------------------------------------------------------------------------


def ndcg_at_10(top: np.ndarray, target: np.ndarray) -> float:
    """Mean of 1 / log2(place + 1) over rows: ``top`` (R, 10) items, best first; ``target`` (R,)."""
    place = (top == target[:, None]) @ np.arange(1, K + 1)  # (R,) 0 where the target is not there
    return float(np.where(place > 0, 1 / np.log2(place.clip(1) + 1), 0).mean())


def common_quality(traces: Sequence[Trace]) -> float:
    """An NDCG@10 that every side reached: ``SHARE`` of the lowest of their best ones."""
    return SHARE * min(max(ndcg for _, _, ndcg in trace) for trace in traces)


def seconds_to(trace: Trace, quality: float) -> float | None:
    """Seconds of training when ``quality`` was first measured; None where it never was."""
    return next((seconds for _, seconds, ndcg in trace if ndcg >= quality), None)


# Time and memory -------------------------------------------------------------------------------------


class Clock:
    """Seconds of training; it stands still while quality is measured.

    Args:
        measure: NDCG@10 on the validation rows.
        every: epochs between measurements.
        name: of the side, for the progress lines.
    """

    def __init__(self, measure: Callable[[], float], every: int, name: str) -> None:
        self.measure, self.every, self.name = measure, every, name
        self.started = time.perf_counter()
        self.paused = 0.0
        self.setup = 0.0  # seconds before the first epoch began: building, loading
        self.ends: list[float] = []  # seconds at the end of each epoch
        self.trace: list[tuple[int, float, float]] = []

    def seconds(self) -> float:
        """Training time so far."""
        return time.perf_counter() - self.started - self.paused

    def begins(self) -> None:
        """The first epoch starts."""
        self.setup = self.seconds()

    def epoch_ends(self) -> None:
        """Note the time, and measure where it is due."""
        now = time.perf_counter()
        self.ends.append(self.seconds())
        epoch = len(self.ends)
        if epoch % self.every == 0:
            self.trace.append((epoch, self.ends[-1], self.measure()))
            say(
                f"{self.name}: epoch {epoch}, {self.ends[-1]:.1f} s, "
                f"NDCG@10 {self.trace[-1][2]:.4f} on validation"
            )
        self.paused += time.perf_counter() - now

    def report(self) -> dict[str, Any]:
        """Plain values for the driver."""
        epochs = np.diff([self.setup, *self.ends]).tolist()
        return {"setup": self.setup, "epoch_seconds": epochs, "trace": self.trace}


def watcher(base: type[Any], clock: Clock) -> Any:
    """A Lightning callback, of whichever Lightning ``base`` is from, that runs ``clock``."""

    class Watch(base):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 0:
                clock.begins()

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            clock.epoch_ends()
            module.train()

    return Watch()


def timed(work: Callable[[], Any], times: int = 3) -> tuple[float, Any]:
    """Median seconds of ``work`` after one call that warms it up, and what it returned last."""
    result = work()
    found = []
    for _ in range(times):
        began = time.perf_counter()
        result = work()
        found.append(time.perf_counter() - began)
    return median(found), result


def peak_memory() -> float:
    """GiB, the most this process has held."""
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss would count the process that started this one as well
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def matmul_speed(size: int = 2048, times: int = 7) -> float:
    """GFLOP/s of ``torch.mm`` on float32 squares, the best of some: the machine's practical peak."""
    import torch

    a, b = torch.rand(size, size), torch.rand(size, size)
    torch.mm(a, b)
    best = min(_once(lambda: torch.mm(a, b)) for _ in range(times))
    return 2 * size**3 / best / 1e9


def copy_speed(size: int = 2**26, times: int = 7) -> float:
    """GB/s read and written by copying float32 values that no cache holds, the best of some."""
    import torch

    a, b = torch.zeros(size), torch.ones(size)
    best = min(_once(lambda: a.copy_(b)) for _ in range(times))
    return 2 * 4 * size / best / 1e9


def _once(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# Data ------------------------------------------------------------------------------------------------


def digest(rows: Mapping[str, np.ndarray]) -> str:
    """Hash of the exported split's content, whatever the order of its arrays."""
    found = hashlib.sha256()
    for name in sorted(rows):
        array = np.ascontiguousarray(rows[name])
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()[:16]


def histories(rows: Rows, chosen: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Users who have an event in ``chosen`` (N,) bool, ascending, and their items in time order."""
    user, item, order = (rows[name][chosen] for name in ("user", "item", "order"))
    place = np.lexsort((order, user))
    users, first = np.unique(user[place], return_index=True)
    return users, np.split(item[place], first[1:])


# Sides -----------------------------------------------------------------------------------------------


def cache_name(peer: str, facts: Mapping[str, Any]) -> str:
    """File name of a peer's result: its version to be read, a hash of everything that decides it."""
    text = json.dumps(facts, sort_keys=True)
    version = facts["versions"][peer]
    return f"{peer}-{version}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"


def cpu_model() -> str:
    """The processor's name, as far as the system tells it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def run_side(train: Callable[[dict[str, Any], Rows], dict[str, Any]]) -> None:
    """The main function of a side: read the job, do it, write what was found.

    The machine's matmul speed at this very time stands beside each result: two results of one machine
    compare only if it was equally free.
    """
    import torch

    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    parser.add_argument("result", type=Path)
    arguments = parser.parse_args()
    sys.argv = sys.argv[:1]  # RecBole reads the command line, too
    job = json.loads(arguments.job.read_text())
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    np.random.seed(job["seed"])
    speed = matmul_speed()
    result = train(job, dict(np.load(job["rows"])))
    result = {"gflops": speed, "peak": peak_memory(), "when": time.strftime("%F %H:%M"), **result}
    arguments.result.write_text(json.dumps(result))


def environment(threads: int) -> dict[str, str]:
    """Of every side alike."""
    found = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"}
    found.setdefault("GOMP_SPINCOUNT", "1000")  # as experiments/run.py
    return found
