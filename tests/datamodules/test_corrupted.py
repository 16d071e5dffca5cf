"""Wrong inputs: another item's picture or texts, or grey; everything else of the data stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.corrupted import TEXTS, WrongImages, corrupted
from datamodules.samplers import others
from datamodules.toy_shop import ToyShopDataModule


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def shop(cache: Path) -> ToyShopDataModule:
    return ToyShopDataModule(products=24, shoppers=10, purchases=4, cache=str(cache))


def test_swapped_pictures_are_those_of_other_items(cache: Path) -> None:
    right, wrong = shop(cache), corrupted(shop(cache), pictures="swapped")
    own, shown = right.item_images, wrong.item_images
    assert shown.mask.tolist() == own.mask.tolist()
    items = range(1, right.num_items + 1)
    digests = [own.digest(i) for i in items]
    moved = [shown.digest(i) for i in items]
    assert sorted(moved) == sorted(digests)
    assert all(a != b for a, b in zip(moved, digests, strict=True))
    whose = digests.index(moved[0]) + 1
    assert shown.picture(1).tobytes() == own.picture(whose).tobytes()
    assert shown.digest(0) == shown.digest(right.num_items + 1) == ""
    assert wrong.catalog.equals(right.catalog)
    assert wrong.prepared.folder == right.prepared.folder
    assert wrong.protocol() == right.protocol()


def test_blank_pictures_are_grey_and_of_the_same_size(cache: Path) -> None:
    data = corrupted(shop(cache), pictures="blank")
    shown = data.item_images
    picture = shown.picture(3)
    assert picture.size == (224, 224)
    assert picture.getcolors() == [(224 * 224, (128, 128, 128))]
    assert len({shown.digest(i) for i in range(1, data.num_items + 1)}) == 1
    assert shown.digest(1) != ""


@pytest.mark.parametrize("pictures", ["swapped", "blank"])
def test_sizes_are_read_and_names_are_known_without_decoding_a_picture(
    cache: Path, monkeypatch: pytest.MonkeyPatch, pictures: Any
) -> None:
    shown: Any = corrupted(shop(cache), pictures=pictures).item_images
    items = range(1, len(shown.mask))
    expected = [shown.picture(item).size for item in items]

    def refuse(self: Any, item: int) -> Any:
        raise AssertionError(item)

    monkeypatch.setattr(type(shown.images), "picture", refuse)
    assert [shown.size(item) for item in items] == expected
    assert all(shown.digest(item) for item in items)


def test_one_picture_alone_cannot_be_swapped() -> None:
    class One:
        mask = np.array([False, False, True])

        def digest(self, item: int) -> str:
            return "ab" * 32

        picture = size = digest

    shown: Any = WrongImages(One(), blank=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs two items with pictures, and there is one"):
        shown.digest(2)


def test_swapped_texts_are_whole_texts_of_other_items(cache: Path) -> None:
    right, wrong = shop(cache), corrupted(shop(cache), texts="swapped")
    lines = right.catalog.select(TEXTS).rows()
    moved = wrong.catalog.select(TEXTS).rows()
    assert sorted(map(str, moved)) == sorted(map(str, lines))
    assert all(a != b for a, b in zip(moved, lines, strict=True))
    assert wrong.catalog["item_id"].equals(right.catalog["item_id"])
    assert wrong.item_images.digest(5) == right.item_images.digest(5)
    # What is true is told of the data, not of what is shown.
    assert wrong.prepared.items.equals(right.catalog)


@pytest.mark.parametrize("count", [2, 3, 50])
def test_nobody_keeps_what_is_theirs(count: int) -> None:
    items = np.arange(10, 10 + count)
    found = others(items)
    assert sorted(found) == items.tolist()
    assert (found != items).all()
    assert found.tolist() == others(items).tolist()


@pytest.mark.parametrize(("asked", "told"), [
    ({}, "nothing would be wrong"), ({"pictures": "none"}, "expected one of own, swapped, blank"),
    ({"texts": "blank"}, "one of own, swapped"),
])  # fmt: skip
def test_impossible_corruptions_are_refused(cache: Path, asked: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        corrupted(shop(cache), **asked)
