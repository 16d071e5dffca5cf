"""Which image files a folder, a tar or a download folder holds, and under which item's name.

An item id is data and never becomes part of a path: a place is listed once, and ids are looked up in
the list. A file is for the item whose id its name gives, ending aside (``1193.jpg``, ``posters/1193.jpg``
in a tar); in file names ``%``, ``/`` and NUL of an id are written ``%25``, ``%2F`` and ``%00``, and a dot
that an id begins with ``%2E``. Downloaded files are named by their content; a table says whose they are.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from datamodules.errors import DataFormatError, DataSourceError
from datamodules.image_decoding import FORMATS, SUFFIXES
from datamodules.versioning import folder_stats, read_json

TABLE, SUMMARY, FILES = "images.parquet", "images.json", "files"  # of a download folder
_BLOCK = 512  # of a tar
_PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")


def file_key(raw_id: str) -> str:
    """What a file for this item is called, ending aside; no two ids share one."""
    key = raw_id.replace("%", "%25").replace("/", "%2F").replace("\0", "%00")
    return f"%2E{key[1:]}" if key.startswith(".") else key


def stored_name(sha256: str, format_name: str) -> str:
    """Where a downloaded image lies below its folder: equal images of several items are one file."""
    return f"{FILES}/{sha256[:2]}/{sha256}.{format_name.lower()}"


@dataclass(frozen=True)
class Survey:
    """What a look at every one of I images has found.

    Arrays, not a Polars frame: Polars may wait for ever in a loader worker that was forked.
    """

    sha256: np.ndarray  # (I, 32) uint8; zeros where nothing was read
    problems: dict[int, str]  # of those that cannot be shown


@dataclass(frozen=True)
class Listing:
    """Where I images' bytes are: ``sizes[i]`` bytes from ``offsets[i]`` of a file."""

    root: Path
    keys: dict[str, int]  # file key -> i
    files: list[str] | None  # I paths below ``root``; None: all lie in the tar ``root``
    offsets: np.ndarray  # (I,) int64
    sizes: np.ndarray  # (I,) int64
    stamp: Any  # plain values that change when the place does, see ``image_stamp``
    survey: Survey | None = None  # of a download, which has looked at every image


def list_images(place: Path) -> Listing:
    """List a folder (and the folders in it), a plain tar, or a download folder.

    No image is read; a tar costs about 50 microseconds a member, a folder one ``stat`` a file.

    Raises:
        DataSourceError: no such place, a packed tar, a damaged one, or no image in it.
        DataFormatError: two files for one item.
    """
    if (place / TABLE).is_file():
        return _list_download(place)
    if place.is_dir():
        listing = _list_folder(place)
    elif place.name.lower().endswith(_PACKED):
        raise DataSourceError(
            f"{place} is packed, so that no single image can be read from it; unpack it and give the "
            "folder, or give it as a plain .tar (images do not get smaller by packing)."
        )
    elif place.is_file():
        listing = _list_tar(place)
    else:
        raise DataSourceError(f"{place} is neither a folder nor a tar file; name one with images.")
    if not listing.keys:
        raise DataSourceError(
            f"{place} holds no image; expected files named by item id, such as 1193.jpg "
            f"({', '.join(SUFFIXES)}), in it or one folder below."
        )
    return listing


def image_stamp(place: Path) -> Any:
    """Plain values that change when the images of a place do, without reading any: for keys.

    Names, sizes and times of a folder's files; a tar's own; a download's content digest.
    """
    if (place / TABLE).is_file():
        summary = read_json(place / SUMMARY)
        return ["download", summary["digest"] if summary else None]
    if place.is_dir():
        return ["folder", *([*s] for s in folder_stats(place) if _is_image(s[0]))]
    if place.is_file():
        return ["tar", place.name, place.stat().st_size, place.stat().st_mtime_ns]
    return None


def _is_image(name: str) -> bool:
    last = name.rpartition("/")[2]
    if last.startswith(".") or not last.lower().endswith(SUFFIXES):  # "._1.jpg" is a Mac's note
        return False
    return not any("\ud800" <= c <= "\udfff" for c in last)  # no text, so no item's name


def _list_folder(folder: Path) -> Listing:
    stamp = image_stamp(folder)
    return _listing(folder, [(name, 0, size) for name, size, _ in stamp[1:]], stamp)


def _list_tar(path: Path) -> Listing:
    stamp = image_stamp(path)
    try:
        with tarfile.open(path, "r:") as file:
            members = file.getmembers()
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if members:
        _require_end(path, members[-1])
    plain = [m for m in members if m.isreg() and _is_image(m.name)]
    if sparse := next((m for m in plain if m.issparse()), None):
        raise _damaged(path, f"{sparse.name!r} is stored with holes")
    last = {m.name: (m.name, m.offset_data, m.size) for m in plain}  # tar's rule: the last one wins
    return _listing(path, list(last.values()), stamp, in_tar=True)


def _require_end(path: Path, last: tarfile.TarInfo) -> None:
    """``tarfile`` takes a damaged header for the end: behind the last member there must be zeros."""
    end = last.offset_data + (-(-last.size // _BLOCK) * _BLOCK if last.isreg() else 0)
    with path.open("rb") as file:
        file.seek(end)
        if file.read(_BLOCK).strip(b"\0"):
            raise _damaged(path, f"what follows {last.name!r} is no member")
    if path.stat().st_size < last.offset_data + (last.size if last.isreg() else 0):
        raise _damaged(path, f"it ends within {last.name!r}")


def _damaged(path: Path, why: str) -> DataSourceError:
    return DataSourceError(
        f"{path} cannot be read as a plain tar of images ({why}); make or fetch it again."
    )


def _listing(
    root: Path, entries: Iterable[tuple[str, int, int]], stamp: Any, in_tar: bool = False
) -> Listing:
    """From (name, offset, size) of each image."""
    keys: dict[str, int] = {}
    files: list[str] = []
    places: list[tuple[int, int]] = []
    for name, offset, size in entries:
        key = name.rpartition("/")[2].rpartition(".")[0]
        if key in keys:
            raise DataFormatError(
                f"{root}: {files[keys[key]]} and {name} are both for item {key!r}; keep one of them."
            )
        keys[key] = len(files)
        files.append(name)
        places.append((offset, size))
    table = np.array(places, np.int64).reshape(-1, 2)
    return Listing(root, keys, None if in_tar else files, table[:, 0], table[:, 1], stamp)


def _list_download(folder: Path) -> Listing:
    try:
        table = pl.read_parquet(folder / TABLE).filter(pl.col("status") == "ok")
        table = table.select("item_id", "format", "bytes", "sha256")
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataSourceError(
            f"{folder / TABLE} cannot be read ({error}); run make images again."
        ) from error
    # A folder may come from somebody else: nothing in its table may lead out of it.
    named = pl.col("sha256").str.contains("^[0-9a-f]{64}$") & pl.col("format").is_in(list(FORMATS))
    if not table.select((named & pl.col("bytes").ge(0)).fill_null(False).all()).item():
        raise DataSourceError(f"{folder / TABLE} names no stored files; run make images again.")
    keys = [file_key(item) for item in table["item_id"]]
    stored = zip(table["sha256"], table["format"], strict=True)
    hashes = np.frombuffer(bytes.fromhex("".join(table["sha256"])), np.uint8).reshape(-1, 32)
    return Listing(
        folder,
        {key: i for i, key in enumerate(keys)},
        [stored_name(sha256, format_name) for sha256, format_name in stored],
        np.zeros(len(keys), np.int64),
        table["bytes"].to_numpy(),
        image_stamp(folder),
        Survey(hashes, {}),
    )
