"""Greedy decoding against argmax by hand, answers held to a list, and strict matching."""

from __future__ import annotations

import math
from functools import wraps
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_modules.llm.generation import TokenTrie, generate, match_answer, valid_rate
from tests.lightning_modules.tiny_llm import TINY

END = 2


@pytest.fixture(scope="module", params=["llama", "gemma"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = TINY[request.param](tmp_path_factory.mktemp("llm"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return AutoTokenizer.from_pretrained(folder), model


def by_hand(model: Any, prompt: list[int], steps: int, trie: TokenTrie | None = None) -> list[int]:
    written: list[int] = []
    for _ in range(steps):
        logits = model(torch.tensor([prompt + written])).logits[0, -1]
        allowed = range(len(logits)) if trie is None else trie.after(written)
        best = max(allowed, key=lambda token: logits[token].item())
        if best == END:
            break
        written.append(best)
    return written


@torch.no_grad()
def test_free_text_is_the_argmax_at_every_step(tiny: Any) -> None:
    tokenizer, model = tiny
    prompts = [[10, 11, 12, 13, 14, 15, 16, 17, 18], [20], [30, 31]]
    got = generate(model, tokenizer, prompts, max_new_tokens=5)
    assert got == [by_hand(model, p, 5) for p in prompts]


@torch.no_grad()
@pytest.mark.parametrize("held", [False, True], ids=["free", "held to a list"])
def test_what_all_prompts_begin_with_changes_nothing(
    tiny: Any, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, model = tiny
    opening = [10 + i % 50 for i in range(40)]
    prompts = [[*opening, 60, 61, 62, 63, 64], [*opening, 70], [*opening, 80, 81]]
    choices = [[[40, 41], [40, 42, 43], [50]]] * 3 if held else None
    read: list[int] = []
    forward = type(model).forward

    @wraps(forward)  # transformers asks for what its signature names
    def counted(self: Any, *options: Any, **given: Any) -> Any:
        read.append(given.get("input_ids", *options[:1]).numel())
        return forward(self, *options, **given)

    monkeypatch.setattr(type(model), "forward", counted)
    got = generate(model, tokenizer, prompts, max_new_tokens=5, choices=choices)
    first, second = read[:2]
    alone = generate(model, tokenizer, prompts, max_new_tokens=5, choices=choices, share=False)
    tries = [None] * 3 if choices is None else [TokenTrie(c, END) for c in choices]
    by = [by_hand(model, p, 5, trie) for p, trie in zip(prompts, tries, strict=True)]
    assert got == alone == by
    if model.config.get_text_config().model_type == "llama":  # no windows: 40 once, 5 x 3 behind
        assert (first, second) == (40, 15)


@torch.no_grad()
def test_a_penalty_in_the_model_files_is_not_taken(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, model = tiny
    expected = by_hand(model, [20, 21], 5)
    for penalty in (0.1, 10.0):
        monkeypatch.setattr(model.generation_config, "repetition_penalty", penalty)
        assert generate(model, tokenizer, [[20, 21]], max_new_tokens=5) == [expected]


@torch.no_grad()
def test_held_to_a_list_each_row_writes_one_of_its_own(tiny: Any) -> None:
    tokenizer, model = tiny
    prompts = [[10, 11, 12, 13, 14, 15, 16, 17, 18], [20]]
    choices = [[[40, 41], [40, 42, 43], [50]], [[60], [60, 61]]]
    got = generate(model, tokenizer, prompts, max_new_tokens=1, choices=choices)
    for prompt, row, written in zip(prompts, choices, got, strict=True):
        assert written in row
        assert written == by_hand(model, prompt, 9, TokenTrie(row, END))


def test_a_trie_by_hand() -> None:
    trie = TokenTrie([[5, 6], [5, 7, 8], [5]], END)
    assert trie.after([]) == [5]
    assert trie.after([5]) == [END, 6, 7]
    assert trie.after([5, 7]) == [8]
    assert trie.after([5, 6]) == [END]
    assert trie.after([5, END]) == trie.after([9]) == [END]
    for bad in ([], [[5], []]):
        with pytest.raises(ValueError, match="at least one token"):
            TokenTrie(bad, END)


FILMS = ["Alien", "Aliens", "Heat (1995)", "Yes."]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Alien", 0),
        ('  "Alien" is my choice', 0),
        ("ALIENS!", 1),
        ("Alienation", None),
        ("Heat (1995)", 2),
        ("**Heat (1995)**", 2),
        ("heat  (1995), I think", 2),
        ("I would say Alien", None),
        ("Not Alien", None),
        ("Yes.", 3),
        ("Yes", None),
        ("", None),
    ],
)
def test_an_answer_is_what_a_text_begins_with(text: str, expected: int | None) -> None:
    assert match_answer(text, FILMS) == expected


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=8), max_size=4))
def test_matching_never_fails_and_finds_what_is_said_word_for_word(
    text: str, answers: list[str]
) -> None:
    found = match_answer(text, answers)
    assert found is None or 0 <= found < len(answers)


def test_the_share_of_texts_that_can_be_used() -> None:
    texts = ["Alien", "No idea", "heat (1995)"]
    assert valid_rate(texts, [FILMS] * 3) == pytest.approx(2 / 3)
    assert math.isnan(valid_rate([], []))
