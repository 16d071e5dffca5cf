"""Texts of pictures and of words and pictures together: who is asked, what is asked, and what is kept."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from datamodules.types import ItemWords
from lightning_modules.errors import ModelError
from lightning_modules.item_pictures import ItemPicturesModule
from lightning_modules.item_summaries import ItemFusionModule
from lightning_modules.llm.pictures import PICTURE
from lightning_modules.llm.random_models import RandomModel
from lightning_modules.llm.random_vision import RandomVisionModel
from lightning_modules.llm.row_pictures import OpenedPictures
from lightning_modules.llm.specs import BackboneSpec, VisionSpec

WORDS = ItemWords("toy", "toys", "buy", "bought")
ARCHITECTURES = ("llava_lite", "idefics3", "qwen2_5_vl")


class Pictures:
    """Pictures of noise by internal id; those that are None are missing."""

    def __init__(self, *seeds: int | None) -> None:
        self.seeds = seeds
        self.opened: list[int] = []
        self.mask = np.array([False, *(seed is not None for seed in seeds)])

    def picture(self, item: int) -> Image.Image:
        self.opened.append(item)
        draw = np.random.default_rng(self.seeds[item - 1])
        return Image.fromarray(draw.integers(0, 255, (60, 50 + 10 * item, 3), dtype=np.uint8))

    def size(self, item: int) -> tuple[int, int]:
        return 50 + 10 * item, 60

    def digest(self, item: int) -> str:
        return hashlib.sha256(str(self.seeds[item - 1]).encode()).hexdigest()


def describer(images: Pictures, architecture: Any = "llava_lite", **options: Any) -> Any:
    spec = VisionSpec(RandomVisionModel(architecture), dtype="float32", max_length=512)
    made = ItemPicturesModule(WORDS, images, spec, **{"max_new_tokens": 6, **options})
    made._load(spec, torch.device("cpu"), None, seed=0)
    return made


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, data_cache: Path) -> None:
    monkeypatch.setenv("LLMREC_CACHE", str(data_cache))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_of_pictures_is_described_as_each_alone(architecture: Any) -> None:
    images = Pictures(1, None, 3, 4)
    together, alone = describer(images, architecture), describer(images, architecture)
    together.predict_step(torch.tensor([0, 1, 2, 3]))
    table = together.table()
    assert table["item"].to_list() == [1, 2, 3, 4]
    assert table["text"][1] is None  # nothing is made up
    assert alone.table().equals(table)
    assert len(together.generations.known) == 3
    assert set(together.generations.known) == set(alone.generations.known)
    assert "3 of 4 items have a picture" in together.remarks()


def test_another_picture_asks_again_about_its_item_alone() -> None:
    before = describer(Pictures(1, 2, 3))
    before.table()
    images = Pictures(1, 9, 3)
    after = describer(images)
    after.generations.known.update(before.generations.known)
    after.table()
    fresh = {g.key for g in after.generations.take_fresh()}
    assert len(fresh) == 1
    assert not fresh & set(before.generations.known)


def test_a_model_sees_the_pixels() -> None:
    """Equal sizes are equal tokens: only what the tower sees differs."""
    one, other = Pictures(1), Pictures(2)
    first, second = describer(one, max_new_tokens=20), describer(other, max_new_tokens=20)
    assert first.prompt(0) == second.prompt(0)
    assert first.table()["text"][0] != second.table()["text"][0]


def test_what_cannot_be_asked() -> None:
    spec = BackboneSpec(RandomModel())
    with pytest.raises(
        ValueError, match="BackboneSpec, which reads no pictures: take llm=smolvision"
    ):
        ItemPicturesModule(WORDS, Pictures(1), spec)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"lower the size of pictures"):
        describer(Pictures(1), max_new_tokens=510).prompt(0)


def fused(descriptions: list[str | None], pictures: list[str | None], **options: Any) -> Any:
    frame = pl.DataFrame(
        {"title": [None] * len(pictures), "description": descriptions, "picture": pictures},
        schema=dict.fromkeys(("title", "description", "picture"), pl.String),
    )
    spec = BackboneSpec(RandomModel(), dtype="float32", max_length=512)
    made = ItemFusionModule(frame, WORDS, spec, **{"max_new_tokens": 6, **options})
    made._load(spec, torch.device("cpu"), None, seed=0)
    return made


def test_two_parts_are_fused_and_one_part_stays() -> None:
    made = fused(["A ball.", "A kite.", None, None], ["It is red.", None, "It is blue.", None])
    table = made.table()
    assert table["fused"].to_list() == [True, False, False, False]
    assert table["text"].to_list()[1:] == ["A kite.", "It is blue.", None]
    assert len(made.generations.known) == 1
    asked = made.tokenizer.decode(made.prompt(0))
    assert "Text: A ball.\nPicture: It is red." in asked
    assert "1 of 4 items have a text of words and picture, 3 what is known of them alone" in (
        made.remarks()
    )


def test_neither_part_crowds_the_other_out() -> None:
    made = fused(["long " * 500], ["It is red."], text_tokens=16)
    short = fused(["long " * 50], ["It is red."], text_tokens=16)
    assert made.prompt(0) == short.prompt(0)
    assert "It is red." in made.tokenizer.decode(made.prompt(0))


def test_a_fusion_needs_what_pictures_show() -> None:
    frame = pl.DataFrame({"title": ["x"], "description": ["y"]})
    with pytest.raises(
        ValueError, match=r"catalog\.picture.* of a stage that runs ItemPicturesModule"
    ):
        ItemFusionModule(frame, WORDS, BackboneSpec(RandomModel()))


def test_parts_may_stand_side_by_side_without_a_model() -> None:
    """As the released code has them: a title, then what its picture shows."""
    made = fused(
        ["A ball.", "A kite", None, None], ["It is red.", None, "It is blue.", None], fuse=False
    )
    assert made.table()["text"].to_list() == ["A ball.. It is red.", "A kite", "It is blue.", None]
    assert not made.generations.known
    made.model = None
    made.configure_model()  # needs no trainer: nothing is loaded
    assert made.model is None
    assert made.predict_batches(4, 0, 1) == []


@pytest.mark.parametrize("architecture", ["llava_next", "qwen2_5_vl"])
def test_pictures_of_like_length_are_described_together(architecture: Any) -> None:
    images = Pictures(1, None, 3, 4, *range(5, 30))
    made = describer(images, architecture)
    lengths = {n: len(made.prompt(n)) for n in range(made.numbered) if images.mask[n + 1]}
    assert len(set(lengths.values())) > 2  # image tokens count
    images.opened.clear()
    batches = made.predict_batches(4, 0, 1)
    assert images.opened == []  # a file's beginning tells a picture's size
    order = [number for batch in batches for number in batch]
    assert sorted(order) == sorted(lengths)
    assert [lengths[n] for n in order] == sorted(lengths.values(), reverse=True)
    assert {len(batch) for batch in batches[:-1]} == {4}
    both = [n for rank in (0, 1) for b in made.predict_batches(4, rank, 2) for n in b]
    assert sorted(both) == sorted(lengths)
    for batch in batches:
        made.predict_step(torch.tensor(batch))
    assert sorted(images.opened) == [n + 1 for n in sorted(lengths)]  # each once
    assert made.table().equals(describer(images, architecture).table())


def test_opened_pictures_are_kept_as_long_as_they_fit() -> None:
    images = Pictures(1, 2, 3)
    opened = OpenedPictures(images, most_bytes=60 * (60 + 70) * 3)
    for item in (1, 2, 1, 2):
        opened.picture(item)
    assert images.opened == [1, 2]
    opened.picture(3)  # both others go: it is 60 x 80 pixels
    opened.picture(2)
    assert images.opened == [1, 2, 3, 2]
    assert opened.digest(2) == images.digest(2)


@pytest.mark.parametrize("architecture", ["llava", "llava_next", "idefics3", "qwen2_5_vl"])
def test_a_prompt_with_one_token_a_picture(architecture: Any) -> None:
    reader = describer(Pictures(1), architecture).reader
    sizes = [(70, 60), (200, 60)]
    text = reader.lay_out(f"Compare {PICTURE} with {PICTURE}.")
    short = reader.one_token_each(reader.tokens(text, sizes), sizes)
    image = reader.processor.config.image_token_id
    assert short.count(image) == 2
    mark = reader.processor.before + reader.processor.image + reader.processor.behind
    encoded = reader.tokenizer(text.replace(PICTURE, mark), add_special_tokens=False)["input_ids"]
    assert short == encoded
    with pytest.raises(ModelError, match="not in its prompt as its tokens"):
        reader.one_token_each(short, [*sizes, *sizes])
