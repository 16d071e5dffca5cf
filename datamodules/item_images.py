"""Item images as modules see them: by internal id (``types.ItemImages``).

Legend: I items.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from datamodules.images import ImageStore
from datamodules.types import ItemImages

if TYPE_CHECKING:
    from PIL import Image

Found = TypeVar("Found")


class CatalogueImages:
    """Those of one catalogue. Plain values only, and nothing is looked at before it is asked for.

    Args:
        store: the images; None: no item has one.
        raw_ids: (I,) of the internal items 1..I.
    """

    def __init__(self, store: ImageStore | None, raw_ids: Sequence[str]) -> None:
        self.store, self.raw_ids = store, list(raw_ids)

    @cached_property
    def mask(self) -> np.ndarray:
        """(I + 1,) bool."""
        found = np.zeros(len(self.raw_ids) + 1, dtype=bool)
        if self.store is not None:
            found[1:] = self.store.mask(self.raw_ids)
        return found

    def picture(self, item: int) -> Image.Image:
        """RGB. Raises ValueError where there is no image; else as ``ImageStore.open``."""
        found = None
        if self.store is not None and self._known(item):
            found = self.store.open(self.raw_ids[item - 1])
        return _required(found, item)

    def size(self, item: int) -> tuple[int, int]:
        """In pixels. Raises ValueError where there is no image; else as ``ImageStore.size``."""
        found = None
        if self.store is not None and self._known(item):
            found = self.store.size(self.raw_ids[item - 1])
        return _required(found, item)

    def digest(self, item: int) -> str:
        """SHA-256 (hex) of the bytes; "" where the mask is False."""
        if self.store is None or not self._known(item):
            return ""
        return self.store.sha256_of(self.raw_ids[item - 1])

    def _known(self, item: int) -> bool:
        return 1 <= item <= len(self.raw_ids)  # 0 is padding


def _required(found: Found | None, item: int) -> Found:
    if found is None:
        raise ValueError(f"item {item} has no image: ask only for items in the mask")
    return found


class JoinedImages:
    """Those of several catalogues, numbered one after the other."""

    def __init__(self, parts: Sequence[ItemImages]) -> None:
        self.parts = list(parts)

    @cached_property
    def mask(self) -> np.ndarray:
        """(I + 1,) bool."""
        return np.concatenate([[False], *(part.mask[1:] for part in self.parts)])

    def picture(self, item: int) -> Image.Image:
        """As of the item's part."""
        part, own = self._owner(item)
        return part.picture(own)

    def size(self, item: int) -> tuple[int, int]:
        """As of the item's part."""
        part, own = self._owner(item)
        return part.size(own)

    def digest(self, item: int) -> str:
        """As of the item's part."""
        part, own = self._owner(item)
        return part.digest(own)

    def _owner(self, item: int) -> tuple[ItemImages, int]:
        """The part that an item belongs to, and its number there; the last part for numbers beyond."""
        for part in self.parts[:-1]:
            if item < len(part.mask):
                return part, item
            item -= len(part.mask) - 1
        return self.parts[-1], item
