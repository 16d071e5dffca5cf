"""``CaptionedItems``: the pictures of catalogues with their titles and categories as captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    damaged,
    package_digest,
    publish_folder,
    value_digest,
    write_json,
)

if TYPE_CHECKING:
    from PIL import Image

ROWS = "rows.parquet"
_HELD_OUT = 221  # stream of random numbers, see samplers.py


@dataclass(frozen=True)
class ItemPicture:
    """One row (``captions.CaptionedPicture``): an item of one of the parts."""

    images: ItemImages
    item: int
    caption: str
    attributes: dict[str, str] = field(default_factory=dict)

    @property
    def picture(self) -> Image.Image:
        """RGB."""
        return self.images.picture(self.item)


class CaptionedItems(CaptionData):
    """Pictures of items, captioned as ``caption`` says: films' posters with title and genres.

    Items without a picture or a title are left out; nothing else is.

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
        self.attribute_values = {}

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
                f"{part.name} has no images to learn captions of: name a folder or a tar of files named by item "
                f"id as its images (data.images=PATH, of a part data.parts.{name}.images=PATH)."
            )
        return part.images.digest_of(part.catalog["item_id"].to_list())

    def _write(self, folder: Path) -> None:
        found = []
        for name, part in self.parts.items():
            shown = part.catalog.with_row_index("item", offset=1).filter(part.item_images.mask[1:])
            texts = shown.drop_nulls("title").select("item", "title", "categories").iter_rows()
            found += [(name, item, caption(title, groups or [])) for item, title, groups in texts]
        kinds = {"part": pl.String(), "item": pl.Int64(), "caption": pl.String()}
        rows = pl.DataFrame(found, schema=kinds, orient="row")
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
        """``part``, ``item`` (its internal id there), ``caption``, ``split`` (train, valid)."""
        try:
            return pl.read_parquet(self.prepared.folder / ROWS)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise damaged(self.prepared.folder, error) from error

    def captioned(self, code: int) -> Sequence[ItemPicture]:
        """The rows of a split."""
        part = self.rows.filter(pl.col("split") == SPLIT_NAMES[code])
        images = {name: part.item_images for name, part in self.parts.items()}
        return [
            ItemPicture(images[row["part"]], row["item"], row["caption"])
            for row in part.iter_rows(named=True)
        ]


def caption(title: str, categories: Sequence[str]) -> str:
    """``title (category, category)``, without categories that the title has, such as a film's year."""
    told = ", ".join(name for name in categories if name not in title)
    return f"{title} ({told})" if told else title


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
