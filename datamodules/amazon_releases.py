"""The Amazon releases of 2014, 2018 and 2023: their categories, addresses, file names and formats.

Addresses are those of the publishers' own pages (McAuley lab, UCSD; the 2014 files lie at Stanford's
SNAP), which give no checksums: the first download is trusted, and its size and SHA-256 hold from then on.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path

from datamodules.amazon_reviews import ReviewFormat
from datamodules.errors import DataSourceError
from datamodules.sources import Download, Source, first_available

_UCSD = "https://mcauleylab.ucsd.edu/public_datasets/data/"
_CATEGORIES_2014 = (
    "Amazon_Instant_Video", "Apps_for_Android", "Automotive", "Baby", "Beauty", "Books", "CDs_and_Vinyl",
    "Cell_Phones_and_Accessories", "Clothing_Shoes_and_Jewelry", "Digital_Music", "Electronics",
    "Grocery_and_Gourmet_Food", "Health_and_Personal_Care", "Home_and_Kitchen", "Kindle_Store",
    "Movies_and_TV", "Musical_Instruments", "Office_Products", "Patio_Lawn_and_Garden", "Pet_Supplies",
    "Sports_and_Outdoors", "Tools_and_Home_Improvement", "Toys_and_Games", "Video_Games",
)  # fmt: skip
_CATEGORIES_2018 = (
    "AMAZON_FASHION", "All_Beauty", "Appliances", "Arts_Crafts_and_Sewing", "Automotive", "Books",
    "CDs_and_Vinyl", "Cell_Phones_and_Accessories", "Clothing_Shoes_and_Jewelry", "Digital_Music",
    "Electronics", "Gift_Cards", "Grocery_and_Gourmet_Food", "Home_and_Kitchen",
    "Industrial_and_Scientific", "Kindle_Store", "Luxury_Beauty", "Magazine_Subscriptions",
    "Movies_and_TV", "Musical_Instruments", "Office_Products", "Patio_Lawn_and_Garden", "Pet_Supplies",
    "Prime_Pantry", "Software", "Sports_and_Outdoors", "Tools_and_Home_Improvement", "Toys_and_Games",
    "Video_Games",
)  # fmt: skip
_CATEGORIES_2023 = (
    "All_Beauty", "Amazon_Fashion", "Appliances", "Arts_Crafts_and_Sewing", "Automotive",
    "Baby_Products", "Beauty_and_Personal_Care", "Books", "CDs_and_Vinyl",
    "Cell_Phones_and_Accessories", "Clothing_Shoes_and_Jewelry", "Digital_Music", "Electronics",
    "Gift_Cards", "Grocery_and_Gourmet_Food", "Handmade_Products", "Health_and_Household",
    "Health_and_Personal_Care", "Home_and_Kitchen", "Industrial_and_Scientific", "Kindle_Store",
    "Magazine_Subscriptions", "Movies_and_TV", "Musical_Instruments", "Office_Products",
    "Patio_Lawn_and_Garden", "Pet_Supplies", "Software", "Sports_and_Outdoors", "Subscription_Boxes",
    "Tools_and_Home_Improvement", "Toys_and_Games", "Video_Games", "Unknown",
)  # fmt: skip
_EVENT_2018 = ("reviewerID", "asin", "overall", "unixReviewTime", "reviewText")
_JSON_2014 = ReviewFormat(_EVENT_2018, loose=True)
_JSON_2018 = ReviewFormat(_EVENT_2018)
_JSON_2023 = ReviewFormat(
    ("user_id", "parent_asin", "rating", "timestamp", "text"), per_second=1000
)
_CSV_2014 = ReviewFormat(("user_id", "item_id", "rating", "time"), csv=True)
_CSV_2018 = ReviewFormat(("item_id", "user_id", "rating", "time"), csv=True)
_CSV_2023 = ReviewFormat(
    ("user_id", "item_id", "rating", "time"),
    csv=True,
    header="user_id,parent_asin,rating,timestamp",
    per_second=1000,
)


@dataclass(frozen=True)
class AmazonRelease:
    """One release. Paths are below ``base``, with ``{}`` for the category; a file may also be unpacked."""

    year: int
    categories: tuple[str, ...]
    base: str
    reviews: dict[str, tuple[str, ReviewFormat]]  # "5core" | "full" | "ratings" -> path, format
    metadata: str

    def category(self, name: str) -> str:
        """The category as the release spells it. Raises ValueError naming the nearest."""
        wanted = _plain(name)
        spelt = {_plain(category): category for category in self.categories}
        if wanted in spelt:
            return spelt[wanted]
        near = difflib.get_close_matches(wanted, spelt, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(repr(spelt[n]) for n in near)}?" if near else ""
        raise ValueError(
            f"Amazon {self.year} has no category {name!r}; it has {', '.join(self.categories)}.{hint}"
        )

    def kind(self, reviews: str) -> tuple[str, ReviewFormat]:
        """Path and format of one kind of events. Raises ValueError naming the known kinds."""
        if reviews not in self.reviews:
            raise ValueError(f"reviews is {reviews!r}; expected {', '.join(self.reviews)}.")
        return self.reviews[reviews]


def _plain(name: str) -> str:
    """``"Arts, Crafts & Sewing"`` and ``arts_crafts_and_sewing`` are one name."""
    return "_".join(re.findall("[a-z0-9]+", str(name).lower().replace("&", " and ")))


RELEASES = {
    2014: AmazonRelease(
        2014,
        _CATEGORIES_2014,
        "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/",
        {
            "5core": ("reviews_{}_5.json.gz", _JSON_2014),
            "full": ("reviews_{}.json.gz", _JSON_2014),
            "ratings": ("ratings_{}.csv", _CSV_2014),
        },
        "meta_{}.json.gz",
    ),
    2018: AmazonRelease(
        2018,
        _CATEGORIES_2018,
        _UCSD + "amazon_v2/",
        {
            "5core": ("categoryFilesSmall/{}_5.json.gz", _JSON_2018),
            "full": ("categoryFiles/{}.json.gz", _JSON_2018),
            "ratings": ("categoryFilesSmall/{}.csv", _CSV_2018),
        },
        "metaFiles2/meta_{}.json.gz",
    ),
    2023: AmazonRelease(
        2023,
        _CATEGORIES_2023,
        _UCSD + "amazon_2023/",
        {
            "5core": ("benchmark/5core/rating_only/{}.csv.gz", _CSV_2023),
            "full": ("raw/review_categories/{}.jsonl.gz", _JSON_2023),
            "ratings": ("benchmark/0core/rating_only/{}.csv.gz", _CSV_2023),
        },
        "raw/meta_categories/meta_{}.jsonl.gz",
    ),
}


def categories(release: int | str) -> tuple[str, ...]:
    """All categories of a release, as it spells them. Raises ValueError."""
    return find_release(release).categories


def find_release(release: int | str) -> AmazonRelease:
    """The release of that year. Raises ValueError naming the known ones."""
    text = str(release).strip()
    if not text.isdecimal() or int(text) not in RELEASES:
        raise ValueError(f"Unknown Amazon release {release!r}; known are 2014, 2018 and 2023.")
    return RELEASES[int(text)]


@dataclass(frozen=True)
class OfficialFile:
    """One file below a folder of the user's, plain or ``.gz``.

    Looked for in the folders ``below`` (the category, the kind of reviews), then in the folder itself;
    nowhere else, as 2023's 5-core and full ratings have one name.
    """

    root: Path
    file: str
    below: tuple[str, ...]

    @property
    def name(self) -> str:
        """The folder."""
        return str(self.root)

    def fetch(self, cache: Path) -> dict[str, Path]:
        """Find the file. Raises DataSourceError naming it."""
        name = self.file.removesuffix(".gz")
        for folder in (*(self.root / part for part in self.below), self.root):
            for file in (folder / name, folder / f"{name}.gz"):
                if file.is_file():
                    return {name: file}
        places = " nor ".join(f"{part}/" for part in self.below)
        raise DataSourceError(
            f"{self.root} has no {name} (nor the same as .gz), neither in itself nor in {places}."
        )

    def cached(self, cache: Path) -> dict[str, Path] | None:
        """Nothing: a folder of the user's may change, so it is looked at each time."""
        return None


def fetch_file(
    release: AmazonRelease, kind: str, category: str, root: Path | None, cache: Path
) -> tuple[Path, str]:
    """One official file and the name of its source.

    Args:
        release: whose file.
        kind: a kind of reviews, or ``metadata``.
        category: as the release spells it.
        root: a folder with the file; None = the cache, then the official address.
        cache: where downloads are kept, apart for each release and kind, as names repeat.

    Raises:
        DataSourceError: it could not be had; the message says which file to put where.
    """
    path = release.metadata if kind == "metadata" else release.kind(kind)[0]
    url = release.base + path.format(category)
    name = url.rsplit("/", 1)[-1]
    source: Source = Download(url, (name.removesuffix(".gz"),))
    if root is not None:
        source = OfficialFile(root, name, (category, kind))
    without = "; data.metadata=false does without it" if kind == "metadata" else ""
    files, used = first_available(
        (source,),
        cache / f"amazon-{release.year}-{kind}",
        f"Amazon {release.year} {category}, {name},",
        f"put {name} (unpacked or not) in FOLDER or FOLDER/{category} and pass data.root=FOLDER; its "
        f"address is {url}{without}.",
    )
    return next(iter(files.values())), used.name
