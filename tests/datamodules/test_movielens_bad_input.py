"""Each kind of bad row and bad file: a sentence with file and line, or a counted skip."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from datamodules import delimited
from datamodules.errors import DataFormatError
from datamodules.movielens_formats import load_movielens
from tests.datamodules.movielens_files import (
    EVENTS,
    FILMS,
    FORMATS,
    events_of,
    put,
    write_100k,
    write_csv,
    write_dat,
)

GOOD = b"userId,movieId,rating,timestamp\r\n1,10,4.0,5\r\n"
BAD_ROWS = [
    (b"1,10,4.0", "line 3: broken row: 3 fields where 4"),
    (b"1,10,4.0,5,6", "line 3: broken row: 5 fields where 4"),
    (b'1,"10,4.0,5', "line 3: broken quotes"),
    (b'"1"x,10,4.0,5', "line 3: broken quotes"),
    (b"1,1\xff,4.0,5", "line 3: bytes of an unknown encoding"),
    (b"1,10,5.5,5", "line 3: rating off the scale: '5.5', expected 0.5 to 5 in steps of 0.5"),
    (b"1,10,0,5", "line 3: rating off the scale"),
    (b"1,10,3.7,5", "line 3: rating off the scale"),
    (b"1,10,nan,5", "line 3: rating off the scale"),
    (b"1,10,five,5", "line 3: rating off the scale"),
    (b"1,10,,5", "line 3: rating off the scale"),
    (b"1,10,4.0,-5", "line 3: bad timestamp: '-5'"),
    (b"1,10,4.0,5.5", "line 3: bad timestamp: '5.5'"),
    (b"1,10,4.0,", "line 3: bad timestamp: ''"),
    (b"1,10,4.0,9223372036854775808", "line 3: bad timestamp"),
    (b",10,4.0,5", "line 3: empty id"),
    (b'1,"",4.0,5', "line 3: empty id"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_a_bad_row_is_named_or_counted(tmp_path: Path, row: bytes, message: str) -> None:
    contents = write_csv(EVENTS, FILMS) | {"ratings.csv": GOOD + row + b"\r\n2,7,0.5,6\r\n"}
    put(tmp_path, contents)
    with pytest.raises(DataFormatError, match=message) as error:
        load_movielens("25m", tmp_path, tmp_path)
    assert str(tmp_path / "ratings.csv") in str(error.value)
    assert "data.on_bad_row=skip" in str(error.value)
    raw = load_movielens("25m", tmp_path, tmp_path, on_bad_row="skip")
    assert events_of(raw) == [("1", "10", 4.0, 5), ("2", "7", 0.5, 6)]
    assert list(raw.skipped.values()) == [1]
    assert next(iter(raw.skipped)).startswith("ratings.csv: ")


@pytest.mark.parametrize("rating", ["0.5", "3.5", "0", "6"])
def test_whole_stars_are_whole_in_100k_and_1m(tmp_path: Path, rating: str) -> None:
    contents = write_dat(EVENTS, FILMS, "latin-1")
    contents["ratings.dat"] += f"1::10::{rating}::5\n".encode()
    with pytest.raises(
        DataFormatError, match=r"line 4: rating off the scale.* 1 to 5 in steps of 1"
    ):
        load_movielens("1m", put(tmp_path / "1m", contents), tmp_path)
    contents = write_100k(EVENTS, FILMS)
    contents["u.data"] += f"1\t10\t{rating}\t5\n".encode()
    with pytest.raises(DataFormatError, match="line 4: rating off the scale"):
        load_movielens("100k", put(tmp_path / "100k", contents), tmp_path)


@pytest.mark.parametrize(
    ("name", "release", "line", "message"),
    [
        ("movies.csv", "25m", b"9,Nine\r\n", "line 4: broken row: 2 fields where 3"),
        ("movies.csv", "25m", b"7,Again,Drama\r\n", "line 4: repeated id: '7' is on line 2"),
        ("movies.csv", "25m", b"9,Caf\xe9,Drama\r\n", "line 4: bytes of an unknown encoding"),
        ("movies.csv", "25m", b",Nobody,Drama\r\n", "line 4: empty id"),
        ("movies.dat", "1m", b"9::A::B::C\n", "line 3: broken row: 4 fields where 3"),
        ("u.item", "100k", b"9|Nine|date||url" + b"|0" * 18 + b"\n", "line 3: broken row: 23"),
        ("u.item", "100k", b"9|Nine|date||url" + b"|2" * 19 + b"\n", "line 3: bad genre flag"),
    ],
)
def test_bad_rows_of_the_other_files(
    tmp_path: Path, name: str, release: str, line: bytes, message: str
) -> None:
    contents = FORMATS[release][1](EVENTS, FILMS)
    contents[name] += line
    put(tmp_path, contents)
    with pytest.raises(DataFormatError, match=message):
        load_movielens(release, tmp_path, tmp_path)
    raw = load_movielens(release, tmp_path, tmp_path, on_bad_row="skip")
    assert raw.catalog.frame["item_id"].to_list() == ["7", "10"]
    assert list(raw.skipped.values()) == [1]


GOOD_TAGS = b"userId,movieId,tag,timestamp\r\n1,7,slow,5\r\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"1,7,slow", "line 3: broken row: 3 fields where 4"),
        (b'1,7,"slow,5', "line 3: broken quotes"),
        (b"1,7,caf\xe9,5", "line 3: bytes of an unknown encoding"),
        (b"1,,slow,5", "line 3: empty id"),
    ],
)
def test_bad_tags(tmp_path: Path, line: bytes, message: str) -> None:
    put(tmp_path, write_csv(EVENTS, FILMS) | {"tags.csv": GOOD_TAGS + line + b"\r\n1,7,dark,6\r\n"})
    with pytest.raises(DataFormatError, match=message):
        load_movielens("25m", tmp_path, tmp_path)
    raw = load_movielens("25m", tmp_path, tmp_path, on_bad_row="skip")
    assert raw.catalog.frame.filter(item_id="7")["description"].to_list() == ["slow, dark"]
    assert list(raw.skipped.values()) == [1]


def test_a_blank_tag_is_no_tag_and_counted(tmp_path: Path) -> None:
    put(tmp_path, write_csv(EVENTS, FILMS) | {"tags.csv": GOOD_TAGS + b"1,10, ,5\r\n1,10,,5\r\n"})
    raw = load_movielens("25m", tmp_path, tmp_path)
    assert raw.skipped == {"tags.csv: empty tag": 2}
    assert raw.catalog.frame.filter(item_id="10")["description"].to_list() == [None]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"9::F::x::0::1\n", "line 1: bad age: 'x'"),
        (b"9::F::25::21::1\n", "line 1: bad occupation: '21'"),
    ],
)
def test_bad_users(tmp_path: Path, line: bytes, message: str) -> None:
    put(tmp_path, write_dat(EVENTS, FILMS, "latin-1") | {"users.dat": line})
    with pytest.raises(DataFormatError, match=message):
        load_movielens("1m", tmp_path, tmp_path)


@pytest.mark.parametrize("mode", ["error", "skip"])
def test_a_missing_column_and_an_empty_file_are_never_skipped(tmp_path: Path, mode: str) -> None:
    contents = write_csv(EVENTS, FILMS)
    put(tmp_path, contents | {"ratings.csv": b"userId,movieId,timestamp\n1,2,3\n"})
    with pytest.raises(DataFormatError, match="line 1: missing column rating; the header names"):
        load_movielens("25m", tmp_path, tmp_path, mode)
    put(tmp_path, {"ratings.csv": b"\n"})
    with pytest.raises(DataFormatError, match="the file is empty"):
        load_movielens("25m", tmp_path, tmp_path, mode)
    put(tmp_path, {"ratings.csv": b"userId,movieId,rating,timestamp\n"})
    with pytest.raises(DataFormatError, match="no good row"):
        load_movielens("25m", tmp_path, tmp_path, mode)


def test_a_truncated_gz_is_named(tmp_path: Path) -> None:
    contents = write_csv(EVENTS * 200, FILMS)
    whole = gzip.compress(contents.pop("ratings.csv"))
    put(tmp_path, contents | {"ratings.csv.gz": whole[: len(whole) // 2]})
    with pytest.raises(DataFormatError, match=r"ratings.csv.gz: the gzip file is truncated"):
        load_movielens("25m", tmp_path, tmp_path)


def test_columns_are_found_by_name_and_byte_order_mark_and_blank_lines_are_ignored(
    tmp_path: Path,
) -> None:
    text = "\ufefftimestamp,extra,rating,movieId,userId\n5,x,4.0,10,1\n\n6,x,0.5,7,2\n\n"
    put(tmp_path, write_csv(EVENTS, FILMS) | {"ratings.csv": text.encode()})
    raw = load_movielens("25m", tmp_path, tmp_path)
    assert events_of(raw) == [("1", "10", 4.0, 5), ("2", "7", 0.5, 6)]


def test_on_bad_row_has_two_values(tmp_path: Path) -> None:
    put(tmp_path, write_csv(EVENTS, FILMS))
    with pytest.raises(ValueError, match='expected "error" or "skip"'):
        load_movielens("25m", tmp_path, tmp_path, on_bad_row="ignore")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_wide_encodings_are_named_for_what_they_are(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "u.item"
    path.write_bytes("1|Toy Story (1995)|01-Jan-1995\n".encode(encoding))
    with pytest.raises(DataFormatError, match=r"u\.item, line 1: .*UTF-16.*save it in"):
        delimited.read_raw(path)
    path.write_bytes(b"1|Toy Story\n2|Golden\0Eye\n")
    with pytest.raises(DataFormatError, match=r"line 2: a NUL byte"):
        delimited.read_raw(path)
