"""The toy shop's products, tastes and reviews, in the raw format of Amazon 2023.

A product's title, description, categories, brand and price are drawn apart from its look, each pair of a
shape and a colour is on equally many products, and tastes are spread evenly over pairs: neither text nor
popularity tells what a product looks like.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

from datamodules.toy_pictures import BACKGROUNDS, COLOURS, MARKS, PATTERNS, SHAPES, Look

_BOTH, _ONE = 3.0, 1.0  # how much a product that fits a taste in shape and colour, or in one, draws
_DAY = 86_400_000  # milliseconds
_OPENED = 1_577_836_800_000  # 2020-01-01
_KINDS = (
    "Desk Organizer", "Storage Box", "Wall Clock", "Lunch Bag", "Notebook Cover", "Pencil Case", "Cushion",
    "Keychain", "Door Mat", "Table Lamp", "Coaster Set", "Photo Frame",
)  # fmt: skip
_QUALITIES = (
    "Compact", "Sturdy", "Classic", "Portable", "Everyday", "Premium", "Handy", "Lightweight", "Foldable",
)  # fmt: skip
_DEPARTMENTS = (
    ("Home", "Decoration"), ("Office", "Desk"), ("Kitchen", "Dining"), ("School", "Supplies"),
    ("Travel", "Bags"),
)  # fmt: skip
_MAKERS = ("Nordvik", "Palmera", "Castell", "Brightwell", "Ostara", "Juniper")
_MATERIALS = ("cotton", "bamboo", "steel", "felt", "cork", "recycled plastic")
_REMARKS = (
    "Arrived on time.", "As described.", "A gift for my sister.", "Bought a second one.", "Well packed.",
    "We use it every day.",
)  # fmt: skip


@dataclass(frozen=True)
class Taste:
    """What a shopper looks for: a shape, and a colour, which may be another one from half-way on."""

    colour: str
    shape: str
    later_colour: str

    def at(self, purchase: int, purchases: int) -> tuple[str, str]:
        """Colour and shape that are looked for by then."""
        return (self.later_colour if 2 * purchase >= purchases else self.colour), self.shape


def make_looks(seed: int, products: int) -> dict[str, Look]:
    """Raw item id -> look; pairs of shape and colour as equally often as can be, all else at random."""
    chance = random.Random(f"toy shop {seed}: looks")
    pairs = _evenly(list(itertools.product(SHAPES, COLOURS)), products, chance)
    return {
        f"B0TOY{number:05d}": Look(
            shape, colour, chance.choice(list(BACKGROUNDS)), chance.choice(PATTERNS), chance.choice(MARKS)
        )
        for number, (shape, colour) in enumerate(pairs, start=1)
    }  # fmt: skip


def make_tastes(seed: int, shoppers: int, drift: float) -> dict[str, Taste]:
    """Raw user id -> taste; pairs as equally often as can be."""
    chance = random.Random(f"toy shop {seed}: tastes")
    pairs = _evenly(list(itertools.product(SHAPES, COLOURS)), shoppers, chance)
    tastes = {}
    for number, (shape, colour) in enumerate(pairs, start=1):
        others = [c for c in COLOURS if c != colour]
        later = chance.choice(others) if chance.random() < drift else colour
        tastes[f"AETOY{number:05d}"] = Taste(colour, shape, later)
    return tastes


def _evenly(values: list[tuple[str, str]], count: int, chance: random.Random) -> list[Any]:
    """``count`` of the values in random order, no value more than once oftener than another."""
    drawn: list[tuple[str, str]] = []
    while len(drawn) < count:
        drawn += chance.sample(values, len(values))
    drawn = drawn[:count]
    chance.shuffle(drawn)
    return drawn


def make_reviews(
    seed: int, looks: dict[str, Look], tastes: dict[str, Taste], purchases: int, noise: float
) -> list[dict[str, Any]]:
    """Reviews in the format of Amazon 2023: each shopper's different products in time order."""
    chance = random.Random(f"toy shop {seed}: reviews")
    rows: list[dict[str, Any]] = []
    for user, taste in tastes.items():
        time = _OPENED + chance.randrange(365 * _DAY)
        bought: set[str] = set()
        for number in range(purchases):
            wanted = taste.at(number, purchases)
            fits = {i: _fit(k, *wanted) for i, k in looks.items() if i not in bought}
            liked = {i: weight for i, weight in fits.items() if weight}
            if chance.random() < noise or not liked:
                item, stars = chance.choice(list(fits)), chance.choice((2, 3, 4))
            else:
                item = chance.choices(list(liked), list(liked.values()))[0]
                stars = chance.choice((4, 5, 5))
            bought.add(item)
            rows.append(_review(user, item, stars, time, chance))
            time += chance.randrange(1, 40 * _DAY)
    return sorted(rows, key=lambda row: row["timestamp"])


def _fit(look: Look, colour: str, shape: str) -> float:
    return (0.0, _ONE, _BOTH)[(look.colour == colour) + (look.shape == shape)]


def _review(user: str, item: str, stars: int, time: int, chance: random.Random) -> dict[str, Any]:
    return {
        "rating": float(stars), "title": f"{stars} of 5", "text": chance.choice(_REMARKS), "images": [],
        "asin": item, "parent_asin": item, "user_id": user, "timestamp": time, "helpful_vote": 0,
        "verified_purchase": True,
    }  # fmt: skip


def make_metadata(
    seed: int, items: list[str], reviews: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Metadata in the format of Amazon 2023, of which nothing depends on a look."""
    chance = random.Random(f"toy shop {seed}: texts")
    names = [f"{quality} {kind}" for quality in _QUALITIES for kind in _KINDS]
    titles = chance.sample(names, len(names))
    stars: dict[str, list[float]] = {item: [] for item in items}
    for review in reviews:
        stars[review["parent_asin"]].append(review["rating"])
    rows: list[dict[str, Any]] = []
    for number, item in enumerate(items):
        title, again = titles[number % len(titles)], number // len(titles)
        size, parts, given = chance.randint(8, 60), chance.randint(1, 12), stars[item]
        department = chance.choice(_DEPARTMENTS)
        rows.append({
            "main_category": "Toys & Games", "title": f"{title} {again + 1}" if again else title,
            "average_rating": round(sum(given) / len(given), 1) if given else None,
            "rating_number": len(given), "features": [f"Pack of {parts}"],
            "description": [f"Made of {chance.choice(_MATERIALS)}.", f"Measures {size} cm; pack of {parts}."],
            "price": round(chance.uniform(5, 60), 2), "images": [], "videos": [],
            "store": chance.choice(_MAKERS), "categories": list(department), "details": {},
            "parent_asin": item, "bought_together": None,
        })  # fmt: skip
    return rows
