"""Vectors in the place of tokens against the same model that is given all embeddings by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_modules.llm.candidate_scoring import candidate_log_likelihoods
from lightning_modules.llm.generation import generate
from lightning_modules.llm.label_scoring import last_logits
from lightning_modules.llm.soft_tokens import soft_tokens
from tests.lightning_modules.tiny_llm import TINY

TOKENS = torch.tensor([[3, 3, 10, 11, 12], [20, 21, 22, 23, 24]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
WHERE = torch.tensor([[0, 0, 0, 1, 0], [1, 0, 0, 1, 0]]).bool()


@pytest.fixture(scope="module", params=sorted(TINY))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = TINY[request.param](tmp_path_factory.mktemp(request.param))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def vectors_for(model: Any) -> torch.Tensor:
    width = model.get_input_embeddings().embedding_dim
    return torch.randn(3, width, generator=torch.Generator().manual_seed(0)).requires_grad_()


def by_hand(model: Any, tokens: list[int], place: list[int], vectors: torch.Tensor) -> torch.Tensor:
    """(L, V) logits of one text without padding, whose embeddings are put together here."""
    embeddings = model.get_input_embeddings()(torch.tensor([tokens])).clone()
    embeddings[0, place] = vectors
    logits: torch.Tensor = model(inputs_embeds=embeddings).logits[0]
    return logits


def test_the_model_reads_the_vectors_and_they_learn(model: Any) -> None:
    vectors = vectors_for(model)
    first = by_hand(model, [10, 11, 12], [1], vectors[:1])[-2:]
    second = by_hand(model, [20, 21, 22, 23, 24], [0, 3], vectors[1:])[-2:]
    expected = torch.stack([first, second])
    with soft_tokens(model, WHERE, vectors):
        found = last_logits(model, TOKENS, MASK, keep=2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    weight = torch.randn_like(found)
    (gradient,) = torch.autograd.grad((found * weight).sum(), vectors)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), vectors)
    torch.testing.assert_close(gradient, wanted, atol=1e-4, rtol=1e-3)


def test_afterwards_the_model_is_as_before(model: Any) -> None:
    before = last_logits(model, TOKENS, MASK)
    with (
        pytest.raises(ValueError, match="2 vectors for 3 positions"),
        soft_tokens(model, WHERE, vectors_for(model)[:2]),
    ):
        pass
    with soft_tokens(model, WHERE, vectors_for(model)):
        assert not torch.allclose(last_logits(model, TOKENS, MASK), before)
    assert torch.equal(last_logits(model, TOKENS, MASK), before)


@torch.no_grad()
def test_candidates_behind_such_prompts(model: Any) -> None:
    vectors = vectors_for(model)
    prompts, candidates = [[10, 11, 12], [20, 21, 22, 23, 24]], [[[30, 31], [32]], [[33, 34, 35]]]
    with soft_tokens(model, WHERE, vectors):
        total, _ = candidate_log_likelihoods(model, prompts, candidates, pad=3)
    for row, places, own in ((0, [1], vectors[:1]), (1, [0, 3], vectors[1:])):
        for number, candidate in enumerate(candidates[row]):
            logits = by_hand(model, prompts[row] + candidate, places, own).log_softmax(-1)
            start = len(prompts[row]) - 1
            expected = sum(logits[start + i, token].item() for i, token in enumerate(candidate))
            assert total[row, number].item() == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_what_is_written_behind_such_a_prompt(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = TINY["llama"](tmp_path_factory.mktemp("llama"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vectors = 3 * vectors_for(model).detach()[:1]
    written: list[int] = []
    for _ in range(5):  # greedily, from the definition
        written.append(int(by_hand(model, [10, 11, 12, *written], [1], vectors)[-1].argmax()))
    with soft_tokens(model, WHERE[:1, 2:], vectors):
        (found,) = generate(model, tokenizer, [[10, 11, 12]], max_new_tokens=5)
    end = tokenizer.eos_token_id
    assert found == (written[: written.index(end)] if end in written else written)
