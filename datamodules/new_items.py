"""Items that nobody has seen: JSON lines, and a catalogue with them behind it.

A line is an object with ``item_id`` (a text that no item has yet), ``title``, and, where there are any:
``description``, ``categories`` (a list of texts), ``brand``, ``price`` (a number), and ``image`` (a file
beside the JSON lines).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from datamodules.errors import DataFormatError
from datamodules.image_decoding import decode, upright_size
from datamodules.item_images import JoinedImages
from datamodules.prepared import Prepared
from datamodules.types import CATALOG_SCHEMA, Histories

if TYPE_CHECKING:
    from PIL import Image

    from datamodules.base import SequenceDataModule

MOST_ITEMS = 10_000
MOST_BYTES = 64 * 2**20
_TEXTS = ("item_id", "title", "description", "brand", "image")
_HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair: JSON can name it, UTF-8 cannot hold it


def read_items(path: Path) -> tuple[pl.DataFrame, list[Path | None]]:
    """(n,) items with the columns of ``CATALOG_SCHEMA``, and each one's picture.

    Raises:
        DataFormatError: the file is missing or too large, or a line is no such item; the line is named.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise DataFormatError(f"{path} has more than {MOST_BYTES:,} bytes")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataFormatError(f"{path} cannot be read: {error}") from error
    rows = [_item(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    ids = [row["item_id"] for row in rows]
    if not 1 <= len(rows) <= MOST_ITEMS:
        raise DataFormatError(f"{path} has {len(rows):,} items, expected 1 to {MOST_ITEMS:,}")
    if twice := sorted({i for i in ids if ids.count(i) > 1}):
        raise DataFormatError(f"{path} has two items of the id {twice[0]!r}")
    pictures = [_picture(path, row.pop("image", None)) for row in rows]
    return pl.DataFrame(rows, schema=CATALOG_SCHEMA), pictures


def _item(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise DataFormatError(f"{where} is no JSON: {error}") from error
    known = {*CATALOG_SCHEMA, "image"} - {"images"}
    if not isinstance(found, dict) or not {"item_id", "title"} <= found.keys() <= known:
        raise DataFormatError(
            f"{where} must be an object with item_id and title, and none but {', '.join(sorted(known))}"
        )
    row = {key: value for key, value in found.items() if value is not None}
    if half := [k for k, v in row.items() if _HALF.search(json.dumps(v, ensure_ascii=False))]:
        raise DataFormatError(
            f"{where}: {', '.join(half)} holds half of a surrogate pair (\\ud800 to \\udfff alone), which is "
            "no character: write both halves, or leave it out"
        )
    wrong = [key for key in _TEXTS if key in row and not isinstance(row[key], str)]
    listed = row.get("categories", [])
    if not isinstance(listed, list) or not all(isinstance(word, str) for word in listed):
        wrong.append("categories")
    price = row.get("price", 0.0)
    if isinstance(price, bool) or not isinstance(price, (int, float)):
        wrong.append("price")
    if wrong or not row.get("item_id") or not row.get("title"):
        raise DataFormatError(
            f"{where}: {', '.join(wrong) or 'item_id or title'} is empty or of another type: texts, but a "
            "list of texts in categories and a number in price"
        )
    return row


def _picture(path: Path, name: str | None) -> Path | None:
    """The file, which must be beside the JSON lines or below."""
    if name is None:
        return None
    found = (path.parent / name).resolve()
    if not found.is_relative_to(path.parent.resolve()) or not found.is_file():
        raise DataFormatError(f"the image {name!r} is no file beside {path}")
    return found


@dataclass(frozen=True)
class _Extended(Prepared):
    """A prepared folder with items behind its catalogue, which nobody has met."""

    added: pl.DataFrame

    @cached_property
    def items(self) -> pl.DataFrame:
        """All."""
        own = self._table("items")
        more = self.added.select(name for name in own.columns if name in self.added.columns)
        more = more.cast({name: own.schema[name] for name in more.columns})
        return pl.concat([own, more], how="diagonal")

    @cached_property
    def histories(self) -> Histories:
        """Over more items."""
        own = Prepared(self.folder).histories
        return replace(own, num_items=own.num_items + len(self.added))

    @property
    def digest(self) -> str:
        """Of the folder and of what was added."""
        told = hashlib.sha256(self.added.write_json().encode()).hexdigest()[:16]
        return f"{self.manifest['digest']}+{told}"


class _Pictures:
    """``ItemImages`` of files."""

    def __init__(self, files: Sequence[Path | None]) -> None:
        self.files = list(files)

    @cached_property
    def mask(self) -> np.ndarray:
        """(n + 1,) bool."""
        return np.array([False, *(file is not None for file in self.files)])

    def _bytes(self, item: int) -> bytes:
        file = self.files[item - 1] if 1 <= item <= len(self.files) else None
        return b"" if file is None else file.read_bytes()

    def picture(self, item: int) -> Image.Image:
        """RGB. Raises ValueError: the item has none, or it is no picture."""
        return decode(self._bytes(item))

    def size(self, item: int) -> tuple[int, int]:
        """In pixels. Raises ValueError as ``picture`` does."""
        return upright_size(self._bytes(item))

    def digest(self, item: int) -> str:
        """SHA-256 (hex), "" where there is none."""
        content = self._bytes(item)
        return hashlib.sha256(content).hexdigest() if content else ""


def add_items(
    data: SequenceDataModule, items: pl.DataFrame, pictures: Sequence[Path | None]
) -> None:
    """Put items behind the catalogue of a data module that nothing has been built on yet.

    Raises:
        DataFormatError: an id is an item's already, or the data set is joined of several.
    """
    own = data.prepared
    if type(own) is not Prepared:
        raise DataFormatError(f"{data.name} is joined of several data sets: it takes no new items")
    if taken := sorted(set(items["item_id"]) & set(own.items["item_id"].cast(pl.String))):
        raise DataFormatError(
            f"{data.name} has an item {taken[0]!r} already: give new ones new ids"
        )
    images = JoinedImages([data.item_images, _Pictures(pictures)])
    data._prepared = _Extended(own.folder, items)
    data.item_images = images
