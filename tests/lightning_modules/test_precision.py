"""Training on quantized weights, through Lightning: against float32, and all that goes wrong silently."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes as bnb
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.autograd import grad as grads
from torch.optim import AdamW
from torch.utils.data import DataLoader

from lightning_modules.base import RankingModule
from lightning_modules.errors import ModelError
from lightning_modules.llm.adapters import attach_adapter
from lightning_modules.llm.backbones import load_causal_lm
from lightning_modules.llm.memory import memory_report
from lightning_modules.llm.precision import (
    QLoRAPrecision,
    paged_adamw_8bit,
    quantized_layers,
    refuse_sharding,
)
from lightning_modules.llm.specs import AdapterSpec, BackboneSpec
from tests.lightning_modules.tiny_llm import LONGEST, WIDTH, write_tiny_llm, write_tiny_opt

MODES: list[Any] = ["nf4", "nf4-dq", "fp4", "int8"]
TOKENS = torch.arange(4, 24).reshape(2, 10)
LINEARS = 14  # 2 blocks of 7
# Parameters of a block: q, o (64 x 64), k, v (64 x 32), gate, up, down (64 x 128).
LINEAR_PARAMETERS = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llm(tmp_path_factory.mktemp("llama"))


def _spec(
    folder: Path, mode: Any = "nf4", dtype: Any = "float32", block_size: int = 64
) -> BackboneSpec:
    return BackboneSpec(
        str(folder), dtype=dtype, quantization=mode, block_size=block_size, max_length=LONGEST
    )


def _load(spec: BackboneSpec) -> tuple[Any, QLoRAPrecision]:
    plugin = QLoRAPrecision.for_spec(spec)
    return load_causal_lm(spec, "cpu", plugin.quantization_config("cpu")), plugin


class Tuned(pl.LightningModule):
    """A method in miniature: a language model with LoRA, a projector, and prompts of one length."""

    strict_loading = False

    def __init__(self, spec: BackboneSpec, adapter: AdapterSpec | None) -> None:
        super().__init__()
        self.spec, self.adapter, self.llm = spec, adapter, None
        self.gradients: list[Tensor] = []
        self.logits: list[Tensor] = []

    def configure_model(self) -> None:
        if self.llm is not None:
            return
        device = self.trainer.strategy.root_device
        plugin: Any = self.trainer.precision_plugin
        self.llm = load_causal_lm(self.spec, device, plugin.quantization_config(device))
        if self.adapter is not None:
            self.llm = attach_adapter(self.llm, self.adapter, seed=1)
            self.projector = nn.Linear(WIDTH, WIDTH)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        assert self.llm is not None
        embedded = self.projector(self.llm.get_input_embeddings()(batch))
        loss: Tensor = self.llm(inputs_embeds=embedded, labels=batch).loss
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        grads = [p.grad for p in self.parameters() if p.requires_grad]
        assert all(g is not None for g in grads)
        self.gradients.append(torch.cat([g.flatten() for g in grads if g is not None]))

    def validation_step(self, batch: Tensor, index: int) -> None:
        assert self.llm is not None
        self.logits.append(self.llm(batch).logits)

    def configure_optimizers(self) -> Any:
        return AdamW([p for p in self.parameters() if p.requires_grad], lr=0.0)


def _trainer(plugin: QLoRAPrecision, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(
        accelerator="cpu", devices=1, plugins=[plugin], enable_checkpointing=False,
        **{**quiet, "max_epochs": 2, **options},
    )  # fmt: skip


def _loader() -> DataLoader[Tensor]:
    return DataLoader(list(TOKENS), batch_size=2)  # type: ignore[arg-type]


# ---------------------------------------------------------------- against float32


def _with_lora(model: Any) -> tuple[Tensor, Tensor]:
    """Logits and the gradient of all LoRA weights, B away from zero."""
    adapted = attach_adapter(model, AdapterSpec(dropout=0, targets=("q_proj", "v_proj")), seed=0)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    draw = torch.Generator().manual_seed(0)
    for parameter in trained:
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
    found = adapted(TOKENS, labels=TOKENS)
    return found.logits.detach(), torch.cat([g.flatten() for g in grads(found.loss, trained)])


@pytest.mark.parametrize(
    ("mode", "block_size"), [("nf4", 64), ("nf4-dq", 64), ("fp4", 64), ("nf4-dq", 32)]
)
def test_gradients_are_those_of_a_dense_model_with_the_unpacked_weights(
    tiny: Path, mode: Any, block_size: int
) -> None:
    dense = load_causal_lm(BackboneSpec(str(tiny), dtype="float32", max_length=LONGEST), "cpu")
    model, plugin = _load(_spec(tiny, mode, block_size=block_size))
    plugin.convert_module(model)
    for name, layer in quantized_layers(model):
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        dense.get_submodule(name).weight.data = weight
    for found, expected in zip(_with_lora(model), _with_lora(dense), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("mode", "error"), [("nf4", 0.09), ("nf4-dq", 0.09), ("fp4", 0.11), ("int8", 0.007)]
)
def test_outputs_and_gradients_are_near_those_of_float32(
    tmp_path: Path, mode: Any, error: float
) -> None:
    """Gaussian weights are rounded by ``error``; eight layers in series (v, o, up, down, twice) add up."""
    folder = write_tiny_llm(tmp_path, initializer_range=0.05)
    plain = load_causal_lm(BackboneSpec(str(folder), dtype="float32", max_length=LONGEST), "cpu")
    logits, gradient = _with_lora(plain)
    found, approximate = _with_lora(_load(_spec(folder, mode))[0])
    bound = 8**0.5 * error
    assert 0 < (found - logits).norm() / logits.norm() < bound
    assert 0 < (approximate - gradient).norm() / gradient.norm() < 2 * bound  # forward and backward
    assert torch.cosine_similarity(gradient, approximate, dim=0) > 1 - bound


@pytest.mark.parametrize(("block_size", "wide"), [(32, 96), (64, 128), (32, 65)])
def test_the_weights_of_a_block_share_a_scale(tmp_path: Path, block_size: int, wide: int) -> None:
    """QLoRA's equation 1 by hand: each weight is the nearest of 16 values times the block's largest."""
    folder = write_tiny_llm(tmp_path, intermediate_size=wide)
    dense = load_causal_lm(BackboneSpec(str(folder), dtype="float32", max_length=LONGEST), "cpu")
    values = bnb.functional.get_4bit_type("nf4", device="cpu")
    for name, layer in quantized_layers(_load(_spec(folder, "nf4", block_size=block_size))[0]):
        weight = dense.get_submodule(name).weight
        blocks = weight.reshape(-1, block_size)
        scales = blocks.abs().amax(1, keepdim=True)
        nearest = ((blocks / scales)[..., None] - values).abs().argmin(-1)
        found = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        expected = (values[nearest] * scales).reshape(weight.shape)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"quantization": "nf4", "block_size": 48}, "block_size must be 32 or 64"),
        ({"quantization": None, "block_size": 32}, "these are not quantized"),
        ({"quantization": "int8", "block_size": 32}, "these are int8"),
    ],
)
def test_blocks_that_no_kernel_or_no_weight_has_are_refused(settings: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        BackboneSpec("folder", **settings)


def test_a_layer_computes_with_what_its_weight_unpacks_to(tiny: Path) -> None:
    model, _ = _load(_spec(tiny))
    layer = dict(quantized_layers(model))["model.layers.0.mlp.up_proj"]
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), x @ weight.T, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- through Lightning


@pytest.mark.parametrize(
    ("mode", "dtype"), [("nf4", "float32"), ("nf4-dq", "bfloat16"), ("int8", "float32")]
)
def test_gradients_after_validation_are_those_before_it(tiny: Path, mode: Any, dtype: Any) -> None:
    """bitsandbytes 0.50 stops gradients after the first eval pass on CPUs with AVX512_BF16."""
    spec = _spec(tiny, mode, dtype)
    module = Tuned(spec, AdapterSpec(dropout=0))
    _trainer(QLoRAPrecision.for_spec(spec), num_sanity_val_steps=1).fit(
        module, _loader(), _loader()
    )
    first, second = (
        module.gradients
    )  # the learning rate is 0: the same weights, an eval pass between
    assert torch.equal(first, second)
    assert first.abs().sum() > 0
    assert all(torch.equal(logits, module.logits[0]) for logits in module.logits)
    for _, layer in quantized_layers(module):
        assert layer.support_avx512bf16_for_cpu is False
        assert layer.compute_dtype == getattr(torch, dtype)


def test_what_is_trained_and_norms_are_float32_and_the_rest_as_loaded(tiny: Path) -> None:
    spec = _spec(tiny, "nf4", "bfloat16")
    module = Tuned(spec, AdapterSpec())
    _trainer(QLoRAPrecision.for_spec(spec), max_epochs=1).fit(module, _loader())
    assert module.llm is not None
    norms = [p for n, p in module.named_parameters() if "norm" in n]
    assert len(norms) == 5
    assert {p.dtype for p in norms} == {torch.float32}
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    base = module.llm.get_base_model()
    assert base.lm_head.weight is base.model.embed_tokens.weight  # still tied
    assert base.lm_head.weight.dtype == torch.bfloat16
    assert len(dict(quantized_layers(module))) == LINEARS


def test_trained_weights_move_and_quantized_ones_do_not(tiny: Path) -> None:
    spec = _spec(tiny)

    class Moving(Tuned):
        def configure_optimizers(self) -> Any:
            return AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1)

    module = Moving(spec, AdapterSpec(dropout=0))
    trainer = _trainer(QLoRAPrecision.for_spec(spec), max_epochs=1)
    before: dict[str, Tensor] = {}

    class Start(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            before.update({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    trainer.callbacks.append(Start())  # type: ignore[attr-defined]
    trainer.fit(module, DataLoader(list(TOKENS) * 2, batch_size=2), _loader())  # type: ignore[arg-type]
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


@pytest.mark.parametrize("mode", ["nf4-dq", "int8"])
def test_a_checkpoint_holds_what_was_trained_and_no_scales(tiny: Path, mode: Any) -> None:
    spec = _spec(tiny, mode)
    module = Tuned(spec, AdapterSpec())
    _trainer(QLoRAPrecision.for_spec(spec), max_epochs=1).fit(module, _loader())
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    unbound: Any = RankingModule.on_save_checkpoint
    unbound(module, checkpoint)
    assert checkpoint["state_dict"].keys() == {
        n for n, p in module.named_parameters() if p.requires_grad
    }


def test_a_state_dict_is_not_corrupted_by_an_eval_pass(tiny: Path) -> None:
    model, plugin = _load(_spec(tiny))
    plugin.convert_module(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        expected = model(TOKENS).logits
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) for k in before)
        assert torch.equal(model(TOKENS).logits, expected)


def test_rows_that_end_inside_a_block_are_refused_on_a_cpu(tmp_path: Path) -> None:
    """Unpacked weights would be others: 0.24 away from the model's own, in place of 0.09."""
    folder = write_tiny_llm(tmp_path, intermediate_size=96)
    with pytest.raises(ModelError, match=r"mlp.down_proj has 96 inputs, .* of 64 weights"):
        _load(_spec(folder))
    with pytest.raises(ModelError, match=r"smaller llm\.block_size"):
        _load(_spec(folder, block_size=128))
    _load(_spec(folder, block_size=32))
    _load(_spec(folder, mode="int8"))


def test_widths_are_computed_in_both_modes_alike(tmp_path: Path) -> None:
    folder = write_tiny_llm(tmp_path, intermediate_size=96)
    model, plugin = _load(_spec(folder, block_size=32))
    plugin.convert_module(model)
    with torch.no_grad():
        expected = model.eval()(TOKENS).logits
        assert torch.equal(model.train()(TOKENS).logits, expected)


def test_opt_with_its_biases_and_layer_norms_trains_in_bfloat16(tmp_path: Path) -> None:
    spec = BackboneSpec(
        str(write_tiny_opt(tmp_path)), dtype="bfloat16", quantization="nf4-dq",
        chat_template=False, max_length=LONGEST,
    )  # fmt: skip
    module = Tuned(spec, AdapterSpec(dropout=0))
    _trainer(QLoRAPrecision.for_spec(spec)).fit(module, _loader(), _loader())
    assert torch.equal(module.gradients[0], module.gradients[1])
    assert torch.isfinite(module.gradients[0]).all()


# ---------------------------------------------------------------- what is refused


def test_a_fit_needs_something_to_train_and_a_test_does_not(tiny: Path) -> None:
    spec = _spec(tiny)
    with pytest.raises(ModelError, match="nothing is left to train: attach an adapter"):
        _trainer(QLoRAPrecision.for_spec(spec)).fit(Tuned(spec, None), _loader())
    module = Tuned(spec, None)
    _trainer(QLoRAPrecision.for_spec(spec)).validate(module, _loader(), verbose=False)
    assert len(module.logits) == 1


def test_a_module_without_a_quantized_layer_is_refused() -> None:
    with pytest.raises(
        ModelError, match="no layer is quantized: load the model in configure_model"
    ):
        QLoRAPrecision().convert_module(nn.Linear(2, 2))


def test_quantized_weights_that_cannot_be_trained_are_refused(tiny: Path) -> None:
    model, plugin = _load(_spec(tiny))
    adapted = attach_adapter(model, AdapterSpec(targets=("q_proj",)), 0)
    inner = adapted.base_model.model.model.layers[0].self_attn.q_proj
    inner.lora_A["default"] = bnb.nn.Linear4bit(WIDTH, 8, bias=False)
    adapted.base_model.model.lm_head = bnb.nn.Linear4bit(WIDTH, 400, bias=False)
    with pytest.raises(ModelError, match=r"lora_A\.default belongs to an adapter") as error:
        plugin.convert_module(adapted)
    assert "lm_head is an embedding or output head" in str(error.value)
    model, plugin = _load(_spec(tiny, "int8"))
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.float()
    weight.requires_grad_(True)
    with pytest.raises(ModelError, match=r"up_proj\.weight is to be trained, but it is quantized"):
        plugin.convert_module(model)


def test_float32_arithmetic_on_half_weights_is_refused(tiny: Path) -> None:
    plugin = QLoRAPrecision("nf4", "float32")
    model = load_causal_lm(_spec(tiny, "nf4", "bfloat16"), "cpu", plugin.quantization_config("cpu"))
    with pytest.raises(
        ModelError, match=r"compute_dtype is float32, but model\.embed_tokens\.weight"
    ):
        plugin.convert_module(model)


def test_sharding_and_float16_on_a_cpu_are_refused(tiny: Path) -> None:
    for strategy in ("fsdp", "fsdp_cpu_offload", "deepspeed_stage_2", FSDPStrategy()):
        with pytest.raises(ModelError, match=r"shards weights.* take strategy ddp"):
            refuse_sharding(strategy)
    refuse_sharding("ddp")
    with pytest.raises(ModelError, match="float16 is for GPUs"):
        QLoRAPrecision("nf4", "float16").quantization_config("cpu")
    wrong: Any = "nf3"
    with pytest.raises(ValueError, match="mode must be nf4 or nf4-dq or fp4 or int8"):
        QLoRAPrecision(wrong)
    with pytest.raises(ValueError, match="compute_dtype must be auto or"):
        QLoRAPrecision("nf4", wrong)
    with pytest.raises(ValueError, match="for quantized models"):
        QLoRAPrecision.for_spec(BackboneSpec(str(tiny)))


def test_float16_training_would_need_scaled_losses(tiny: Path) -> None:
    from lightning_modules.llm.precision import problems

    model, _ = _load(_spec(tiny))
    layers = dict(quantized_layers(model))
    model.lm_head.bias = nn.Parameter(torch.zeros(1))
    assert [p.partition(":")[0] for p in problems(model, layers, True, torch.float16)] == [
        "float16 needs its losses scaled in training"
    ]
    assert list(problems(model, layers, False, torch.float16)) == []


# ---------------------------------------------------------------- optimizers and memory


def test_the_paged_optimizer_is_for_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="for CUDA devices: take AdamW on others"):
        paged_adamw_8bit([nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(ValueError, match="no parameter to train"):
        paged_adamw_8bit([], lr=0.1)
    seen: list[Any] = []
    monkeypatch.setattr(bnb.optim, "PagedAdamW8bit", lambda p, **options: seen.append((p, options)))
    gpu: Any = SimpleNamespace(device=torch.device("cuda:0"))
    paged_adamw_8bit([gpu], lr=0.1)
    assert seen == [([gpu], {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0})]


@pytest.mark.parametrize(
    ("mode", "block_size"), [*((mode, 64) for mode in MODES), ("nf4", 32), ("fp4", 32)]
)
def test_the_memory_of_weights_is_counted_by_arithmetic(
    tiny: Path, mode: Any, block_size: int
) -> None:
    model, _ = _load(_spec(tiny, mode, block_size=block_size))
    report = memory_report(model)
    scales = LINEAR_PARAMETERS // block_size
    rows = 2 * (2 * 64 + 2 * 32 + 2 * 128 + 64)  # outputs of all layers
    # Half a byte a weight, a float32 a scale, and a table of 16 values a layer; doubly quantized, a byte a
    # scale, a float32 for every (begun) 256 of them, a table of 256 values and an offset a layer.
    seconds = LINEARS  # no layer has more than 256 scales
    expected = {
        "nf4": LINEAR_PARAMETERS // 2 + 4 * scales + LINEARS * 64,
        "fp4": LINEAR_PARAMETERS // 2 + 4 * scales + LINEARS * 64,
        "nf4-dq": LINEAR_PARAMETERS // 2 + scales + 4 * seconds + LINEARS * (64 + 1024 + 4),
        "int8": LINEAR_PARAMETERS + 4 * rows,
    }
    plain = sum(p.numel() for p in model.parameters() if p.dtype == torch.float32)
    assert report.quantized == expected[mode]
    assert report.quantized_parameters == LINEAR_PARAMETERS
    assert report.parameters == LINEAR_PARAMETERS + plain
    assert report.other == 4 * plain
    assert report.total == expected[mode] + 4 * plain
    assert report.dense("bfloat16") == 2 * report.parameters
    assert report.per_parameter == report.total / report.parameters
    with torch.no_grad():
        model(TOKENS)  # int8 layers move their scales at the first pass
    assert memory_report(model) == report
