"""What only a CUDA device computes: quantized kernels, autocast, the paged optimizer, two GPUs.

All of it at once: ``python -m pytest -m gpu``. Every bound says what it is made of: bfloat16 rounds by up to
2^-9 = 0.2% of a number, int8 by up to half of 1/127 of a row's largest.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import lightning.pytorch as pl
import polars
import pytest
import torch
from torch import Tensor
from torch.autograd import grad as grads

from datamodules.instructions import InstructionDataModule
from lightning_modules.llm.adapters import attach_adapter
from lightning_modules.llm.backbones import load_causal_lm, load_tokenizer
from lightning_modules.llm.generation import generate
from lightning_modules.llm.instruction_tuning import InstructionModule
from lightning_modules.llm.label_scoring import SharedPrefix, last_logits, pad_left
from lightning_modules.llm.memory import memory_report
from lightning_modules.llm.precision import QLoRAPrecision, paged_adamw_8bit, quantized_layers
from lightning_modules.llm.specs import AdapterSpec, BackboneSpec
from tests.lightning_modules.tiny_llm import tallrec_words, write_tiny_llm, write_wide_llm

DEVICE = "cuda"
LONGEST = 160
MODES: list[Any] = ["nf4", "nf4-dq", "fp4", "int8"]
PROMPTS = [list(range(10, 40)), list(range(60, 72)), [5, 9]]
ADAPTER = AdapterSpec(rank=64, dropout=0.0)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wide_llm(tmp_path_factory.mktemp("llama"), LONGEST)


def load(folder: Path, dtype: Any = "float32", mode: Any = None, **settings: Any) -> Any:
    """On the device; quantized as a trainer's plugin leaves it."""
    spec = BackboneSpec(
        str(folder), dtype=dtype, quantization=mode, chat_template=False, max_length=LONGEST,
        **settings,
    )  # fmt: skip
    if mode is None:
        return load_causal_lm(spec, DEVICE)
    plugin = QLoRAPrecision.for_spec(spec)
    model = load_causal_lm(spec, DEVICE, plugin.quantization_config(DEVICE))
    return plugin.convert_module(model)


def unpacked(layer: Any) -> Tensor:
    """The weight that a quantized layer stands for, float32."""
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        return layer.weight.data.float() * (scale.float() / 127)[:, None]
    found: Tensor = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return found.float()


def apart(found: Tensor, expected: Tensor) -> float:
    """The distance of two tensors as a share of the second's length."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())


def batch() -> tuple[Tensor, Tensor]:
    tokens, mask = pad_left(PROMPTS, 3)
    return tokens.to(DEVICE), mask.to(DEVICE)


def with_lora(model: Any, autocast: bool = False) -> tuple[Tensor, Tensor]:
    """The last logits, and the gradient of all LoRA weights, B away from zero."""
    adapted = attach_adapter(model, ADAPTER, seed=0)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    draw = torch.Generator().manual_seed(0)
    for parameter in trained:
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=draw).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        logits = last_logits(adapted, *batch())[:, 0]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([7, 8, 9], device=DEVICE))
    return logits.detach(), torch.cat([g.flatten() for g in grads(loss, trained)])


# ---------------------------------------------------------------- quantized kernels


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 33])  # one row has a kernel of its own
def test_a_quantized_layer_computes_what_its_weight_unpacks_to(
    tiny: Path, mode: Any, dtype: Any, rows: int
) -> None:
    """4 bits: bfloat16's rounding of inputs, weights and outputs; int8: that of each row of inputs, too.

    A Gaussian row of 256 reaches 3 sigma: steps of 3 / 127, a twelfth of whose square is an error of 0.7%.
    """
    model = load(tiny, dtype, mode)
    draw = torch.Generator().manual_seed(1)
    bound = 0.02 if mode == "int8" else {"float32": 1e-4, "bfloat16": 0.01}[dtype]
    for name, layer in quantized_layers(model):
        x = torch.randn(rows, layer.in_features, generator=draw)
        x = x.to(DEVICE, getattr(torch, dtype))
        with torch.no_grad():
            found = layer(x)
        assert apart(found, x.float() @ unpacked(layer).T) < bound, name


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4"])
def test_gradients_through_4_bits_are_those_of_a_dense_model(tiny: Path, mode: Any) -> None:
    """Both compute in float32: they differ by the order of sums."""
    model, dense = load(tiny, mode=mode), load(tiny)
    for name, layer in quantized_layers(model):
        dense.get_submodule(name).weight.data = unpacked(layer)
    for found, expected in zip(with_lora(model), with_lora(dense), strict=True):
        assert apart(found, expected) < 1e-3


@pytest.mark.parametrize(("mode", "bound"), [(None, 0.05), ("nf4-dq", 0.05), ("int8", 0.1)])
def test_gradients_in_bfloat16_are_near_those_in_float32(
    tiny: Path, mode: Any, bound: float
) -> None:
    """Two layers of some ten roundings of 0.2% and 0.4%, forward and backward; int8 rounds inputs, too."""
    half, dense = load(tiny, "bfloat16", mode), load(tiny)
    if mode:
        for name, layer in quantized_layers(half):
            dense.get_submodule(name).weight.data = unpacked(layer)
    found, expected = with_lora(half, autocast=True), with_lora(dense)
    assert apart(found[0], expected[0]) < bound
    assert apart(found[1], expected[1]) < 2 * bound
    assert found[1].dtype == torch.float32


@pytest.mark.parametrize("mode", [None, *MODES])
def test_the_memory_report_is_what_the_device_gave(tiny: Path, mode: Any) -> None:
    """The device gives blocks of 512 bytes: a part of one is lost with each tensor, at most six a layer."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model = load(tiny, "bfloat16", mode)
    torch.cuda.synchronize()
    taken = torch.cuda.memory_allocated() - before
    report = memory_report(model)
    assert report.total <= taken <= 1.05 * report.total + 512 * 6 * 32


# ---------------------------------------------------------------- attention and writing


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs flash-attn")
def test_flash_attention_scores_like_sdpa(tiny: Path) -> None:
    """Rows of unlike lengths, padded on the left, also behind what all begin with; all in bfloat16."""
    opening = list(range(110, 122))
    behind = [x.to(DEVICE) for x in pad_left([opening + row for row in PROMPTS], 3)]
    alone, shared = [], []
    for attention in ("sdpa", "flash_attention_2"):
        model = load(tiny, "bfloat16", attention=attention)
        with torch.no_grad():
            alone.append(last_logits(model, *batch(), keep=2))
            shared.append(SharedPrefix(model, opening).last_logits(*behind))
    assert apart(alone[1], alone[0]) < 0.03
    assert apart(shared[1], shared[0]) < 0.03


def test_answers_are_written_as_on_the_cpu(tiny: Path) -> None:
    spec = BackboneSpec(str(tiny), dtype="float32", chat_template=False, max_length=LONGEST)
    tokenizer = load_tokenizer(spec)
    plain = load_causal_lm(spec, "cpu")
    expected = generate(plain, tokenizer, PROMPTS, 8)
    assert generate(load(tiny), tokenizer, PROMPTS, 8) == expected
    choices = [[[11, 12], [13]], [[20, 21, 22], [20, 30]], [[40], [41]]]
    held = generate(load(tiny, "bfloat16", "nf4"), tokenizer, PROMPTS, 8, choices)
    assert all(answer in row for answer, row in zip(held, choices, strict=True))


# ---------------------------------------------------------------- training


def test_the_paged_optimizer_keeps_8_bits_and_pages_large_tensors() -> None:
    weights = [torch.nn.Parameter(torch.randn(n, device=DEVICE)) for n in (4_095, 4_096, 131_072)]
    goals = [torch.randn_like(w) for w in weights]
    optimizer = paged_adamw_8bit(weights, lr=0.05)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = sum(
            (((w - g) ** 2).mean() for w, g in zip(weights, goals, strict=True)), torch.zeros(())
        )
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    states = [optimizer.state[w] for w in weights]
    assert [s["state1"].dtype for s in states] == [torch.float32, torch.uint8, torch.uint8]
    assert [getattr(s["state1"], "is_paged", False) for s in states] == [False, False, True]


def tuned(
    tiny: Path, folder: Path, epochs: int, resume: str | None = None, dtype: Any = "float32"
) -> tuple[InstructionModule, pl.Trainer]:
    """A fit of the instruction stage on nf4 weights with the paged optimizer."""
    file = folder / "rows.json"
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(20)]
    file.write_text(json.dumps(rows))
    spec = BackboneSpec(
        str(tiny), dtype=dtype, quantization="nf4", chat_template=False, max_length=LONGEST
    )
    pl.seed_everything(0, verbose=False)
    data = InstructionDataModule(str(file), cache=str(folder))
    data.batch_size = 6
    module = InstructionModule(
        spec, ADAPTER, learning_rate=0.002, warmup_steps=0, schedule="constant",
        optimizer="paged_adamw_8bit",
    )  # fmt: skip
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="gpu", devices=1, plugins=[module.precision_plugin("cuda", "auto")],
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0,
    )  # fmt: skip
    assert module.untrainable(trainer) is None
    trainer.fit(module, data, ckpt_path=resume, weights_only=True if resume else None)
    return module, trainer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fit_with_the_paged_optimizer_learns(tiny: Path, tmp_path: Path, dtype: Any) -> None:
    module, trainer = tuned(tiny, tmp_path, 1, dtype=dtype)
    first = trainer.callback_metrics["val/loss"].item()
    module, trainer = tuned(tiny, tmp_path, 6, dtype=dtype)
    assert trainer.callback_metrics["val/loss"].item() < 0.8 * first
    optimizer = trainer.optimizers[0]
    assert type(optimizer).__name__ == "PagedAdamW8bit"
    for weight in (p for p in module.parameters() if p.requires_grad):
        assert weight.device.type == "cuda"
        assert optimizer.state[weight]["state1"].dtype == torch.uint8  # rank 64 of 256: 16,384 each
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}


def test_a_fit_with_the_paged_optimizer_resumes(tiny: Path, tmp_path: Path) -> None:
    """Its state is rounded to 8 bits, so that the last bit of a gradient may move a step by a percent."""
    _, trainer = tuned(tiny, tmp_path, 2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, trainer = tuned(tiny, tmp_path, 4, resume=str(tmp_path / "half.ckpt"))
    assert {s["step"] for s in trainer.optimizers[0].state.values()} == {trainer.global_step}
    whole, _ = tuned(tiny, tmp_path, 4)
    rows = [
        torch.cat([p.detach().flatten() for p in m.parameters() if p.requires_grad])
        for m in (resumed, whole)
    ]
    assert apart(rows[0], rows[1]) < 0.01


# ---------------------------------------------------------------- two devices, the real command


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, tiny_movielens: Path) -> list[str]:
    llm = write_tiny_llm(tmp_path_factory.mktemp("llm"), longest=1024)
    return [
        *tallrec_words(llm, tiny_movielens, examples=16),
        "++llm.dtype=bfloat16", "launch.accelerator=gpu", "~stages.reference",
        "++stages.train.module.adapter.dropout=0.0", "++stages.train.trainer.max_epochs=2",
    ]  # fmt: skip


def logged_losses(runs: Path) -> list[float]:
    (log,) = runs.glob("*.train-*/csv/**/metrics.csv")
    with log.open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]


def scores_of(runs: Path) -> polars.Series:
    (file,) = runs.glob("*.evaluate-*/scores.*.parquet")
    return polars.read_parquet(file)["score"]


@two_gpus
@pytest.mark.parametrize(("strategy", "mode"), [("ddp", "nf4"), ("fsdp", "null")])
def test_two_gpus_train_what_one_trains(
    run_command: Callable[..., Any], words: list[str], tmp_path: Path, strategy: str, mode: str
) -> None:
    """The same global batches: bfloat16's rounding of gradients apart, of which Adam makes a few percent.

    What two have trained is then scored by one.
    """
    name, words = "tallrec/movie_64shot", [*words, f"++llm.quantization={mode}"]
    pair = ["launch.devices=2", f"launch.strategy={strategy}"]
    for place, launch in (("one", []), ("two", pair)):
        done = run_command("exp", name, *words, *launch, runs=tmp_path / place)
        assert done.returncode == 0, done.stderr[-4000:]
    one, two = (logged_losses(tmp_path / place) for place in ("one", "two"))
    assert two == pytest.approx(one, rel=0.05)
    (folder,) = (tmp_path / "two").glob("*.train-*")
    assert json.loads((folder / "done.json").read_text())["devices"] == 2
    scored = scores_of(tmp_path / "two")
    shutil.rmtree(next((tmp_path / "two").glob("*.evaluate-*")))
    done = run_command("exp", name, *words, runs=tmp_path / "two")
    assert done.returncode == 0, done.stderr[-4000:]
    again = scores_of(tmp_path / "two")
    assert apart(again.to_torch(), scored.to_torch()) < 0.02
