"""What is asked about a picture, in several ways: a later stage asks in words of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from zlib import crc32

from lightning_modules.llm.layouts import answered
from lightning_modules.llm.pictures import PICTURE

# Instruction and input.
ASKED = (
    ("Describe the picture.", PICTURE),
    ("What does the picture show?", PICTURE),
    (f"{PICTURE}\nDescribe this picture in one sentence.", ""),
    ("Look at the picture and say what is in it.", f"Picture: {PICTURE}"),
)


def captioned(
    tokenizer: Any, chat_template: bool, caption: str, asked: Sequence[tuple[str, str]] = ASKED
) -> tuple[str, str]:
    """A prompt with one picture, and the caption as its answer; which one follows from the caption.

    Returns:
        The prompt, and what stands behind it with the token that ends it.
    """
    instruction, input_text = asked[crc32(caption.encode()) % len(asked)]
    return answered(tokenizer, chat_template, instruction, input_text, caption)
