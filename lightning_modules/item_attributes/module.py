"""``ItemAttributesModule``: a frozen vision-language model answers questions about an item's picture.

Legend: I items.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Literal, get_args

import polars as pl

from datamodules.types import ItemImages, ItemWords
from lightning_modules.item_attributes.answers import UNKNOWN, parsed, short_answer, told
from lightning_modules.item_pictures import ItemPicturesModule
from lightning_modules.llm.engines import Engine
from lightning_modules.llm.specs import VisionSpec

Asks = Literal["together", "apart"]
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
    it. What is still no answer is ``unknown``, and ``valid`` says so; ``unknown`` is always allowed.

    The table has ``text`` for later prompts (null where nothing is known), the values as JSON in
    ``attributes`` (null without a picture), and ``valid``.

    Args:
        item_words, item_images, llm, engine: see ``ItemPicturesModule``.
        attributes: the names, and what each is in words; ``{item}`` is what one item is called.
        asks: how.
        max_new_tokens: of an answer, at most.

    Raises:
        ValueError: no attributes, an unknown way to ask, or see ``ItemPicturesModule``.
    """

    def __init__(
        self,
        item_words: ItemWords | None,
        item_images: ItemImages,
        llm: VisionSpec,
        attributes: dict[str, str] | None = None,
        asks: Asks = "together",
        max_new_tokens: int = 96,
        engine: Engine | None = None,
    ) -> None:
        super().__init__(item_words, item_images, llm, max_new_tokens=max_new_tokens, engine=engine)
        if asks not in get_args(Asks):
            raise ValueError(f"asks is {asks!r}, expected one of {', '.join(get_args(Asks))}")
        self.attributes = ATTRIBUTES if attributes is None else dict(attributes)
        if not self.attributes:
            raise ValueError("attributes is empty: name at least one, such as {colour: its colour}")
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

    def question_apart(self, name: str) -> str:
        """For one attribute."""
        return (
            f"Look at the picture of this {self.item_words.singular} and say {self._meaning(name)}, in a few "
            f'words, or "{UNKNOWN}".'
        )

    def _meaning(self, name: str) -> str:
        return self.attributes[name].replace("{item}", self.item_words.singular)

    def prompt(self, number: int) -> list[int]:
        """Tokens of what is asked first about an item."""
        first = next(iter(self.attributes))
        together = self.asks == "together"
        return self.tokens_of(
            number, self.question_together(False) if together else self.question_apart(first)
        )

    # What is answered ----------------------------------------------------------------------------------

    def answers(self, numbers: Sequence[int]) -> list[str]:
        """JSON objects; "" where there was no answer."""
        found = self._together(numbers) if self.asks == "together" else self._apart(numbers)
        return ["" if one is None else json.dumps(one, ensure_ascii=False) for one in found]

    def _together(self, numbers: Sequence[int]) -> list[dict[str, str] | None]:
        names = list(self.attributes)
        first = self._asked(numbers, self.question_together(False))
        found = {n: parsed(text, names) for n, text in zip(numbers, first, strict=True)}
        if lost := [number for number, values in found.items() if values is None]:
            second = self._asked(lost, self.question_together(True))
            found |= {n: parsed(text, names) for n, text in zip(lost, second, strict=True)}
        return [found[number] for number in numbers]

    def _apart(self, numbers: Sequence[int]) -> list[dict[str, str] | None]:
        each = {name: self._asked(numbers, self.question_apart(name)) for name in self.attributes}
        found: list[dict[str, str] | None] = []
        for row in range(len(numbers)):
            values = {name: short_answer(texts[row]) for name, texts in each.items()}
            right = {name: value for name, value in values.items() if value is not None}
            found.append(right if len(right) == len(values) else None)
        return found

    def _asked(self, numbers: Sequence[int], question: str) -> list[str]:
        prompts = [self.tokens_of(number, question) for number in numbers]
        written = self.write(prompts, self.max_new_tokens, shown=self.shown(numbers))
        return [self.said(tokens) for tokens in written]

    # What is kept --------------------------------------------------------------------------------------

    @cached_property
    def values(self) -> list[dict[str, str] | None]:
        """(I,) of each item; None without a picture."""
        unknown = dict.fromkeys(self.attributes, UNKNOWN)
        return [
            (json.loads(self.written[n]) if self.written[n] else unknown)
            if n in self.written
            else None
            for n in range(self.numbered)
        ]

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
            "valid": pl.Series([bool(self.written.get(n)) for n in range(self.numbered)]),
        })  # fmt: skip

    def remarks(self) -> list[str]:
        """How many pictures were answered for, and how often an attribute is unknown."""
        lost = sum(not text for text in self.written.values())
        asked = [one for one in self.values if one is not None]
        rates = [
            f"{name} {sum(one[name] == UNKNOWN for one in asked) / len(asked):.0%}"
            for name in self.attributes
        ] if asked else []  # fmt: skip
        told_of = [f"unknown: {', '.join(rates)}"] if rates else []
        pictured = f"{len(self.written):,} of {self.numbered:,} items have a picture"
        return [f"{pictured}, {lost:,} of them without a valid answer", *told_of]
