"""TALLRec's question in words: what was liked, what was not, and would this be liked?

Bao et al., "TALLRec", RecSys 2023 (arXiv 2305.00447): its three parts (instruction, input, response), with
wording of our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from lightning_modules.item_texts import without_years

LABELS = ("Yes.", "No.")
Probe = Literal["none", "shuffled", "no_history", "swapped", "masked"]
_NOTHING = "nothing so far"


@dataclass(frozen=True)
class Question:
    """One question; items as they are shown, oldest first."""

    liked: tuple[str, ...]
    disliked: tuple[str, ...]
    target: str
    domain: str = ""  # of the item asked about, where data have several


@dataclass(frozen=True)
class YesNoPrompt:
    """Turns questions into the two texts that a layout (Alpaca's or a chat's) puts together.

    Args:
        singular: what one item is called: film, book, product.
        plural: what several are called.
        counts: also say how many of the items shown were liked: a small model does not count them by itself.

    Raises:
        ValueError: a name is blank.
    """

    singular: str = "film"
    plural: str = "films"
    counts: bool = False

    def __post_init__(self) -> None:
        if not self.singular.strip() or not self.plural.strip():
            raise ValueError(
                "an item needs a name: give singular and plural, such as book and books"
            )

    def instruction(self) -> str:
        """What is asked of everybody."""
        return (
            f"Somebody has told us which {self.plural} they liked and which they disliked. Decide whether "
            f'they will like one more {self.singular}. Answer "Yes." or "No." and nothing else.'
        )

    def input(self, question: Question) -> str:
        """What is known of one person, and the item asked about."""
        liked, shown = len(question.liked), len(question.liked) + len(question.disliked)
        counted = f"They liked {liked} of {shown} {self.plural}. " if self.counts else ""
        return (
            f"Liked: {_listed(question.liked)}\n"
            f"Disliked: {_listed(question.disliked)}\n"
            f'{counted}Will they like the {self.singular} "{question.target}"?'
        )


def _listed(items: Sequence[str]) -> str:
    return ", ".join(f'"{item}"' for item in items) or _NOTHING


def probed(
    question: Question, probe: Probe, prompt: YesNoPrompt, seed: tuple[int, ...]
) -> Question:
    """The question without what a probe takes away.

    ``shuffled``: the lists in another order; ``no_history``: both empty; ``swapped``: likes as dislikes and
    the other way round; ``masked``: numbers in place of names, the same item the same number. A model that
    reads histories loses by the second, and turns round under the third.

    Args:
        question: as it is.
        probe: what is taken away.
        prompt: what items are called.
        seed: of the order; the same question is always shuffled in the same way.
    """
    if probe == "no_history":
        return replace(question, liked=(), disliked=())
    if probe == "swapped":
        return replace(question, liked=question.disliked, disliked=question.liked)
    if probe == "shuffled":
        random = np.random.default_rng(seed)
        liked, disliked = (
            tuple(items[i] for i in random.permutation(len(items)))
            for items in (question.liked, question.disliked)
        )
        return replace(question, liked=liked, disliked=disliked)
    if probe == "masked":
        named = [*question.liked, *question.disliked, question.target]
        number = {name: f"{prompt.singular} {i}" for i, name in enumerate(dict.fromkeys(named), 1)}
        return replace(
            question,
            liked=tuple(number[i] for i in question.liked),
            disliked=tuple(number[i] for i in question.disliked),
            target=number[question.target],
        )
    return question


def shown_items(
    titles: Sequence[str], creators: Sequence[str | None] | None = None, years: bool = True
) -> list[str]:
    """(I + 1,) what prompts call each item: its title, and who made it where that is known.

    Args:
        titles: (I + 1,).
        creators: (I + 1,) author or director; None shows titles alone.
        years: keep the year that a title ends with in brackets; without them see ``without_years``.
    """
    if not years:
        titles = without_years(titles)
    if creators is None:
        return list(titles)
    pairs = zip(titles, creators, strict=True)
    return [f"{title} by {creator}" if creator else title for title, creator in pairs]
