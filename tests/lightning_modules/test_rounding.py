"""Weights on the 4-bit grid, rounded so that errors make up for each other: by the formula, and loaded."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig, OPTConfig

from datamodules.sources import DataSourceError
from lightning_modules.errors import ModelError
from lightning_modules.llm import gptq, rounding
from lightning_modules.llm.backbones import decoder_layers, load_causal_lm, load_tokenizer
from lightning_modules.llm.gptq import round_weight
from lightning_modules.llm.precision import QLoRAPrecision, grid_of, quantized_layers
from lightning_modules.llm.random_models import RandomModel
from lightning_modules.llm.rounding import Rounded
from lightning_modules.llm.specs import BackboneSpec, VisionSpec

TINY = RandomModel(seed=3)
SMALL: dict[str, Any] = {"texts": 30, "tokens": 24}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "cache"))


def inputs(seed: int, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Weights (3, width), and products of inputs that depend on each other."""
    draw = torch.Generator().manual_seed(seed)
    few = torch.randn(rows, width // 4, generator=draw, dtype=torch.float64)
    read = few @ torch.randn(width // 4, width, generator=draw, dtype=torch.float64)
    read += 0.3 * torch.randn(rows, width, generator=draw, dtype=torch.float64)
    return torch.randn(3, width, generator=draw), read.T @ read


def lost(weight: Tensor, found: Tensor, products: Tensor) -> float:
    """The squared error of a layer's outputs, summed over its inputs."""
    error = (found - weight).double()
    return float((error @ products * error).sum())


def nearest(weight: Tensor, block: int, quantization: str = "nf4") -> Tensor:
    """As bitsandbytes rounds."""
    packed, state = bnb.functional.quantize_4bit(
        weight.contiguous(), blocksize=block, quant_type=quantization
    )
    return bnb.functional.dequantize_4bit(packed, state)


def by_hand(weight: Tensor, products: Tensor, grid: Tensor, block: int) -> Tensor:
    """Optimal brain surgeon: behind each rounded column the others are set anew, by an inverse each time."""
    width = weight.shape[1]
    left, sizes = weight.double(), products.diagonal()
    damped = products + gptq.DAMPING * sizes.mean() * torch.eye(width)
    scales, ends = torch.zeros(len(weight), width // block).double(), {}
    for row, start in ((r, s) for r in range(len(weight)) for s in range(0, width, block)):
        values = left[row, start : start + block]
        tried = values.abs().max() * torch.linspace(*gptq._SHARES).double()
        near = [grid[(values[:, None] / s - grid).abs().argmin(1)] * s for s in tried]
        worst = [float(((n - values) ** 2 * sizes[start : start + block]).sum()) for n in near]
        scales[row, start // block] = tried[worst.index(min(worst))]
        largest = start + int(values.abs().argmax())
        ends[row, largest] = left[row, largest].sign()
    found = torch.zeros_like(left)
    remaining = sizes.argsort(descending=True, stable=True).tolist()
    while remaining:
        column, inverse = remaining[0], torch.linalg.inv(damped[remaining][:, remaining])
        for row in range(len(weight)):
            scale, value = scales[row, column // block], left[row, column]
            code = ends.get((row, column), grid[(value / scale - grid).abs().argmin()])
            found[row, column] = code * scale
            left[row, remaining] -= (value - code * scale) / inverse[0, 0] * inverse[0]
        remaining = remaining[1:]
    return found


@pytest.mark.parametrize("columns", [64, 5])
@pytest.mark.parametrize("block", [4, 8])
def test_it_is_the_optimal_surgeon_one_column_after_the_other(
    monkeypatch: pytest.MonkeyPatch, block: int, columns: int
) -> None:
    monkeypatch.setattr(gptq, "_COLUMNS", columns)
    weight, products = inputs(0, 40, 16)
    expected = by_hand(weight, products, grid_of("nf4"), block)
    found = round_weight(weight, products, grid_of("nf4"), block)
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([(32, 32), (32, 64), (64, 64)]),
    st.sampled_from(["nf4", "fp4"]),
)
def test_bitsandbytes_leaves_the_values_as_they_are(
    seed: int, sizes: tuple[int, int], grid: str
) -> None:
    block, width = sizes
    weight, products = inputs(seed, 200, width)
    found = round_weight(weight, products, grid_of(grid), block)
    torch.testing.assert_close(nearest(found, block, grid), found, atol=1e-6, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_outputs_stay_nearer_than_those_of_the_nearest_values(seed: int) -> None:
    weight, products = inputs(seed, 300, 64)
    found = round_weight(weight, products, grid_of("nf4"), 32)
    assert lost(weight, found, products) < 0.5 * lost(weight, nearest(weight, 32), products)


def test_inputs_that_are_never_there_and_blocks_of_zeros_do_no_harm() -> None:
    weight, products = inputs(0, 40, 64)
    weight[:, 32:], products[:, 5], products[5] = 0, 0, 0
    found = round_weight(weight, products, grid_of("nf4"), 32)
    assert found.isfinite().all()
    assert found[:, 32:].abs().max() < 1e-9


# ---------------------------------------------------------------- as a model's source


def loaded(spec: BackboneSpec) -> Any:
    plugin = QLoRAPrecision.for_spec(spec) if spec.quantization else None
    model = load_causal_lm(spec, "cpu", plugin.quantization_config("cpu") if plugin else None)
    if plugin:
        plugin.convert_module(model)
    return model


def spec_of(source: Any, **options: Any) -> BackboneSpec:
    return BackboneSpec(
        source, **{"dtype": "float32", "chat_template": False, "max_length": 64, **options}
    )


def rounded(**options: Any) -> Rounded:
    return Rounded(**{"source": TINY, "revision": None, "grid": "nf4", "block_size": 32, **options})


def test_a_rounded_model_is_loaded_as_it_was_written_and_answers_nearer_to_the_original() -> None:
    spec = spec_of(TINY, quantization="nf4", block_size=32, rounding="gptq")
    folder = rounded().folder()
    packed = loaded(spec)
    assert [f.name for f in folder.parent.glob("gptq*")] == [folder.name], "made once"
    plain = loaded(spec_of(str(folder)))
    names = [name for name, _ in quantized_layers(packed)]
    assert len(names) == 14  # of two layers
    for name, layer in quantized_layers(packed):
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        torch.testing.assert_close(weight, plain.get_submodule(name).weight, atol=1e-6, rtol=1e-5)
    whole, near = loaded(spec_of(TINY)), loaded(spec_of(TINY, quantization="nf4", block_size=32))
    others = {name for name, _ in whole.named_parameters()} - {f"{name}.weight" for name in names}
    for name in others:
        assert torch.equal(whole.get_parameter(name), plain.get_parameter(name)), name
    assert sorted(f.name for f in folder.glob("*.safetensors")) == ["model.safetensors"]
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, 300, (16, 24), generator=draw)
    with torch.no_grad():
        expected, ours, theirs = (m(tokens).logits for m in (whole, packed, near))
    assert (ours - expected).square().mean() < 0.9 * (theirs - expected).square().mean()


@pytest.mark.parametrize("kind", ["opt", "gemma3"])
def test_layers_of_other_architectures_are_given_what_they_are_given(kind: str) -> None:
    """OPT has biases and positions of its own, Gemma a sliding window and other rotations in some layers."""
    config: Any = OPTConfig(vocab_size=60, hidden_size=64, ffn_dim=96, num_hidden_layers=3, init_std=0.3,
                            num_attention_heads=4, word_embed_proj_dim=64, dropout=0.0)  # fmt: skip
    if kind == "gemma3":
        config = Gemma3TextConfig(vocab_size=60, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
                                  num_attention_heads=4, num_key_value_heads=2, head_dim=32, sliding_window=4,
                                  layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                                  initializer_range=0.3)  # fmt: skip
    torch.manual_seed(0)
    ours = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    whole, near = copy.deepcopy(ours), copy.deepcopy(ours)
    tokens = torch.randint(4, 60, (60, 16), generator=torch.Generator().manual_seed(1))
    rounding.round_model(ours, tokens[:40].split(7), grid_of("nf4"), 32)
    for layer in rounding_layers(near):
        layer.weight.copy_(nearest(layer.weight, 32))
    expected, found, other = (model(tokens[40:]).logits for model in (whole, ours, near))
    assert (found - expected).square().mean() < 0.9 * (other - expected).square().mean()


def rounding_layers(model: Any) -> list[Any]:
    """The linear layers inside of decoder layers."""
    return [part for layer in decoder_layers(model) for _, part in rounding._linear(layer)]


def test_the_same_is_made_again_and_the_random_stream_is_kept(tmp_path: Path) -> None:
    made = []
    for place in ("one", "other"):
        (tmp_path / place).mkdir()
        torch.manual_seed(7)
        rounded(**SMALL).write(tmp_path / place)
        made.append(((tmp_path / place / "model.safetensors").read_bytes(), float(torch.rand(1))))
    assert made[0] == made[1]
    torch.manual_seed(7)
    assert made[0][1] == float(torch.rand(1))


def test_prompts_take_the_place_of_own_texts() -> None:
    """Joined, and cut into equal rows; the rest is left out."""
    prompts = ("Will they like one more of them?", "Yes or no:", "A, B and C")
    tokenizer = load_tokenizer(spec_of(TINY))
    ids = [i for text in prompts for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    one = rounded(prompts=prompts, tokens=7)
    assert one._read(tokenizer).tolist() == [ids[i : i + 7] for i in range(0, len(ids) - 6, 7)]
    assert rounded(prompts=prompts)._read(tokenizer).tolist() == [ids]
    spec = spec_of(TINY, quantization="nf4-dq", block_size=32, rounding="gptq")
    load_causal_lm(
        spec, "cpu", QLoRAPrecision.for_spec(spec).quantization_config("cpu"), lambda: prompts
    )
    assert rounded(prompts=prompts).folder() != rounded(**SMALL).folder()
    assert len(list(rounded(prompts=prompts).folder().parent.glob("gptq*"))) == 2


def test_a_damaged_folder_is_made_anew_once_it_is_gone() -> None:
    spec = spec_of(TINY, quantization="nf4", block_size=32, rounding="gptq")
    prompts = ("Will they like one more of them?", "A, B and C")
    config = QLoRAPrecision.for_spec(spec).quantization_config("cpu")
    folder = rounded(prompts=prompts).folder()
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:10_000])
    with pytest.raises(
        DataSourceError, match=r"cannot be loaded .*: delete this folder, and it is"
    ):
        load_causal_lm(spec, "cpu", config, lambda: prompts)
    shutil.rmtree(folder)
    load_causal_lm(spec, "cpu", config, lambda: prompts)
    assert (folder / "model.safetensors").read_bytes() == whole


def test_its_folder_is_named_by_its_parts() -> None:
    changes: list[dict[str, Any]] = [{}, {"source": RandomModel(seed=4)}, {"grid": "fp4"}, {"seed": 1},
                                     {"block_size": 64}, {"prompts": ("A?",)}]  # fmt: skip
    kinds = [rounded(**SMALL, **change) for change in changes]
    assert len({kind.folder() for kind in kinds}) == len(kinds)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_only_weights_in_4_bits_are_rounded_so(quantization: Any) -> None:
    with pytest.raises(ValueError, match="rounding gptq is of weights in 4 bits, and these are"):
        spec_of(TINY, quantization=quantization, rounding="gptq")
    with pytest.raises(ValueError, match="rounding"):
        spec_of(TINY, quantization="nf4", rounding="stochastic")


def test_models_that_read_pictures_are_not_rounded_so() -> None:
    with pytest.raises(ValueError, match="read no pictures"):
        VisionSpec(quantization="nf4", rounding="gptq")


def test_descriptions_without_it_are_called_as_before() -> None:
    plain, together = (spec_of(TINY, quantization="nf4", rounding=r) for r in ("nearest", "gptq"))
    assert "rounding" not in plain._settings()
    assert plain.digest() != together.digest()


def test_rows_that_end_inside_a_block_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="64 inputs, no whole number of blocks of 48"):
        rounded(block_size=48, **SMALL).write(tmp_path)


def test_how_weights_are_kept_is_told() -> None:
    told = [
        spec_of(TINY).kept, spec_of(TINY, quantization="int8").kept,
        spec_of(TINY, quantization="nf4-dq").kept,
        spec_of(TINY, quantization="fp4", block_size=32, rounding="gptq").kept,
    ]  # fmt: skip
    assert told == ["", "int8", "nf4-dq", "fp4, blocks of 32, rounded together"]
