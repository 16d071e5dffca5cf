"""Adapters: what they train, against plain PEFT, and through files and merges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from datamodules.sources import DataSourceError
from lightning_modules.errors import ModelError
from lightning_modules.llm.adapters import (
    adapter_is_untrained,
    attach_adapter,
    load_adapter,
    merged,
    save_adapter,
)
from lightning_modules.llm.backbones import load_causal_lm, recompute_activations
from lightning_modules.llm.instruction_tuning import InstructionModule
from lightning_modules.llm.label_scoring import last_logits, pad_left
from lightning_modules.llm.precision import QLoRAPrecision
from lightning_modules.llm.specs import AdapterSpec, BackboneSpec
from lightning_modules.llm.targets import linear_paths
from tests.lightning_modules.tiny_llm import LONGEST, WIDTH, write_tiny_llm, write_tiny_opt

TOKENS = torch.arange(4, 24).reshape(2, 10)
# q and o are 64 -> 64, k and v 64 -> 32, gate and up 64 -> 128, down 128 -> 64, in 2 blocks.
INS_AND_OUTS = 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
OUTS = 2 * (2 * 64 + 2 * 32 + 2 * 128 + 64)
METHODS: list[Any] = ["lora", "rslora", "dora", "ia3", "prompt", "prefix"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llm(tmp_path_factory.mktemp("llama"))


def _base(folder: Path, mode: Any = None, dtype: Any = "float32") -> Any:
    spec = BackboneSpec(str(folder), dtype=dtype, quantization=mode, max_length=LONGEST)
    config = QLoRAPrecision.for_spec(spec).quantization_config("cpu") if mode else None
    return load_causal_lm(spec, "cpu", config)


def _plain(folder: Path) -> Any:
    spec = BackboneSpec(str(folder), dtype="float32", chat_template=False, max_length=LONGEST)
    return load_causal_lm(spec, "cpu")


def _trained(model: Any) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def _moved(model: Any, seed: int = 0) -> Any:
    """As if it had been trained: every weight of the adapter elsewhere."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in _trained(model).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model.eval()


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    found: Tensor = model(TOKENS).logits
    return found


# ---------------------------------------------------------------- what is trained


@pytest.mark.parametrize(
    ("method", "count"),
    [
        ("lora", 4 * INS_AND_OUTS),  # rank times inputs and outputs
        ("rslora", 4 * INS_AND_OUTS),
        ("dora", 4 * INS_AND_OUTS + OUTS),  # and a magnitude an output
        ("ia3", 2 * (2 * 32 + 128)),  # keys, values, and what enters the down projection
        ("prompt", 5 * WIDTH),
        ("prefix", 5 * 2 * 2 * 32),  # keys and values of 2 blocks
        ("none", 0),
    ],
)
@pytest.mark.parametrize("mode", [None, "nf4"])
def test_only_the_adapter_is_trained_in_float32(
    tiny: Path, method: Any, count: int, mode: Any
) -> None:
    dtype = None if mode else "bfloat16"
    base = _base(tiny, mode, dtype or "float32")
    spec = AdapterSpec(method, rank=4, num_virtual_tokens=5, dropout=0)
    model = attach_adapter(base, spec, seed=0)
    trained = _trained(model)
    assert sum(p.numel() for p in trained.values()) == count
    assert {p.dtype for p in trained.values()} <= {torch.float32}
    if count:
        model(TOKENS, labels=TOKENS).loss.backward()
        assert all(p.grad is not None for p in trained.values())
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("method", [*METHODS, "full"])
@pytest.mark.parametrize("write", [write_tiny_llm, write_tiny_opt])
def test_a_training_step_is_the_same_where_activations_are_recomputed(
    tmp_path: Path, method: Any, write: Any
) -> None:
    """Of prefixes, which recomputed layers do not take, the module refuses it before any model is loaded."""
    folder = write(tmp_path)
    spec = AdapterSpec(method, rank=4, num_virtual_tokens=3, dropout=0)
    module = InstructionModule(
        BackboneSpec(str(folder), chat_template=False, max_length=LONGEST), spec
    )
    if method == "prefix":
        with pytest.raises(ModelError, match=r"launch\.activation_checkpointing=false"):
            module.checkpoint_activations()
    else:
        module.checkpoint_activations()
    found = []
    for recomputes in (False, True)[: 1 if method == "prefix" else 2]:
        model = _moved(attach_adapter(_plain(folder), spec, seed=0)).train()
        if recomputes:
            recompute_activations(model)
        logits = last_logits(model, *pad_left([[5, 6, 7, 8, 9], [10, 11]], 3))
        (logits[..., 5] - logits[..., 6]).square().sum().backward()
        before = {n: p.detach().clone() for n, p in _trained(model).items()}
        torch.optim.SGD(_trained(model).values(), lr=1e-3).step()
        found.append({n: p.detach() - before[n] for n, p in _trained(model).items()})
        # A bias of keys changes no softmax.
        moved = [name for name, step in found[-1].items() if step.abs().sum() > 0]
        assert method == "full" or len(moved) == len(found[-1])
        assert len(moved) > 0.8 * len(found[-1])
    for name, step in found[0].items():
        torch.testing.assert_close(found[-1][name], step, atol=1e-6, rtol=1e-4)


def test_full_trains_every_weight_and_refuses_quantized_ones(tiny: Path) -> None:
    model = attach_adapter(_base(tiny), AdapterSpec("full"), seed=0)
    assert all(p.requires_grad for p in model.parameters())
    assert model.training
    with pytest.raises(ModelError, match=r"full trains every weight.*quantization=null"):
        attach_adapter(_base(tiny, "nf4"), AdapterSpec("full"), seed=0)
    with pytest.raises(ModelError, match="dora does not work on int8"):
        attach_adapter(_base(tiny, "int8"), AdapterSpec("dora"), seed=0)


def test_full_trains_in_float32_what_is_computed_in_bfloat16(tiny: Path) -> None:
    loaded = _base(tiny, dtype="bfloat16")
    expected = {n: p.float() for n, p in loaded.named_parameters()}
    model = attach_adapter(loaded, AdapterSpec("full"), seed=0)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert all(p.dtype == torch.float32 and torch.equal(p, expected[n]) for n, p in start.items())
    assert model.lm_head.weight is model.get_input_embeddings().weight  # still one weight
    seen: list[torch.dtype] = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda m, i, out: seen.append(out.dtype)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    with MixedPrecision("bf16-mixed", "cpu").forward_context():
        loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    optimizer.step()
    assert seen == [torch.bfloat16]
    # Adam's first step is the learning rate, whatever the gradient; bfloat16 weights of 0.2 are 1e-3 apart.
    steps = [(p - start[n]).abs() for n, p in model.named_parameters()]
    assert sum(int((s > 5e-6).sum()) for s in steps) > 0.98 * sum(s.numel() for s in steps)
    assert sum(
        int((start[n].bfloat16() == p.bfloat16()).sum()) for n, p in model.named_parameters()
    ) > 0.9 * sum(s.numel() for s in steps)  # a model kept in bfloat16 would have stood still


def test_dropout_works_in_the_adapter_and_not_in_the_frozen_model(tmp_path: Path) -> None:
    write_tiny_opt(tmp_path)
    spec = BackboneSpec(str(tmp_path), dtype="float32", chat_template=False, max_length=LONGEST)
    model = attach_adapter(load_causal_lm(spec, "cpu"), AdapterSpec(), seed=0)
    drops = {n: m for n, m in model.named_modules() if isinstance(m, nn.Dropout)}
    assert drops
    assert all(m.training for m in drops.values())
    assert not model.get_base_model().model.decoder.layers[0].training


def test_the_seed_decides_the_start_and_the_random_stream_is_left_alone(tiny: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first, again, other = (
        _trained(attach_adapter(_base(tiny), AdapterSpec(), seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.rand(4), expected)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert any(not torch.equal(first[n], other[n]) for n in first)


# ---------------------------------------------------------------- targets


def test_all_linear_is_every_layer_but_the_output_head(tiny: Path, tmp_path: Path) -> None:
    blocks = [f"model.layers.{i}" for i in range(2)]
    names = [f"self_attn.{n}_proj" for n in "qkvo"]
    names += [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    assert sorted(linear_paths(_base(tiny))) == sorted(f"{b}.{n}" for b in blocks for n in names)
    assert linear_paths(_base(tiny, "nf4")) == linear_paths(_base(tiny))
    untied = write_tiny_llm(tmp_path, tie_word_embeddings=False)
    assert linear_paths(_base(untied)) == linear_paths(_base(tiny))
    two = linear_paths(_base(tiny), ("q_proj", "v_proj"))
    assert two == [f"{b}.self_attn.{n}_proj" for b in blocks for n in "qv"]


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_no_gradient_goes_below_the_last_layers(tiny: Path, method: Any) -> None:
    model = attach_adapter(_base(tiny), AdapterSpec(method, rank=4, last_layers=1), seed=0)
    assert all(".layers.1." in name for name in _trained(model))
    seen: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if name.endswith((".layers.0", ".layers.1")):
            layer.register_forward_hook(lambda _, __, out, name=name: seen.update({name[-1]: out}))
    model(TOKENS, labels=TOKENS).loss.backward()
    assert [seen[block].requires_grad for block in "01"] == [False, True]
    assert all(p.grad is not None for p in _trained(model).values())
    every = attach_adapter(_base(tiny), AdapterSpec(method, rank=4, last_layers=2), seed=0)
    assert [*_trained(every)] == [
        *_trained(attach_adapter(_base(tiny), AdapterSpec(method), seed=0))
    ]


def test_last_layers_are_as_many_as_there_are() -> None:
    for method in ("prompt", "prefix", "full", "none"):
        with pytest.raises(ValueError, match=f"last_layers .* method is {method}"):
            AdapterSpec(method, last_layers=1)  # type: ignore[arg-type]
    for wrong in (0, -1, 0.0, 1.0, 1.5, float("nan"), True):
        with pytest.raises(
            ValueError, match=f"last_layers must be .* or a share .*, got {wrong!r}"
        ):
            AdapterSpec(last_layers=wrong)


@pytest.mark.parametrize(
    ("share", "adapted"), [(0.01, 1), (0.5, 1), (0.99, 1), (0.75, 3), (0.29, 1)]
)
def test_a_share_of_the_layers_is_rounded_down_to_at_least_one(
    tmp_path: Path, share: float, adapted: int
) -> None:
    model = _base(write_tiny_llm(tmp_path, num_hidden_layers=4 if adapted == 3 else 2))
    of_share = linear_paths(model, last_layers=share)
    assert of_share == linear_paths(model, last_layers=adapted)
    assert len({path.split(".layers.")[1][0] for path in of_share}) == adapted


def test_more_last_layers_than_a_model_has_are_refused(tiny: Path) -> None:
    with pytest.raises(ModelError, match=r"last_layers=3, but the model has 2 layers: lower it"):
        attach_adapter(_base(tiny), AdapterSpec(last_layers=3), seed=0)


def test_a_target_that_is_not_there_is_told_with_those_that_are(tiny: Path) -> None:
    with pytest.raises(ModelError, match=r"no layer called W_pack; it has down_proj, gate_proj, k"):
        attach_adapter(_base(tiny), AdapterSpec(targets=("q_proj", "W_pack")), seed=0)
    with pytest.raises(ModelError, match="no layer called lm_head"):
        attach_adapter(_base(tiny), AdapterSpec(targets=("lm_head",)), seed=0)


@pytest.mark.parametrize("fused", ["phi3", "gpt2"])
def test_ia3_is_refused_where_its_own_layers_are_not_alone(fused: str) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, Phi3Config, Phi3ForCausalLM

    model: Any
    if fused == "gpt2":
        ends = {"bos_token_id": 1, "eos_token_id": 2}
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, **ends)  # type: ignore[arg-type]
        )
    else:
        shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "pad_token_id": 0}
        shape |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
        model = Phi3ForCausalLM(Phi3Config(vocab_size=50, **shape))
    named = {"phi3": "down_proj, gate_up_proj, o_proj, qkv_proj", "gpt2": "c_attn, c_fc, c_proj"}
    with pytest.raises(ModelError, match=rf"no layers of these alone.*it has {named[fused]}: name"):
        attach_adapter(model, AdapterSpec("ia3"), seed=0)
    chosen = ("qkv_proj", "down_proj") if fused == "phi3" else ("c_attn",)
    trained = _trained(attach_adapter(model, AdapterSpec("ia3", targets=chosen), seed=0))
    assert len(trained) == len(chosen)  # whoever names layers has them


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", [None, "nf4-dq"])
def test_a_saved_adapter_loads_here_and_in_plain_peft(
    tiny: Path, tmp_path: Path, method: Any, mode: Any
) -> None:
    model = _moved(attach_adapter(_base(tiny, mode), AdapterSpec(method), seed=0))
    expected = _logits(model)
    save_adapter(model, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    again = load_adapter(_base(tiny, mode), tmp_path)
    assert torch.equal(_logits(again), expected)
    assert not _trained(again)
    plain = peft.PeftModel.from_pretrained(_base(tiny, mode), str(tmp_path)).eval()
    assert torch.equal(_logits(plain), expected)


@pytest.mark.parametrize("method", METHODS)
def test_training_can_go_on_from_a_saved_adapter(tiny: Path, tmp_path: Path, method: Any) -> None:
    model = attach_adapter(_base(tiny), AdapterSpec(method), seed=0)
    save_adapter(model, tmp_path)
    again = load_adapter(_base(tiny), tmp_path, trainable=True)
    assert _trained(again).keys() == _trained(model).keys()
    assert all(torch.equal(p, _trained(model)[n]) for n, p in _trained(again).items())
    assert all(m.training for m in again.modules() if isinstance(m, nn.Dropout))


def test_an_adapter_names_its_backbone_not_a_cache_folder(tiny: Path, tmp_path: Path) -> None:
    model = _base(tiny)
    assert model.name_or_path == str(tiny)
    model.name_or_path = "maker/model"  # as load_causal_lm sets it for a model of the hub
    save_adapter(attach_adapter(model, AdapterSpec(), seed=0), tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "maker/model"


def test_files_that_do_not_fit_are_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(DataSourceError, match=r"has no adapter_config\.json and no adapter_model"):
        load_adapter(_base(tiny), tmp_path)
    save_adapter(attach_adapter(_base(tiny), AdapterSpec(), seed=0), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    first = sorted(whole)[0]
    save_file({k: v for k, v in whole.items() if k != first}, file, metadata={"format": "pt"})
    with pytest.raises(DataSourceError, match=rf"{first} is missing from the file"):
        load_adapter(_base(tiny), tmp_path)
    save_file({**whole, "more.weight": torch.ones(1)}, file, metadata={"format": "pt"})
    with pytest.raises(DataSourceError, match=r"more\.weight is unknown to the model"):
        load_adapter(_base(tiny), tmp_path)
    save_file({**whole, first: whole[first][:, :3].contiguous()}, file, metadata={"format": "pt"})
    with pytest.raises(DataSourceError, match="does not fit the model"):
        load_adapter(_base(tiny), tmp_path)
    config = tmp_path / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "target_modules": ["W_pack"]}))
    with pytest.raises(DataSourceError, match="does not fit the model"):
        load_adapter(_base(tiny), tmp_path)


# ---------------------------------------------------------------- merging


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "ia3"])
@pytest.mark.parametrize("mode", [None, "nf4", "nf4-dq", "fp4"])
def test_a_merged_model_is_plain_and_computes_the_same(
    tiny: Path, tmp_path: Path, method: Any, mode: Any
) -> None:
    from transformers import AutoModelForCausalLM

    model = _moved(attach_adapter(_base(tiny, mode), AdapterSpec(method), seed=0))
    expected = _logits(model)
    plain = merged(model)
    torch.testing.assert_close(_logits(plain), expected, atol=5e-5, rtol=1e-4)
    assert {type(m) for m in plain.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(_logits(again), _logits(plain))


def test_merging_int8_leaves_only_the_rounding_of_activations(tiny: Path) -> None:
    model = _moved(attach_adapter(_base(tiny, "int8"), AdapterSpec(), seed=0))
    expected = _logits(model)
    found = _logits(merged(model))
    assert (found - expected).norm() / expected.norm() < 0.1


def test_what_has_no_weights_to_merge_is_refused(tiny: Path) -> None:
    with pytest.raises(TypeError, match="has no adapter: attach one"):
        merged(_base(tiny))
    with pytest.raises(TypeError, match="PROMPT_TUNING adds tokens"):
        merged(attach_adapter(_base(tiny), AdapterSpec("prompt"), seed=0))
    with pytest.raises(TypeError, match="has no adapter"):
        save_adapter(_base(tiny), "nowhere")


# ---------------------------------------------------------------- the alarm


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "ia3"])
def test_an_untrained_adapter_is_noticed(tiny: Path, method: Any) -> None:
    base = _base(tiny)
    before = _logits(base)
    model = attach_adapter(base, AdapterSpec(method), seed=0).eval()
    torch.testing.assert_close(_logits(model), before, atol=1e-5, rtol=1e-5)
    assert adapter_is_untrained(model)
    list(_trained(model).values())[-1].data.view(-1)[0] += 1e-3
    if method == "dora":  # whose last weight is a magnitude
        assert adapter_is_untrained(model)
    assert not adapter_is_untrained(_moved(model))


def test_where_the_start_is_random_nothing_is_claimed(tiny: Path) -> None:
    with pytest.raises(TypeError, match="cannot be read off them"):
        adapter_is_untrained(attach_adapter(_base(tiny), AdapterSpec("prefix"), seed=0))
