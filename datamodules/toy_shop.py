"""A small shop that is made up: its shoppers choose by what only the pictures show.

Everything is written in the raw format of Amazon 2023 (``toy_reviews``) and read by its parser; the pictures
are drawn (``toy_pictures``), and what each shows is known.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import polars as pl

from datamodules import toy_pictures, toy_reviews
from datamodules.amazon_loading import load_amazon
from datamodules.base import SequenceDataModule
from datamodules.prepared import Prepared
from datamodules.toy_reviews import make_looks, make_metadata, make_reviews, make_tastes
from datamodules.types import RawData
from datamodules.versioning import code_digest, publish_folder, value_digest

RELEASE, CATEGORY = 2023, "Toys_and_Games"
REVIEWS, METADATA, PICTURES = f"{CATEGORY}.jsonl", f"meta_{CATEGORY}.jsonl", "pictures"
ATTRIBUTES, TASTES = "attributes.parquet", "tastes.parquet"


class ToyShopDataModule(SequenceDataModule):
    """A generated shop with drawn pictures: needs no download.

    Args:
        shop_seed: draws products, tastes and purchases.
        products: how many; a multiple of 36 has each pair of a shape and a colour equally often.
        shoppers: how many.
        purchases: of each shopper, all different; the last is what a split by user asks for.
        noise: share of purchases that follow no taste.
        drift: share of shoppers whose taste in colour changes half-way.
        options: those of ``SequenceDataModule``, without ``root``.

    Raises:
        ValueError: impossible arguments.
    """

    def __init__(
        self,
        shop_seed: int = 0,
        products: int = 72,
        shoppers: int = 120,
        purchases: int = 7,
        noise: float = 0.05,
        drift: float = 0.25,
        **options: Any,
    ) -> None:
        if options.get("root"):
            raise ValueError("ToyShopDataModule makes its own files: leave out root")
        if purchases < 2 or shoppers < 1 or not 2 * purchases <= products <= 10_000:
            raise ValueError(
                f"ToyShopDataModule got products={products}, shoppers={shoppers}, purchases={purchases}; "
                "expected at least 2 purchases, a shopper, and twice as many products as purchases"
            )
        if not (0 <= noise <= 1 and 0 <= drift <= 1):
            raise ValueError(f"noise={noise} and drift={drift} are shares: from 0 to 1")
        self.settings: dict[str, Any] = {
            "shop_seed": shop_seed, "products": products, "shoppers": shoppers, "purchases": purchases,
            "noise": noise, "drift": drift,
        }  # fmt: skip
        super().__init__("toy-shop", **options)
        files = (__file__, toy_reviews.__file__, toy_pictures.__file__)
        code = code_digest(map(Path, files))
        self._place = Path("toy_shop") / value_digest([self.settings, code])
        if self.image_place is None:
            self.image_place = self.folder / PICTURES

    @property
    def folder(self) -> Path:
        """The raw files, the pictures and what is known of them."""
        return self.cache / self._place

    @property
    def prepared(self) -> Prepared:
        """The prepared folder; the shop itself is made anew, too, if it is gone."""
        self._make()
        return super().prepared

    def load_raw(self) -> RawData:
        """The shop through Amazon's parser."""
        self._make()
        raw = load_amazon(RELEASE, CATEGORY, "full", self.folder, self.cache, self.on_bad_row)
        told = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return replace(raw, source=f"generated in the format of Amazon {RELEASE} ({told})")

    def asked(self) -> dict[str, Any]:
        """The shop's settings, and where its pictures lie below the cache."""
        return {**self.settings, "images": str(self._place / PICTURES)}

    def attributes(self) -> pl.DataFrame:
        """What each picture shows: ``item_id`` and a ``Look``; row ``i`` is the internal item ``i + 1``."""
        return self._of(self.prepared.items, "item_id", ATTRIBUTES)

    def tastes(self) -> pl.DataFrame:
        """``user_id`` and the fields of ``Taste``; row ``u`` is the internal user ``u + 1``."""
        return self._of(self.prepared.users, "user_id", TASTES)

    def _of(self, known: pl.DataFrame, key: str, file: str) -> pl.DataFrame:
        table = pl.read_parquet(self.folder / file)
        return known.select(key).join(table, on=key, how="left", maintain_order="left")

    def _make(self) -> None:
        if not (self.folder / ATTRIBUTES).is_file():
            publish_folder(self.folder, ATTRIBUTES, self._write)

    def _write(self, folder: Path) -> None:
        asked = self.settings
        seed = asked["shop_seed"]
        looks = make_looks(seed, asked["products"])
        tastes = make_tastes(seed, asked["shoppers"], asked["drift"])
        reviews = make_reviews(seed, looks, tastes, asked["purchases"], asked["noise"])
        _write_lines(folder / REVIEWS, reviews)
        _write_lines(folder / METADATA, make_metadata(seed, list(looks), reviews))
        (folder / PICTURES).mkdir()
        for item, look in looks.items():
            toy_pictures.draw(look, f"shop {seed} {item}").save(folder / PICTURES / f"{item}.png")
        pl.DataFrame([{"user_id": u, **asdict(t)} for u, t in tastes.items()]).write_parquet(
            folder / TASTES
        )
        pl.DataFrame([{"item_id": i, **asdict(look)} for i, look in looks.items()]).write_parquet(
            folder / ATTRIBUTES
        )


def _write_lines(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
