"""Items as people see them: a small picture and a title."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from PIL import Image

from datamodules.types import ItemImages

LARGEST = (160, 192)  # pixels of a picture
KEPT = 2000  # pictures in memory


class Shelf:
    """Titles and small pictures by internal id.

    Args:
        titles: (I + 1,).
        images: the items'.
    """

    def __init__(self, titles: Sequence[str], images: ItemImages) -> None:
        self._titles, self._images = titles, images
        self._picture = lru_cache(KEPT)(self._small)

    def title(self, item: int) -> str:
        """On one line."""
        return " ".join(self._titles[item].split())

    def picture(self, item: int) -> Image.Image | None:
        """At most ``LARGEST``; None where the item has none."""
        return self._picture(item)

    def _small(self, item: int) -> Image.Image | None:
        found = self._images.picture(item) if self._images.mask[item] else None
        if found is not None:
            found = found.convert("RGB")
            found.thumbnail(LARGEST, Image.Resampling.LANCZOS)
        return found
