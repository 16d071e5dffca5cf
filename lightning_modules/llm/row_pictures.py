"""The items' pictures that prompts show, by row: opened when a text is written, named by their content.

Legend: B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from datamodules.types import ItemImages
from lightning_modules.llm.pictures import PictureReader, beside


@dataclass(frozen=True)
class RowPictures:
    """What ``WritesTexts.write`` has to know of the pictures in its prompts.

    Args:
        reader: of the model that writes.
        images: of the data.
        items: (B) internal ids of the items whose pictures each prompt shows, in order.
    """

    reader: PictureReader
    images: ItemImages
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
