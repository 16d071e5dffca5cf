"""Wrong inputs for probes: what does a method write of a picture that is another item's, or of a wrong text?

Legend: I items.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import polars as pl

from datamodules.base import SequenceDataModule
from datamodules.joined import JoinedDataModule
from datamodules.samplers import others
from datamodules.types import ItemImages

if TYPE_CHECKING:
    from PIL import Image

Pictures = Literal["own", "swapped", "blank"]
Texts = Literal["own", "swapped"]
TEXTS = ("title", "description", "categories", "brand")
_GREY = (128, 128, 128)


def corrupted(
    data: SequenceDataModule, pictures: Pictures = "own", texts: Texts = "own"
) -> SequenceDataModule:
    """The same data, but stages are shown wrong pictures or wrong texts of its items.

    For a stage's own data: ``data: {_target_: datamodules.corrupted.corrupted, data: "${data}", pictures:
    swapped}``. Users, histories, splits and candidates stay.

    Args:
        data: that is shown wrongly.
        pictures: ``swapped``: each item has the picture of another one, always the same; ``blank``: a grey
            one of the same size. An item without a picture stays without.
        texts: ``swapped``: each item has title, description, categories and brand of another one, always the
            same, which contradict its picture.

    Raises:
        ValueError: an unknown kind of corruption, none, or joined data, whose parts can be corrupted before.
    """
    if pictures not in get_args(Pictures) or texts not in get_args(Texts):
        raise ValueError(
            f"pictures is {pictures!r} and texts {texts!r}: expected one of {', '.join(get_args(Pictures))} "
            f"and one of {', '.join(get_args(Texts))}"
        )
    if pictures == texts == "own":
        raise ValueError("pictures and texts are both own: nothing would be wrong; set one of them")
    if isinstance(data, JoinedDataModule):
        raise ValueError("joined data cannot be shown wrongly: take one of its parts")
    data.corruption = Corruption(pictures, texts)
    return data


@dataclass(frozen=True)
class Corruption:
    """See ``corrupted``."""

    pictures: Pictures
    texts: Texts

    def images(self, images: ItemImages) -> ItemImages:
        """The pictures as they are shown."""
        return images if self.pictures == "own" else WrongImages(images, self.pictures == "blank")

    def catalog(self, items: pl.DataFrame) -> pl.DataFrame:
        """The catalogue as it is shown."""
        if self.texts == "own":
            return items
        moved = items.select(TEXTS)[others(np.arange(len(items)))]
        return items.with_columns(moved.get_columns())


@dataclass(frozen=True)
class WrongImages:
    """Those of other items, or grey ones of the same sizes.

    Args:
        images: the items' own.
        blank: grey ones.

    Raises:
        ValueError: one item alone has a picture, when that is to be swapped.
    """

    images: ItemImages
    blank: bool

    @property
    def mask(self) -> np.ndarray:
        """(I + 1,) bool."""
        return self.images.mask

    def picture(self, item: int) -> Image.Image:
        """RGB. Raises ValueError where there is no image."""
        if not self.blank:
            return self.images.picture(self._of(item))
        from PIL import Image

        return Image.new("RGB", self.size(item), _GREY)

    def size(self, item: int) -> tuple[int, int]:
        """Width and height of the picture in pixels. Raises ValueError where there is no image."""
        return self.images.size(item if self.blank else self._of(item))

    def digest(self, item: int) -> str:
        """Names (hex) what is shown; "" where the mask is False."""
        if not 0 < item < len(self.mask) or not self.mask[item]:
            return ""
        if not self.blank:
            return self.images.digest(self._of(item))
        return hashlib.sha256(repr(self.size(item)).encode()).hexdigest()

    def _of(self, item: int) -> int:
        """Whose picture an item is shown with."""
        return int(self._owners[item]) if 0 <= item < len(self._owners) else item

    @cached_property
    def _owners(self) -> np.ndarray:
        """(I + 1,) whose picture each item is shown with; itself where it has none."""
        found = np.arange(len(self.mask))
        items = np.flatnonzero(self.mask)
        if len(items) == 1:
            raise ValueError("pictures=swapped needs two items with pictures, and there is one")
        if len(items):
            found[items] = others(items)
        return found
