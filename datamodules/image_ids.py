"""Whose image is whose, where the files bear other ids than the data: a stated map, or equal titles.

MovieLens 100K numbers its films by itself while posters are named by the ids of the later releases, so
that film 2 is GoldenEye here and Jumanji there. Showing the wrong picture would go unnoticed; therefore
ids are the same, or given, or joined by title, and never guessed.
"""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import polars as pl

from datamodules.delimited import BadRows, Layout, header_names, read_raw, read_rows
from datamodules.errors import DataFormatError, DataSourceError
from datamodules.text import TITLE_LIMIT, normalise_text

logger = logging.getLogger(__name__)

SAME, TITLE = "id", "title"
_TITLE_LISTS = ("movies.dat", "movies.csv")
_MOVIES_DAT = Layout("::", ("movieId", "title", "genres"), encoding="latin-1")
_MAP_HEADER, _TITLE_HEADER = ("item_id", "image_id"), ("movieId", "title")


def read_ids(join: str, place: Path, items: pl.DataFrame) -> dict[str, str] | None:
    """Item id -> id in the file names, for ``images.open_images``; None where they are the same.

    Args:
        join: ``id``: files are named by the data's own ids. ``title``: by those of a movies.dat or
            movies.csv that lies in ``place`` or beside it; films of equal title (with its year) are the
            same. Else the path of such a file, or of a CSV file with the header ``item_id,image_id``.
        place: the folder or tar of images.
        items: ``item_id`` and ``title`` of the data.

    Raises:
        DataSourceError: no such file, or no title list beside the images.
        DataFormatError: it has another header, a broken row, or an item twice.
    """
    if join == SAME:
        return None
    file = list_file(join, place)
    if not file.is_file():
        raise DataSourceError(
            f"{file} is no file; data.image_ids is id, title, or the path of a movies.dat, a "
            f"movies.csv, or a CSV file with the header {','.join(_MAP_HEADER)}."
        )
    data, _ = read_raw(file)
    bad = BadRows(file, "error")
    if file.name.removesuffix(".gz") == "movies.dat":
        return by_title(items, [(r[0], r[1]) for _, r in read_rows(data, _MOVIES_DAT, bad)], file)
    first = data.removeprefix(b"\xef\xbb\xbf").split(b"\n", 1)[0]
    columns = _TITLE_HEADER if b"movieId" in first else _MAP_HEADER
    layout = Layout(",", header={name: name for name in columns}, quoted=True)
    header_names(data, layout, file)
    rows = [(line, fields[0], fields[1]) for line, fields in read_rows(data, layout, bad)]
    if columns == _TITLE_HEADER:
        return by_title(items, [(image, title) for _, image, title in rows], file)
    return _stated(rows, file)


def list_file(join: str, place: Path) -> Path:
    """The file that says whose images they are, for a ``join`` other than ``id``; see ``read_ids``.

    Raises:
        DataSourceError: no title list beside the images.
    """
    return _title_list(place) if join == TITLE else Path(join).expanduser()


def by_title(items: pl.DataFrame, listed: list[tuple[str, str]], file: Path) -> dict[str, str]:
    """Item id -> image id of the film with the same normalised title.

    Two items of one title share the picture (MovieLens 100K has 18 films twice). A title that the list
    has twice says nothing: its items are left without an image.
    """
    titles = [(image, normalise_text(title, TITLE_LIMIT)) for image, title in listed]
    times = Counter(title for _, title in titles)
    known = {title: image for image, title in titles if times[title] == 1}
    pairs = items.select("item_id", "title").drop_nulls().rows()
    found = {item: known[title] for item, title in pairs if title in known}
    unclear = sum(times[title] > 1 for _, title in pairs)
    logger.info(
        "%s: %d of %d items found by title, %d titles are there twice",
        file, len(found), items.height, unclear,
    )  # fmt: skip
    if not found:
        raise DataFormatError(
            f"{file}: no title in it is one of the data's; name the list that belongs to the images."
        )
    return found


def _title_list(place: Path) -> Path:
    folders = ([place] if place.is_dir() else []) + [place.parent]
    tried = [
        folder / f"{name}{end}"
        for folder in folders
        for name in _TITLE_LISTS
        for end in ("", ".gz")
    ]
    found = next((file for file in tried if file.is_file()), None)
    if found is None:
        raise DataSourceError(
            f"no {' or '.join(_TITLE_LISTS)} lies beside {place}, so its files cannot be joined by title; "
            "put the list of the release that they are named by there, or pass data.image_ids=PATH "
            "(data.image_ids=id if the files are named by this data's own ids)."
        )
    return found


def _stated(rows: list[tuple[int, str, str]], file: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for line, item, image in rows:
        if item in found:
            raise DataFormatError(
                f"{file}, line {line}: item {item!r} is there twice; keep one of its images."
            )
        found[item] = image
    return found
