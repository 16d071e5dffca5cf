"""The publishers' own files: counts made by parsing them with nothing but ``json``."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from datamodules.amazon_loading import load_amazon
from datamodules.amazon_metadata import read_metadata
from datamodules.text import normalise_text
from datamodules.types import RawData
from tests.datamodules.amazon_files import SHARED

pytestmark = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"the real Amazon files are not here: {SHARED} is absent"
)


@cache
def records(category: str, name: str) -> list[dict[str, Any]]:
    lines = gzip.decompress((SHARED / category / name).read_bytes()).splitlines()
    return [json.loads(line) for line in lines]


def load(category: str, tmp_path: Path, **options: Any) -> RawData:
    return load_amazon(2018, category, "5core", SHARED, tmp_path, **options)


def shape(raw: RawData) -> tuple[int, int, int]:
    frame = raw.interactions.frame
    return frame["user_id"].n_unique(), frame["item_id"].n_unique(), frame.height


@pytest.mark.parametrize(
    ("category", "counts", "again"),
    [
        ("Gift_Cards", (458, 148, 2_972), 0),
        ("Magazine_Subscriptions", (348, 157, 2_375), 42),
        ("All_Beauty", (991, 85, 5_269), 1_027),
    ],
)
def test_users_items_and_rows(
    category: str, counts: tuple[int, int, int], again: int, tmp_path: Path
) -> None:
    raw = load(category, tmp_path, duplicates="keep", metadata=False)
    assert shape(raw) == counts
    assert raw.skipped.get("kept: exact duplicate lines", 0) == again
    rows = records(category, f"{category}_5.json.gz")
    events = [(r["reviewerID"], r["asin"], r["overall"], r["unixReviewTime"]) for r in rows]
    strings = {"user_id": pl.String, "item_id": pl.String}
    assert raw.interactions.frame.cast(strings).rows() == events

    raw = load(category, tmp_path, metadata=False)
    assert shape(raw) == (*counts[:2], counts[2] - again)
    assert raw.skipped.get(f"{category}_5.json: exact duplicate lines", 0) == again
    distinct = {json.dumps(r, sort_keys=True): e for r, e in zip(rows, events, strict=True)}
    assert sorted(raw.interactions.frame.cast(strings).rows()) == sorted(distinct.values())
    times = Counter((user, time) for user, _, _, time in distinct.values())
    tied = {user for (user, _), n in times.items() if n > 1}
    assert raw.skipped["kept: users with several events at one time"] == len(tied)
    pairs = {(user, item) for user, item, _, _ in distinct.values()}
    assert raw.skipped["kept: repeated (user, item) rows"] == len(distinct) - len(pairs)
    silent = sum(1 for line in distinct if not json.loads(line).get("reviewText", "").strip())
    assert raw.skipped["kept: reviews without text"] == silent


def test_gift_cards_text_is_what_the_folder_says(tmp_path: Path) -> None:
    raw = load("Gift_Cards", tmp_path)
    catalog = raw.catalog.frame
    assert catalog.height == 148 == catalog["title"].drop_nulls().len()
    assert catalog["description"].drop_nulls().len() == 145
    assert int((catalog["images"].list.len() > 0).sum()) == 116
    assert raw.skipped["kept: reviews without text"] == 6
    assert raw.skipped["meta_Gift_Cards.json: items without a review"] == 1_547 - 148
    titles = {r["asin"]: r["title"] for r in records("Gift_Cards", "meta_Gift_Cards.json.gz")}
    for asin, title in catalog.select("item_id", "title").rows():
        assert title == normalise_text(titles[asin])
    assert set(raw.checksums) == {"Gift_Cards_5.json", "meta_Gift_Cards.json"}


def test_all_gift_cards_202_of_which_share_a_title() -> None:
    rows = records("Gift_Cards", "meta_Gift_Cards.json.gz")
    found = read_metadata(
        SHARED / "Gift_Cards" / "meta_Gift_Cards.json.gz",
        2018,
        pl.Series([r["asin"] for r in rows]),
    )
    assert found.frame["item_id"].to_list() == [r["asin"] for r in rows]
    assert found.frame["title"].to_list().count("Amazon eGift Card") == 202
    assert found.counts["kept: titles with markup or entities, mended"] == 178
    assert found.frame["title"].str.contains("&amp;|&quot;|&#").sum() == 0
    priced = {
        r["asin"]: float(p[1:].replace(",", "")) for r in rows if (p := r["price"]) and "-" not in p
    }
    prices = dict(
        found.frame.filter(pl.col("price").is_not_null()).select("item_id", "price").rows()
    )
    assert prices == pytest.approx(priced)


def test_magazines_have_scraps_for_titles_and_repeated_rows(tmp_path: Path) -> None:
    raw = load("Magazine_Subscriptions", tmp_path)
    rows = records("Magazine_Subscriptions", "meta_Magazine_Subscriptions.json.gz")
    reviewed = {
        r["asin"] for r in records("Magazine_Subscriptions", "Magazine_Subscriptions_5.json.gz")
    }
    assert raw.catalog.frame.height == len(reviewed) == 157
    name = "meta_Magazine_Subscriptions.json"
    assert raw.skipped[f"{name}: repeated rows of an item"] == len(rows) - 2_320 == 1_065
    assert raw.skipped["kept: items without metadata"] == 6
    scrap = '<span class="a-size-medium a-color-secondary"'
    assert sum(r["title"] == scrap for r in rows) == 3_153
    titled = {r["asin"] for r in rows if r["asin"] in reviewed and r["title"] != scrap}
    assert raw.catalog.frame["title"].drop_nulls().len() == len(titled)
    assert raw.skipped["kept: titles that are scraps of markup"] == 157 - 6 - len(titled)
    ranks = {r["asin"]: isinstance(r["rank"], list) for r in rows if r["asin"] in reviewed}
    assert raw.skipped["kept: sales ranks written as lists (not used)"] == sum(ranks.values()) > 9
    assert raw.catalog.frame["price"].drop_nulls().len() == sum(
        r["price"].startswith("$") for r in rows if r["asin"] in reviewed
    )
