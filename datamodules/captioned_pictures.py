"""``CaptionedPictures``: drawn pictures whose captions are true, with whole combinations held out."""

from __future__ import annotations

import hashlib
import io
import itertools
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from datamodules import toy_pictures
from datamodules.captions import CaptionData
from datamodules.image_decoding import decode
from datamodules.prepared import Prepared
from datamodules.toy_pictures import BACKGROUNDS, COLOURS, MARKS, PATTERNS, SHAPES, Look
from datamodules.types import SPLIT_NAMES, TRAIN, VALID
from datamodules.versioning import (
    code_digest,
    publish_folder,
    value_digest,
    write_json,
)

if TYPE_CHECKING:
    from PIL import Image

ROWS = "rows.parquet"
# In the order in which a caption names them.
_TOLD = {"colour": list(COLOURS), "shape": list(SHAPES), "background": list(BACKGROUNDS)}
_DETAILED = {
    "colour": list(COLOURS), "shape": list(SHAPES), "pattern": list(PATTERNS),
    "background": list(BACKGROUNDS), "mark": list(MARKS),
}  # fmt: skip


@dataclass(frozen=True)
class DrawnPicture:
    """One row (``captions.CaptionedPicture``)."""

    png: bytes
    caption: str
    attributes: dict[str, str]

    @property
    def picture(self) -> Image.Image:
        """RGB."""
        return decode(self.png)


class CaptionedPictures(CaptionData):
    """Pictures drawn as the toy shop's are, none of them a product: ``one red star on a white background``.

    Of all combinations of shape, colour and background, some are never learned from: every held-out picture
    shows one of these, so that naming it takes each attribute by itself.

    Args:
        train: pictures to learn from.
        valid: pictures of held-out combinations.
        held_out: share of the combinations that is held out; at least one is.
        details: captions also tell the background's pattern and the brand mark, which every picture has.
        pictures_seed: draws the combinations that are held out, and the pictures.
        name: names the data in folders and tables.
        cache: as in ``StageDataModule``.

    Raises:
        ValueError: impossible arguments.
    """

    def __init__(
        self,
        train: int = 1200,
        valid: int = 110,
        held_out: float = 0.15,
        details: bool = False,
        pictures_seed: int = 0,
        name: str = "captioned-pictures",
        cache: str | None = None,
    ) -> None:
        super().__init__(name, cache)
        if train < 1 or valid < 1 or not 0 < held_out < 1:
            raise ValueError(
                f"CaptionedPictures got train={train}, valid={valid}, held_out={held_out}; expected pictures "
                "of each kind, and a share above 0 and below 1"
            )
        self.settings: dict[str, Any] = {
            "train": train, "valid": valid, "held_out": held_out, "details": details,
            "pictures_seed": pictures_seed,
        }  # fmt: skip

    @property
    def attribute_values(self) -> dict[str, list[str]]:
        """Those that the captions tell."""
        return _DETAILED if self.settings["details"] else _TOLD

    @cached_property
    def prepared(self) -> Prepared:
        """The prepared folder, made on first use."""
        files = (__file__, toy_pictures.__file__)
        asked = {**self.settings, "code": code_digest(map(Path, files))}
        folder = self.cache / "prepared" / f"{self.name}-{value_digest(asked)}"
        if not (folder / "manifest.json").is_file():
            publish_folder(folder, "manifest.json", self._write)
        return Prepared(folder)

    def _write(self, folder: Path) -> None:
        rows = list(draw_rows(**self.settings))
        pl.DataFrame(rows).write_parquet(folder / ROWS)
        facts = [
            [r["split"], r["caption"], hashlib.sha256(r["png"]).hexdigest()[:16]] for r in rows
        ]
        recipe = {"name": self.name, **self.settings}
        manifest = {
            "recipe": {key: str(value) for key, value in recipe.items()},
            "source": "drawn",
            "checksums": {},
            "counts": {"train": self.settings["train"], "valid": self.settings["valid"]},
            "digest": value_digest(facts, 16),
        }
        write_json(folder / "manifest.json", manifest)

    @cached_property
    def rows(self) -> pl.DataFrame:
        """``split`` (train, valid), ``caption``, a ``Look``'s attributes and ``png``; training rows first."""
        return self.prepared.parquet(ROWS)

    def attributes(self, code: int) -> pl.DataFrame:
        """What each picture of ``TRAIN`` or ``VALID`` shows, in the order of ``captioned``."""
        return self.rows.filter(pl.col("split") == SPLIT_NAMES[code]).select(toy_pictures.LOOK)

    def captioned(self, code: int) -> Sequence[DrawnPicture]:
        """The rows of a split; attributes that the captions do not tell are left out."""
        part = self.rows.filter(pl.col("split") == SPLIT_NAMES[code])
        return [
            DrawnPicture(r["png"], r["caption"], {n: r[n] for n in self.attribute_values})
            for r in part.iter_rows(named=True)
        ]


def combinations(held_out: float, seed: int) -> dict[int, list[tuple[str, str, str]]]:
    """Shape, colour and background: those to learn from (``TRAIN``), and those held out (``VALID``)."""
    every = list(itertools.product(SHAPES, COLOURS, BACKGROUNDS))
    random.Random(f"captioned pictures {seed}: held out").shuffle(every)
    count = min(max(1, round(held_out * len(every))), len(every) - 1)
    return {VALID: every[:count], TRAIN: every[count:]}


def draw_rows(
    train: int, valid: int, held_out: float, details: bool, pictures_seed: int
) -> list[dict[str, Any]]:
    """Rows as ``CaptionedPictures.rows`` has them; within a split, combinations come equally often."""
    known = combinations(held_out, pictures_seed)
    rows = []
    for code, count in ((TRAIN, train), (VALID, valid)):
        split = SPLIT_NAMES[code]
        for number in range(count):
            key = f"captioned {pictures_seed} {split} {number}"
            chance = random.Random(key)
            shape, colour, background = known[code][number % len(known[code])]
            look = Look(shape, colour, background, chance.choice(PATTERNS), chance.choice(MARKS))
            out = io.BytesIO()
            toy_pictures.draw(look, key).save(out, "PNG")
            caption = look.caption(details)
            rows.append({"split": split, "caption": caption, **asdict(look), "png": out.getvalue()})
    return rows
