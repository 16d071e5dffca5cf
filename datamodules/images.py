"""Item images: which items have one, and its bytes or picture, from a folder, a tar or the download.

An item without an image has a False in the mask and a None for its picture; nothing stands in for it.
``image_listing`` says how files are named.

Legend: R ids that are asked for, I images at hand.
"""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from filelock import FileLock

from datamodules.errors import DataFormatError, DataSourceError
from datamodules.image_decoding import BadImageError, decode, inspect, upright_size
from datamodules.image_listing import (
    TABLE,
    Listing,
    Survey,
    file_key,
    image_stamp,
    list_images,
)
from datamodules.versioning import value_digest

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["ImageStore", "download_folder", "image_stamp", "open_images"]

Told = TypeVar("Told")
logger = logging.getLogger(__name__)

MAX_BYTES = 20_000_000  # of one image
_THREADS = 4  # of a survey; decoding leaves the interpreter's lock


def download_folder(cache: Path, name: str) -> Path:
    """Where the downloaded images of the data set ``name`` lie."""
    return cache / "images" / name


def open_images(
    place: Path | None, cache: Path, name: str, renamed: Mapping[str, str] | None = None
) -> ImageStore | None:
    """The images of a data set; None where none are given and none have been downloaded.

    Args:
        place: a folder or tar of files named by item id, or somebody's download folder; None looks
            for our own download.
        cache: the cache root.
        name: the data set's name, which names its download folder.
        renamed: raw item id -> the id in the file names, where those differ (``image_ids.read_ids``);
            items that are not in it have no image.

    Raises:
        DataSourceError, DataFormatError: see ``image_listing.list_images``.
    """
    if place is None:
        place = download_folder(cache, name)
        if not (place / TABLE).is_file():
            return None
    return ImageStore(list_images(place), cache, renamed)


class ImageStore:
    """The images of a data set, by raw item id. Plain values only: it may be pickled and forked.

    Every read opens its file anew (about 30 microseconds), so that processes share no file position.

    Args:
        listing: where the bytes are.
        cache: where the survey of a user's place is kept.
        renamed: see ``open_images``.
    """

    def __init__(
        self, listing: Listing, cache: Path, renamed: Mapping[str, str] | None = None
    ) -> None:
        self.listing, self.cache = listing, cache
        self.renamed = dict(renamed) if renamed is not None else None
        self._survey = listing.survey

    def __len__(self) -> int:
        """I, whether or not an item is known for each."""
        return len(self.listing.sizes)

    def has(self, raw_ids: Sequence[str]) -> np.ndarray:
        """(R,) bool: whether there is a file; ``mask`` tells whether it can be shown."""
        return np.array([self._index(i) is not None for i in raw_ids], bool)

    def mask(self, raw_ids: Sequence[str]) -> np.ndarray:
        """(R,) bool: whether there is an image that ``open`` can show. Costs a survey once."""
        bad, found = self.survey.problems, (self._index(i) for i in raw_ids)
        return np.array([i is not None and i not in bad for i in found], bool)

    def read(self, raw_id: str) -> bytes | None:
        """An image's bytes as they were sent; None where there is no image.

        Raises:
            DataFormatError: more than ``MAX_BYTES``; ``mask`` has left this item out.
            DataSourceError: the file is gone or has changed since the place was listed.
        """
        index = self._index(raw_id)
        if index is None:
            return None
        if (size := int(self.listing.sizes[index])) > MAX_BYTES:
            raise self._unusable(raw_id, index, f"{size:,} bytes, at most {MAX_BYTES:,}")
        return self._bytes(index)

    def open(self, raw_id: str) -> Image.Image | None:
        """The picture (RGB, upright, on white); None where there is no image.

        Raises:
            DataFormatError: the file is there and is no image; ``mask`` has left this item out.
            DataSourceError: the file is gone or has changed since the place was listed.
        """
        return self._told(raw_id, decode)

    def size(self, raw_id: str) -> tuple[int, int] | None:
        """Width and height of what ``open`` gives, in pixels, without decoding it.

        Raises:
            DataFormatError, DataSourceError: as ``open``.
        """
        return self._told(raw_id, upright_size)

    def _told(self, raw_id: str, of: Callable[[bytes], Told]) -> Told | None:
        data, index = self.read(raw_id), self._index(raw_id)
        if data is None or index is None:
            return None
        try:
            return of(data)
        except BadImageError as error:
            raise self._unusable(raw_id, index, str(error)) from error

    @property
    def survey(self) -> Survey:
        """What is known of every image.

        A download has it from its own records. A user's place is read and decoded once and remembered
        in the cache until the sizes or times of its files change.
        """
        if self._survey is None:
            name = value_digest([self.listing.stamp, list(self.listing.keys)])
            file = self.cache / "images" / "surveys" / f"{name}.npz"
            file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(file.with_suffix(".lock")):  # one of several ranks looks, the others wait
                self._survey = _read_survey(file, len(self))
                if self._survey is None:
                    self._survey = self._look()
                    _write_survey(file, self._survey)
        return self._survey

    @property
    def digest(self) -> str:
        """Digest of all good images and of ``renamed``. Costs a survey once."""
        facts = [self._fact(key, i) for key, i in self.listing.keys.items()]
        good = [fact for fact in facts if fact is not None]
        return value_digest([sorted(good), self.renamed], 16)

    def digest_of(self, raw_ids: Sequence[str]) -> str:
        """Digest of these items' (id, bytes, SHA-256): what a stage that shows them depends on."""
        facts = [self._fact(i, index) for i in raw_ids if (index := self._index(i)) is not None]
        return value_digest(sorted({fact for fact in facts if fact is not None}), 16)

    def sha256_of(self, raw_id: str) -> str:
        """SHA-256 (hex) of an image's bytes; "" where ``mask`` is False. Costs a survey once."""
        index = self._index(raw_id)
        fact = None if index is None else self._fact(raw_id, index)
        return "" if fact is None else fact[2]

    def _fact(self, name: str, index: int) -> tuple[str, int, str] | None:
        if index in self.survey.problems:
            return None
        return name, int(self.listing.sizes[index]), self.survey.sha256[index].tobytes().hex()

    def _index(self, raw_id: str) -> int | None:
        name = raw_id if self.renamed is None else self.renamed.get(raw_id)
        return None if name is None else self.listing.keys.get(file_key(name))

    def _path(self, index: int) -> Path:
        files = self.listing.files
        return self.listing.root if files is None else self.listing.root / files[index]

    def _unusable(self, raw_id: str, index: int, why: str) -> DataFormatError:
        return DataFormatError(
            f"{self._path(index)}: the image of item {raw_id!r} cannot be shown ({why}); replace or "
            "delete it, or ask only for items in the mask."
        )

    def _bytes(self, index: int) -> bytes:
        path, offset = self._path(index), int(self.listing.offsets[index])
        size = int(self.listing.sizes[index])
        try:
            with path.open("rb") as file:
                about = os.fstat(file.fileno())
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise DataSourceError(f"{path}: the image cannot be read ({error}).") from error
        in_tar = self.listing.files is None
        now: Any = ["tar", path.name, about.st_size, about.st_mtime_ns] if in_tar else about.st_size
        if len(data) != size or now != (self.listing.stamp if in_tar else size):
            raise DataSourceError(f"{path} has changed since it was listed; run again.")
        return data

    def _look(self) -> Survey:
        """Read and decode every image of a user's place."""
        logger.info("%s: looking at %d images, once", self.listing.root, len(self))
        hashes = np.zeros((len(self), 32), np.uint8)
        problems = {}
        with ThreadPoolExecutor(_THREADS) as pool:
            for index, (digest, problem) in enumerate(pool.map(self._facts, range(len(self)))):
                hashes[index] = np.frombuffer(digest, np.uint8)
                if problem is not None:
                    problems[index] = problem
        if problems:
            shown = "; ".join(f"{self._name(i)}: {why}" for i, why in list(problems.items())[:3])
            logger.warning(
                "%s: %d of %d files are no good images, their items count as without (%s)",
                self.listing.root, len(problems), len(self), shown,
            )  # fmt: skip
        return Survey(hashes, problems)

    def _name(self, index: int) -> str:
        return next(key for key, i in self.listing.keys.items() if i == index)

    def _facts(self, index: int) -> tuple[bytes, str | None]:
        """SHA-256 and what is wrong with one image."""
        size = int(self.listing.sizes[index])
        if size > MAX_BYTES:
            return bytes(32), f"{size:,} bytes, at most {MAX_BYTES:,}"
        data = self._bytes(index)
        digest = hashlib.sha256(data).digest()
        try:
            inspect(data)
        except BadImageError as error:
            return digest, str(error)
        return digest, None


def _write_survey(file: Path, survey: Survey) -> None:
    part = file.with_suffix(".part")
    with part.open("wb") as out:
        np.savez(
            out,
            sha256=survey.sha256,
            bad=np.array(list(survey.problems), np.int64),
            why=np.array(list(survey.problems.values()), np.str_),
        )
    os.replace(part, file)


def _read_survey(file: Path, count: int) -> Survey | None:
    """A remembered survey, if it is whole and of so many images."""
    try:
        with np.load(file, allow_pickle=False) as found:
            hashes, bad, why = found["sha256"], found["bad"].tolist(), found["why"].tolist()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    same = hashes.shape == (count, 32) and hashes.dtype == np.uint8
    return Survey(hashes, dict(zip(bad, why, strict=True))) if same else None
