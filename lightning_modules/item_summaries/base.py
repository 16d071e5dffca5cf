"""What the stages that write a text of each item share.

Legend: B items of a batch, I items.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property

import polars as pl
from torch import Tensor

from datamodules.types import ItemWords
from lightning_modules.errors import ModelError
from lightning_modules.generations import Generations
from lightning_modules.llm.engines import Engine
from lightning_modules.llm.layouts import lay_out_shown
from lightning_modules.llm.specs import AdapterSpec, BackboneSpec
from lightning_modules.llm.wording import required_words
from lightning_modules.llm.writing import Shown, WritesTexts
from lightning_modules.predicting import PredictingModule

# Where a sentence ends, whatever closes behind it; the points of "1." and "Mr." end none.
_END = re.compile(
    r"(?<!\b\d)(?<!\b\d\d)(?<!\bMr)(?<!\bMs)(?<!\bDr)(?<!\bMrs)[.!?][\"')\]]*(?=\s|$)|[。！？]"
)


class WritesItemTexts(WritesTexts, PredictingModule):
    """A frozen language model is asked about some of the items; the others keep a text, or have none.

    Args:
        item_words: given by the runner from the data.
        llm: it writes; nothing is trained.
        words: that a text should have, at most; the model is asked, not forced.
        max_new_tokens: of a text, at most; what is cut off ends with its last whole sentence.
        engine: what runs the language model; None: transformers.
        limits: further numbers that must be at least 1, by name.

    Raises:
        ValueError: a limit is impossible, or the data do not say what their items are called, or the engine
            cannot run the language model.
    """

    written_by = "predict"

    def __init__(
        self,
        item_words: ItemWords | None,
        llm: BackboneSpec,
        words: int,
        max_new_tokens: int,
        engine: Engine | None = None,
        **limits: int,
    ) -> None:
        super().__init__(llm, AdapterSpec(method="none"))
        self.run_by(engine)
        asked = {"words": words, "max_new_tokens": max_new_tokens, **limits}
        if wrong := [f"{name} is {value}" for name, value in asked.items() if value < 1]:
            raise ValueError(f"{', '.join(wrong)}, expected at least 1")
        self.item_words = required_words(item_words)
        self.words, self.max_new_tokens = words, max_new_tokens
        self.generations = Generations()

    # What a stage gives --------------------------------------------------------------------------------

    @abstractmethod
    def is_asked(self, number: int) -> bool:
        """Whether the model is asked about an item."""

    @abstractmethod
    def prompt(self, number: int) -> list[int]:
        """Tokens of what is asked about an item."""

    def shown(self, numbers: Sequence[int]) -> Shown | None:
        """What the prompts of some items show besides."""
        return None

    @abstractmethod
    def kept(self, number: int) -> str | None:
        """The text of an item that the model is not asked about."""

    def flags(self) -> dict[str, list[bool]]:
        """Further columns of the table, (I,) each."""
        return {}

    # What is done with it ------------------------------------------------------------------------------

    def laid_out(
        self, instruction: str, input_text: str, shown: Sequence[tuple[str, str]] = ()
    ) -> list[int]:
        """Tokens of a prompt without pictures, behind worked inputs and answers, see ``require_room``."""
        chat = self.llm.chat_template
        text = lay_out_shown(self.tokenizer, chat, instruction, shown, input_text)
        special = not self.llm.chat_template
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        self.require_room(ids, "lower text_tokens")
        return ids

    def require_room(self, ids: Sequence[int], remedy: str) -> None:
        """Refuse a prompt and an answer that are more than the language model reads.

        Raises:
            ModelError: they are.
        """
        if len(ids) + self.max_new_tokens > self.llm.max_length:
            raise ModelError(
                f"a prompt of {len(ids)} tokens and a text of {self.max_new_tokens} do not fit into "
                f"llm.max_length={self.llm.max_length}: {remedy}"
            )

    def predict_batches(self, size: int, rank: int, world_size: int) -> list[list[int]]:
        """Items that the model is asked about, those of prompts of like length together, the longest first.

        Image tokens count. Devices take turns, so that each has as much to read.
        """
        asked = [number for number in range(self.numbered) if self.is_asked(number)]
        lengths = {number: len(self.prompt(number)) for number in asked}
        mine = sorted(asked, key=lambda number: -lengths[number])[rank::world_size]
        return [mine[at : at + size] for at in range(0, len(mine), size)]

    def predict_step(self, batch: Tensor, batch_index: int = 0) -> None:
        """Write about the items of (B,) that the model is asked about."""
        if asked := [number for number in batch.tolist() if self.is_asked(number)]:
            self.answers(asked)

    def answers(self, numbers: Sequence[int]) -> list[str]:
        """What the model writes about some items."""
        written = self.write(
            [self.prompt(number) for number in numbers],
            self.max_new_tokens,
            shown=self.shown(numbers),
        )
        return [
            shortened(self.said(tokens), len(tokens) < self.max_new_tokens) for tokens in written
        ]

    @cached_property
    def written(self) -> dict[int, str]:
        """What the model has written, by item."""
        asked = filter(self.is_asked, range(self.numbered))
        return {number: self.answers([number])[0] for number in asked}

    def table(self) -> pl.DataFrame:
        """``item`` 1..I and ``text``; null where an item has none, or nothing was written; then the flags."""
        numbers = range(self.numbered)
        texts = [self.written[n] if self.is_asked(n) else self.kept(n) for n in numbers]
        columns = {"item": [n + 1 for n in numbers], "text": [text or None for text in texts]}
        kinds = {"item": pl.Int64, "text": pl.String}
        return pl.DataFrame(columns, schema=kinds).with_columns(
            pl.Series(name, values, dtype=pl.Boolean) for name, values in self.flags().items()
        )

    def remarks(self) -> list[str]:
        """How many texts came to nothing."""
        empty = sum(not text for text in self.written.values())
        told = [f"{empty:,} texts are empty: these items have none"] if empty else []
        return [*super().remarks(), *told]


def shortened(said: str, whole: bool = True) -> str:
    """What was written, on one line; of a text that was cut off the whole sentences, if there is one."""
    line = " ".join(said.rstrip("\ufffd").split())  # of the last letter perhaps a part
    ends = [match.end() for match in _END.finditer(line)]
    return line if whole or not ends else line[: ends[-1]]
