"""What is asked about a user's events and about earlier notes; the wording is our own.

No prompt holds an id: a number says nothing about taste.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from datamodules.types import ItemWords

DISLIKED = "(disliked) "  # before an item, where the data tell it


@dataclass(frozen=True)
class WorkedNote:
    """A note that shows the model what is wanted: a small model copies a form that it cannot be told.

    Args:
        items: as prompts show them, the oldest first; none of them should be the catalogue's.
        note: what is written of them.
        before: the note that was there; without one the example shows how a first note is written.

    Raises:
        ValueError: there are no items, or no note.
    """

    items: tuple[str, ...]
    note: str
    before: str = ""

    def __post_init__(self) -> None:
        if not self.items or not self.note.strip():
            raise ValueError("a worked note needs items, and the note on them")


class Asked(NamedTuple):
    """One call: what is asked of every input, worked inputs and their answers, and the input."""

    instruction: str
    shown: list[tuple[str, str]]
    input: str


@dataclass(frozen=True)
class NotePrompts:
    """Asks for notes.

    Args:
        words: what items are called.
        most: words of a note, at most.
        about: what a note is about.
        examples: worked notes; each is shown where a note of its kind, first or later, is asked for.
    """

    words: ItemWords
    most: int
    about: str
    examples: tuple[WorkedNote, ...] = ()

    def first(self, items: Sequence[str]) -> Asked:
        """About events, oldest first, of somebody of whom nothing is known."""
        told = f"Somebody {self.words.past} these {self.words.plural}, the oldest first."
        shown = [(_listed(e.items), e.note) for e in self.examples if not e.before]
        wish = (
            self._in_a_sentence()
            if shown
            else f"Say what they like.{_marked(items)} {self._shape()}"
        )
        return Asked(f"{told} {wish}", shown, _listed(items))

    def next_block(self, items: Sequence[str], before: str) -> Asked:
        """The same of somebody on whom there is a note."""
        told = (
            f"There is a note on what somebody likes, and the {self.words.plural} that they "
            f"{self.words.past} most recently, the oldest first."
        )
        shown = [(_behind(e.before, e.items), e.note) for e in self.examples if e.before]
        wish = (
            f"Write the note anew with the {self.about} that they like."
            if shown
            else "Write the note anew: keep what still holds, add what is new, and say what has changed."
            f"{_marked(items)} {self._shape()}"
        )
        return Asked(f"{told} {wish}", shown, _behind(before, items))

    def merged(self, notes: Sequence[str]) -> Asked:
        """Notes on consecutive times, oldest first."""
        told = (
            f"These notes say what one person liked, from the {self.words.plural} that they "
            f"{self.words.past} at one time and then at the next. Make one note of them: what stays the "
            "same, and what they like now. The newest note counts most."
        )
        return Asked(f"{told} {self._shape()}", [], _listed(notes))

    def _in_a_sentence(self) -> str:
        return f"Say in one sentence which {self.about} they like."

    def _shape(self) -> str:
        return (
            f"Write one paragraph of at most {self.most} words about {self.about}. Do not list the "
            f'{self.words.plural} and do not repeat their titles. Begin with "This person".'
        )


def _marked(items: Sequence[str]) -> str:
    some = any(text.startswith(DISLIKED) for text in items)
    return " Those marked as disliked they did not like." if some else ""


def _behind(note: str, items: Sequence[str]) -> str:
    return f"Note: {note}\n\n{_listed(items)}"


def _listed(texts: Sequence[str]) -> str:
    return "\n".join(f"{number}. {text}" for number, text in enumerate(texts, start=1))
