"""Language models on two devices (gloo): what one device computes, for the same global batches."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from experiments.source_graph import REPO
from tests.lightning_modules.tiny_llm import write_tiny_llm
from tests.recipes.test_instruction_stage import write_instructions
from tests.recipes.test_two_devices import free_port

SCRIPT = Path(__file__).with_name("fit_language_models.py")
# name -> (stage, strategy, overrides); a validation of 7 rows leaves ranks with unequal batches.
JOBS: dict[str, tuple[str, str, list[str]]] = {
    "ddp nf4": ("train", "ddp", ["++llm.quantization=nf4", "++llm.dtype=float32"]),
    "ddp nf4-dq instructions": (
        "alpaca", "ddp", ["++llm.quantization=nf4-dq", "++llm.dtype=float32"],
    ),
    "fsdp": ("train", "fsdp", ["++llm.dtype=float32"]),
    "fsdp instructions": ("alpaca", "fsdp", ["++llm.dtype=float32"]),
    "fsdp bfloat16": ("train", "fsdp", ["++llm.dtype=bfloat16"]),
    "fsdp recomputed": (
        "alpaca", "fsdp", ["++llm.dtype=float32", "launch.activation_checkpointing=true"],
    ),
}  # fmt: skip
SHARDED = [name for name, (_, strategy, _) in JOBS.items() if strategy == "fsdp"]


def _words(root: Path, movielens: Path) -> list[str]:
    llm = write_tiny_llm(root / "llm", longest=1024)
    return [
        f"data.root={movielens}", "data.expected=null", "data.examples.count=8",
        "data.examples.valid=7", f"++llm.source={llm}", "++llm.max_length=1024",
        "launch.threads=1", "launch.accelerator=cpu", "launch.micro_batch_size=2",
        "++stages.train.module.adapter.dropout=0.0", "stages.train.batch_size=6",
        "++stages.train.trainer.max_epochs=2",
    ]  # fmt: skip


def _start(out: Path, jobs: dict[str, Any], world: int, cache: Path) -> Any:
    """Run the jobs in ``world`` processes and read what the first has written."""
    port, running = str(free_port()), []
    for rank in range(world):
        environment = {**os.environ, "LLMREC_CACHE": str(cache), "PYTHONPATH": str(REPO)}
        if world > 1:
            environment |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test",
            }  # fmt: skip
        running.append(subprocess.Popen(
            [sys.executable, str(SCRIPT), str(out), json.dumps(jobs)], env=environment,
            cwd=out.parent, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ))  # fmt: skip
    try:
        told = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert all(process.returncode == 0 for process in running), "\n".join(t[-3000:] for t in told)
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def fitted(tiny_movielens: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What one process and two have computed, by job, and their checkpoints of the job ``fsdp``."""
    folder = tmp_path_factory.mktemp("devices")
    words = _words(folder, tiny_movielens)
    words += [
        f"instructions={write_instructions(folder / 'rows.jsonl')}",
        "stages.alpaca.batch_size=8", "stages.alpaca.trainer.max_epochs=1",
        "stages.alpaca.module.warmup_steps=0", "stages.train.module.warmup_steps=0",
    ]  # fmt: skip
    jobs: dict[str, Any] = {
        name: {"stage": stage, "strategy": strategy, "overrides": [*words, *more]}
        for name, (stage, strategy, more) in JOBS.items()
    }
    jobs["fsdp"]["save"] = [str(folder / "{world}.ckpt")]
    one = _start(folder / "one.pt", jobs, 1, folder / "cache")
    # Each goes on from what the other has left: a checkpoint knows no number of devices.
    longer = [*words, "++llm.dtype=float32", "++stages.train.trainer.max_epochs=3"]
    resumed = {"stage": "train", "strategy": "fsdp", "overrides": longer}
    jobs["from one"] = {**resumed, "resume": str(folder / "1.ckpt")}
    two = _start(folder / "two.pt", jobs, 2, folder / "cache")
    back = {"from two": {**resumed, "resume": str(folder / "2.ckpt")}}
    one |= _start(folder / "back.pt", back, 1, folder / "cache")
    return [one, two, torch.load(folder / "1.ckpt", weights_only=True),
            torch.load(folder / "2.ckpt", weights_only=True)]  # fmt: skip


def _apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_two_devices_compute_what_one_computes(fitted: list[Any], name: str) -> None:
    """The same sums in another order: float32 keeps 2^-24 of each term, bfloat16 2^-9.

    Adam divides by the root of squares, so that small gradients, and their errors, count as much as large
    ones: later gradients are further apart than the first.
    """
    one, two = (run[name] for run in fitted[:2])
    half = "bfloat16" in name
    assert len(one["gradients"]) == len(two["gradients"]) > 1
    first = _apart(two["gradients"][0], one["gradients"][0])
    later = max(map(_apart, two["gradients"], one["gradients"]))
    assert first < (0.02 if half else 1e-5)
    assert later < (0.2 if half else 1e-3)
    assert one["logged"].keys() == two["logged"].keys() >= {"train/loss"}
    for metric, value in one["logged"].items():
        bound = {"rel": 0.05} if half else {"rel": 1e-4}
        if "auc" not in metric or not half:  # a near tie of bfloat16 scores may turn round
            assert two["logged"][metric] == pytest.approx(value, **bound, nan_ok=True), metric


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_a_device_holds_its_part_and_a_checkpoint_the_whole(fitted: list[Any], name: str) -> None:
    one, two = (run[name] for run in fitted[:2])
    assert two["parts"] == pytest.approx(one["parts"] / 2, rel=0.01)
    assert one["weights"].keys() == two["weights"].keys()
    for weight, value in one["weights"].items():
        assert two["weights"][weight].shape == value.shape


@pytest.mark.slow
def test_a_checkpoint_knows_no_number_of_devices(fitted: list[Any]) -> None:
    one, two, first, second = fitted
    assert first["state_dict"].keys() == second["state_dict"].keys()
    assert all("lora_" in n for n in second["state_dict"])
    assert (
        first["optimizer_states"][0]["state"].keys()
        == second["optimizer_states"][0]["state"].keys()
    )
    found, expected = two["from one"], one["from two"]
    assert len(found["gradients"]) == len(expected["gradients"]) > 0
    for pair in zip(found["gradients"], expected["gradients"], strict=True):
        assert _apart(*pair) < 1e-3
    for name, weight in expected["weights"].items():
        assert _apart(found["weights"][name], weight) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "mode"), [("ddp", "nf4"), ("fsdp", "null")])
def test_the_command_trains_on_two_devices_and_one_scores_the_result(
    finish: Callable[..., Any], tiny_movielens: Path, tmp_path: Path, strategy: str, mode: str
) -> None:
    words = [*_words(tmp_path, tiny_movielens), f"++llm.quantization={mode}", "++llm.dtype=float32",
             "~stages.reference"]  # fmt: skip
    pair = ["launch.devices=2", f"launch.strategy={strategy}"]
    run = finish("tallrec/movie_64shot", [*words, *pair])
    assert run.json("train", "done.json")["devices"] == 2
    folder = run.folder("evaluate")
    two = pl.read_parquet(next(folder.glob("scores.*.parquet")))
    assert two["row"].n_unique() == two.height
    shutil.rmtree(folder)
    run = finish("tallrec/movie_64shot", words, run.runs)
    one = pl.read_parquet(next(run.folder("evaluate").glob("scores.*.parquet")))
    assert one["row"].to_list() == two["row"].to_list()
    assert one["score"].to_list() == pytest.approx(two["score"].to_list(), abs=1e-4)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["launch.strategy=fsdp", "++llm.quantization=nf4"], "fsdp shards weights"),
        (["launch.strategy=fsdp_cpu_offload"], "launch.strategy=fsdp_cpu_offload is not known"),
        (["+stages.train.module.optimizer=paged_adamw_8bit"], "take optimizer: adamw"),
    ],
)
def test_what_a_device_or_a_strategy_cannot_do_is_told(
    run_command: Callable[..., Any], tiny_movielens: Path, tmp_path: Path,
    overrides: list[str], told: str,
) -> None:  # fmt: skip
    words = [*_words(tmp_path, tiny_movielens), "++llm.dtype=float32", "~stages.reference"]
    done = run_command("exp", "tallrec/movie_64shot", *words, *overrides, runs=tmp_path / "runs")
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_small_models_are_not_spread(
    run_command: Callable[..., Any], tiny: list[str], tmp_path: Path
) -> None:
    words = [*tiny, "launch.strategy=fsdp", "launch.devices=2"]
    done = run_command("exp", "sasrec/movielens_100k", *words, runs=tmp_path)
    assert done.returncode == 2
    assert "SASRecModule has no large weights to spread over devices" in done.stderr
