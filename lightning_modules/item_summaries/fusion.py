"""``ItemFusionModule``: one text of what is written about an item and of what its picture shows.

Legend: I items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import polars as pl

from datamodules.types import ItemWords
from lightning_modules.item_summaries.base import WritesItemTexts
from lightning_modules.item_texts import Field, item_texts
from lightning_modules.llm.engines import Engine
from lightning_modules.llm.specs import BackboneSpec
from lightning_modules.llm.wording import capped


@dataclass(frozen=True)
class WorkedFusion:
    """A text that shows the model what is wanted of the two parts; none should be the catalogue's.

    Raises:
        ValueError: a part is empty.
    """

    text: str
    picture: str
    fusion: str

    def __post_init__(self) -> None:
        if not all(part.strip() for part in (self.text, self.picture, self.fusion)):
            raise ValueError("a worked fusion needs a text, what a picture shows, and their fusion")


class ItemFusionModule(WritesItemTexts):
    """The last of MLLM-MSR's three prompts for an item (arXiv 2408.09698), and MLLM-SRec's IMSG.

    Either part is read up to a cap of its own, so that neither crowds the other out. An item of which only
    one part is known keeps that part, as it is: nothing is made up, and ``fused`` says so.

    Args:
        catalog, item_words: given by the runner from the data; the catalogue's column ``picture`` is an
            input, ``catalog.picture: STAGE/predictions.parquet`` of a stage that runs ItemPicturesModule.
        llm, words, max_new_tokens, engine: see ``WritesItemTexts``.
        fields: of the catalogue, that the written part is made of.
        text_tokens: of either part, that are read, at most.
        examples: worked texts, which are shown before what is asked.
        fuse: ask for one text. Else both parts stand one behind the other, as the released code puts a title
            before its picture's description, and nothing is written.

    Raises:
        ValueError: there is no column ``picture``, or see ``WritesItemTexts``.
    """

    def __init__(
        self,
        catalog: pl.DataFrame,
        item_words: ItemWords | None,
        llm: BackboneSpec,
        fields: Sequence[Field] = ("title", "description"),
        words: int = 50,
        text_tokens: int = 128,
        max_new_tokens: int = 80,
        examples: Sequence[WorkedFusion] = (),
        engine: Engine | None = None,
        fuse: bool = True,
    ) -> None:
        super().__init__(item_words, llm, words, max_new_tokens, engine, text_tokens=text_tokens)
        self.text_tokens, self.fuse = text_tokens, fuse
        self.examples = tuple(examples)
        self.written_parts = item_texts(catalog, fields)  # (I,)
        self.pictured_parts = item_texts(catalog, ["picture"])  # (I,)

    @property
    def numbered(self) -> int:
        """I."""
        return len(self.written_parts)

    @cached_property
    def _read(self) -> tuple[list[str], list[str]]:
        """(I,) each: the parts as they are read."""
        parts = (self.written_parts, self.pictured_parts)
        written, pictured = (capped(part, self.text_tokens, self.tokenizer)[0] for part in parts)
        return written, pictured

    def is_asked(self, number: int) -> bool:
        """Whether there are two parts to be put together."""
        return self.fuse and all(part[number] for part in self._read)

    def kept(self, number: int) -> str | None:
        """What there is, within the caps."""
        return ". ".join(part[number] for part in self._read if part[number])

    def configure_model(self) -> None:
        """The language model, where it is asked anything."""
        if self.fuse:
            super().configure_model()

    def prompt(self, number: int) -> list[int]:
        """Tokens of what is asked about an item.

        Raises:
            ModelError: they and the answer are more than the language model reads.
        """
        written, pictured = self._read
        asked = (
            f"Here is what is written about one {self.item_words.singular}, and what its picture shows. Say "
            f"in one paragraph of at most {self.words} words what it is and how it looks. Use only what is "
            "given here, from both."
        )
        shown = [(_parts(one.text, one.picture), one.fusion) for one in self.examples]
        return self.laid_out(asked, _parts(written[number], pictured[number]), shown)

    def flags(self) -> dict[str, list[bool]]:
        """``fused``: whether a text is of both parts."""
        return {"fused": [self.is_asked(number) for number in range(self.numbered)]}

    def remarks(self) -> list[str]:
        """How many texts are of both parts."""
        if not self.fuse:
            return ["what is written of items and what their pictures show stand side by side"]
        alone = self.numbered - len(self.written)
        told = f"{len(self.written):,} of {self.numbered:,} items have a text of words and picture"
        more = f", {alone:,} what is known of them alone" if alone else ""
        return [told + more, *super().remarks()]


def _parts(text: str, picture: str) -> str:
    return f"Text: {text}\nPicture: {picture}"
