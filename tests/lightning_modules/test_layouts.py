"""Prompts of models that think unless they are told not to: what is trained is what is asked."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from lightning_modules.llm.instruction_tokens import prompt_and_answer
from lightning_modules.llm.layouts import answered, lay_out, lay_out_shown
from tests.lightning_modules.tiny_llm import write_tiny_tokenizer

BLOCK = "<think>\n\n</think>\n\n"
# As Qwen3's: an empty block of thoughts before the newest answer, before none of the earlier ones, and in a
# question where thinking is off; without that word the model opens a block of its own.
QWEN3 = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{- m.content + '<|im_end|>\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
WITHOUT_BLOCK = QWEN3.replace("and loop.last", "and false")  # which shows no answer with its block
TEXTS = [("Will they like it?", "Heat", "Yes."), ("Say no.", "", "No.")]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    made = write_tiny_tokenizer(tmp_path)
    made.chat_template = QWEN3
    return made


def test_a_question_ends_with_an_empty_block_of_thoughts(tokenizer: Any) -> None:
    turn = "<|im_start|>user\nWill they like it?\n\nHeat<|im_end|>\n<|im_start|>assistant\n"
    assert lay_out(tokenizer, True, "Will they like it?", "Heat") == turn + BLOCK


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_trained_begins_with_what_is_asked(
    tokenizer: Any, text: tuple[str, str, str]
) -> None:
    prompt, answer = answered(tokenizer, True, *text)
    assert prompt == lay_out(tokenizer, True, *text[:2])
    assert answer == f"{text[2]}<|im_end|>"  # no thoughts are trained
    ((asked, said),) = prompt_and_answer(tokenizer, True, [text])
    assert asked == tokenizer(lay_out(tokenizer, True, *text[:2]))["input_ids"]
    assert tokenizer.decode(asked + said) == prompt + answer


def test_a_template_that_shows_answers_otherwise_is_still_asked_alike(tokenizer: Any) -> None:
    tokenizer.chat_template = WITHOUT_BLOCK
    prompt, answer = answered(tokenizer, True, *TEXTS[0])
    assert prompt == lay_out(tokenizer, True, *TEXTS[0][:2])
    assert prompt.endswith(BLOCK)
    assert answer == "Yes.</s>"


def test_shown_answers_are_earlier_turns_of_the_template(tokenizer: Any) -> None:
    shown = [("Jaws", "No."), ("Alien", "Yes.")]
    assert lay_out_shown(tokenizer, True, "Will they?", shown, "Heat") == (
        "<|im_start|>user\nWill they?\n\nJaws<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n"
        "<|im_start|>user\nAlien<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
        f"<|im_start|>user\nHeat<|im_end|>\n<|im_start|>assistant\n{BLOCK}"
    )


def test_a_template_that_does_not_know_the_word_passes_over_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = write_tiny_tokenizer(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = lay_out(plain, True, "Will they?", "Heat")
    assert found == "<|user|>Will they?\n\nHeat</s><|assistant|>"
    assert capfd.readouterr().err == ""
