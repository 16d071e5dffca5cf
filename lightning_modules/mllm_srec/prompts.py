"""MLLM-SRec's question in words: who somebody is, what they like, one more item, and would they like it?

Sci. Rep. 2025 (s41598-025-14251-1), Table 1: its fields (instruction; user, profile, preference, target as
image and text; response), with wording of our own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_modules.llm.pictures import PICTURE
from lightning_modules.mllm_msr.prompts import BETWEEN, CANDIDATE, USER, PairPrompt

Step = Literal[
    "picture", "fusion"
]  # of a candidate: columns of the catalogue that earlier stages wrote
PREFERENCE = "preference"  # the step about the user
HEADINGS = {"picture": "What its picture shows", "fusion": "In short", PREFERENCE: "What they like"}


@dataclass(frozen=True)
class SRecPrompt(PairPrompt):
    """Turns a user and a candidate into a prompt's two parts.

    With ``chain`` the steps that lead to the answer are numbered as they follow one another: the candidate's
    (VIU, IMSG), the user's (TUBC), then the question. That is the paper's order, and needs
    ``candidate_first``; else the user's step is the first, so that it is read once for all candidates.

    Args:
        words, candidate_first: see ``PairPrompt``.
        chain: a candidate's steps; None numbers nothing.
        in_one: the steps are not told: the model is asked to write them itself.
        preferred: with ``in_one`` the user's step is one of them.
    """

    chain: tuple[Step, ...] | None = None
    in_one: bool = False
    preferred: bool = True

    @property
    def written(self) -> tuple[str, ...]:
        """Steps that the model writes itself, in the paper's order."""
        if not self.in_one:
            return ()
        return (*(self.chain or ()), *((PREFERENCE,) if self.preferred else ()))

    def instruction(self) -> str:
        """What is asked of everybody."""
        task = f"Infer from what is known of somebody whether they will like one more {self.words.singular}."
        if self.written:
            return f"{task} Write your reasons as numbered lines, then the answer."
        through = (
            " The numbered notes lead to it." if self.chain is not None and not self.in_one else ""
        )
        return f'{task}{through} Answer "Yes." or "No." and nothing else.'

    # Numbers -------------------------------------------------------------------------------------------

    def _numbered(self, step: str, text: str) -> str:
        """A line with its step's number, where steps are numbered."""
        if self.chain is None or self.in_one:
            return text
        return f"{self.numbers[step]}. {text}"

    @property
    def numbers(self) -> dict[str, int]:
        """Of the steps, in the order in which they follow one another; "" is the question."""
        own = self.chain or ()
        first = self.in_one or self.candidate_first
        order = self.written if self.in_one else (*own, PREFERENCE) if first else (PREFERENCE, *own)
        return {step: number for number, step in enumerate((*order, ""), start=1)}

    # Parts ---------------------------------------------------------------------------------------------

    def preference(self, text: str) -> str:
        """A user whose taste is told; "" where nothing is known."""
        return self._numbered(PREFERENCE, super().preference(text))

    def history(self, titles: Sequence[str]) -> str:
        """A user whose items are listed, the oldest first."""
        shown = "; ".join(f"({n}) {text}" for n, text in enumerate(titles, 1)) or "nothing so far"
        told = f"What they {self.words.past}, the oldest first: {shown}"
        return self._numbered(PREFERENCE, told)

    def item(self, title: str | None, pictured: bool, notes: Mapping[str, str]) -> str:
        """The target as image and text, and what earlier steps found out about it.

        Args:
            title: None where nothing that is written of items is told.
            pictured: whether its picture is shown.
            notes: by step; "" where a step has nothing.
        """
        named = (
            f'One {self.words.singular}: "{title}"'
            if title is not None
            else f"One {self.words.singular}"
        )
        shown = [f"Its picture: {PICTURE}"] if pictured else []
        lines = [*shown, named] if self.candidate_first else [named, *shown]
        if self.chain is not None and not self.in_one:
            told = ((step, notes.get(step) or "unknown") for step in self.chain)
            lines += [self._numbered(step, f"{HEADINGS[step]}: {text}") for step, text in told]
        return "\n".join(lines)

    def marked(self) -> str:
        """All but the instruction, with marks in place of user and candidate, and where the parts meet."""
        first, second = (CANDIDATE, USER) if self.candidate_first else (USER, CANDIDATE)
        question = self._numbered("", "Will they like it?")
        if self.written:
            lines = [f"{self.numbers[step]}. {HEADINGS[step]}: ..." for step in self.written]
            asked = [f"{self.numbers['']}. Yes. or No."]
            question = "\n".join(
                [f"{question} Write these lines, one sentence each:", *lines, *asked]
            )
        return f"{first}\n{BETWEEN}{second}\n{question}"

    # The lines that the model writes -------------------------------------------------------------------

    def opening(self) -> str:
        """What the response begins with, whoever writes it."""
        return f"1. {HEADINGS[self.written[0]]}:"

    def response(self, notes: Mapping[str, str]) -> str:
        """The lines as earlier stages would write them: what a fit teaches."""
        each = ((step, notes.get(step) or "unknown") for step in self.written)
        return "\n".join(f"{self.numbers[step]}. {HEADINGS[step]}: {text}" for step, text in each)

    def last_line(self) -> str:
        """What the last line begins with: nothing behind it is a reason."""
        return f"\n{self.numbers['']}."

    def closing(self) -> str:
        """What stands between the reasons and the answer."""
        return f"{self.last_line()} Will they like it (Yes. or No.)?\n"
