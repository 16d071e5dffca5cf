"""MLLM-MSR's question in words: what somebody likes, one more item, and would they take it?

Ye et al., AAAI 2025 (arXiv 2408.09698): the fields of its recommender's prompt, with wording of our own. A
prompt has a part that knows the user and one that knows the candidate: each is cut into tokens once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from datamodules.types import ItemWords
from lightning_modules.llm.pictures import PICTURE

# Private code points that no text has: who is meant, and where a prompt is cut in two.
USER, CANDIDATE, BETWEEN = "\ue000", "\ue001", "\ue002"


@dataclass(frozen=True)
class PairPrompt:
    """Turns a user and a candidate into a prompt's two parts.

    Args:
        words: what items are called.
        candidate_first: show the candidate before the user, as published; else every prompt of a user begins
            with the same words.
    """

    words: ItemWords
    candidate_first: bool = False

    def instruction(self) -> str:
        """What is asked of everybody."""
        return (
            f"Read what somebody likes, and about one {self.words.singular} that they have not "
            f"{self.words.past} yet. Decide whether they will {self.words.present} it next. Answer "
            '"Yes." or "No." and nothing else.'
        )

    def preference(self, text: str) -> str:
        """A user whose taste is told; "" where nothing is known."""
        return f"What they like: {text or 'nothing is known of them'}"

    def history(self, titles: Sequence[str]) -> str:
        """A user whose items are listed, the oldest first."""
        shown = ", ".join(f'"{title}"' for title in titles) or "nothing so far"
        return f"What they have {self.words.past}, the oldest first: {shown}"

    def candidate(self, title: str, details: str = "", pictured: bool = False) -> str:
        """The item asked about, what else is known of it, and its picture: first where it comes first."""
        told = [f'One {self.words.singular}: "{title}"']
        told += [f"About it: {details}"] if details else []
        shown = [f"Its picture: {PICTURE}"] if pictured else []
        return "\n".join(shown + told if self.candidate_first else told + shown)

    def marked(self) -> str:
        """All but the instruction, with marks in place of user and candidate, and where the parts meet."""
        first, second = (CANDIDATE, USER) if self.candidate_first else (USER, CANDIDATE)
        return f"{first}\n{BETWEEN}{second}\nWill they {self.words.present} it next?"
