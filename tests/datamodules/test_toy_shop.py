"""The generated shop: only its pictures tell what shoppers look for, and pixels say what was drawn."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline

from datamodules.candidates import UniformCandidates
from datamodules.splits import RandomByUser
from datamodules.toy_pictures import BACKGROUNDS, COLOURS, LOOK, MARKS, PATTERNS, SHAPES, Look, draw
from datamodules.toy_reviews import make_looks, make_metadata, make_reviews, make_tastes
from datamodules.toy_shop import ToyShopDataModule
from datamodules.types import TEST
from tests.datamodules import pixels

# As the README of the shared data lists them.
REVIEW = {
    "rating", "title", "text", "images", "asin", "parent_asin", "user_id", "timestamp", "helpful_vote",
    "verified_purchase",
}  # fmt: skip
ITEM = {
    "main_category", "title", "average_rating", "rating_number", "features", "description", "price",
    "images", "videos", "store", "categories", "details", "parent_asin", "bought_together",
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def shop(cache: Path) -> ToyShopDataModule:
    made = ToyShopDataModule(
        split=RandomByUser(0.1, 0.4, 42), candidates=UniformCandidates(20), cache=str(cache)
    )
    made.prepare_data()
    return made


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_raw_files_are_in_the_format_of_amazon_2023(shop: ToyShopDataModule) -> None:
    reviews = lines(shop.folder / "Toys_and_Games.jsonl")
    items = lines(shop.folder / "meta_Toys_and_Games.jsonl")
    assert (len(reviews), len(items)) == (840, 72)
    assert {frozenset(row) for row in reviews} == {frozenset(REVIEW)}
    assert {frozenset(row) for row in items} == {frozenset(ITEM)}
    assert sum(row["rating_number"] for row in items) == 840
    assert all(row["timestamp"] > 1.5e12 for row in reviews)
    assert len({(row["user_id"], row["parent_asin"]) for row in reviews}) == 840
    assert (shop.num_users, shop.num_items) == (120, 72)
    assert (
        shop.catalog.select("title", "description", "brand", "price").null_count().row(0)
        == (0,) * 4
    )
    assert shop.item_images.mask.tolist() == [False, *[True] * 72]


def test_a_seed_makes_one_shop_and_another_seed_another(
    shop: ToyShopDataModule, cache: Path, tmp_path: Path
) -> None:
    again = ToyShopDataModule(cache=str(tmp_path))
    assert again.attributes().equals(shop.attributes())
    assert [again.item_images.digest(i) for i in range(73)] == [
        shop.item_images.digest(i) for i in range(73)
    ]
    other = ToyShopDataModule(shop_seed=1, cache=str(tmp_path))
    assert not other.attributes().equals(shop.attributes())
    assert other.folder != again.folder
    shutil.rmtree(again.folder)
    assert ToyShopDataModule(cache=str(tmp_path)).item_images.digest(1) == shop.item_images.digest(
        1
    )


def test_impossible_shops_are_refused(tmp_path: Path) -> None:
    for options in ({"products": 10}, {"purchases": 1}, {"noise": 1.5}, {"drift": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ToyShopDataModule(**options)
    with pytest.raises(ValueError, match="leave out root"):
        ToyShopDataModule(root=str(tmp_path))


# ---------------------------------------------------------------- text and popularity


def told(row: dict[str, Any], plus: str = "") -> str:
    """Everything but the picture, as words; numbers as words of their size."""
    numbers = (
        f"price{row['price'] // 5:.0f} bought{row['rating_number']} stars{row['average_rating']}"
    )
    texts = [row["title"], *row["description"], *row["features"], *row["categories"], row["store"]]
    return " ".join([*texts, row["main_category"], numbers, plus])


def read(texts: list[str], labels: list[str]) -> float:
    """How often the better of two readers of words is right about texts that it has not learned from."""
    scores = []
    for reader in (MultinomialNB(), LogisticRegression(max_iter=300)):
        words = CountVectorizer(token_pattern=r"[^ ]+")
        scores.append(cross_val_score(make_pipeline(words, reader), texts, labels, cv=5).mean())
    return float(max(scores))


def test_no_text_price_or_count_tells_what_a_picture_shows() -> None:
    looks = make_looks(3, 720)
    reviews = make_reviews(3, looks, make_tastes(3, 800, 0.25), 7, 0.05)
    rows = make_metadata(3, list(looks), reviews)
    for name in LOOK:
        labels = [getattr(look, name) for look in looks.values()]
        chance = max(labels.count(v) for v in set(labels)) / len(labels)
        margin = 4 * (chance * (1 - chance) / len(labels)) ** 0.5
        found = read([told(row) for row in rows], labels)
        assert found < chance + margin, name
        planted = [told(row, f"is{label}") for row, label in zip(rows, labels, strict=True)]
        assert read(planted, labels) > chance + 0.5, name


def test_no_text_has_a_word_for_a_look(shop: ToyShopDataModule) -> None:
    words = {*COLOURS, *SHAPES, *BACKGROUNDS, *PATTERNS}
    for file in ("Toys_and_Games.jsonl", "meta_Toys_and_Games.jsonl"):
        found = set(re.findall("[a-z]+", (shop.folder / file).read_text().lower()))
        assert not found & {*words, *(f"{w}s" for w in words)}


def test_each_pair_of_shape_and_colour_is_on_as_many_products(shop: ToyShopDataModule) -> None:
    pairs = shop.attributes().group_by("shape", "colour").len()
    assert pairs["len"].to_list() == [2] * 36
    tastes = shop.tastes()
    assert set(tastes.group_by("shape", "colour").len()["len"]) == {3, 4}
    drifted = tastes.filter(tastes["colour"] != tastes["later_colour"]).height
    assert 15 <= drifted <= 45  # a quarter of 120


def preference(scores: np.ndarray, is_target: np.ndarray) -> float:
    """Mean AUC of rows: how often the target is above a negative, ties by half."""
    target = scores[is_target][:, None]
    above = (scores < target) + 0.5 * (scores == target)
    return float(above[~is_target].mean())


def test_who_knows_the_pictures_ranks_and_popularity_does_not(tmp_path: Path) -> None:
    large = ToyShopDataModule(
        shoppers=800, split=RandomByUser(0.1, 0.4, 42), candidates=UniformCandidates(20), cache=str(tmp_path)
    )  # fmt: skip
    rows, histories, looks = large.rows(TEST), large.histories, large.attributes()
    candidates = rows.candidates
    assert candidates is not None
    is_target = candidates == rows.target[:, None]
    popular = preference(histories.train_counts()[candidates], is_target)
    assert abs(popular - 0.5) < 0.05
    known = [np.array(["", *looks[name]]) for name in ("shape", "colour")]
    shared = np.zeros(candidates.shape)
    for row, (user, stop) in enumerate(zip(rows.user, rows.position, strict=True)):
        history = histories.items[histories.offsets[user] : stop]
        for values in known:
            shared[row] += (values[candidates[row]][:, None] == values[history]).sum(1)
    assert preference(shared, is_target) > 0.75
    unpictured = np.array(["", *looks["background"]])
    same = (unpictured[candidates][:, :, None] == unpictured[rows.target][:, None, None]).sum(2)
    assert preference(same, is_target) > 0.6  # the measure itself can be misled by a leak


# ---------------------------------------------------------------- pixels


def test_every_attribute_can_be_read_off_the_pixels(shop: ToyShopDataModule) -> None:
    chance = random.Random(5)
    samples = [
        Look(shape, chance.choice(list(COLOURS)), chance.choice(list(BACKGROUNDS)), "plain", mark)
        for shape in SHAPES for mark in MARKS for _ in range(3)
    ]  # fmt: skip
    drawn = [draw(look, f"sample {i}") for i, look in enumerate(samples)]
    outlines, badges = ([read(p) for p in drawn] for read in (pixels.outline_of, pixels.badge_of))
    right = dict.fromkeys(LOOK, 0)
    for item, truth in enumerate(shop.attributes().iter_rows(named=True), start=1):
        picture = shop.item_images.picture(item)
        assert (picture.mode, picture.size) == ("RGB", (224, 224))
        found = {
            "shape": pixels.like_the_nearest(
                outlines, [s.shape for s in samples], pixels.outline_of(picture)
            ),
            "colour": pixels.colour_of(picture),
            "background": pixels.background_of(picture),
            "pattern": pixels.pattern_of(picture),
            "mark": pixels.like_the_nearest(
                badges, [s.mark for s in samples], pixels.badge_of(picture)
            ),
        }
        for name in LOOK:
            right[name] += found[name] == truth[name]
    assert right["colour"] == right["background"] == 72, right
    assert min(right.values()) >= 70, right


def test_a_caption_says_what_is_there() -> None:
    look = Look("star", "orange", "grey", "striped", "H")
    assert look.caption() == "one orange star on a grey background"
    told = "one orange star on a striped grey background with the mark H"
    assert look.caption(details=True) == told
