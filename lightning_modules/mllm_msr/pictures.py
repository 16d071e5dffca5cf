"""Which picture a candidate is shown with: its own, or for a probe another one.

Legend: I items.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from datamodules.samplers import others
from datamodules.types import ItemImages

if TYPE_CHECKING:
    from lightning_modules.llm.pictures import PictureReader

Shown = Literal["none", "own", "swapped", "blank"]
_GREY = (128, 128, 128)


class ShownPictures:
    """The pictures of candidates.

    ``own``; ``swapped``: each item has the picture of another one, always the same; ``blank``: grey ones of
    the same sizes; ``none``. A model that reads pictures loses by all but the first. An item without a
    picture is shown without one.

    Args:
        images: the items' own.
        which: one of the above but ``none``.

    Raises:
        ValueError: no item has a picture; or one alone, which cannot be swapped.
    """

    def __init__(self, images: ItemImages | None, which: Shown) -> None:
        self.which = which
        if images is None or not images.mask.any():
            raise ValueError(
                f"pictures={which} needs items with pictures, and the data has none: give "
                "data.images=FOLDER, or set pictures=none"
            )
        self.images = images
        self.mask = images.mask  # (I + 1,) bool
        self.of = np.arange(len(self.mask))  # (I + 1,) whose picture an item has
        if which == "swapped":
            items = np.flatnonzero(self.mask)
            if len(items) < 2:
                raise ValueError("pictures=swapped needs two items with pictures, and there is one")
            self.of[items] = others(items)

    def picture(self, item: int) -> Image.Image:
        """What an item of the mask is shown with."""
        found = self.images.picture(int(self.of[item]))
        return Image.new("RGB", found.size, _GREY) if self.which == "blank" else found

    def digest(self, item: int) -> str:
        """Names (hex) what an item of the mask is shown with."""
        if self.which == "blank":
            return hashlib.sha256(repr(self.sizes[item]).encode()).hexdigest()
        return self.images.digest(int(self.of[item]))

    @cached_property
    def sizes(self) -> list[tuple[int, int] | None]:
        """(I + 1,) in pixels; None where there is no picture."""
        return [self.size(item) if there else None for item, there in enumerate(self.mask.tolist())]

    def size(self, item: int) -> tuple[int, int]:
        """Of what an item of the mask is shown with, in pixels."""
        return self.images.size(int(self.of[item]))

    def expanded(self, texts: list[str], reader: PictureReader) -> list[str]:
        """(I + 1,) texts of items with image tokens in place of their marks."""
        pairs = zip(texts, self.sizes, strict=True)
        return [text if size is None else reader.expand(text, [size]) for text, size in pairs]
