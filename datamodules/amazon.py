"""Amazon reviews for every method: the releases of 2014, 2018 and 2023, any category."""

from __future__ import annotations

from typing import Any

from datamodules.amazon_loading import load_amazon
from datamodules.amazon_releases import find_release
from datamodules.base import SequenceDataModule
from datamodules.types import RawData


class AmazonDataModule(SequenceDataModule):
    """Amazon reviews as histories of product ids; every review counts as one event.

    Items are ``asin`` (2014, 2018) or ``parent_asin`` (2023), which joins the variants of a product.
    Reviews of 2014 and 2018 know the day only, so that most users have tied times: ties keep the order
    of the file.

    Args:
        release: 2014, 2018 or 2023.
        category: as the release names it, e.g. ``All_Beauty`` or ``"Arts, Crafts & Sewing"``.
        reviews: ``5core`` (users and items with 5 reviews or more, by the publishers), ``full``, or
            ``ratings`` (every rating, no text; the smallest download).
        metadata: also read titles, descriptions, categories, brands, prices and image addresses.
        duplicates: ``drop`` leaves out review lines that repeat an earlier one in every byte; ``keep``
            has the counts of papers that did not look.
        options: those of ``SequenceDataModule``.
    """

    def __init__(
        self,
        release: int,
        category: str,
        reviews: str = "5core",
        metadata: bool = True,
        duplicates: str = "drop",
        **options: Any,
    ) -> None:
        known = find_release(release)
        self.release, self.category, self.reviews = known.year, known.category(category), reviews
        self.metadata, self.duplicates = metadata, duplicates
        known.kind(reviews)
        if duplicates not in ("drop", "keep"):
            raise ValueError(f"duplicates is {duplicates!r}, expected 'drop' or 'keep'")
        super().__init__(f"amazon-{known.year}-{self.category}", **options)

    def load_raw(self) -> RawData:
        """Fetch and parse the category."""
        return load_amazon(
            self.release, self.category, self.reviews, self.root, self.cache, self.on_bad_row,
            self.metadata, self.duplicates,
        )  # fmt: skip

    def local_files(self) -> list[tuple[str, int, int]]:
        """Those of this category: another category's file in the same folder changes nothing here."""
        return [file for file in super().local_files() if self.category in file[0]]

    def asked(self) -> dict[str, Any]:
        """What is read of the release; local files are named by ``SequenceDataModule``."""
        return {
            "release": self.release,
            "category": self.category,
            "reviews": self.reviews,
            "metadata": self.metadata,
            "duplicates": self.duplicates,
        }
