"""Review and metadata files in Amazon's 2023 format, made from a seed: the real ones' size, not their text.

Who reviews what follows heavy-tailed popularity, as in the real files; lengths of texts are log-normal
with the mean of the real ones (about 350 characters a review, 600 a description). Texts are drawn from a
pool of sentences. Lines are written in blocks, so that memory does not grow with the file.

Legend: L lines, U users, I items, B lines in a block.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

LETTERS = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", np.uint8)
LINES_PER_USER, LINES_PER_ITEM = 4, 12
BLOCK = 250_000
POOL = 20_000  # different texts; more would only make the same bytes in another order
FIRST, LAST = 1_200_000_000_000, 1_690_000_000_000  # milliseconds: 2008 to 2023
WORD_LIST = """the a this it is was my for with and but so very not really great good nice soft clean cheap
skin hair brush cream color size smell bottle week month price quality product bought ordered received
returned would recommend again because after before works lasts feels looks arrived broken daughter wife gift
perfect small large easy use every day money worth little bit than expected love it's don't I'm"""
WORDS = WORD_LIST.split()
HOST = "https://images.example.com/I"


@dataclass(frozen=True)
class Files:
    """A review file and its metadata file."""

    reviews: Path
    metadata: Path
    lines: int


def write_files(folder: Path, category: str, lines: int, seed: int = 0) -> Files:
    """Both files, or those of an earlier call with the same arguments.

    Args:
        folder: of these files alone; they are named ``CATEGORY.jsonl`` and ``meta_CATEGORY.jsonl``.
        category: a category of the release.
        lines: L, reviews.
        seed: of everything.
    """
    files = Files(folder / f"{category}.jsonl", folder / f"meta_{category}.jsonl", lines)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    users, items = max(1, lines // LINES_PER_USER), max(1, lines // LINES_PER_ITEM)
    if not files.metadata.is_file():
        _write(files.metadata, _item_blocks(rng, items, category))
    if not files.reviews.is_file():
        _write(files.reviews, _review_blocks(np.random.default_rng(seed + 1), lines, users, items))
    return files


def draw_codes(rng: np.random.Generator, size: int, kinds: int, exponent: float) -> np.ndarray:
    """(size,) int64 in [0, kinds): Zipf's law, the ranks shuffled over the numbers."""
    total = np.cumsum(1 / np.arange(1, kinds + 1) ** exponent)
    rank = np.searchsorted(total / total[-1], rng.random(size))
    return rng.permutation(kinds)[np.minimum(rank, kinds - 1)]


def user_names(users: int) -> pl.Series:
    """(U,) ids of 28 characters."""
    return _names("A", users, 27, 11)


def item_names(items: int) -> pl.Series:
    """(I,) ids of 10 characters."""
    return _names("B0", items, 8, 12)


def _names(prefix: str, count: int, length: int, seed: int) -> pl.Series:
    table = LETTERS[np.random.default_rng(seed).integers(0, 32, (count, length))]  # bytes
    # The last letters count up, so that no two names are the same.
    digits = (np.arange(count)[:, None] >> (5 * np.arange(5))) & 31
    table[:, -5:] = LETTERS[digits]
    text = np.ascontiguousarray(table).view(f"S{length}")[:, 0].astype(str)
    return prefix + pl.Series(text)


def _texts(
    rng: np.random.Generator, mean: float, spread: float, marked: float, count: int = POOL
) -> pl.Series:
    """(count,) texts of log-normal length with this mean, a share of them ``marked`` up or with entities."""
    lengths = rng.lognormal(np.log(mean) - spread**2 / 2, spread, count).clip(8, 20_000).astype(int)
    words = np.array(WORDS)[rng.integers(0, len(WORDS), int(lengths.sum() // 3))]
    ends = np.where(rng.random(len(words)) < 0.08, ". ", " ")
    stream = "".join(np.char.add(words, ends).tolist())
    stops = np.cumsum(lengths)
    texts = [stream[a:b].strip() for a, b in zip(stops - lengths, stops, strict=True)]
    for row in np.flatnonzero(rng.random(count) < marked):
        texts[row] = texts[row].replace(". ", ".<br /><br />", 2) + " &amp; more"
    return pl.Series(texts)


def _write(path: Path, blocks: Iterator[pl.DataFrame]) -> None:
    """JSON lines of all blocks; a file that was cut off never has the final name."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        for block in blocks:
            block.write_ndjson(file)
    os.replace(part, path)


def _review_blocks(
    rng: np.random.Generator, lines: int, users: int, items: int
) -> Iterator[pl.DataFrame]:
    user, item = draw_codes(rng, lines, users, 0.6), draw_codes(rng, lines, items, 0.8)
    texts, titles = _texts(rng, 350, 1.1, 0.2), _texts(rng, 25, 0.6, 0.01)
    names, products = user_names(users), item_names(items)
    for at in range(0, lines, BLOCK):
        u, i = user[at : at + BLOCK], item[at : at + BLOCK]
        again = np.flatnonzero(rng.random(len(u)) < 0.005)  # exact repeats, as the real files have
        row = np.arange(len(u))
        row[again] = np.maximum(again - 1, 0)
        yield _reviews(rng, names.gather(u), products.gather(i), texts, titles)[row]


def _reviews(
    rng: np.random.Generator,
    users: pl.Series,
    items: pl.Series,
    texts: pl.Series,
    titles: pl.Series,
) -> pl.DataFrame:
    """B reviews."""
    size = len(users)
    frame = pl.DataFrame(
        {
            "rating": rng.choice([1.0, 2.0, 3.0, 4.0, 5.0], size, p=[0.12, 0.06, 0.09, 0.13, 0.6]),
            "title": titles.gather(rng.integers(0, len(titles), size)),
            "text": texts.gather(rng.integers(0, len(texts), size)),
            "pictured": rng.random(size) < 0.05,
            "parent_asin": items,
            "variant": rng.random(size) < 0.3,
            "user_id": users,
            "timestamp": rng.integers(FIRST, LAST, size),
            "helpful_vote": rng.geometric(0.6, size) - 1,
            "verified_purchase": rng.random(size) < 0.9,
        }
    )
    sizes = (("small_image_url", 256), ("medium_image_url", 800), ("large_image_url", 1600))
    picture = pl.struct(
        *(pl.format(f"{HOST}/{{}}._SL{n}_.jpg", "parent_asin").alias(name) for name, n in sizes),
        attachment_type=pl.lit("IMAGE"),
    )
    variant = pl.format("{}V", pl.col("parent_asin").str.head(9))
    return frame.select(
        "rating", "title", "text",
        images=_some("pictured", pl.concat_list(picture)),
        asin=pl.when("variant").then(variant).otherwise("parent_asin"),
        parent_asin="parent_asin", user_id="user_id", timestamp="timestamp",
        helpful_vote="helpful_vote", verified_purchase="verified_purchase",
    )  # fmt: skip


def _some(where: str, values: pl.Expr) -> pl.Expr:
    """The list where the column is true, else an empty one."""
    return pl.when(where).then(values).otherwise(values.list.head(0))


def _item_blocks(rng: np.random.Generator, items: int, category: str) -> Iterator[pl.DataFrame]:
    texts, titles = _texts(rng, 600, 0.8, 0.1), _texts(rng, 90, 0.4, 0.05)
    names = item_names(items)
    for at in range(0, items, BLOCK):
        yield _items(rng, names[at : at + BLOCK], category.replace("_", " "), texts, titles)


def _items(
    rng: np.random.Generator,
    names: pl.Series,
    category: str,
    texts: pl.Series,
    titles: pl.Series,
) -> pl.DataFrame:
    """B rows of metadata."""
    size = len(names)

    def some(pool: pl.Series) -> pl.Series:
        return pool.gather(rng.integers(0, len(pool), size))

    frame = pl.DataFrame(
        {
            "parent_asin": names,
            "title": some(titles),
            "description": some(texts),
            "first": some(titles),
            "second": some(titles),
            "price": np.round(rng.lognormal(2.5, 0.8, size), 2),
            "average_rating": np.round(rng.uniform(2, 5, size), 1),
            "rating_number": rng.geometric(0.05, size),
            "priced": rng.random(size) < 0.6,
            "described": rng.random(size) < 0.6,
            "pictured": rng.random(size) < 0.9,
            "store": some(titles).str.head(12).str.strip_chars(),
        }
    )
    picture = pl.struct(
        thumb=pl.format(f"{HOST}/{{}}._SS40_.jpg", "parent_asin"),
        large=pl.format(f"{HOST}/{{}}.jpg", "parent_asin"),
        variant=pl.lit("MAIN"),
        hi_res=pl.format(f"{HOST}/{{}}._SL1500_.jpg", "parent_asin"),
    )
    details = {"Brand": "store", "UPC": "parent_asin", "Item Form": "first"}
    return frame.select(
        "title", "average_rating", "rating_number", "store", "parent_asin",
        main_category=pl.lit(category),
        features=_some("described", pl.concat_list("first", "second")),
        description=_some("described", pl.concat_list("description")),
        price=pl.when("priced").then("price"),
        images=_some("pictured", pl.concat_list(picture, picture)),
        videos=pl.concat_list("title").list.head(0),
        categories=pl.concat_list(pl.lit(category), pl.col("store")),
        details=pl.struct([pl.col(of).alias(name) for name, of in details.items()]),
        bought_together=pl.lit(None, pl.String),
    )  # fmt: skip
