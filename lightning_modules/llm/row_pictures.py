"""The items' pictures that prompts show, by row: opened when a text is written, named by their content.

Legend: B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from datamodules.types import ItemImages
from lightning_modules.llm.pictures import PictureReader, beside

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_BYTES = 2**28  # of decoded pictures that are kept; the oldest go first


class OpenedPictures:
    """The pictures of ``images``, each decoded once as long as they fit: several questions show the same one.

    Args:
        images: of the data.
        most_bytes: of pixels that are kept, at most; the newest picture always is.
    """

    def __init__(self, images: ItemImages, most_bytes: int = MOST_BYTES) -> None:
        self.images, self.most_bytes = images, most_bytes
        self._kept: dict[int, Image] = {}
        self._bytes = 0

    def picture(self, item: int) -> Image:
        """An item's."""
        if item not in self._kept:
            found = self.images.picture(item)
            self._kept[item] = found
            self._bytes += _size(found)
            while self._bytes > self.most_bytes and len(self._kept) > 1:
                self._bytes -= _size(self._kept.pop(next(iter(self._kept))))
        return self._kept[item]

    def digest(self, item: int) -> str:
        """As of ``images``."""
        return self.images.digest(item)


def _size(picture: Image) -> int:
    return picture.width * picture.height * len(picture.getbands())


@dataclass(frozen=True)
class RowPictures:
    """What ``WritesTexts.write`` has to know of the pictures in its prompts.

    Args:
        reader: of the model that writes.
        images: of the data.
        items: (B) internal ids of the items whose pictures each prompt shows, in order.
    """

    reader: PictureReader
    images: OpenedPictures
    items: Sequence[Sequence[int]]

    def names(self, row: int) -> list[int]:
        """Digests of a row's pictures: equal tokens may stand for unlike ones."""
        return [int(self.images.digest(item), 16) for item in self.items[row]]

    def inputs(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """What a model reads of the pictures of some rows, beside their prompts' tokens."""
        shown = {item: self.images.picture(item) for row in rows for item in self.items[row]}
        pairs = zip(prompts, rows, strict=True)
        return beside(
            self.reader.inputs([(ids, [shown[i] for i in self.items[row]]) for ids, row in pairs])
        )

    def raw(self, row: int, prompt: Sequence[int]) -> tuple[list[int], list[Image]]:
        """A row's prompt with one token for each picture, and the pictures: for who reads them itself."""
        shown = [self.images.picture(item) for item in self.items[row]]
        return self.reader.one_token_each(prompt, [picture.size for picture in shown]), shown
