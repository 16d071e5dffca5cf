"""``CaptionedItems``: the pictures of catalogues with their titles and categories as captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from datamodules.base import SequenceDataModule
from datamodules.captions import CaptionData
from datamodules.errors import DataSourceError, each_or_all_errors
from datamodules.prepared import Prepared
from datamodules.sample_ids import hash_ids
from datamodules.types import SPLIT_NAMES, TRAIN, VALID, ItemImages
from datamodules.versioning import (
    package_digest,
    publish_folder,
    value_digest,
    write_json,
)

if TYPE_CHECKING:
    from PIL import Image

ROWS = "rows.parquet"
COLUMNS = ("part", "item", "caption", "category")
_HELD_OUT = 221  # stream of random numbers, see samplers.py


@dataclass(frozen=True)
class ItemPicture:
    """One row (``captions.CaptionedPicture``): an item of one of the parts."""

    images: ItemImages
    item: int
    caption: str
    attributes: dict[str, str]

    @property
    def picture(self) -> Image.Image:
        """RGB."""
        return self.images.picture(self.item)


class CaptionedItems(CaptionData):
    """Pictures of items, captioned as ``title (category, category)``: films' posters with title and genres.

    Categories that the title has itself, such as a film's year, are not named again. Items without a
    picture or a title are left out; nothing else is.

    Args:
        parts: data modules with images, by name.
        valid: share of the distinct captions that is held out, drawn by ``valid_seed``; at least one is.
        valid_seed: draws them.
        name: names the data in folders and tables.
        cache: as in ``StageDataModule``.

    Raises:
        ValueError: impossible arguments.
        DataSourceError: on preparing, there are no images, or not two captions.
    """

    def __init__(
        self,
        parts: Mapping[str, SequenceDataModule],
        valid: float = 0.15,
        valid_seed: int = 0,
        name: str = "captioned-items",
        cache: str | None = None,
    ) -> None:
        super().__init__(name, cache)
        if not parts or not 0 < valid < 1:
            raise ValueError(
                f"CaptionedItems got {len(parts)} parts and valid={valid}; expected one or more, and a share "
                "above 0 and below 1"
            )
        self.parts = dict(parts)
        self.valid, self.valid_seed = valid, valid_seed

    @property
    def attribute_values(self) -> dict[str, list[str]]:
        """``category``: the one that a caption names first; nothing where no caption names any."""
        known = self.rows["category"].drop_nulls().unique().sort().to_list()
        return {"category": known} if known else {}

    @cached_property
    def prepared(self) -> Prepared:
        """The prepared folder, made on first use."""
        made = each_or_all_errors(partial(getattr, p, "prepared") for p in self.parts.values())
        asked = {
            "parts": {n: [m.digest, self._images(n)] for n, m in zip(self.parts, made, strict=True)},
            "valid": self.valid, "valid_seed": self.valid_seed, "code": package_digest(),
        }  # fmt: skip
        folder = self.cache / "prepared" / f"{self.name}-{value_digest(asked)}"
        if not (folder / "manifest.json").is_file():
            publish_folder(folder, "manifest.json", self._write)
        return Prepared(folder)

    def _images(self, name: str) -> str:
        """Content of a part's pictures. Raises DataSourceError where there are none."""
        part = self.parts[name]
        if part.images is None:
            raise DataSourceError(
                f"{part.name} has no images to learn captions of: name a folder or a tar of files named by "
                f"item id as its images (data.images=PATH, of a part data.parts.{name}.images=PATH)."
            )
        return part.images.digest_of(part.catalog["item_id"].to_list())

    def _write(self, folder: Path) -> None:
        found = []
        for name, part in self.parts.items():
            shown = part.catalog.with_row_index("item", offset=1).filter(part.item_images.mask[1:])
            texts = shown.drop_nulls("title").select("item", "title", "categories").iter_rows()
            for item, title, groups in texts:
                named = [group for group in groups or [] if group not in title]
                found.append((name, item, caption(title, named), named[0] if named else None))
        kinds = (pl.String(), pl.Int64(), pl.String(), pl.String())
        rows = pl.DataFrame(found, dict(zip(COLUMNS, kinds, strict=True)), orient="row")
        held_out = _held_out(rows["caption"], self.valid, self.valid_seed)
        split = np.where(held_out, SPLIT_NAMES[VALID], SPLIT_NAMES[TRAIN])
        rows = rows.with_columns(split=pl.Series(split))
        rows.write_parquet(folder / ROWS)
        recipe = {"name": self.name, "valid": str(self.valid), "valid_seed": str(self.valid_seed)}
        made = {name: part.prepared for name, part in self.parts.items()}
        pictures = {name: self._images(name) for name in self.parts}
        manifest = {
            "recipe": recipe,
            "source": "; ".join(f"{n}: {p.manifest['source']}" for n, p in made.items()),
            "checksums": {},
            "counts": {"train": int((~held_out).sum()), "valid": int(held_out.sum())},
            "parts": {name: str(prepared.folder) for name, prepared in made.items()},
            "digest": value_digest([rows.rows(), pictures, recipe], 16),
        }
        write_json(folder / "manifest.json", manifest)

    @cached_property
    def rows(self) -> pl.DataFrame:
        """``COLUMNS`` (``item``: its internal id in the part) and ``split`` (train, valid)."""
        return self.prepared.parquet(ROWS)

    def captioned(self, code: int) -> Sequence[ItemPicture]:
        """The rows of a split."""
        part = self.rows.filter(pl.col("split") == SPLIT_NAMES[code])
        images = {name: part.item_images for name, part in self.parts.items()}
        return [
            ItemPicture(images[name], item, text, {"category": category} if category else {})
            for name, item, text, category in part.select(COLUMNS).iter_rows()
        ]


def caption(title: str, categories: Sequence[str]) -> str:
    """``title (category, category)``."""
    return f"{title} ({', '.join(categories)})" if categories else title


def _held_out(captions: pl.Series, share: float, seed: int) -> np.ndarray:
    """(R,) bool, by a caption's text and the seed alone: copies go together.

    Raises:
        DataSourceError: there are not two captions.
    """
    distinct = captions.unique().sort()
    if len(distinct) < 2:
        raise DataSourceError(
            f"{len(captions)} items have a picture and a title of {len(distinct)} kinds: at least two are "
            "needed, one to learn from and one to be held out; name images of this data."
        )
    count = min(max(1, round(share * len(distinct))), len(distinct) - 1)
    drawn = np.argsort(hash_ids(distinct, _HELD_OUT, seed=seed), kind="stable")[:count]
    return captions.is_in(distinct.gather(drawn).implode()).to_numpy()
