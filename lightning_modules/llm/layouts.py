"""Instruction and input as one prompt: Alpaca's three parts, or the tokenizer's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from functools import lru_cache
from typing import Any

# The headers are the format that instruction-tuned adapters know (Taori et al., "Stanford Alpaca", 2023).
_ALPACA = (
    "An instruction and what it is about follow. Write the response.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT = (
    "An instruction follows. Write the response.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)

_INPUT = "### Input:\n"
_SHOWN = _INPUT + "{input}\n\n### Response:\n{answer}\n\n"

# Some templates (Llama-3's, SmolLM3's) write today's date: it is always this one, Llama-3's own default.
_DAY = date(2024, 7, 26)
# The templates' clock, as a macro of their own, which wins: transformers hands no functions to them.
_CODES = (
    "a",
    "A",
    "b",
    "B",
    "d",
    "-d",
    "e",
    "m",
    "-m",
    "y",
    "Y",
    "F",
    "j",
    "H",
    "I",
    "M",
    "S",
    "p",
)
_CLOCK = "{%- macro strftime_now(format) -%}{{ format"
_CLOCK += "".join(f"|replace('%{c}', '{_DAY.strftime(f'%{c}')}')" for c in _CODES)
_CLOCK += " }}{%- endmacro %}{{ '' }}"


def alpaca(instruction: str, input_text: str = "") -> str:
    """The prompt up to where the response begins."""
    layout = _ALPACA if input_text else _WITHOUT_INPUT
    return layout.format(instruction=instruction, input=input_text)


def chat(tokenizer: Any, instruction: str, input_text: str = "") -> str:
    """The same as one message of a user, in the tokenizer's chat template, up to where the answer begins."""
    turn = {"role": "user", "content": _content(instruction, input_text)}
    return _in_turns(tokenizer, [turn], asks=True)


def _in_turns(tokenizer: Any, messages: Sequence[dict[str, str]], asks: bool) -> str:
    """Messages in the tokenizer's chat template; with ``asks`` up to where an answer begins.

    Models that could think before they answer (Qwen3) are told not to: the answer is read or trained right
    behind the prompt. Templates that do not know the word pass over it. The same messages are the same text
    on any day.
    """
    template = getattr(tokenizer, "chat_template", None)
    reads_clock = isinstance(template, str) and "strftime_now" in template
    text: str = tokenizer.apply_chat_template(
        _as_taken(tokenizer, messages),
        tokenize=False,
        add_generation_prompt=asks,
        enable_thinking=False,
        date_string=_DAY.strftime("%d %b %Y"),
        **({"chat_template": _CLOCK + str(template)} if reads_clock else {}),
    )
    return text


def _as_taken(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """Messages with their texts as a template takes them: as they are, or in parts (vision-language models).

    A template of the other kind writes a text's letters one by one, or nothing, or the parts as Python does.
    """
    if _takes_texts(tokenizer, getattr(tokenizer, "chat_template", None)):
        return [*messages]
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


@lru_cache(maxsize=8)  # one rendering for each template, not one for each prompt
def _takes_texts(tokenizer: Any, template: Any) -> bool:
    """Whether a tokenizer's template shows contents that are texts; ``template`` is its template."""
    probe = "\ue0f1"
    asked = [{"role": "user", "content": probe}]
    return probe in tokenizer.apply_chat_template(asked, tokenize=False)


def _content(instruction: str, input_text: str) -> str:
    return f"{instruction}\n\n{input_text}" if input_text else instruction


def lay_out(tokenizer: Any, chat_template: bool, instruction: str, input_text: str = "") -> str:
    """``chat`` or ``alpaca``."""
    if chat_template:
        return chat(tokenizer, instruction, input_text)
    return alpaca(instruction, input_text)


def lay_out_shown(
    tokenizer: Any,
    chat_template: bool,
    instruction: str,
    shown: Sequence[tuple[str, str]],
    input_text: str,
) -> str:
    """An instruction, answered inputs as (input, answer), and the input that is asked about.

    As Brown et al., "Language Models are Few-Shot Learners", NeurIPS 2020 (arXiv 2005.14165): the task is
    told once, before the first input. In a chat every input is a message of the user and every answer one of
    the assistant, which the template shows as it shows earlier turns (Qwen3's: without a block of thoughts).
    """
    if not shown:
        return lay_out(tokenizer, chat_template, instruction, input_text)
    if not chat_template:
        before = "".join(_SHOWN.format(input=i, answer=a) for i, a in shown)
        return alpaca(instruction, before.removeprefix(_INPUT) + _INPUT + input_text)
    inputs = [f"{instruction}\n\n{shown[0][0]}", *(i for i, _ in shown[1:])]
    messages = [
        message
        for asked, (_, answer) in zip(inputs, shown, strict=True)
        for message in (
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answer},
        )
    ]
    return _in_turns(tokenizer, [*messages, {"role": "user", "content": input_text}], asks=True)


def answered(
    tokenizer: Any, chat_template: bool, instruction: str, input_text: str, output: str
) -> tuple[str, str]:
    """The prompt of ``lay_out``, and the response behind it with the token that ends it."""
    prompt = lay_out(tokenizer, chat_template, instruction, input_text)
    if chat_template:
        turns = [
            {"role": "user", "content": _content(instruction, input_text)},
            {"role": "assistant", "content": output},
        ]
        whole = _in_turns(tokenizer, turns, asks=False)
        if whole.startswith(prompt):  # some templates open an answer otherwise than they show one
            return prompt, whole[len(prompt) :].rstrip()
    return prompt, output + (tokenizer.eos_token or "")
