"""The item images that a stage's modules can show: its folder is another one when they change.

A stage counts as one that shows images if its modules reach ``READER`` by imports. Nothing here imports
torch, and where no images are configured nothing is looked at.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datamodules.errors import DataFormatError, DataSourceError
from datamodules.sources import cache_root, file_digest
from datamodules.versioning import read_json, value_digest, write_json
from experiments.errors import UserError
from experiments.source_graph import sources

# Whatever turns item images into something that a model reads imports this file.
READER = "lightning_modules/llm/pictures.py"
ARGUMENT = "item_images"  # of the modules, see build.RUNTIME


def shown_images(
    modules: tuple[str, ...], data: dict[str, Any], prepared: Path, cache: Path
) -> dict[str, str]:
    """``{"item_images": content digest}`` where a stage can show images and its data has any, else nothing.

    Args:
        modules: dotted names of the stage's modules and of what is nested in them.
        data: the stage's data configuration.
        prepared: its prepared folder.
        cache: where digests are remembered, until the images' names, sizes or times change.

    Raises:
        UserError: the images that the configuration names are not there or cannot be listed.
    """
    if READER not in sources(modules):
        return {}
    try:
        found = _digest(data, prepared, cache)
    except (DataSourceError, DataFormatError) as error:
        raise UserError(str(error)) from error
    return {} if found is None else {ARGUMENT: found}


def _digest(data: dict[str, Any], prepared: Path, cache: Path) -> str | None:
    """Of the images of a data set, or of its parts; None where there are none."""
    if isinstance(inner := data.get("data"), dict):  # of data that is shown wrongly
        return _digest(inner, prepared, cache)
    manifest = read_json(prepared / "manifest.json") or {}
    if parts := manifest.get("parts"):
        each = {n: _digest(data["parts"][n], Path(f), cache) for n, f in parts.items()}
        return value_digest(each, 16) if any(each.values()) else None
    root = Path(data["cache"]).expanduser() if data.get("cache") else cache_root()
    if data.get("images"):
        return _content(Path(data["images"]).expanduser(), data.get("image_ids"), cache)
    if own := manifest.get("asked", {}).get("images"):  # made with the data, and made again if gone
        place = root / own
        return _content(place, None, cache) if place.is_dir() else "not made yet"
    downloaded = root / "images" / str(manifest.get("recipe", {}).get("name"))
    return _content(downloaded, None, cache) if (downloaded / "images.parquet").is_file() else None


def _content(place: Path, image_ids: str | None, cache: Path) -> str:
    """Digest of a place's good images and of the list that says whose they are."""
    from datamodules.image_ids import SAME, list_file  # with Polars, which most plans do without
    from datamodules.image_listing import list_images
    from datamodules.images import ImageStore, image_stamp

    names = None
    if image_ids not in (None, SAME):
        file = list_file(str(image_ids), place)
        if not file.is_file():
            raise DataSourceError(f"{file}, which data.image_ids names, is no file.")
        names = file_digest(file)
    stamp = [str(place.resolve()), image_stamp(place), names]
    note = cache / "index" / f"images-{value_digest(stamp)}.json"
    known = read_json(note)
    if not isinstance(known, dict) or "digest" not in known:
        known = {"digest": value_digest([ImageStore(list_images(place), cache).digest, names], 16)}
        write_json(note, known)
    return str(known["digest"])
