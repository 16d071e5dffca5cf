"""All candidates in one pass against one candidate at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from lightning_modules.errors import ModelError
from lightning_modules.llm.adapters import attach_adapter
from lightning_modules.llm.candidate_scoring import candidate_log_likelihoods, plant, tree_mask
from lightning_modules.llm.specs import AdapterSpec
from tests.lightning_modules.tiny_llm import TINY, write_tiny_llm


@pytest.fixture(scope="module", params=[*sorted(TINY), "adapted"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    TINY.get(request.param, write_tiny_llm)(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if request.param == "adapted":
        loaded = attach_adapter(loaded, AdapterSpec(), seed=0).eval()
        for name, weight in loaded.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    return loaded


def one_by_one(model: Any, prompt: list[int], candidate: list[int]) -> float:
    """The definition: the whole text alone, and the log-probability of each of the candidate's tokens."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + candidate])).logits[0].double()
    log_p = logits.log_softmax(-1)
    start = len(prompt) - 1
    return sum(log_p[start + i, token].item() for i, token in enumerate(candidate))


TOKENS = st.lists(st.integers(4, 200), min_size=1, max_size=9)


@settings(max_examples=15, deadline=None)
@given(rows=st.lists(st.tuples(TOKENS, st.lists(TOKENS, max_size=4)), min_size=1, max_size=3))
def test_equals_one_candidate_at_a_time(
    model: Any, rows: list[tuple[list[int], list[list[int]]]]
) -> None:
    prompts, candidates = [p for p, _ in rows], [c for _, c in rows]
    if not any(candidates):
        return
    with torch.no_grad():
        total, mean = candidate_log_likelihoods(model, prompts, candidates, pad=3)
    assert total.shape == (len(rows), max(map(len, candidates)))
    for b, (prompt, row) in enumerate(rows):
        for c, candidate in enumerate(row):
            expected = one_by_one(model, prompt, candidate)
            assert total[b, c].item() == pytest.approx(expected, abs=1e-4)
            assert mean[b, c].item() == pytest.approx(expected / len(candidate), abs=1e-4)
        assert all(math.isinf(x) for x in total[b, len(row) :].tolist())


def test_a_tree_by_hand() -> None:
    tree = plant([[10, 11], [12]], [[[5, 6, 7], [8]], [[9, 4]]], pad=3)
    # The last token of a candidate is not read; the second prompt is padded on the left.
    assert tree.tokens.tolist() == [[10, 11, 5, 6], [3, 12, 9, 3]]
    assert tree.positions.tolist() == [[0, 1, 2, 3], [0, 0, 1, 0]]
    assert tree.segment.tolist() == [[0, 0, 1, 1], [-1, 0, 1, -1]]
    assert tree.wanted.tolist() == [5, 6, 7, 8, 9, 4]
    assert tree.source.tolist() == [0, 1, 2, 0, 3, 4]
    assert tree.owner.tolist() == [0, 0, 0, 1, 2, 2]


def test_a_token_sees_the_prompt_and_its_own_candidate() -> None:
    segment = torch.tensor([[-1, 0, 1, 2, 2]])
    seen = tree_mask(segment)[0, 0]
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 1, 0, 1, 0],
        [0, 1, 0, 1, 1],
    ]


@pytest.mark.parametrize(
    ("prompts", "candidates", "message"),
    [
        ([[]], [[[1]]], "at least one token"),
        ([[1]], [[[1], []]], "at least one token"),
        ([[1]], [[]], "no candidate"),
        ([[1], [2]], [[[1]]], "2 prompts and 1 lists"),
    ],
)
def test_empty_texts_are_refused(
    prompts: list[list[int]], candidates: list[list[list[int]]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plant(prompts, candidates, pad=3)


def test_gradients_reach_what_is_trained(model: Any) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    total, _ = candidate_log_likelihoods(model, [[5, 6]], [[[7, 8], [9]]], pad=3)
    total.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    model.zero_grad()


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_vectors_before_the_text_are_refused(tmp_path: Path, method: Any) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(write_tiny_llm(tmp_path), dtype=torch.float32)
    adapted = attach_adapter(loaded, AdapterSpec(method), seed=0)
    with pytest.raises(ModelError, match=r"vectors of its own before it: take .*method=lora"):
        candidate_log_likelihoods(adapted, [[5, 6]], [[[7, 8], [9]]], pad=3)
