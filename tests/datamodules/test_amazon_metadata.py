"""Metadata of the three releases: every field, every kind of dirt, and what is never invented."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from datamodules import json_lines
from datamodules.errors import DataFormatError
from datamodules.types import CATALOG_SCHEMA
from tests.datamodules.amazon_files import (
    EVENTS,
    METADATA,
    events_file,
    item,
    items_file,
    load,
    put,
)

FIRST, SECOND = "B000000001", "B000000002"
KIND = {2014: "5core", 2018: "5core", 2023: "full"}


def catalog(
    folder: Path, year: int, records: list[dict[str, Any]], **options: Any
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Rows of the catalogue and what was counted about the metadata."""
    kind = KIND[year]
    put(folder, year, kind, events_file(year, kind, EVENTS), items_file(year, records))
    raw = load(folder, year, kind, **options)
    assert raw.catalog.frame.schema == CATALOG_SCHEMA
    counts = {what: n for what, n in raw.skipped.items() if "fewer than" not in what}
    return raw.catalog.frame.rows(named=True), counts


PLAIN = {
    2014: {
        "description": "Cleans.", "categories": ["Beauty", "Bath", "Gifts"], "price": 3.5,
        "images": [f"http://x.com/{FIRST}.jpg"],
    },
    2018: {
        "description": "Cleans. Well.", "categories": ["Beauty", "Bath & Body"], "price": 1003.5,
        "images": [f"https://x.com/{FIRST}_hi.jpg"],
    },
    2023: {
        "description": "Cleans. Well.", "categories": ["Beauty", "Bath"], "price": 3.5,
        "images": ["https://x.com/h.jpg"],
    },
}  # fmt: skip


@pytest.mark.parametrize("year", [2014, 2018, 2023])
def test_each_release_gives_the_same_columns(tmp_path: Path, year: int) -> None:
    records = [item(year, FIRST), item(year, "B00OTHER00"), item(year, SECOND, title="Comb")]
    found, counts = catalog(tmp_path, year, records)
    same = {"item_id": FIRST, "title": 'Bob\'s "Soap"', "brand": "Bob"}
    assert found[0] == {**same, **PLAIN[year]}
    assert found[1]["title"] == "Comb"
    assert counts == {
        f"{METADATA[year]}: items without a review": 1,
        "kept: titles with markup or entities, mended": 1,
    }


@pytest.mark.parametrize("year", [2014, 2018, 2023])
def test_fields_that_are_not_there_are_null_or_empty(tmp_path: Path, year: int) -> None:
    key = "parent_asin" if year == 2023 else "asin"
    found, counts = catalog(tmp_path, year, [{key: FIRST}])
    empty = {"title": None, "description": None, "brand": None, "price": None}
    for row in found:  # the first has a row without anything, the second no row at all
        assert {name: row[name] for name in empty} == empty
        assert not row["categories"]
        assert not row["images"]
    assert [row["item_id"] for row in found] == [FIRST, SECOND]
    assert counts == {
        "kept: items without metadata": 1,
        "kept: items with metadata, without a usable title": 1,
    }


SCRAP = '<span class="a-size-medium a-color-secondary"'


@pytest.mark.parametrize(
    "title", [SCRAP, "<br>", "&nbsp;", "--", "   ", "<script>f()</script>", '" />']
)
@pytest.mark.parametrize("year", [2014, 2018, 2023])
def test_a_title_that_says_nothing_is_null(tmp_path: Path, year: int, title: str) -> None:
    found, counts = catalog(tmp_path, year, [item(year, FIRST, title=title), item(year, SECOND)])
    assert found[0]["title"] is None
    assert counts["kept: items with metadata, without a usable title"] == 1
    scraps = counts.get("kept: titles that are scraps of markup", 0)
    assert scraps == (1 if title.strip() else 0)


@pytest.mark.parametrize("year", [2014, 2018, 2023])
def test_of_repeated_rows_the_first_with_a_usable_title_counts(tmp_path: Path, year: int) -> None:
    brand = "store" if year == 2023 else "brand"
    told = [
        (FIRST, SCRAP, "1"),
        (SECOND, None, "1"),
        (FIRST, "Soap", "2"),
        (FIRST, "Comb", "3"),
        (SECOND, SCRAP, "2"),
    ]
    records = [item(year, asin, **{"title": title, brand: name}) for asin, title, name in told]
    found, counts = catalog(tmp_path, year, records)
    first, second = sorted(found, key=lambda row: row["item_id"])
    assert (first["title"], first["brand"]) == ("Soap", "2")
    assert (second["title"], second["brand"]) == (None, "1")
    assert counts[f"{METADATA[year]}: repeated rows of an item"] == 3


@pytest.mark.parametrize("year", [2014, 2018, 2023])
def test_items_that_share_a_title_are_counted(tmp_path: Path, year: int) -> None:
    records = [
        item(year, FIRST, title=" Amazon  eGift Card"),
        item(year, SECOND, title="Amazon eGift Card "),
    ]
    found, counts = catalog(tmp_path, year, records)
    assert [row["title"] for row in found] == ["Amazon eGift Card"] * 2
    assert counts == {"kept: items that share their title": 2}


CSS = ".a-box-inner{background-color:#fff}#alohaBuyBoxWidget .selected{color:#123}"


@pytest.mark.parametrize("year", [2018, 2023])
@pytest.mark.parametrize(
    ("written", "price", "counted"),
    [
        ("$12.99", 12.99, 0), (" $1,250.00 ", 1250.0, 0), ("7", 7.0, 0), ("", None, 0), (None, None, 0),
        ("$5.00 - $9.99", None, 1), (CSS, None, 1), ("from 12.99", None, 1), ("—", None, 1),
        ("$1,2,3", None, 1), (1e300, None, 1), ("9" * 60, None, 1),
        (12.5, 12.5, 0), (True, None, 1), ([12.5], None, 1), ({}, None, 1),
    ],
)  # fmt: skip
def test_a_price_is_one_number_or_null(
    tmp_path: Path, year: int, written: Any, price: float | None, counted: int
) -> None:
    found, counts = catalog(tmp_path, year, [item(year, FIRST, price=written), item(year, SECOND)])
    assert found[0]["price"] == pytest.approx(price)
    assert counts.get("kept: prices that are no single number", 0) == counted


@pytest.mark.parametrize(
    ("written", "description", "listed"),
    [
        (["a", "b"], "a b", 0),
        ("one text", "one text", 0),
        (["['a', 'b']"], "a b", 1),
        (["[\"it's\", 'b']", "c"], "it's b c", 1),
        ("['a\\nb']", "a b", 1),
        (["['a', 'b'"], "['a', 'b'", 0),
        (["['a', 5]"], "['a', 5]", 1),  # looks like a list of texts and is none: left as it is
        (["['a'] and ['b']"], "['a'] and ['b']", 1),
        ([], None, 0),
        (["", " "], None, 0),
        (["<p>One&nbsp;two</p>", "<b>three"], "One two three", 0),
        ([None, "a"], "a", 0),
        (5, None, 0),
    ],
)
@pytest.mark.parametrize("year", [2018, 2023])
def test_descriptions_of_any_shape(
    tmp_path: Path, year: int, written: Any, description: str | None, listed: int
) -> None:
    record = item(year, FIRST, description=written, features=None)
    found, counts = catalog(tmp_path, year, [record, item(year, SECOND)])
    assert found[0]["description"] == description
    assert counts.get("kept: descriptions that were written-out lists", 0) == listed


def test_in_2023_features_stand_in_for_a_description_only_where_there_is_none(
    tmp_path: Path,
) -> None:
    records = [
        item(2023, FIRST, description=["", " "], features=["Soft", "Warm"]),
        item(2023, SECOND, description=["Text"], features=["Soft"]),
    ]
    found, _ = catalog(tmp_path, 2023, records)
    assert [row["description"] for row in found] == ["Soft Warm", "Text"]


@pytest.mark.parametrize(
    ("changes", "images"),
    [
        ({}, [f"https://x.com/{FIRST}_hi.jpg"]),
        ({"imageURLHighRes": []}, [f"https://x.com/{FIRST}.jpg"]),
        ({"imageURLHighRes": None, "imageURL": None, "image": ["https://y.com/1", "https://y.com/1"]},
         ["https://y.com/1"]),
        ({"imageURLHighRes": ["no address", "file:///etc/passwd", "https://y.com/2"]}, ["https://y.com/2"]),
        ({"imageURLHighRes": None, "imageURL": None}, []),
    ],
)  # fmt: skip
def test_images_of_2018_best_first(
    tmp_path: Path, changes: dict[str, Any], images: list[str]
) -> None:
    found, _ = catalog(tmp_path, 2018, [item(2018, FIRST, **changes), item(2018, SECOND)])
    assert (found[0]["images"] or []) == images


@pytest.mark.parametrize(
    ("pictures", "images"),
    [
        ([{"large": 'https://x.com/a"b'}], ['https://x.com/a"b']),
        ([{"large": "https://x.com/a\\nb"}], ["https://x.com/a\\nb"]),
        ([{"large": "https://x.com/\u00e9\u2028{"}], []),  # white space ends an address
        ([{"large": "https://x.com/\u00e9{"}], ["https://x.com/\u00e9{"]),
        (['{"large": "https://x.com/1"}'], []),  # a text, no picture
        (["https://x.com/1"], []),
        ("https://x.com/1", []),
        ({"large": "https://x.com/1"}, []),
        ([[{"large": "https://x.com/1"}]], []),
        ([None, {}, {"large": {"large": "x"}}, {"large": "https://x.com/1"}], ["https://x.com/1"]),
    ],
)
def test_odd_pictures_are_read_by_line_as_by_block(
    tmp_path: Path, pictures: Any, images: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [item(2023, FIRST, images=pictures)]
    assert (catalog(tmp_path / "block", 2023, records)[0][0]["images"] or []) == images
    monkeypatch.setattr(json_lines, "_lines", lambda data: None)
    assert (catalog(tmp_path / "line", 2023, records)[0][0]["images"] or []) == images


def test_images_of_2023_take_the_largest_size_there_is(tmp_path: Path) -> None:
    pictures = [
        {"hi_res": None, "large": "https://x.com/1l", "thumb": "https://x.com/1t"},
        {"hi_res": "https://x.com/2h", "large": "https://x.com/2l", "variant": "PT01"},
        {"thumb": "https://x.com/3t"},
        None,
    ]
    found, _ = catalog(tmp_path, 2023, [item(2023, FIRST, images=pictures), item(2023, SECOND)])
    assert found[0]["images"] == ["https://x.com/1l", "https://x.com/2h", "https://x.com/3t"]


@pytest.mark.parametrize("byline", [False, True])
def test_sales_ranks_written_as_lists_are_counted(
    tmp_path: Path, byline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if byline:
        monkeypatch.setattr(json_lines, "_lines", lambda data: None)
    records = [item(2018, FIRST, rank=[">#7 in Beauty"]), item(2018, SECOND, rank="7 in Beauty")]
    _, counts = catalog(tmp_path, 2018, records)
    assert counts["kept: sales ranks written as lists (not used)"] == 1


def test_the_grey_no_image_picture_of_2014_is_no_image(tmp_path: Path) -> None:
    grey = "http://g-ecx.images-amazon.com/images/G/01/x-site/icons/no-img-sm._CB192198896_.gif"
    found, _ = catalog(tmp_path, 2014, [item(2014, FIRST, imUrl=grey), item(2014, SECOND)])
    assert [len(row["images"]) for row in found] == [0, 1]


def test_a_title_of_digits_is_a_title(tmp_path: Path) -> None:
    for year in (2014, 2018, 2023):
        found, _ = catalog(
            tmp_path / str(year),
            year,
            [item(year, FIRST, title="1984"), item(year, SECOND, title=1984)],
        )
        assert [row["title"] for row in found] == ["1984", "1984"]


@pytest.mark.parametrize("year", [2014, 2018, 2023])
def test_a_bad_row_is_named_or_counted(tmp_path: Path, year: int) -> None:
    kind, good = KIND[year], [item(year, FIRST), item(year, SECOND)]
    key = "parent_asin" if year == 2023 else "asin"
    bad = [
        b"{'asin': open('x')}",
        b"[" * 300,
        b"{",
        b"5",
        json.dumps({key: ""}).encode(),
        b"\xff{}",
    ]
    whole = items_file(year, good)
    for line in bad:
        put(tmp_path, year, kind, events_file(year, kind, EVENTS), whole + line + b"\n")
        with pytest.raises(DataFormatError, match=rf"{METADATA[year]}, line 3: ") as error:
            load(tmp_path, year, kind)
        assert "data.on_bad_row=skip" in str(error.value)
    put(tmp_path, year, kind, events_file(year, kind, EVENTS), whole + b"\n".join(bad))
    raw = load(tmp_path, year, kind, on_bad_row="skip")
    assert raw.catalog.frame["item_id"].to_list() == [FIRST, SECOND]
    name = METADATA[year]
    assert sum(n for what, n in raw.skipped.items() if what.startswith(name)) == len(bad)


def test_without_metadata_the_file_is_not_asked_for(tmp_path: Path) -> None:
    put(tmp_path, 2018, "5core", events_file(2018, "5core", EVENTS))
    raw = load(tmp_path, 2018, "5core", metadata=False)
    assert raw.catalog.frame["title"].null_count() == 2
    assert list(raw.checksums) == ["All_Beauty_5.json"]
