"""``ItemPicturesModule``: a frozen vision-language model says what an item's picture shows.

Legend: B items of a batch, I items.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from datamodules.types import ItemImages, ItemWords
from lightning_modules.item_summaries.base import WritesItemTexts
from lightning_modules.llm.engines import Engine
from lightning_modules.llm.pictures import PICTURE, PictureReader
from lightning_modules.llm.row_pictures import OpenedPictures, RowPictures
from lightning_modules.llm.specs import VisionSpec


class ItemPicturesModule(WritesItemTexts):
    """MLLM-MSR's image descriptions (arXiv 2408.09698). An item without a picture has no text.

    Args:
        item_words, item_images: given by the runner from the data.
        llm, words, max_new_tokens, engine: see ``WritesItemTexts``; the language model reads pictures.
        question: what is asked in place of our own words, which a model may have been aligned with.

    Raises:
        ValueError: a language model that reads no pictures, or has an untrained projector, or see
            ``WritesItemTexts``.
    """

    llm: VisionSpec
    pictures_a_prompt = 1

    def __init__(
        self,
        item_words: ItemWords | None,
        item_images: ItemImages,
        llm: VisionSpec,
        words: int = 50,
        max_new_tokens: int = 80,
        question: str | None = None,
        engine: Engine | None = None,
    ) -> None:
        if not isinstance(llm, VisionSpec):
            raise ValueError(
                f"llm is a {type(llm).__name__}, which reads no pictures: take llm=smolvision, or any other "
                "VisionSpec"
            )
        llm.require_projector()
        super().__init__(item_words, llm, words, max_new_tokens, engine)
        self.images = item_images
        self._opened = OpenedPictures(item_images)
        self.question = question or (
            f"Describe the picture of this {self.item_words.singular} in one paragraph of at most {words} "
            "words: what it shows, its colours and shapes, any text on it, and whatever else stands out. Say "
            "only what can be seen."
        )

    @property
    def numbered(self) -> int:
        """I."""
        return len(self.images.mask) - 1

    @cached_property
    def reader(self) -> PictureReader:
        """Of the language model."""
        return PictureReader(self.llm, self.tokenizer)

    def is_asked(self, number: int) -> bool:
        """Whether there is a picture."""
        return bool(self.images.mask[number + 1])

    def kept(self, number: int) -> str | None:
        """Nothing: what no picture shows is not made up."""
        return None

    def prompt(self, number: int) -> list[int]:
        """Tokens of what is asked about an item."""
        return self.tokens_of(number, self.question)

    def tokens_of(self, number: int, question: str) -> list[int]:
        """Tokens of a question about an item's picture, those of the picture among them.

        Raises:
            ModelError: they and the answer are more than the language model reads.
        """
        size = self.images.size(number + 1)
        ids = self.reader.tokens(self.reader.lay_out(question, PICTURE), [size])
        self.require_room(ids, "raise it, or lower the size of pictures (llm.pictures)")
        return ids

    def shown(self, numbers: Sequence[int]) -> RowPictures:
        """The items' pictures."""
        return RowPictures(self.reader, self._opened, [[number + 1] for number in numbers])

    def remarks(self) -> list[str]:
        """How many items have a picture."""
        told = f"{len(self.written):,} of {self.numbered:,} items have a picture"
        return [told, *super().remarks()]
