"""All branches behind a prompt in a few passes against one text at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from lightning_modules.errors import ModelError
from lightning_modules.llm.adapters import attach_adapter
from lightning_modules.llm.branches import ReadPrompts, can_branch, side_by_side
from lightning_modules.llm.label_scoring import SharedPrefix, pad_left
from lightning_modules.llm.specs import AdapterSpec
from tests.lightning_modules.tiny_llm import TINY, write_tiny_llm

LABELS = (40, 41)


@pytest.fixture(scope="module", params=[*sorted(TINY), "adapted", "eager"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    TINY.get(request.param, write_tiny_llm)(folder)
    how = {"attn_implementation": "eager"} if request.param == "eager" else {}
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()
    if request.param == "adapted":
        loaded = attach_adapter(loaded, AdapterSpec(), seed=0).eval()
        for name, weight in loaded.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    return loaded


@torch.no_grad()
def one_by_one(model: Any, text: list[int]) -> list[float]:
    """The definition: the whole text alone, without padding, mask or cache."""
    logits = model(torch.tensor([text])).logits[0, -1]
    return [float(logits[label]) for label in LABELS]


TOKENS = st.lists(st.integers(4, 200), min_size=1, max_size=11)


@settings(max_examples=12, deadline=None)
@given(
    data=st.integers(1, 4).flatmap(
        lambda count: st.lists(
            st.tuples(TOKENS, st.lists(TOKENS, min_size=count, max_size=count)),
            min_size=1, max_size=3,
        )
    ),
    at_once=st.sampled_from([1, 8, 512]),
    opening=st.lists(st.integers(4, 200), max_size=9),
)  # fmt: skip
def test_equals_one_text_at_a_time(
    model: Any, data: list[tuple[list[int], list[list[int]]]], at_once: int, opening: list[int]
) -> None:
    prompts, branches = [opening + prompt for prompt, _ in data], [row for _, row in data]
    data = list(zip(prompts, branches, strict=True))
    with torch.no_grad():
        prefix = SharedPrefix(model, opening) if opening else None
        read = ReadPrompts(model, *pad_left(prompts, 3), prefix)
        got = read.end_logits(branches, LABELS, 3, at_once)
        again = read.end_logits(branches, LABELS, 3)  # what was read is as it was
    assert got.shape == (len(data), len(branches[0]), 2)
    for b, (prompt, row) in enumerate(data):
        for c, branch in enumerate(row):
            expected = one_by_one(model, prompt + branch)
            assert got[b, c].tolist() == pytest.approx(expected, abs=1e-4)
            assert again[b, c].tolist() == pytest.approx(expected, abs=1e-4)


def test_rows_are_aligned_by_length() -> None:
    rows = [[[5], [6, 7, 8], [9, 10]], [[11, 12, 13, 14], [15], [16]]]
    (part,) = side_by_side(rows, pad=3)
    assert part.tokens.tolist() == [[3, 6, 7, 8, 9, 10, 5], [11, 12, 13, 14, 3, 15, 16]]
    assert part.places.tolist() == [[0, 0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0, 0]]
    assert part.segment.tolist() == [[-1, 0, 0, 0, 1, 1, 2], [0, 0, 0, 0, -1, 1, 2]]
    assert part.ends.tolist() == [3, 5, 6]
    assert part.branches.tolist() == [[1, 2, 0], [0, 1, 2]]
    passes = list(side_by_side(rows, pad=3, at_once=3))
    assert [p.branches.tolist() for p in passes] == [[[1], [0]], [[2, 0], [1, 2]]]


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        list(side_by_side([[[5], []]], pad=3))
    flash = SimpleNamespace(
        _attn_implementation="flash_attention_2", layer_types=["full_attention"]
    )
    flash.get_text_config = lambda: flash
    model = SimpleNamespace(config=flash)
    assert not can_branch(model)
    with pytest.raises(ModelError, match=r"llm\.attention=sdpa"):
        ReadPrompts(model, torch.ones(1, 1, dtype=torch.long), torch.ones(1, 1))
