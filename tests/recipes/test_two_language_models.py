"""Language models on two devices (gloo): what one device computes, for the same global batches."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars
import pytest
import torch

from experiments.errors import UserError
from experiments.source_graph import REPO
from experiments.trainers import make_trainer
from lightning_modules.llm.specs import AdapterSpec, BackboneSpec
from lightning_modules.stage_module import StageModule
from lightning_modules.tallrec.listwise import ListwiseModule
from lightning_modules.tallrec.module import TALLRecModule
from tests.lightning_modules.tiny_llm import write_tiny_llm
from tests.ranks import start_ranks
from tests.recipes.fit_language_models import fit
from tests.recipes.test_instruction_stage import write_instructions

SCRIPT = Path(__file__).with_name("fit_language_models.py")
# name -> (stage, strategy, overrides)
JOBS: dict[str, tuple[str, str, list[str]]] = {
    "ddp nf4": ("train", "ddp", ["++llm.quantization=nf4", "++llm.dtype=float32"]),
    "fsdp": ("train", "fsdp", ["++llm.dtype=float32"]),
    "fsdp bfloat16": ("train", "fsdp", ["++llm.dtype=bfloat16"]),
    "fsdp packed instructions recomputed": (
        "alpaca", "fsdp",
        ["++llm.dtype=float32", "launch.activation_checkpointing=true",
         "++stages.alpaca.module.packing=true"],
    ),
}  # fmt: skip
SHARDED = [name for name, (_, strategy, _) in JOBS.items() if strategy == "fsdp"]


def _words(root: Path, movielens: Path) -> list[str]:
    """A validation of 7 rows leaves ranks with unequal numbers of batches; gradients' norms are above 1."""
    llm = write_tiny_llm(root / "llm", longest=1024)
    return [
        f"data.root={movielens}", "data.expected=null", "data.examples.count=8",
        "data.examples.valid=7", f"++llm.source={llm}", "++llm.max_length=1024",
        "launch.threads=1", "launch.accelerator=cpu", "launch.micro_batch_size=2",
        "++stages.train.module.adapter.dropout=0.0", "stages.train.batch_size=6",
        "++stages.train.trainer.max_epochs=2", "stages.train.module.warmup_steps=0",
        "++stages.train.trainer.gradient_clip_val=1.0",
    ]  # fmt: skip


def _fit_on_two(folder: Path, jobs: dict[str, Any]) -> Any:
    """Run the jobs in two processes and read what the first has written."""
    out = folder / "two.pt"
    command = [sys.executable, str(SCRIPT), str(out), json.dumps(jobs)]
    start_ranks(2, command, folder, {"PYTHONPATH": str(REPO)}, seconds=300)
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def fitted(
    tiny_movielens: Path, data_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Any]:
    """What one process and two have computed, by job, and their checkpoints of the job ``fsdp``."""
    folder = tmp_path_factory.mktemp("devices")
    words = _words(folder, tiny_movielens)
    words += [
        f"instructions={write_instructions(folder / 'rows.jsonl')}", "stages.alpaca.batch_size=8",
        "stages.alpaca.trainer.max_epochs=1", "stages.alpaca.module.warmup_steps=0",
    ]  # fmt: skip
    jobs: dict[str, Any] = {
        name: {"stage": stage, "strategy": strategy, "overrides": [*words, *more]}
        for name, (stage, strategy, more) in JOBS.items()
    }
    jobs["fsdp"]["save"] = str(folder / "{world}.ckpt")
    # Each goes on from what the other has left: a checkpoint knows no number of devices.
    longer = [*words, "++llm.dtype=float32", "++stages.train.trainer.max_epochs=3"]
    resumed = {"stage": "train", "strategy": "fsdp", "overrides": longer}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMREC_CACHE", str(data_cache))
        one = {name: fit(folder, job, 1) for name, job in jobs.items()}
        from_one = {**resumed, "resume": str(folder / "1.ckpt")}
        two = _fit_on_two(folder, {**jobs, "resumed": from_one})
        one["resumed"] = fit(folder, {**resumed, "resume": str(folder / "2.ckpt")}, 1)
    return [one, two, *(torch.load(folder / f"{n}.ckpt", weights_only=True) for n in (1, 2))]


def _apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.slow
@pytest.mark.parametrize("name", [*JOBS, "resumed"])
def test_two_devices_compute_what_one_computes(fitted: list[Any], name: str) -> None:
    """The same sums in another order: float32 keeps 2^-24 of each term, bfloat16 2^-9.

    Adam divides by the root of squares, so that small gradients, and their errors, count as much as large
    ones: later gradients are further apart than the first. Measured for the first gradients, all gradients
    and what is logged: 1e-6, 2e-6 and 5e-7 in float32, 0.027, 0.016 and 0.005 in bfloat16, whose products
    round otherwise for other numbers of rows. The bounds leave a factor of three or more.
    """
    one, two = (run[name] for run in fitted[:2])
    half = "bfloat16" in name
    first, later, told = (0.1, 0.1, 0.05) if half else (1e-5, 1e-4, 1e-5)
    gradients = list(zip(two["gradients"], one["gradients"], strict=True))
    assert len(gradients) > 1
    assert _apart(*gradients[0]) < first
    assert max(_apart(*pair) for pair in gradients) < later
    assert one["logged"].keys() == two["logged"].keys() >= {"train/loss"}
    for metric, value in one["logged"].items():
        if "auc" not in metric or not half:  # a near tie of bfloat16 scores may turn round
            assert two["logged"][metric] == pytest.approx(value, rel=told, nan_ok=True), metric


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDED)
def test_a_device_holds_its_part_and_a_checkpoint_the_whole(fitted: list[Any], name: str) -> None:
    one, two = (run[name] for run in fitted[:2])
    assert two["held"] == pytest.approx(one["held"] / 2, rel=0.01)
    assert one["weights"].keys() == two["weights"].keys()
    for weight, value in one["weights"].items():
        assert two["weights"][weight].shape == value.shape


@pytest.mark.slow
def test_a_checkpoint_knows_no_number_of_devices(fitted: list[Any]) -> None:
    one, two, first, second = fitted
    assert first["state_dict"].keys() == second["state_dict"].keys()
    assert all("lora_" in n for n in second["state_dict"])
    states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (first, second)]
    assert states[0].keys() == states[1].keys()
    for key, state in states[0].items():
        assert {n: v.shape for n, v in state.items()} == {
            n: v.shape for n, v in states[1][key].items()
        }
    # Two epochs of two steps were done: the resumed fits do the third alone.
    for run in (one, two):
        assert len(run["resumed"]["gradients"]) == len(run["fsdp"]["gradients"]) // 2


@pytest.mark.slow
def test_the_command_starts_two_processes(
    finish: Callable[..., Any], tiny_movielens: Path, tmp_path: Path
) -> None:
    run = finish("tallrec/movie_64shot", [
        *_words(tmp_path, tiny_movielens), "++llm.dtype=float32", "~stages.reference",
        "~stages.evaluate", "++stages.train.trainer.max_epochs=1",
        "launch.devices=2", "launch.strategy=fsdp",
    ])  # fmt: skip
    assert run.json("train", "done.json")["devices"] == 2
    best = torch.load(run.folder("train") / "best.ckpt", weights_only=True)
    assert best["state_dict"]
    assert all("lora_" in name for name in best["state_dict"])


@pytest.mark.parametrize(
    ("kind", "strategy", "mode", "told"),
    [
        (TALLRecModule, "fsdp", "nf4", "fsdp shards weights"),
        (ListwiseModule, "fsdp", None, "ListwiseModule writes texts"),
        (StageModule, "fsdp", None, "StageModule has no large weights to spread over devices"),
    ],
)
def test_what_cannot_be_spread_is_told(
    tmp_path: Path, kind: Any, strategy: str, mode: Any, told: str
) -> None:
    module: Any = kind() if kind is StageModule else kind(
        llm=BackboneSpec(str(tmp_path), dtype="float32", quantization=mode),
        adapter=AdapterSpec(), catalog=polars.DataFrame({"title": ["A"], "brand": ["B"]}),
    )  # fmt: skip
    launch = {"strategy": strategy, "devices": 2, "num_nodes": 1, "accelerator": "cpu"}
    job = {"spec": {"trainer": {}, "run": "test"}, "launch": launch}
    data: Any = SimpleNamespace()
    with pytest.raises(UserError, match=told):
        make_trainer(tmp_path, job, data, module, [])
