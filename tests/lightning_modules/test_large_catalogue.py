"""Memory of a full ranking: bounded for a huge catalogue, and nothing is kept for each user.

Legend: U users, I items.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "bench_evaluation.py"
LINUX = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")


def measured(*options: str) -> dict[str, Any]:
    """The benchmark's figures: loaders, SASRec, metrics and scores file, in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--json", "--threads", "1", *options],
        capture_output=True, text=True, check=False,
        # Without the C library's habit of keeping what was freed, which would count as growth.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


@pytest.mark.slow
@LINUX
def test_a_million_items_fit_into_a_fraction_of_four_gigabytes() -> None:
    found = measured("--users", "200000", "--items", "1000000", "--batches", "2")
    # 244 MiB of item table; all scores of one batch at once would be another 1,000.
    for name in ("validate", "test"):
        assert found[name]["batches"] == 2
        assert found[name]["peak_mib"] < 1500


@pytest.mark.slow
@LINUX
def test_the_second_half_of_the_users_needs_no_more_memory_than_the_first() -> None:
    users, items = 40_000, 2_000
    options = ["--full", "--users", str(users), "--items", str(items), "--batch-size", "512",
               "--events", "10"]  # fmt: skip
    # What is kept is kept each time; on a busy machine the writer's queue may be longer once.
    runs = [measured(*options)]
    if any(runs[0][name]["grown_mib"] >= 20 for name in ("validate", "test")):
        runs.append(measured(*options))
    for name in ("validate", "test"):
        assert runs[0][name]["batches"] == -(-users // 512)
        # Kept scores would be 150 MiB here, kept lists of the best 100 items at least 23.
        assert min(run[name]["grown_mib"] for run in runs) < 20, (name, runs)
