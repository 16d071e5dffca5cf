"""Drawn tokens: by their chances, never beyond ``top_p``, and the same whatever stands beside a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.llm.generation import generate
from lightning_modules.llm.sampling import RowSampler, Sampling, draw
from tests.lightning_modules.tiny_llm import write_tiny_llm

NAMES = ["0" * 32, "0123456789abcdef" * 2, "f" * 32]


def test_numbers_fall_on_tokens_by_their_chances() -> None:
    chances = torch.tensor([0.1, 0.5, 0.0, 0.3, 0.1])
    uniform = torch.arange(1000) / 1000 + 0.0005
    logits = chances.log().expand(1000, -1)
    counts = torch.bincount(draw(logits, 1.0, uniform), minlength=5)
    assert counts.tolist() == pytest.approx([100, 500, 0, 300, 100], abs=1)
    # The two likeliest tokens reach 0.75: the rest are left out, and the others take their place.
    counts = torch.bincount(draw(logits, 0.75, uniform), minlength=5)
    assert counts.tolist() == pytest.approx([0, 625, 0, 375, 0], abs=1)
    assert draw(logits, 0.01, uniform).unique().tolist() == [1]


@settings(max_examples=50, deadline=None)
@given(st.floats(0.01, 1), st.sampled_from([0.0, 0.5, 0.9999999]), st.integers(0, 10_000))
def test_the_likeliest_token_and_nothing_beyond_the_share(
    top_p: float, uniform: float, seed: int
) -> None:
    logits = torch.randn(7, 31, generator=torch.Generator().manual_seed(seed)) * 4
    token = draw(logits, top_p, torch.full((7,), uniform))
    chances = logits.softmax(-1)
    if uniform == 0:
        assert token.tolist() == logits.argmax(-1).tolist()
    for row, chosen in zip(chances, token, strict=True):
        assert row[row > row[chosen]].sum() < top_p + 1e-5


def test_a_row_is_drawn_the_same_whatever_stands_beside_it() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    empty = torch.zeros(3, 0)
    together = RowSampler(Sampling(), NAMES)
    apart = [RowSampler(Sampling(), [name]) for name in NAMES]
    for _ in range(5):
        whole = together(empty, logits)
        alone = [s(empty, row[None])[0] for s, row in zip(apart, logits, strict=True)]
        assert torch.equal(whole, torch.stack(alone))
        assert (whole == 0).sum(-1).tolist() == [1, 1, 1]
    assert whole.isinf().sum() == 3 * 49


def test_written_texts_are_drawn(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = write_tiny_llm(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [[5, 6, 7, 8, 9], [10, 11], [12]]

    def write(rows: list[int], **settings: Any) -> list[list[int]]:
        sampler = RowSampler(Sampling(**settings), [NAMES[row] for row in rows])
        return generate(model, tokenizer, [prompts[row] for row in rows], 12, sampler=sampler)

    hot = {"temperature": 1.5, "top_p": 1.0}
    assert write([0, 1, 2], **hot) == [write([row], **hot)[0] for row in range(3)]
    greedy = generate(model, tokenizer, prompts, 12)
    assert write([0, 1, 2], **hot) != greedy
    assert write([0, 1, 2], temperature=1.0, top_p=1e-6) == greedy  # the likeliest alone


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_impossible_sampling_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected a temperature"):
        Sampling(**settings)  # type: ignore[arg-type]
