"""The words of data and of others in a prompt: what items are called, and texts that stay data."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from datamodules.types import ItemWords

_PRIVATE = "[\ue000-\uf8ff]"  # code points that no text has; prompts mark places with them


def as_data(texts: Sequence[str], tokenizer: Any) -> list[str]:
    """Texts of others, each as one line that can end neither its quotes nor the message it stands in."""
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    names = map(re.escape, sorted(special, key=len, reverse=True))
    marks = re.compile("|".join([_PRIVATE, *names]))
    return [" ".join(marks.sub(" ", text).replace('"', "'").split()) for text in texts]


def capped(texts: Sequence[str], most: int, tokenizer: Any) -> tuple[list[str], list[int]]:
    """Texts of others as prompts show them (``as_data``), each by its first ``most`` tokens.

    Returns:
        The texts, and how many tokens each has without the cap.
    """
    if not texts:
        return [], []
    tokens = tokenizer(list(texts), add_special_tokens=False, verbose=False)[
        "input_ids"
    ]  # (B) lists
    shown = [
        # Of the last token perhaps a part: a letter may be several tokens.
        tokenizer.decode(ids[:most]).rstrip("\ufffd") if len(ids) > most else text
        for text, ids in zip(texts, tokens, strict=True)
    ]
    return as_data(shown, tokenizer), [len(ids) for ids in tokens]


def required_words(words: ItemWords | None) -> ItemWords:
    """The data's words; raises ValueError where there are none: a prompt would lack its question."""
    if words is None:
        raise ValueError(
            "the data do not say what their items are called: give the data config words, such as {_target_: "
            "datamodules.types.ItemWords, singular: film, plural: films, present: watch, past: watched}"
        )
    return words
