"""The words of data and of others in a prompt: what items are called, and texts that stay data."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from datamodules.types import ItemWords

_PRIVATE = "[\ue000-\uf8ff]"  # code points that no text has; prompts mark places with them
# Texts: a tokenizer takes 160 bytes a token, and a catalogue's descriptions are millions.
AT_ONCE = 256


def as_data(texts: Sequence[str], tokenizer: Any) -> list[str]:
    """Texts of others, each as one line that can end neither its quotes nor the message it stands in."""
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    names = map(re.escape, sorted(special, key=len, reverse=True))
    marks = re.compile("|".join([_PRIVATE, *names]))
    return [" ".join(marks.sub(" ", text).replace('"', "'").split()) for text in texts]


def capped(texts: Sequence[str], most: int, tokenizer: Any) -> tuple[list[str], list[int]]:
    """Texts of others as prompts show them (``as_data``), each cut to at most ``most`` tokens.

    Returns:
        The texts, and how many tokens each has without the cap.
    """
    plain = as_data(texts, tokenizer)
    lengths = [len(ids) for ids in token_ids(tokenizer, plain)]
    return cut_to(tokenizer, plain, [most] * len(plain)), lengths


def cut_to(tokenizer: Any, texts: Sequence[str], rooms: Sequence[int]) -> list[str]:
    """Texts of at most so many tokens each, on one line where they are cut; others stay as they are."""
    # No token is shorter than a byte: most texts need not be cut into tokens to know that they fit.
    pairs = enumerate(zip(texts, rooms, strict=True))
    long = [i for i, (text, room) in pairs if len(text.encode()) > room]
    found, less = list(texts), 0
    while long:
        made = token_ids(tokenizer, [found[i] for i in long])
        over = []
        for i, ids in zip(long, made, strict=True):
            if len(ids) > max(0, rooms[i]):
                over.append(i)
                whole = str(tokenizer.decode(ids[: max(0, rooms[i] - less)]))
                # Of the last token perhaps a part is left.
                found[i] = " ".join(whole.rstrip("\ufffd").split())
        # What was cut may be cut into other, more tokens.
        long, less = over, less + 1
    return found


def token_ids(tokenizer: Any, texts: Sequence[str], **options: Any) -> Iterator[list[int]]:
    """Tokens of each text, without special ones unless asked for; ``AT_ONCE`` texts are held at a time."""
    options = {"add_special_tokens": False, "verbose": False, **options}
    for at in range(0, len(texts), AT_ONCE):
        yield from tokenizer(list(texts[at : at + AT_ONCE]), **options)["input_ids"]


def required_words(words: ItemWords | None) -> ItemWords:
    """The data's words; raises ValueError where there are none: a prompt would lack its question."""
    if words is None:
        raise ValueError(
            "the data do not say what their items are called: give the data config words, such as {_target_: "
            "datamodules.types.ItemWords, singular: film, plural: films, present: watch, past: watched}"
        )
    return words
