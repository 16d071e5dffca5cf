"""Which optimizer trains an adapter, and where it cannot."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
from torch.optim import AdamW

from lightning_modules.errors import ModelError
from lightning_modules.llm import tuning
from lightning_modules.llm.instruction_tuning import InstructionModule
from lightning_modules.llm.sharding import ShardedStrategy
from lightning_modules.llm.specs import AdapterSpec, BackboneSpec
from tests.lightning_modules.tiny_llm import LONGEST, write_tiny_llm

ADAPTER = AdapterSpec(rank=4, targets=("q_proj",))


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> BackboneSpec:
    folder = write_tiny_llm(tmp_path_factory.mktemp("llama"))
    return BackboneSpec(str(folder), dtype="float32", max_length=LONGEST)


@pytest.mark.parametrize("name", ["adamw", "paged_adamw_8bit"])
def test_the_optimizer_has_what_is_trained_and_nothing_else(
    name: Any, spec: BackboneSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fake(kind: str) -> Any:
        def make(params: Any, **options: Any) -> AdamW:
            asked.append(kind)
            return AdamW(params, **options)

        return make

    monkeypatch.setattr(tuning, "AdamW", fake("adamw"))
    monkeypatch.setattr(tuning, "paged_adamw_8bit", fake("paged_adamw_8bit"))
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cpu")), precision_plugin=None,
        datamodule=SimpleNamespace(seed=0), estimated_stepping_batches=10,
    )  # fmt: skip
    monkeypatch.setattr(InstructionModule, "trainer", trainer)
    module = InstructionModule(
        spec, ADAPTER, optimizer=name, learning_rate=0.5, betas=(0.8, 0.9), weight_decay=0.1,
        warmup_steps=5,
    )  # fmt: skip
    module.configure_model()
    optimizer = module.configure_optimizers()["optimizer"]
    assert asked == [name]
    (group,) = optimizer.param_groups
    assert {id(p) for p in group["params"]} == {
        id(p) for n, p in module.named_parameters() if "lora_" in n
    }
    assert len(group["params"]) == 4  # A and B of two layers
    assert group["betas"] == (0.8, 0.9)
    assert (group["initial_lr"], group["weight_decay"]) == (0.5, 0.1)
    assert group["lr"] == pytest.approx(0.5 / 5)  # the first of five steps of warm-up


def test_an_optimizer_that_the_device_cannot_run_is_told(spec: BackboneSpec) -> None:
    def reason(name: Any, accelerator: Any, strategy: Any) -> str | None:
        trainer: Any = SimpleNamespace(accelerator=accelerator, strategy=strategy)
        return InstructionModule(spec, ADAPTER, optimizer=name).untrainable(trainer)

    paged = "paged_adamw_8bit"
    assert "on a GPU, and there is none here" in str(reason(paged, CPUAccelerator(), None))
    assert "spread over devices" in str(reason(paged, CUDAAccelerator(), ShardedStrategy(2)))
    assert reason(paged, CUDAAccelerator(), None) is None
    assert reason("adamw", CPUAccelerator(), ShardedStrategy(2)) is None
    wrong: Any = "sgd"
    with pytest.raises(ValueError, match="optimizer is 'sgd', expected adamw or paged_adamw_8bit"):
        InstructionModule(spec, ADAPTER, optimizer=wrong)


def test_rates_that_cannot_be_are_told_before_anything_is_loaded(spec: BackboneSpec) -> None:
    """A rate of 0 would otherwise be found out at the end of a fit, a negative warm-up never."""
    with pytest.raises(ValueError, match="learning_rate=0 is not above 0; weight_decay=-1 is not"):
        InstructionModule(spec, ADAPTER, learning_rate=0, weight_decay=-1)
    with pytest.raises(ValueError, match=r"warmup_steps=-4 is not at least 0; betas=\[0.9, 1\]"):
        InstructionModule(spec, ADAPTER, warmup_steps=-4, betas=(0.9, 1))


def test_float16_and_shards_do_not_go_together(tmp_path: Path) -> None:
    half = InstructionModule(BackboneSpec(str(tmp_path), dtype="float16"), ADAPTER)
    with pytest.raises(ModelError, match=r"take llm\.dtype=bfloat16"):
        half.precision_plugin("cuda", "fsdp")
    assert half.precision_plugin("cuda", "ddp").precision == "16-mixed"
    assert isinstance(half.sharded_strategy(3), pl.strategies.ModelParallelStrategy)
