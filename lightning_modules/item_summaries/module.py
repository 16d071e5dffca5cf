"""``ItemSummariesModule``: a frozen language model says in a sentence what an item is.

Legend: B items of a batch, I items.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

import polars as pl
from torch import Tensor

from datamodules.types import ItemWords
from lightning_modules.errors import ModelError
from lightning_modules.generations import Generations
from lightning_modules.item_texts import Field, item_texts
from lightning_modules.llm.layouts import lay_out
from lightning_modules.llm.specs import AdapterSpec, BackboneSpec
from lightning_modules.llm.wording import as_data, required_words
from lightning_modules.llm.writing import WritesTexts
from lightning_modules.predicting import PredictingModule

_SENTENCE = re.compile(r"(.*?[.!?])(?:[\"')\]]*)(?:\s|$)", re.DOTALL)


class ItemSummariesModule(WritesTexts, PredictingModule):
    """Texts that a later stage reads in full whatever its room, and whose memory is bounded.

    Texts of at most ``max_new_tokens`` tokens stay as they are: a summary could only be longer. Of others the
    first ``text_tokens`` are shown. Where nothing is written an item has no summary, and is counted. Read a
    sample before you trust them: a small model also writes what no text says.

    Args:
        catalog, item_words: given by the runner from the data.
        llm: it writes; nothing is trained.
        fields: of the catalogue, that a text is made of.
        words: that a summary should have, at most; the model is asked, not forced.
        text_tokens: of a text that are read, at most.
        max_new_tokens: of a summary, at most; what is cut off ends with its last whole sentence.

    Raises:
        ValueError: a limit is impossible, or the data do not say what their items are called.
    """

    written_by = "predict"

    def __init__(
        self,
        catalog: pl.DataFrame,
        item_words: ItemWords | None,
        llm: BackboneSpec,
        fields: Sequence[Field] = ("title", "description"),
        words: int = 20,
        text_tokens: int = 256,
        max_new_tokens: int = 40,
    ) -> None:
        super().__init__(llm, AdapterSpec(method="none"))
        if min(words, text_tokens, max_new_tokens) < 1:
            raise ValueError(
                f"words is {words}, text_tokens {text_tokens} and max_new_tokens {max_new_tokens}, expected "
                "at least 1 each"
            )
        self.item_words = required_words(item_words)
        self.texts = item_texts(catalog, fields)  # (I,)
        self.words, self.text_tokens, self.max_new_tokens = words, text_tokens, max_new_tokens
        self.generations = Generations()

    @property
    def numbered(self) -> int:
        """I."""
        return len(self.texts)

    @cached_property
    def _read(self) -> list[tuple[str, int]]:
        """(I,) each text as it is read, and how many tokens it has."""
        tokens = self.tokenizer(self.texts, add_special_tokens=False)["input_ids"]  # (I) lists
        most = self.text_tokens
        shown = [
            self.tokenizer.decode(ids[:most]) if len(ids) > most else text
            for text, ids in zip(self.texts, tokens, strict=True)
        ]
        return list(zip(as_data(shown, self.tokenizer), map(len, tokens), strict=True))

    def is_long(self, number: int) -> bool:
        """Whether a summary can be shorter than the text."""
        return self._read[number][1] > self.max_new_tokens

    def prompt(self, number: int) -> list[int]:
        """Tokens of what is asked about an item.

        Raises:
            ModelError: they and the answer are more than the language model reads.
        """
        text, _ = self._read[number]
        asked = (
            f"Say in one sentence of at most {self.words} words what this {self.item_words.singular} is. Use "
            "only what the text says.",
            f"Text: {text}",
        )
        laid_out = lay_out(self.tokenizer, self.llm.chat_template, *asked)
        special = not self.llm.chat_template
        ids: list[int] = self.tokenizer(laid_out, add_special_tokens=special)["input_ids"]
        if len(ids) + self.max_new_tokens > self.llm.max_length:
            raise ModelError(
                f"a prompt of {len(ids)} tokens and a summary of {self.max_new_tokens} do not fit into "
                f"llm.max_length={self.llm.max_length}: lower text_tokens"
            )
        return ids

    def predict_step(self, batch: Tensor, batch_index: int = 0) -> None:
        """Write what the long texts (B,) say."""
        asked = [self.prompt(number) for number in batch.tolist() if self.is_long(number)]
        if asked:
            self.write(asked, self.max_new_tokens)

    @cached_property
    def _summaries(self) -> dict[int, str]:
        """What was written about each item with a long text, by its number."""
        found = {}
        for number in filter(self.is_long, range(self.numbered)):
            (tokens,) = self.write([self.prompt(number)], self.max_new_tokens)
            whole = len(tokens) < self.max_new_tokens
            found[number] = shortened(self.said(tokens), whole)
        return found

    def table(self) -> pl.DataFrame:
        """``item`` 1..I and ``text``; null where an item has no text, or nothing was written."""
        texts = [
            self._summaries.get(number, text) or None for number, text in enumerate(self.texts)
        ]
        items = range(1, self.numbered + 1)
        return pl.DataFrame(
            {"item": items, "text": texts}, schema={"item": pl.Int64, "text": pl.String}
        )

    def remarks(self) -> list[str]:
        """What became of the texts."""
        read = sum(length > self.text_tokens for _, length in self._read)
        notes = [
            f"{len(self._summaries):,} of {self.numbered:,} texts have more than {self.max_new_tokens} "
            f"tokens and were summarised, {read:,} of them by their first {self.text_tokens} tokens"
        ]
        if empty := sum(not text for text in self._summaries.values()):
            notes.append(f"{empty:,} summaries are empty: these items have none")
        return [*super().remarks(), *notes]


def shortened(said: str, whole: bool = True) -> str:
    """What was written, on one line; of a text that was cut off the whole sentences, if there is one."""
    line = " ".join(said.split())
    sentences = "".join(match[0] for match in _SENTENCE.finditer(line)).strip()
    return line if whole or not sentences else sentences
