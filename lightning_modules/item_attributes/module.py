"""``ItemAttributesModule``: a frozen vision-language model answers questions about an item's picture.

Legend: I items.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, Literal, TypeVar, get_args

import polars as pl

from datamodules.types import ItemImages, ItemWords
from lightning_modules.item_attributes.answers import UNKNOWN, parsed, short_answer, told
from lightning_modules.item_pictures import ItemPicturesModule
from lightning_modules.llm.engines import Engine
from lightning_modules.llm.specs import VisionSpec

Asks = Literal["together", "apart"]
Found = TypeVar("Found")
# The paper names category, colour and brand, and features; these are what we take them to be.
ATTRIBUTES = {
    "category": "what kind of {item} it is",
    "colour": "its main colours",
    "brand": "a brand name or logo that can be read on it",
    "material": "what it is made of",
    "use": "what it is for",
}


class ItemAttributesModule(ItemPicturesModule):
    """MLLM-SRec's image understanding by questions (VIU, s41598-025-14251-1), not by free descriptions.

    ``together`` asks once for a JSON object of all attributes; an answer that is none, or has other fields,
    is asked for once more in other words. ``apart`` asks a question for each attribute, as small models need
    it, and once more where the answer is more than a few words. What is still no answer is ``unknown``, and
    ``valid`` says so; ``unknown`` is always allowed.

    The table has ``text`` for later prompts (null where nothing is known), the values as JSON in
    ``attributes`` (null without a picture), and ``valid``.

    Args:
        item_words, item_images, llm, engine: see ``ItemPicturesModule``.
        attributes: the names, and what each is in words; ``{item}`` is what one item is called.
        asks: how.
        max_new_tokens: of an answer, at most.
        question: is asked ``apart`` in place of our own words, which a model may have been aligned with;
            ``{asked}`` in it is what an attribute is in words.

    Raises:
        ValueError: no attributes, an unknown way to ask, a question that cannot tell attributes apart or is
            not asked ``apart``, or see ``ItemPicturesModule``.
    """

    def __init__(
        self,
        item_words: ItemWords | None,
        item_images: ItemImages,
        llm: VisionSpec,
        attributes: dict[str, str] | None = None,
        asks: Asks = "together",
        max_new_tokens: int = 96,
        question: str | None = None,
        engine: Engine | None = None,
    ) -> None:
        super().__init__(item_words, item_images, llm, max_new_tokens=max_new_tokens, engine=engine)
        if asks not in get_args(Asks):
            raise ValueError(f"asks is {asks!r}, expected one of {', '.join(get_args(Asks))}")
        self.attributes = ATTRIBUTES if attributes is None else dict(attributes)
        if not self.attributes:
            raise ValueError("attributes is empty: name at least one, such as {colour: its colour}")
        if question is not None and asks != "apart":
            raise ValueError("question is asked attribute by attribute: take asks=apart")
        if question is not None and len(self.attributes) > 1 and "{asked}" not in question:
            raise ValueError(
                f"question is the same for all of {', '.join(self.attributes)}: write {{asked}} where each "
                "is to stand, or name one"
            )
        self._apart = question or (
            f"Look at the picture of this {self.item_words.singular} and say {{asked}}, in a few words, or "
            f'"{UNKNOWN}".'
        )
        self.asks = asks

    # What is asked -------------------------------------------------------------------------------------

    def question_together(self, again: bool) -> str:
        """For a JSON object; ``again`` after an answer that was none."""
        item = self.item_words.singular
        wanted = "\n".join(f'"{name}": {self._meaning(name)}' for name in self.attributes)
        asked = (
            f"Look at the picture of this {item} and fill in a JSON object with exactly these fields. Write "
            f'"{UNKNOWN}" where the picture does not show it.\n{wanted}\nAnswer with the object alone.'
        )
        example = json.dumps(dict.fromkeys(self.attributes, "..."))
        return f"{asked} It must look like this: {example}" if again else asked

    def question_apart(self, name: str, again: bool) -> str:
        """For one attribute; ``again`` after an answer that was too long."""
        asked = self._apart.replace("{asked}", self._meaning(name))
        return f"{asked} Answer in three words at most." if again else asked

    def _meaning(self, name: str) -> str:
        return self.attributes[name].replace("{item}", self.item_words.singular)

    def prompt(self, number: int) -> list[int]:
        """Tokens of what is asked first about an item."""
        first = next(iter(self.attributes))
        together = self.asks == "together"
        return self.tokens_of(
            number, self.question_together(False) if together else self.question_apart(first, False)
        )

    # What is answered ----------------------------------------------------------------------------------

    def answers(self, numbers: Sequence[int]) -> list[str]:
        """JSON objects of what was answered; "" where nothing was."""
        found: list[Any]
        if self.asks == "together":
            found = self._answered(numbers, self.question_together, self._object)
        else:
            found = [{} for _ in numbers]
            for name in self.attributes:
                ask = partial(self.question_apart, name)
                said = self._answered(numbers, ask, short_answer)
                for known, value in zip(found, said, strict=True):
                    known |= {} if value is None else {name: value}
        return [json.dumps(one, ensure_ascii=False) if one else "" for one in found]

    def _object(self, text: str) -> dict[str, str] | None:
        return parsed(text, list(self.attributes))

    def _answered(
        self,
        numbers: Sequence[int],
        ask: Callable[[bool], str],
        read: Callable[[str], Found | None],
    ) -> list[Found | None]:
        """(B,) what is read of the answers; what cannot be read is asked for once more."""
        first = self._asked(numbers, ask(False))
        found = {n: read(text) for n, text in zip(numbers, first, strict=True)}
        if lost := [number for number, value in found.items() if value is None]:
            second = self._asked(lost, ask(True))
            found |= {n: read(text) for n, text in zip(lost, second, strict=True)}
        return [found[number] for number in numbers]

    def _asked(self, numbers: Sequence[int], question: str) -> list[str]:
        prompts = [self.tokens_of(number, question) for number in numbers]
        written = self.write(prompts, self.max_new_tokens, shown=self.shown(numbers))
        return [self.said(tokens) for tokens in written]

    # What is kept --------------------------------------------------------------------------------------

    @cached_property
    def answered(self) -> dict[int, dict[str, str]]:
        """What was answered for each item that has a picture."""
        return {n: json.loads(text) if text else {} for n, text in self.written.items()}

    @cached_property
    def values(self) -> list[dict[str, str] | None]:
        """(I,) of each item; None without a picture."""
        unknown = dict.fromkeys(self.attributes, UNKNOWN)
        return [
            unknown | self.answered[n] if n in self.answered else None for n in range(self.numbered)
        ]

    def _is_valid(self, number: int) -> bool:
        """Whether all was answered."""
        return len(self.answered.get(number, {})) == len(self.attributes)

    def table(self) -> pl.DataFrame:
        """``item``, ``text``, ``attributes`` and ``valid``, see the class."""
        known = [
            None if one is None else json.dumps(one, ensure_ascii=False) for one in self.values
        ]
        texts = [told(one or {}) or None for one in self.values]
        return pl.DataFrame({
            "item": pl.Series(range(1, self.numbered + 1), dtype=pl.Int64),
            "text": pl.Series(texts, dtype=pl.String),
            "attributes": pl.Series(known, dtype=pl.String),
            "valid": pl.Series([self._is_valid(n) for n in range(self.numbered)]),
        })  # fmt: skip

    def remarks(self) -> list[str]:
        """How many pictures were answered for, and how often an attribute is unknown."""
        lost = sum(not self._is_valid(number) for number in self.answered)
        asked = [one for one in self.values if one is not None]
        rates = [
            f"{name} {sum(one[name] == UNKNOWN for one in asked) / len(asked):.0%}"
            for name in self.attributes
        ] if asked else []  # fmt: skip
        told_of = [f"unknown: {', '.join(rates)}"] if rates else []
        pictured = f"{len(self.written):,} of {self.numbered:,} items have a picture"
        return [f"{pictured}, {lost:,} of them without a valid answer", *told_of]
