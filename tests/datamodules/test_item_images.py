"""Pictures by internal id, as a module gets them from the runner."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datamodules.errors import DataFormatError
from datamodules.images import open_images
from datamodules.item_images import CatalogueImages, JoinedImages
from datamodules.types import ItemImages
from experiments import build

RED, BLUE = (200, 0, 0), (0, 0, 200)


def png(colour: tuple[int, int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> CatalogueImages:
    """Four items: a has a red picture, b none, c a damaged one, d a blue one."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(png(RED))
    (folder / "c.png").write_bytes(png(RED)[:40])
    (folder / "d.png").write_bytes(png(BLUE))
    return CatalogueImages(open_images(folder, tmp_path, "x"), ["a", "b", "c", "d"])


def check_first_catalogue(images: ItemImages) -> None:
    assert images.picture(1).getpixel((0, 0)) == RED
    assert images.picture(4).getpixel((0, 0)) == BLUE
    assert images.picture(1).mode == "RGB"
    assert images.digest(4) == hashlib.sha256(png(BLUE)).hexdigest()
    assert [images.digest(i) for i in (0, 2, 3)] == ["", "", ""]
    for none in (0, 2):
        with pytest.raises(ValueError, match=f"item {none} has no image"):
            images.picture(none)
        with pytest.raises(ValueError, match=f"item {none} has no image"):
            images.size(none)
    assert [images.size(i) for i in (1, 4)] == [images.picture(i).size for i in (1, 4)]
    with pytest.raises(DataFormatError, match="cannot be shown"):
        images.picture(3)


def test_pictures_go_by_internal_id_and_none_is_made_up(images: CatalogueImages) -> None:
    check_first_catalogue(images)
    assert images.mask.tolist() == [False, True, False, False, True]
    assert images.digest(5) == images.digest(-1) == ""
    with pytest.raises(ValueError, match="item 5 has no image"):
        images.picture(5)


def test_without_images_no_item_has_one() -> None:
    none = CatalogueImages(None, ["a", "b"])
    assert none.mask.tolist() == [False] * 3
    assert none.digest(1) == ""
    with pytest.raises(ValueError, match="item 1 has no image"):
        none.picture(1)


def test_the_survey_waits_until_it_is_asked_for(
    images: CatalogueImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    store: Any = images.store
    monkeypatch.setattr(store, "_look", lambda: pytest.fail("looked"))
    images.picture(1)
    with pytest.raises(pytest.fail.Exception, match="looked"):
        images.digest(1)


def test_catalogues_are_numbered_one_after_the_other(images: CatalogueImages) -> None:
    none = CatalogueImages(None, ["e"])
    joined = JoinedImages([images, none, images])
    assert joined.mask.tolist() == np.concatenate([images.mask, [False], images.mask[1:]]).tolist()
    check_first_catalogue(joined)
    assert joined.picture(6).getpixel((0, 0)) == RED
    assert joined.digest(9) == images.digest(4)
    with pytest.raises(ValueError, match="has no image"):
        joined.picture(5)


class Shown:
    """Asks the runner for pictures, as a module does."""

    def __init__(self, item_images: ItemImages, size: int = 3) -> None:
        self.item_images, self.size = item_images, size


def test_the_runner_hands_them_to_whoever_names_the_argument(images: CatalogueImages) -> None:
    node = {"_target_": f"{__name__}.Shown", "size": 4}
    built = build.build_on(node, SimpleNamespace(item_images=images))
    assert (built.item_images, built.size) == (images, 4)
    assert list(build.problems(node, "module")) == []
    (problem,) = build.problems({**node, "item_images": "x"}, "module")
    assert "comes from the data" in problem
