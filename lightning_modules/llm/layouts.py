"""Instruction and input as one prompt: Alpaca's three parts, or the tokenizer's own chat template."""

from __future__ import annotations

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


def alpaca(instruction: str, input_text: str = "") -> str:
    """The prompt up to where the response begins."""
    layout = _ALPACA if input_text else _WITHOUT_INPUT
    return layout.format(instruction=instruction, input=input_text)


def chat(tokenizer: Any, instruction: str, input_text: str = "") -> str:
    """The same as one message of a user, in the tokenizer's chat template, up to where the answer begins."""
    content = f"{instruction}\n\n{input_text}" if input_text else instruction
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return text


def lay_out(tokenizer: Any, chat_template: bool, instruction: str, input_text: str = "") -> str:
    """``chat`` or ``alpaca``."""
    if chat_template:
        return chat(tokenizer, instruction, input_text)
    return alpaca(instruction, input_text)
