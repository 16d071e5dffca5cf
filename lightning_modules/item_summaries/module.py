"""``ItemSummariesModule``: a frozen language model says in a sentence what an item is.

Legend: I items.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import polars as pl

from datamodules.types import ItemWords
from lightning_modules.item_summaries.base import WritesItemTexts
from lightning_modules.item_texts import Field, item_texts
from lightning_modules.llm.engines import Engine
from lightning_modules.llm.specs import BackboneSpec
from lightning_modules.llm.wording import capped


class ItemSummariesModule(WritesItemTexts):
    """Texts that a later stage reads in full whatever its room, and whose memory is bounded.

    Texts of at most ``max_new_tokens`` tokens stay as they are: a summary could only be longer. Of others the
    first ``text_tokens`` are shown. Where nothing is written an item has no summary, and is counted. Read a
    sample before you trust them: a small model also writes what no text says.

    Args:
        catalog, item_words: given by the runner from the data.
        llm, words, max_new_tokens, engine: see ``WritesItemTexts``.
        fields: of the catalogue, that a text is made of.
        text_tokens: of a text that are read, at most.

    Raises:
        ValueError: see ``WritesItemTexts``.
    """

    def __init__(
        self,
        catalog: pl.DataFrame,
        item_words: ItemWords | None,
        llm: BackboneSpec,
        fields: Sequence[Field] = ("title", "description"),
        words: int = 20,
        text_tokens: int = 256,
        max_new_tokens: int = 40,
        engine: Engine | None = None,
    ) -> None:
        super().__init__(item_words, llm, words, max_new_tokens, engine, text_tokens=text_tokens)
        self.texts = item_texts(catalog, fields)  # (I,)
        self.text_tokens = text_tokens

    @property
    def numbered(self) -> int:
        """I."""
        return len(self.texts)

    @cached_property
    def _read(self) -> tuple[list[str], list[int]]:
        """(I,) each text as it is read, and how many tokens it has."""
        return capped(self.texts, self.text_tokens, self.tokenizer)

    def is_asked(self, number: int) -> bool:
        """Whether a summary can be shorter than the text."""
        return self._read[1][number] > self.max_new_tokens

    def kept(self, number: int) -> str | None:
        """A short text, as it is."""
        return self.texts[number]

    def prompt(self, number: int) -> list[int]:
        """Tokens of what is asked about an item.

        Raises:
            ModelError: they and the answer are more than the language model reads.
        """
        asked = (
            f"Say in one sentence of at most {self.words} words what this {self.item_words.singular} is. Use "
            "only what the text says."
        )
        return self.laid_out(asked, f"Text: {self._read[0][number]}")

    def remarks(self) -> list[str]:
        """What became of the texts."""
        read = sum(length > self.text_tokens for length in self._read[1])
        told = (
            f"{len(self.written):,} of {self.numbered:,} texts have more than {self.max_new_tokens} "
            f"tokens and were summarised, {read:,} of them by their first {self.text_tokens} tokens"
        )
        return [told, *super().remarks()]
