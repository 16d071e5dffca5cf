"""Every trained model on two devices (gloo), SASRec on four: gradients and metrics are those of one."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments import config
from experiments.source_graph import REPO
from tests.lightning_modules.tiny_bert import write_tiny_bert
from tests.ranks import start_ranks

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


def _start(
    out: Path, root: Path, world: int, cache: Path, jobs: Sequence[list[str]]
) -> dict[str, dict[str, float]]:
    """Run the jobs in ``world`` processes and read what the first has written."""
    told = {
        "LLMREC_CACHE": str(cache),
        "PYTHONPATH": str(REPO),
        "TINY_BERT": str(out.with_name("bert")),
    }
    command = [sys.executable, str(SCRIPT), str(out), str(root), json.dumps(jobs)]
    start_ranks(world, command, out.parent, told)
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
