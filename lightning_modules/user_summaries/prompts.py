"""What is asked about a user's events and about earlier notes; the wording is our own.

No prompt holds an id: a number says nothing about taste.
"""

from __future__ import annotations

from collections.abc import Sequence

from datamodules.types import ItemWords

_SHAPE = (
    "Write one paragraph of at most {words} words about kinds, themes and style. Do not list the {plural} "
    'and do not repeat their titles. Begin with "This person".'
)
DISLIKED = "(disliked) "  # before an item, where the data tell it


def first(items: Sequence[str], words: ItemWords, most: int) -> tuple[str, str]:
    """Instruction and input about events, oldest first, of somebody of whom nothing is known."""
    asked = (
        f"Somebody {words.past} these {words.plural}, the oldest first. Say what they like."
        f"{_marked(items)}"
    )
    return f"{asked} {_shape(words, most)}", _listed(items)


def next_block(items: Sequence[str], before: str, words: ItemWords, most: int) -> tuple[str, str]:
    """The same of somebody on whom there is a note."""
    asked = (
        f"There is a note on what somebody likes, and the {words.plural} that they {words.past} most "
        "recently, the oldest first. Write the note anew: keep what still holds, add what is new, and say "
        f"what has changed.{_marked(items)}"
    )
    return f"{asked} {_shape(words, most)}", f"Note: {before}\n\n{_listed(items)}"


def merged(notes: Sequence[str], words: ItemWords, most: int) -> tuple[str, str]:
    """Instruction and input about notes on consecutive times, oldest first."""
    asked = (
        f"These notes say what one person liked, from the {words.plural} that they {words.past} at one "
        "time and then at the next. Make one note of them: what stays the same, and what they like now. The "
        "newest note counts most."
    )
    return f"{asked} {_shape(words, most)}", _listed(notes)


def _marked(items: Sequence[str]) -> str:
    some = any(text.startswith(DISLIKED) for text in items)
    return " Those marked as disliked they did not like." if some else ""


def _shape(words: ItemWords, most: int) -> str:
    return _SHAPE.format(words=most, plural=words.plural)


def _listed(texts: Sequence[str]) -> str:
    return "\n".join(f"{number}. {text}" for number, text in enumerate(texts, start=1))
