"""Prompts of models that think unless they are told not to: what is trained is what is asked."""

from __future__ import annotations

import warnings
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.utils import chat_template_utils

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
# As Llama-3.2's: today, unless a date is given.
LLAMA3 = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}"
    "{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}"
    "Today Date: {{ date_string }}\n{% for m in messages %}{{ m['content'] }}{% endfor %}"
)
# As SmolLM3's and gpt-oss': today, whatever is given.
SMOLLM3 = (
    "\n {%- macro head() %}Today Date: {{ strftime_now('%d %b %Y') }} ({{ strftime_now('%Y-%m-%d') }})"
    "\n{% endmacro %}{{ head() }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
)
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


@pytest.mark.parametrize("template", [LLAMA3, SMOLLM3])
def test_a_prompt_is_the_same_on_any_day(
    tokenizer: Any, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.chat_template = template
    turn = [{"role": "user", "content": "Will they?\n\nHeat"}]
    found, left_alone = [], []
    for day in (datetime(2023, 1, 2), datetime(2031, 11, 30)):
        clock = SimpleNamespace(now=lambda day=day: day)
        monkeypatch.setattr(chat_template_utils, "datetime", clock)
        left_alone.append(tokenizer.apply_chat_template(turn, tokenize=False))
        found.append(lay_out(tokenizer, True, "Will they?", "Heat"))
    assert left_alone[0] != left_alone[1]
    assert found[0] == found[1]
    monkeypatch.setattr(
        chat_template_utils, "datetime", SimpleNamespace(now=lambda: datetime(2024, 7, 26))
    )
    assert found[0] == tokenizer.apply_chat_template(turn, tokenize=False)
    assert found[0].startswith("Today Date: 26 Jul 2024")
