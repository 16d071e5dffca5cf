"""Captioned pictures: captions are true, what is held out is never learned from, batches follow the seed."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from datamodules.captioned_items import CaptionedItems
from datamodules.captioned_pictures import CaptionedPictures
from datamodules.captions import CaptionRows
from datamodules.errors import DataSourceError
from datamodules.movielens import MovieLensDataModule
from datamodules.toy_pictures import BACKGROUNDS, COLOURS, MARKS, PATTERNS, SHAPES, Look
from datamodules.toy_shop import ToyShopDataModule
from datamodules.types import TRAIN, VALID
from tests.datamodules import pixels

DRAWN = ("colour", "shape", "background")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def drawn(cache: str) -> CaptionedPictures:
    return CaptionedPictures(train=250, valid=44, cache=cache)


def combined(rows: pl.DataFrame) -> set[tuple[str, ...]]:
    return set(rows.select(DRAWN).rows())


def test_captions_say_what_the_pixels_show(drawn: CaptionedPictures) -> None:
    for code, count in ((TRAIN, 250), (VALID, 44)):
        rows = drawn.captioned(code)
        assert len(rows) == count
        for row in rows:
            colour, background = pixels.colour_of(row.picture), pixels.background_of(row.picture)
            shape = row.attributes["shape"]
            assert row.caption == f"one {colour} {shape} on a {background} background"
            assert row.attributes == {"colour": colour, "shape": shape, "background": background}


@given(st.data())
def test_no_word_before_a_value_tells_which_it_is(data: st.DataObject) -> None:
    """Else the share of values that are named right behind true words says nothing of the picture."""
    values = {
        "shape": list(SHAPES), "colour": list(COLOURS), "background": list(BACKGROUNDS),
        "pattern": PATTERNS, "mark": MARKS,
    }  # fmt: skip
    look = Look(**{name: data.draw(st.sampled_from(some)) for name, some in values.items()})
    name = data.draw(st.sampled_from(list(values)))
    other = replace(look, **{name: data.draw(st.sampled_from(values[name]))})
    told, instead = look.caption(details=True), other.caption(details=True)
    assert told.split(f" {getattr(look, name)}")[0] == instead.split(f" {getattr(other, name)}")[0]


def test_whole_combinations_are_held_out(drawn: CaptionedPictures) -> None:
    learned, held_out = (combined(drawn.attributes(code)) for code in (TRAIN, VALID))
    every = len(SHAPES) * len(COLOURS) * len(BACKGROUNDS)
    assert not learned & held_out
    assert len(held_out) == round(0.15 * every)
    assert len(learned) == every - len(held_out)
    for place, values in enumerate((COLOURS, SHAPES, BACKGROUNDS)):  # each value is learned
        assert {combination[place] for combination in learned} == set(values)
    other = CaptionedPictures(train=250, valid=44, pictures_seed=1, cache=str(drawn.cache))
    assert combined(other.attributes(VALID)) != held_out
    assert other.prepared.digest != drawn.prepared.digest


def test_no_picture_is_a_product_or_drawn_twice(drawn: CaptionedPictures, cache: str) -> None:
    shop = ToyShopDataModule(cache=cache)
    products = {shop.item_images.picture(i).tobytes() for i in range(1, 73)}
    captioned = [r.picture.tobytes() for code in (TRAIN, VALID) for r in drawn.captioned(code)]
    assert len(set(captioned)) == len(captioned)
    assert not products & set(captioned)


def test_details_are_told_in_the_order_of_the_caption(cache: str) -> None:
    told = CaptionedPictures(train=30, valid=8, details=True, cache=cache)
    assert list(told.attribute_values) == ["colour", "shape", "pattern", "background", "mark"]
    for row in told.captioned(TRAIN):
        places = [row.caption.split().index(row.attributes[n]) for n in told.attribute_values]
        assert places == sorted(places)
        assert set(row.attributes) == set(told.attribute_values)
        assert row.attributes["pattern"] == pixels.pattern_of(row.picture)


def test_impossible_settings_are_refused() -> None:
    for options in ({"train": 0}, {"valid": 0}, {"held_out": 1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            CaptionedPictures(**options)  # type: ignore[arg-type]


# ---------------------------------------------------------------- batches


class Reader:
    """A method that counts a caption's letters and keeps what it is handed."""

    def row_lengths(self, rows: CaptionRows) -> np.ndarray:
        return np.array([len(row.caption) for row in rows.rows])

    target_counts = row_lengths

    def collator(self, training: bool) -> Any:
        return lambda rows: (training, rows)


def batches(
    data: CaptionedPictures, loader: str, rank: int = 0, world: int = 1
) -> list[CaptionRows]:
    trainer: Any = SimpleNamespace(
        lightning_module=Reader(), global_rank=rank, world_size=world, accumulate_grad_batches=1
    )
    data.trainer, data.batch_size = trainer, 16
    found = list(getattr(data, loader)())
    data.trainer = None
    assert all(training == (loader == "train_dataloader") for training, _ in found)
    return [rows for _, rows in found]


def captions(found: list[CaptionRows]) -> list[str]:
    return sorted(row.caption for rows in found for row in rows.rows)


def test_every_row_comes_once_and_losses_are_over_the_global_batch(
    drawn: CaptionedPictures,
) -> None:
    whole = batches(drawn, "train_dataloader")
    assert captions(whole) == sorted(row.caption for row in drawn.captioned(TRAIN))
    assert whole[0].normaliser == sum(len(row.caption) for row in whole[0].rows)
    halves = [batches(drawn, "train_dataloader", rank, 2) for rank in (0, 1)]
    for both, first, second in zip(whole, *halves, strict=True):
        assert captions([first, second]) == captions([both])
        assert first.normaliser == second.normaliser == both.normaliser / 2
    held_out = [batches(drawn, "val_dataloader", rank, 2) for rank in (0, 1)]
    assert captions([*held_out[0], *held_out[1]]) == sorted(
        r.caption for r in drawn.captioned(VALID)
    )


# ---------------------------------------------------------------- items of a catalogue


@pytest.fixture
def posters(tmp_path: Path) -> Path:
    """A tar of one-colour pictures of the films 1 to 40."""
    with tarfile.open(tmp_path / "posters.tar", "w") as tar:
        for film in range(1, 41):
            out = io.BytesIO()
            Image.new("RGB", (6, 8), (film, 0, 0)).save(out, "PNG")
            info = tarfile.TarInfo(f"posters/{film}.png")
            info.size = len(out.getvalue())
            tar.addfile(info, io.BytesIO(out.getvalue()))
    return tmp_path / "posters.tar"


def films(root: Path, posters: Path | None, tmp_path: Path) -> MovieLensDataModule:
    return MovieLensDataModule(
        "100k", root=str(root), images=str(posters) if posters else None, image_ids="id",
        cache=str(tmp_path / "cache"),
    )  # fmt: skip


def test_posters_are_captioned_by_title_and_genres(
    tiny_movielens: Path, posters: Path, tmp_path: Path
) -> None:
    data = CaptionedItems(
        {"films": films(tiny_movielens, posters, tmp_path)}, cache=str(tmp_path / "cache")
    )
    rows = [*data.captioned(TRAIN), *data.captioned(VALID)]
    catalog = data.parts["films"].catalog
    shown = [i for i in catalog["item_id"] if int(i) <= 40]
    assert sorted(str(row.picture.getpixel((0, 0))[0]) for row in rows) == sorted(shown)  # type: ignore[index]
    assert len(data.captioned(VALID)) == round(0.15 * len(shown))
    for row in rows:
        raw = str(row.picture.getpixel((0, 0))[0])  # type: ignore[index]
        (film,) = catalog.filter(pl.col("item_id") == raw).to_dicts()
        genres = [name for name in film["categories"] if name not in film["title"]]
        assert row.caption == film["title"] + (f" ({', '.join(genres)})" if genres else "")
    assert any(row.caption.endswith(")") and ", " not in row.caption for row in rows)
    assert {n for r in rows for n in r.attributes} == {"category"}
    (values,) = data.attribute_values.values()
    assert {row.attributes["category"] for row in rows if row.attributes} == set(values)
    for row in rows:  # named first
        assert all(f" ({value}" in row.caption for value in row.attributes.values())


def test_other_pictures_are_other_data(tiny_movielens: Path, posters: Path, tmp_path: Path) -> None:
    with tarfile.open(posters) as tar:
        tar.extractall(tmp_path / "same", filter="data")
        tar.extractall(tmp_path / "changed", filter="data")
    Image.new("RGB", (6, 8), (0, 99, 0)).save(tmp_path / "changed" / "posters" / "7.png")
    digests = []
    for place in (posters, tmp_path / "same", tmp_path / "changed"):
        parts = {"films": films(tiny_movielens, place, tmp_path)}
        digests.append(CaptionedItems(parts, cache=str(tmp_path / "cache")).prepared.digest)
    assert digests[0] == digests[1] != digests[2]


def test_items_without_pictures_are_told(tiny_movielens: Path, tmp_path: Path) -> None:
    data = CaptionedItems(
        {"films": films(tiny_movielens, None, tmp_path)}, cache=str(tmp_path / "cache")
    )
    with pytest.raises(DataSourceError, match=r"data\.parts\.films\.images=PATH"):
        _ = data.prepared
