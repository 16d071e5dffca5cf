"""Items of one's own: CSV, JSON lines and Parquet, each column, and damaged files."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from datamodules.custom_items import make_item, read_items
from datamodules.errors import DataFormatError
from datamodules.types import CATALOG_SCHEMA
from tests.datamodules.fuzzed_files import CASES, damaged, rows_in

ROWS: list[dict[str, Any]] = [
    {"item_id": "a", "title": "A &amp; B", "description": "Two\nlines, <b>bold</b>",
     "categories": ["Toys", "Games"], "brand": "Acme", "price": 4.5, "image": "http://x/1.jpg"},
    {"item_id": "b", "title": "", "description": None, "categories": [], "brand": None,
     "price": None, "image": None},
]  # fmt: skip
EXPECTED = [
    ("a", "A & B", "Two lines, bold", ["Toys", "Games"], "Acme", 4.5, ["http://x/1.jpg"]),
    ("b", None, None, [], None, None, []),
]
CSV = (
    "item_id,title,description,categories,brand,price,image\n"
    'a,A &amp; B,"Two\nlines, <b>bold</b>",Toys|Games,Acme,$4.50,http://x/1.jpg\n'
    "b,,,,,,\n"
)


@pytest.mark.parametrize("kind", ["csv", "tsv", "csv.gz", "jsonl", "jsonl.gz", "parquet"])
def test_every_format_gives_the_same_items(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"items.{kind}"
    if kind == "parquet":
        pl.DataFrame(ROWS).write_parquet(path)
    else:
        text = CSV if "json" not in kind else "".join(json.dumps(row) + "\n" for row in ROWS)
        if kind == "tsv":
            text = text.replace(",", "\t").replace("lines\t", "lines,")
        data = text.encode()
        path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    frame, skipped = read_items(path, "error")
    assert frame.schema == pl.Schema(CATALOG_SCHEMA)
    assert frame.rows() == EXPECTED
    assert sum(skipped.values()) == 0


@pytest.mark.parametrize(
    ("column", "value", "ours", "expected"),
    [
        ("item_id", 7, "item_id", "7"),
        ("categories", " Toys | Games |", "categories", ["Toys", "Games"]),
        ("images", "u1|u2", "images", ["u1", "u2"]),
        ("images", ["u1", " "], "images", ["u1"]),
        ("image", "u1", "images", ["u1"]),
        ("price", "$1,234.50", "price", 1234.5),
        ("price", 3, "price", 3.0),
        ("price", "0.99", "price", 0.99),
        ("price", "$5.00 - $7.00", "price", None),
        ("price", ".a{color:red}", "price", None),
        ("price", float("nan"), "price", None),
        ("price", 10**400, "price", None),
        ("price", True, "price", None),
    ],
)
def test_one_cell(column: str, value: object, ours: str, expected: object) -> None:
    assert make_item({"item_id": "x", column: value})[ours] == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"title": "T"}, "empty id"),
        ({"item_id": ""}, "empty id"),
        ({"item_id": 1.5}, "empty id"),
        ({"item_id": True}, "empty id"),
        ({"item_id": "a", "title": 5}, "wrong type: title is 5, expected text"),
        ({"item_id": "a", "categories": [["x"]]}, "wrong type: categories"),
        ({"item_id": "a", "images": 5}, "wrong type: images"),
        ({"item_id": "a", "title": "\ud800"}, "bad text"),
        ({"item_id": "\ud800"}, "bad text"),
    ],
)
def test_bad_rows(tmp_path: Path, row: dict[str, object], message: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [ROWS[0], row, ROWS[1]]))
    with pytest.raises(DataFormatError, match=f"items.jsonl, line 2: {message}"):
        read_items(path, "error")
    frame, skipped = read_items(path, "skip")
    assert frame.rows() == EXPECTED
    assert sum(skipped.values()) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: no JSON: "),
        ("[1]", "line 2: no JSON object"),
        ("[" * 100_000, "line 2: no JSON"),
        ('{"item_id": ' + "1" * 5_000 + "}", "line 2: no JSON"),
    ],
)
def test_lines_that_are_no_json(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n")
    with pytest.raises(DataFormatError, match=message):
        read_items(path, "error")
    assert read_items(path, "skip")[0].height == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("i.csv", "id,title\na,A\n", "no column item_id; the file has id, t"),
        ("i.csv", "item_id,title,title\na,A,B\n", "two columns have one name"),
        ("i.csv", 'item_id,title\na,"A\nb,B\n', "line 2: broken quotes"),
        ("i.csv", "item_id,title\na,caf\udce9\n", "line 2: bytes of an unknown encoding"),
        ("i.csv", "item_id,title\n", "no good row"),
        ("i.jsonl", '[{"item_id": 1}]', "a JSON list; write one object a line"),
        ("i.xlsx", "x", "items are read from .csv, .tsv, .item, .jsonl"),
        ("i.parquet", "x", "no Parquet file or is damaged"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["error", "skip"])
def test_files_that_cannot_be_read(
    tmp_path: Path, name: str, text: str, message: str, mode: str
) -> None:
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataFormatError, match=message):
        read_items(tmp_path / name, mode)


def test_a_broken_row_of_a_csv_names_the_line_where_it_begins(tmp_path: Path) -> None:
    path = tmp_path / "i.csv"
    path.write_text('item_id,title\na,"two\nlines"\nb\nc,C\n')
    with pytest.raises(DataFormatError, match="line 4: broken row: 1 fields where 2"):
        read_items(path, "error")
    frame, skipped = read_items(path, "skip")
    assert frame["item_id"].to_list() == ["a", "c"]
    assert sum(skipped.values()) == 1


def test_repeated_items_and_unknown_columns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "i.csv"
    path.write_text("item_id,title,colour\na,First,red\na,Second,blue\n")
    with caplog.at_level(logging.INFO):
        frame, skipped = read_items(path, "error")
    assert frame["title"].to_list() == ["First"]
    assert skipped["i.csv: repeated item, the first row is taken"] == 1
    assert "not used: columns colour" in caplog.text


def test_columns_of_other_names(tmp_path: Path) -> None:
    written = {
        "i.csv": 'asin,name\n1,"A, b"\n',
        "i.item": "asin:token\tname:token_seq\n1\tA, b\n",
        "i.jsonl": '{"asin": 1, "name": "A, b"}\n',
    }
    for name, text in written.items():
        (tmp_path / name).write_text(text)
    pl.DataFrame({"asin": [1], "name": ["A, b"]}).write_parquet(tmp_path / "i.parquet")
    for name in (*written, "i.parquet"):
        typed = {"name:token_seq": "title"} if name == "i.item" else {}
        columns = {"asin": "item_id", "asin:token": "item_id", "name": "title", **typed}
        frame, _ = read_items(tmp_path / name, "error", columns)
        assert frame.select("item_id", "title").rows() == [("1", "A, b")]
    (tmp_path / "typed.item").write_text("item_id:token\ttitle:token_seq\n1\tA\n")
    assert read_items(tmp_path / "typed.item", "error")[0]["title"].to_list() == ["A"]
    with pytest.raises(DataFormatError, match=r"two columns have one name, of asin, name"):
        read_items(tmp_path / "i.csv", "error", {"asin": "item_id", "name": "item_id"})


def test_a_very_long_cell_is_read(tmp_path: Path) -> None:
    (tmp_path / "i.csv").write_text("item_id,title\na," + "x" * 200_000 + "\n")
    assert len(read_items(tmp_path / "i.csv", "error")[0]["title"][0]) == 300


MANY = [{"item_id": f"i{n}", "title": f"Tïtle {n}", "price": n} for n in range(12)]


def test_fuzzed_json_lines_end_in_a_clear_error_or_a_count(tmp_path: Path) -> None:
    good = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in MANY).encode()
    path, read = tmp_path / "i.jsonl", 0
    for data in damaged(good, b","):
        path.write_bytes(data)
        try:
            frame, skipped = read_items(path, "skip")
        except DataFormatError:
            continue
        read += 1
        lost = sum(n for reason, n in skipped.items() if not reason.startswith("kept: "))
        assert frame.height + lost == rows_in(data, b" \t\r\x0b\x0c", header=False)
    assert read > CASES // 4


def test_fuzzed_csv_ends_in_a_clear_error_or_fewer_items(tmp_path: Path) -> None:
    header = "item_id,title,price\n"
    good = header + "".join(f'{r["item_id"]},"{r["title"]}",{r["price"]}\n' for r in MANY)
    path, read = tmp_path / "i.csv", 0
    for data in damaged(good.encode(), b","):
        path.write_bytes(data)
        try:
            frame, skipped = read_items(path, "skip")
        except DataFormatError:
            continue
        read += 1
        lost = sum(n for reason, n in skipped.items() if not reason.startswith("kept: "))
        # A quoted cell may hold line ends, so that damage can join rows; it never makes any.
        assert 0 < frame.height + lost <= rows_in(data) + data.count(b"\r")
    assert read > CASES // 4
