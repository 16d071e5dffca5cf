"""Data of one's own: tables, pairs and lists of events, their errors, and real files in those layouts."""

from __future__ import annotations

import csv
import datetime
import gzip
import logging
import os
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.custom import CustomDataModule
from datamodules.custom_parsers import load_custom, read_events
from datamodules.errors import DataFormatError, DataSourceError
from datamodules.types import CATALOG_SCHEMA, INTERACTION_SCHEMA
from tests.datamodules.fuzzed_files import CASES, damaged, rows_in

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no shared/data beside the repository")
HEADER = "user_id,item_id,rating,timestamp\n"
EVENTS = [("u1", "a", 4.5, 1_383_523_200), ("u2", "b", None, 0), ("u1", "b", -1.0, 1_526_342_400)]
TABLE = HEADER + "u1,a,4.5,1383523200\nu2,b,,0\nu1,b,-1,1526342400.0\n"


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def rows(path: Path, **choices: object) -> list[tuple[object, ...]]:
    return load_custom(path, **choices).interactions.frame.rows()  # type: ignore[arg-type]


# ---------------------------------------------------------------- the layouts


def as_parquet(path: Path) -> Path:
    frame = pl.DataFrame(EVENTS, schema=INTERACTION_SCHEMA, orient="row")
    frame.write_parquet(path)
    return path


WRITERS: dict[str, Callable[[Path], Path]] = {
    "csv": lambda folder: written(folder / "e.csv", TABLE),
    "crlf": lambda folder: written(folder / "e.csv", TABLE.replace("\n", "\r\n")),
    "byte order mark": lambda folder: written(folder / "e.csv", b"\xef\xbb\xbf" + TABLE.encode()),
    "tsv": lambda folder: written(folder / "e.tsv", TABLE.replace(",", "\t")),
    "gz": lambda folder: written(folder / "e.csv.gz", gzip.compress(TABLE.encode())),
    "quoted": lambda folder: written(folder / "e.csv", TABLE.replace("u1", '"u1"')),
    "any name": lambda folder: written(folder / "events", TABLE),
    "parquet": lambda folder: as_parquet(folder / "e.parquet"),
}  # fmt: skip


@pytest.mark.parametrize("layout", WRITERS)
def test_every_way_to_write_a_table_gives_the_same_rows(tmp_path: Path, layout: str) -> None:
    raw = load_custom(WRITERS[layout](tmp_path))
    frame = raw.interactions.frame
    assert frame.schema == pl.Schema(INTERACTION_SCHEMA)
    assert frame.rows() == EVENTS
    assert raw.interactions.ordered
    assert raw.skipped == {}
    assert raw.catalog.frame.schema == pl.Schema(CATALOG_SCHEMA)
    assert raw.catalog.frame["item_id"].to_list() == ["a", "b"]
    assert list(raw.checksums) == [next(tmp_path.iterdir()).name]


ID = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(
    events=st.lists(
        st.tuples(ID, ID, st.none() | st.floats(width=32, allow_nan=False, allow_infinity=False),
                  st.integers(0, 10**11 - 1)), min_size=1)
)  # fmt: skip
def test_any_ids_ratings_and_times_come_back(
    tmp_path_factory: pytest.TempPathFactory, events: list[tuple[str, str, float | None, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "random.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("user_id", "item_id", "rating", "timestamp"), *events])
    assert rows(path) == events
    pl.DataFrame(events, schema=INTERACTION_SCHEMA, orient="row").write_csv(path)
    assert rows(path) == events


def test_pairs_and_lists_say_the_same(tmp_path: Path) -> None:
    pairs = written(tmp_path / "p.txt", "1 30\n1  10\r\n2\t10\n1 10\n\n")
    lists = written(tmp_path / "l.txt", "1 30 10 10\n2\t10\r\n")
    expected = [("1", "30"), ("1", "10"), ("2", "10"), ("1", "10")]
    assert [row[:2] for row in rows(pairs)] == expected
    assert sorted(rows(lists)) == sorted(rows(pairs))
    assert rows(lists)[:3] == [("1", i, None, None) for i in ("30", "10", "10")]
    assert load_custom(pairs).skipped == {"kept: repeated (user, item) rows": 1}
    # Lines of one user and one item each mean the same either way.
    short = written(tmp_path / "s.txt", "1 30\n2 10\n")
    assert rows(short) == rows(short, format="lists") == rows(short, format="pairs")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2\n1 3 4\n", r"row 2 has 3 ids; pass data.format=pairs for .* or data.format=lists"),
        ("1 2\n2\n", "row 2 has 1 ids"),
        ("userId itemId\n1 2\n", "looks like a header without the columns user_id and item_id"),
        ("user\titem\n1\t2\n", "looks like a header"),
        ("user,item\n1,2\n", "there is no column user_id or item_id; the file has user, item"),
        ("user_id,item\n1,2\n", "there is no column item_id;"),
        ("user_id,item_id,user_id\n1,2,3\n", "two columns have one name, of user_id"),
    ],
)
def test_what_may_be_one_or_the_other_is_not_guessed(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(DataFormatError, match=message):
        load_custom(written(tmp_path / "e.txt", text), on_bad_row="skip")


def test_columns_by_name_and_unknown_ones_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path / "e.csv", "mood,item_id,user_id\nx,a,u1\n")
    with caplog.at_level(logging.INFO):
        assert rows(path) == [("u1", "a", None, None)]
    assert "not used: columns mood" in caplog.text
    assert load_custom(path).interactions.ordered
    assert not load_custom(path, ordered=False).interactions.ordered


# ---------------------------------------------------------------- times


def test_columns_of_other_names_and_recboles_types(tmp_path: Path) -> None:
    expected = [("1", "2", 3.0, 40)]
    (tmp_path / "e.csv").write_text("who,what,rating,when,extra\n1,2,3,40,x\n")
    (tmp_path / "e.inter").write_text(
        "user_id:token\titem_id:token\trating:float\twhen\n1\t2\t3\t40\n"
    )
    table = {"who": [1], "what": [2], "rating": [3.0], "when": [40]}
    pl.DataFrame(table).write_parquet(tmp_path / "e.parquet")
    columns = {"who": "user_id", "what": "item_id", "when": "timestamp"}
    for name in ("e.csv", "e.parquet"):
        raw = load_custom(tmp_path / name, columns=columns)
        assert raw.interactions.frame.rows() == expected
    raw = load_custom(tmp_path / "e.inter", columns={"when": "timestamp"})
    assert raw.interactions.frame.rows() == expected
    with pytest.raises(DataFormatError, match=r"data\.columns names wen, but no file has"):
        load_custom(tmp_path / "e.inter", columns={"wen": "timestamp"})
    with pytest.raises(ValueError, match="gives the names userid; known are"):
        CustomDataModule(str(tmp_path / "e.csv"), columns={"who": "userid"})
    with pytest.raises(DataFormatError, match=r"no column user_id or item_id.*data\.columns="):
        load_custom(tmp_path / "e.csv")


def test_a_cell_with_a_line_break_is_no_two_rows(tmp_path: Path) -> None:
    path = tmp_path / "e.csv"
    path.write_text('user_id,item_id\n1,2\n"u\n0",3\n4,5\n')
    with pytest.raises(DataFormatError, match="line 3: broken quotes"):
        load_custom(path)
    raw = load_custom(path, on_bad_row="skip")
    assert raw.interactions.frame["user_id"].to_list() == ["1", "4"]
    assert sum(n for what, n in raw.skipped.items() if "broken quotes" in what) == 2


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("e.jsonl", b'{"user_id": 1}', "JSON lines are read for items alone"),
        ("e.csv", b"user_id;item_id\n1;2\n", "cells are divided by ';'"),
        ("e.csv", b"\x1f\x8b\x08", "this is a gzip file; add .gz"),
    ],
)
def test_files_of_another_kind_are_known(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataFormatError, match=message):
        load_custom(tmp_path / name)


def test_milliseconds_are_noticed_and_converted(tmp_path: Path) -> None:
    path = written(tmp_path / "e.csv", "user_id,item_id,timestamp\n1,2,1383523200999\n1,3,0\n")
    with pytest.raises(
        DataFormatError, match=r"times are in milliseconds; pass data\.time_unit=ms"
    ):
        load_custom(path)
    assert [row[3] for row in rows(path, time_unit="ms")] == [1_383_523_200, 0]
    path = written(tmp_path / "s.csv", "user_id,item_id,timestamp\n1,2,1383523200\n")
    with pytest.raises(DataFormatError, match=r"times are in seconds; pass data\.time_unit=s"):
        load_custom(path, time_unit="ms")


def test_datetimes_of_parquet_are_seconds(tmp_path: Path) -> None:
    when = datetime.datetime(2018, 5, 15, tzinfo=datetime.timezone.utc)
    frame = pl.DataFrame({"user_id": [1], "item_id": ["a"], "timestamp": [when]})
    frame.write_parquet(tmp_path / "e.parquet")
    assert rows(tmp_path / "e.parquet") == [("1", "a", None, int(when.timestamp()))]


# ---------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("u1,a,4", "line 5: broken row: 3 fields where 4"),
        ('u1,"a,4,5', "line 5: broken quotes"),
        (",a,4,5", "line 5: empty id: '', expected a user_id"),
        ('u1,"",4,5', "line 5: empty id: '', expected a item_id"),
        ("u1,a,good,5", "line 5: bad rating: 'good'"),
        ("u1,a,nan,5", "line 5: bad rating: 'nan'"),
        ("u1,a,1e99,5", "line 5: bad rating"),
        ("u1,a,4,", "line 5: bad timestamp: ''"),
        ("u1,a,4,-5", "line 5: bad timestamp: '-5'"),
        ("u1,a,4,5.5", "line 5: bad timestamp: '5.5'"),
        ("u1,a,4,2018-05-15", "line 5: bad timestamp: '2018-05-15'"),
        ("u1,caf\udce9,4,5", "line 5: bytes of an unknown encoding"),
    ],
)
def test_a_bad_row_is_named_or_counted(tmp_path: Path, line: str, message: str) -> None:
    data = (TABLE + line + "\nu3,c,1,1\n").encode("utf-8", "surrogateescape")
    path = written(tmp_path / "e.csv", data)
    with pytest.raises(DataFormatError, match=message) as error:
        load_custom(path)
    assert str(error.value).startswith(str(path))
    raw = load_custom(path, on_bad_row="skip")
    assert raw.interactions.frame.rows() == [*EVENTS, ("u3", "c", 1.0, 1)]
    assert list(raw.skipped.values()) == [1]


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("1 2\n1 2 3\n1 4\n", "pairs", "line 2: broken row: '1 2 3', expected a user and an item"),
        ("1 2\n3\n", "lists", "line 2: broken row: '3', expected a user and at least one item"),
        ("1 2\n1 3\n", "lists", "line 2: repeated id: '1'"),
    ],
)
def test_bad_lines_of_pairs_and_lists(tmp_path: Path, text: str, kind: str, message: str) -> None:
    path = written(tmp_path / "e.txt", text)
    with pytest.raises(DataFormatError, match=message):
        load_custom(path, format=kind)  # type: ignore[arg-type]
    raw = load_custom(path, format=kind, on_bad_row="skip")  # type: ignore[arg-type]
    assert raw.skipped == {f"e.txt: {message.split(': ')[1]}": 1}


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("user_id", [1.0], "column user_id is of type Float64"),
        ("item_id", [["a"]], r"column item_id is of type List\(String\)"),
        ("rating", ["5"], "column rating is of type String"),
        ("timestamp", [1.5], "column timestamp is of type Float64"),
        ("user_id", [None], "row is empty|user_id is of type Null"),
    ],
)
def test_types_of_parquet(tmp_path: Path, column: str, values: list[object], message: str) -> None:
    frame = pl.DataFrame({"user_id": ["u"], "item_id": ["a"]}).with_columns(
        pl.Series(column, values)
    )
    frame.write_parquet(tmp_path / "e.parquet")
    with pytest.raises(DataFormatError, match=message):
        load_custom(tmp_path / "e.parquet", on_bad_row="skip")


def test_bad_rows_of_parquet(tmp_path: Path) -> None:
    good = ("u", "a", 1.0, 5)
    odd = [(None, "a", 1.0, 5), ("u", "", 1.0, 5), ("u", "a", float("inf"), 5), ("u", "a", 1.0, -5),
           ("u", "a", 1.0, None)]  # fmt: skip
    frame = pl.DataFrame([good, *odd], schema=INTERACTION_SCHEMA, orient="row")
    frame.write_parquet(tmp_path / "e.parquet")
    raw = load_custom(tmp_path / "e.parquet", on_bad_row="skip")
    assert raw.interactions.frame.rows() == [good]
    assert raw.skipped == {
        "e.parquet: empty id": 2, "e.parquet: bad rating": 1, "e.parquet: bad timestamp": 2,
    }  # fmt: skip


def test_damaged_parquet_and_pickles_are_refused(tmp_path: Path) -> None:
    whole = as_parquet(tmp_path / "e.parquet").read_bytes()
    for broken in (whole[:-20], b"PAR1" + b"\0" * 40, b"user_id,item_id\n1,2\n"):
        with pytest.raises(DataFormatError, match="no Parquet file or is damaged"):
            load_custom(written(tmp_path / "e.parquet", broken))
    for name in ("e.pkl", "e.npy"):
        with pytest.raises(DataFormatError, match="are not read, as they may hold code"):
            load_custom(written(tmp_path / name, b"\x80\x04N."))
    with pytest.raises(DataFormatError, match="the file is empty"):
        load_custom(written(tmp_path / "e.csv", "\n"))
    with pytest.raises(DataFormatError, match="there is no good row"):
        load_custom(written(tmp_path / "e.csv", HEADER))


@pytest.mark.parametrize("choice", [{"format": "json"}, {"time_unit": "us"}, {"on_bad_row": "x"}])
def test_unknown_choices(tmp_path: Path, choice: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"is not one of|expected \"error\" or \"skip\""):
        load_custom(written(tmp_path / "e.csv", TABLE), **choice)  # type: ignore[arg-type]


# ---------------------------------------------------------------- the data module


def test_files_that_change_name_another_folder(tmp_path: Path) -> None:
    events = written(tmp_path / "e.csv", TABLE)
    items = written(tmp_path / "i.csv", "item_id,title\na,A\n")
    module = CustomDataModule(str(events), str(items), name="mine", cache=str(tmp_path))
    first = module.asked()
    os.utime(items, ns=(1, 1))
    second = module.asked()
    written(events, TABLE + "u9,a,1,1\n")
    third = module.asked()
    assert first != second != third != first
    assert module.load_raw().interactions.frame.height == 4
    assert module.load_raw().catalog.frame["title"].to_list() == ["A", None]
    assert CustomDataModule(str(events)).asked() != third


def test_a_whole_folder_is_prepared(tmp_path: Path) -> None:
    lines = "".join(f"{u},{i},{i}\n" for u in range(5) for i in range(6))
    written(tmp_path / "e.csv", "user_id,item_id,timestamp\n" + lines)
    module = CustomDataModule("e.csv", name="mine", root=str(tmp_path), cache=str(tmp_path / "c"))
    assert module.histories.num_users == 5
    assert module.histories.num_items == 6
    assert len(module.histories.items) == 30
    assert module.prepared.folder.name.startswith("mine-")


def test_a_file_that_is_not_there_and_a_name_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataSourceError, match=r"pass data.interactions=FILE"):
        CustomDataModule(None).load_raw()
    with pytest.raises(DataSourceError, match=r"no.csv is not a file: pass data.items=FILE"):
        CustomDataModule(str(written(tmp_path / "e.csv", TABLE)), str(tmp_path / "no.csv")).asked()
    with pytest.raises(ValueError, match="it names a folder"):
        CustomDataModule("e.csv", name="../mine")


# ---------------------------------------------------------------- fuzzing

MANY = [f"u{n % 4},é{n},{n / 2},{10**9 + n}" for n in range(14)]
FUZZED = {
    "table": (HEADER + "".join(f"{line}\n" for line in MANY), b","),
    "pairs": ("".join(f"{n % 4} {n}\n" for n in range(14)), b" "),
    "lists": ("".join(f"{n} {n + 1} {n + 2} {n + 3}\n" for n in range(14)), b" "),
}


@pytest.mark.parametrize("kind", FUZZED)
def test_fuzzed_files_end_in_a_clear_error_or_a_count(tmp_path: Path, kind: str) -> None:
    text, separator = FUZZED[kind]
    path, read, messages = tmp_path / "e.txt", 0, []
    for data in damaged(text.encode(), separator):
        path.write_bytes(data)
        try:
            frame, skipped, _ = read_events(path, kind, "s", "skip")  # type: ignore[arg-type]
        except DataFormatError as error:
            messages.append(str(error))
            continue
        read += 1
        kept = frame["user_id"].n_unique() if kind == "lists" else frame.height
        blanks = b"\r" if kind == "table" else b" \t\r"
        assert kept + sum(skipped.values()) == rows_in(data, blanks, header=kind == "table")
    assert all(message.startswith(str(path)) for message in messages)
    assert read > CASES // 4, "nearly nothing was read: the accidents are too large to say much"


def test_fuzzed_files_of_unknown_layout_never_crash(tmp_path: Path) -> None:
    path = tmp_path / "e.txt"
    endings = {"read": 0, "refused": 0}
    for text, separator in FUZZED.values():
        for data in damaged(text.encode(), separator, CASES // 5):
            path.write_bytes(data)
            try:
                read_events(path, "auto", "s", "skip")
                endings["read"] += 1
            except DataFormatError:
                endings["refused"] += 1
    assert min(endings.values()) > 10


# ---------------------------------------------------------------- the real files


@needs_data
@pytest.mark.parametrize(
    ("name", "users", "items", "interactions"),
    [
        ("amazon_processed/sasrec_video/Video.txt.gz", 31_013, 23_715, 287_107),
        ("amazon_processed/s3rec/Beauty.txt.gz", 22_363, 12_101, 198_502),
        ("microlens/MicroLens-50k_pairs.tsv.gz", 50_000, 19_220, 359_708),
    ],
)
def test_real_pairs_and_lists(name: str, users: int, items: int, interactions: int) -> None:
    frame = load_custom(DATA / name).interactions.frame
    counts = frame["user_id"].n_unique(), frame["item_id"].n_unique(), frame.height
    assert counts == (users, items, interactions)
    assert frame["timestamp"].null_count() == interactions


@needs_data
def test_the_real_course_file_with_its_items() -> None:
    """Train and validation rows as one table; descriptions there hold line ends."""
    folder = DATA / "amazon_processed" / "luxury_beauty_course"
    raw = load_custom(folder / "train.csv.gz", folder / "items.csv.gz")
    with gzip.open(folder / "items.csv.gz", "rt", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert raw.interactions.frame.height == 14_985
    assert raw.interactions.frame["user_id"].n_unique() == 1_841
    frame = raw.catalog.frame
    assert frame.height == len(table) == 842
    assert frame["title"].null_count() == 0
    assert 842 - frame["description"].null_count() == 841
    assert frame.filter(item_id="1")["title"].item().startswith("Crabtree & Evelyn Nail")
    dollars = [row["price"] for row in table if row["price"]]
    plain = [
        price
        for price in dollars
        if price.replace("$", "").replace(",", "").replace(".", "").isdecimal()
    ]
    assert frame["price"].drop_nulls().len() == len(plain)
    assert raw.skipped["kept: items.csv: prices that are no number"] == len(dollars) - len(plain)
