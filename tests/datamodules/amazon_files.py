"""Tiny files in the raw formats of Amazon's releases, written without the code that reads them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from datamodules.amazon_loading import load_amazon
from datamodules.types import RawData

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "amazon2018"
# user, item, rating, seconds
Event = tuple[str, str, float, int]
EVENTS: list[Event] = [
    ("A1XX", "B000000001", 5.0, 1_400_000_000),
    ("A1XX", "B000000002", 1.0, 1_300_000_000),
    ("A2XX", "B000000001", 4.0, 1_400_000_000),
]
CATEGORY = {2014: "Beauty", 2018: "All_Beauty", 2023: "All_Beauty"}
REVIEWS = {
    (2014, "5core"): "reviews_Beauty_5.json",
    (2014, "full"): "reviews_Beauty.json",
    (2014, "ratings"): "ratings_Beauty.csv",
    (2018, "5core"): "All_Beauty_5.json",
    (2018, "full"): "All_Beauty.json",
    (2018, "ratings"): "All_Beauty.csv",
    (2023, "5core"): "All_Beauty.csv",
    (2023, "full"): "All_Beauty.jsonl",
    (2023, "ratings"): "All_Beauty.csv",
}
METADATA = {2014: "meta_Beauty.json", 2018: "meta_All_Beauty.json", 2023: "meta_All_Beauty.jsonl"}


def review(year: int, event: Event, **changes: Any) -> dict[str, Any]:
    """One review record with every field that the release has; None removes a field."""
    user, item, rating, second = event
    if year == 2023:
        record = {
            "rating": rating, "title": "Fine", "text": 'So "good"', "images": [], "asin": item,
            "parent_asin": item, "user_id": user, "timestamp": second * 1000 + 7,
            "helpful_vote": 0, "verified_purchase": True,
        }  # fmt: skip
    else:
        record = {
            "overall": rating, "reviewTime": "05 13, 2014", "reviewerID": user, "asin": item,
            "reviewerName": "Ann", "reviewText": 'So "good"', "summary": "Fine",
            "unixReviewTime": second,
        }  # fmt: skip
        record |= {"helpful": [0, 1]} if year == 2014 else {"style": {"Size:": " 7 oz"}}
    record |= changes
    return {key: value for key, value in record.items() if value is not None}


def json_lines(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def literals(records: list[dict[str, Any]]) -> bytes:
    return "".join(repr(record) + "\n" for record in records).encode()


def ratings(year: int, events: list[Event]) -> bytes:
    head = "user_id,parent_asin,rating,timestamp\n" if year == 2023 else ""
    lines = []
    for user, item, rating, second in events:
        ids = (item, user) if year == 2018 else (user, item)
        time = second * 1000 + 7 if year == 2023 else second
        lines.append(f"{ids[0]},{ids[1]},{rating},{time}\n")
    return (head + "".join(lines)).encode()


def events_file(year: int, kind: str, events: list[Event]) -> bytes:
    if REVIEWS[year, kind].endswith(".csv"):
        return ratings(year, events)
    return json_lines([review(year, event) for event in events])


def item(year: int, asin: str, **changes: Any) -> dict[str, Any]:
    """One metadata record with every field that the release has; None removes a field."""
    if year == 2014:
        record = {
            "asin": asin, "title": "Bob's &quot;Soap&quot;", "description": "Cleans.", "price": 3.5,
            "imUrl": f"http://x.com/{asin}.jpg", "brand": "Bob", "salesRank": {"Beauty": 7},
            "related": {"also_bought": ["B1"]}, "categories": [["Beauty", "Bath"], ["Beauty", "Gifts"]],
        }  # fmt: skip
    elif year == 2018:
        record = {
            "asin": asin, "title": "Bob's &quot;Soap&quot;", "description": ["Cleans.", "Well."],
            "price": "$1,003.50", "brand": "Bob", "category": ["Beauty", "Bath &amp; Body"],
            "rank": "7 in Beauty", "also_buy": [], "feature": ["f"], "main_cat": "x",
            "details": {"ASIN: ": "B"},
            "imageURL": [f"https://x.com/{asin}.jpg"], "imageURLHighRes": [f"https://x.com/{asin}_hi.jpg"],
        }  # fmt: skip
    else:
        record = {
            "parent_asin": asin, "title": "Bob's &quot;Soap&quot;", "description": ["Cleans.", "Well."],
            "features": ["Small"], "price": 3.5, "store": "Bob", "main_category": "Beauty",
            "categories": ["Beauty", "Bath"], "average_rating": 4.5, "rating_number": 3,
            "details": {"UPC": "1"}, "bought_together": None, "videos": [],
            "images": [{"thumb": "https://x.com/t.jpg", "large": "https://x.com/l.jpg",
                        "variant": "MAIN", "hi_res": "https://x.com/h.jpg"}],
        }  # fmt: skip
    record |= changes
    return {key: value for key, value in record.items() if value is not None}


def items_file(year: int, records: list[dict[str, Any]]) -> bytes:
    return literals(records) if year == 2014 else json_lines(records)


def put(folder: Path, year: int, kind: str, events: bytes, items: bytes | None = None) -> Path:
    """The two files of a release in ``folder``, the first packed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{REVIEWS[year, kind]}.gz").write_bytes(gzip.compress(events, 1))
    if items is not None:
        (folder / METADATA[year]).write_bytes(items)
    return folder


def load(folder: Path, year: int, kind: str, **options: Any) -> RawData:
    return load_amazon(year, CATEGORY[year], kind, folder, folder / "cache", **options)
