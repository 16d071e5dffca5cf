"""Who sees whom: what each kind of layer sees, against counting, and layers that take no such mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import models as families

from lightning_modules.llm.masks import attention_mask, layer_windows
from tests.lightning_modules.tiny_llm import TINY, WINDOW

WINDOWS = {
    "llama": {"full_attention": None}, "opt": {"full_attention": None},
    "gemma": {"full_attention": None, "sliding_attention": WINDOW},
    "mistral": {"sliding_attention": WINDOW},
}  # fmt: skip


class Described:
    """A model that has a config and nothing else."""

    def __init__(self, config: Any) -> None:
        self.config = config
        config._attn_implementation = "sdpa"


@pytest.mark.parametrize("family", sorted(TINY))
def test_each_kind_of_layer_has_its_window(family: str, tmp_path: Any) -> None:
    folder = TINY[family](tmp_path)
    model = Described(AutoConfig.from_pretrained(folder))
    assert layer_windows(model) == WINDOWS[family]
    seen = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    places = torch.arange(10, 19)[None]
    mask = attention_mask(model, seen, places, places)
    masks = mask if isinstance(mask, dict) else {next(iter(WINDOWS[family])): mask}
    assert masks.keys() == WINDOWS[family].keys()
    for kind, window in WINDOWS[family].items():
        expected = [[0 <= i - j < (window or 99) for j in range(9)] for i in range(9)]
        assert masks[kind][0, 0].tolist() == expected


def test_a_window_that_is_switched_off_or_that_the_model_does_not_know_is_none() -> None:
    assert layer_windows(Described(families.mistral.MistralConfig(sliding_window=None))) == {
        "full_attention": None
    }
    qwen = families.qwen2.Qwen2Config(use_sliding_window=False, sliding_window=7)
    assert layer_windows(Described(qwen)) == {"full_attention": None}
    qwen = families.qwen2.Qwen2Config(
        use_sliding_window=True, sliding_window=7, max_window_layers=1, num_hidden_layers=2
    )
    assert layer_windows(Described(qwen)) == {"full_attention": None, "sliding_attention": 7}
    stray = families.llama.LlamaConfig()
    stray.sliding_window = 7  # in some files of LLaMA's kind; its layers never read it
    assert layer_windows(Described(stray)) == {"full_attention": None}


def test_layers_of_another_kind_are_refused() -> None:
    config = families.qwen3_next.Qwen3NextConfig(num_hidden_layers=4)
    assert "linear_attention" in config.layer_types
    model = Described(config)
    assert layer_windows(model) is None
    every = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"take no mask of our own: .* set packing=false"):
        attention_mask(model, every, torch.zeros(1, 2), torch.zeros(1, 2))


@pytest.mark.parametrize("family", ["gemma", "mistral", "llama"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_mask_of_our_own_is_that_of_transformers(
    family: str, attention: Any, tmp_path: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        TINY[family](tmp_path), dtype=torch.float32, attn_implementation=attention
    )
    tokens = torch.arange(4, 24)[None]
    seen = torch.ones(20, 20, dtype=torch.bool).tril()[None, None]
    places = torch.arange(20)[None]
    mask = attention_mask(model, seen, places, places)
    found = model(tokens, attention_mask=mask, position_ids=places).logits
    torch.testing.assert_close(found, model(tokens).logits, atol=1e-5, rtol=1e-5)
