"""Every trained model on two devices (gloo), SASRec on four: gradients and metrics are those of one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments import config
from experiments.source_graph import REPO
from tests.lightning_modules.tiny_bert import write_tiny_bert

SCRIPT = Path(__file__).with_name("fit_models.py")
# CTRL's first stage contrasts the rows of a batch, and refuses two devices.
NAMES = [
    name
    for name in config.names()
    if name.endswith("movielens_100k")
    and not name.startswith("ctrl/")
    and any(s["run"] == "fit" for s in config.load(name).stages.values())
]
MODULE = "++stages.train.module"
SPARSE = [f"{MODULE}.table_optimizer=rowwise_adagrad", f"{MODULE}.negatives=5"]
JOBS = [
    *([name] for name in NAMES),
    ["sasrec/movielens_100k", f"{MODULE}.loss=bce", *SPARSE],
    ["sasrec/movielens_100k", f"{MODULE}.loss=sampled_ce", f"{MODULE}.shared_negatives=true", *SPARSE],
    ["sasrec/movielens_100k", f"{MODULE}.tied=false", f"{MODULE}.table_optimizer=rowwise_adagrad"],
]  # fmt: skip
ON_FOUR = [job for job in JOBS if job[0] == "sasrec/movielens_100k"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _start(
    out: Path, root: Path, world: int, cache: Path, jobs: Sequence[list[str]]
) -> dict[str, dict[str, float]]:
    """Run the jobs in ``world`` processes and read what the first has written."""
    port = str(free_port())
    running = []
    for rank in range(world):
        environment = {**os.environ, "LLMREC_CACHE": str(cache), "PYTHONPATH": str(REPO)}
        environment["TINY_BERT"] = str(out.with_name("bert"))
        if world > 1:
            environment |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test",
            }  # fmt: skip
        command = [sys.executable, str(SCRIPT), str(out), str(root), json.dumps(jobs)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        running.append(
            subprocess.Popen(command, env=environment, cwd=out.parent, text=True, **pipes)
        )
    told = [process.communicate(timeout=900)[0] for process in running]
    assert all(process.returncode == 0 for process in running), "\n".join(t[-3000:] for t in told)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.fixture(scope="module")
def logged(tiny_movielens: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """What one process, two and four have found, by job."""
    folder = tmp_path_factory.mktemp("devices")
    write_tiny_bert(folder / "bert", dropout=0.0)
    jobs = {1: JOBS, 2: JOBS, 4: ON_FOUR}
    return {
        world: _start(folder / f"{world}.json", tiny_movielens, world, folder / "cache", own)
        for world, own in jobs.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "job"), [*((2, job) for job in JOBS), *((4, job) for job in ON_FOUR)],
    ids=lambda each: each if isinstance(each, int) else " ".join(each),
)  # fmt: skip
def test_several_devices_find_what_one_finds(
    logged: dict[int, Any], world: int, job: list[str]
) -> None:
    one, several = (logged[n][" ".join(job)] for n in (1, world))
    assert one.keys() == several.keys()
    assert {"train/loss", "val/all/ndcg@10"} <= one.keys()
    assert any(abs(v) > 1e-4 for name, v in one.items() if name.startswith("gradient norm/"))
    for name, value in one.items():
        assert several[name] == pytest.approx(value, rel=1e-6, abs=1e-6, nan_ok=True), name
