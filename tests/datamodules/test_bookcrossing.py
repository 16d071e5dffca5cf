"""BookCrossing in the dump's dialect and in exports, its zeros, its damage, and the real files."""

from __future__ import annotations

import csv
import gzip
import re
import zipfile
from pathlib import Path

import polars as pl
import pytest

from datamodules import text_tables
from datamodules.bookcrossing import BookCrossingDataModule, load_bookcrossing
from datamodules.bookcrossing_books import read_books
from datamodules.bookcrossing_parsers import A_CUT, read_ratings, read_users
from datamodules.bookcrossing_reader import Reader
from datamodules.errors import DataFormatError, DataSourceError
from datamodules.types import CATALOG_SCHEMA, INTERACTION_SCHEMA
from tests.datamodules.bookcrossing_files import (
    BOOK_NAMES,
    BOOKS,
    IMAGES,
    RATING_NAMES,
    RATINGS,
    dump,
    export,
    write_dump,
    write_export,
)
from tests.datamodules.fuzzed_files import CASES, damaged, rows_in

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "bookcrossing"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no shared/data beside the repository")
SMALL, MEDIUM, LARGE = IMAGES


@pytest.mark.parametrize("place", ["dump", "zip", "gz", ",", ";"])
def test_every_dialect_and_packing_gives_the_same_rows(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "data"
    if len(place) == 1:
        write_export(folder, place)
    else:
        write_dump(folder)
    files = sorted(folder.iterdir())
    if place == "zip":
        with zipfile.ZipFile(folder / "BX-CSV-Dump.zip", "w") as archive:
            for file in files:
                archive.write(file, file.name)
    if place == "gz":
        for file in files:
            file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    if place in ("zip", "gz"):
        for file in files:
            file.unlink()
    raw = load_bookcrossing(folder, tmp_path / "cache", zeros="dislike")
    assert raw.interactions.frame.schema == pl.Schema(INTERACTION_SCHEMA)
    assert not raw.interactions.ordered
    assert raw.interactions.frame.rows() == [(u, i, float(r), None) for u, i, r in RATINGS]
    assert raw.catalog.frame.schema == pl.Schema(CATALOG_SCHEMA)
    images = [LARGE, MEDIUM, SMALL]
    assert raw.catalog.frame.rows() == [
        ("034545104X", "Flesh Tones: A Novel", None, ["Ballantine Books", "2002"], "M. J. Rose",
         None, images),
        ("0155061224", 'The "Rites" of Passage; or &', None, ["Heinle"], "Judith Rae", None, images),
        ("0446520802", "Études \\ é", None, ["Café & Co"], "André Gide", None, images),
        ("052165615X", None, None, None, None, None, None),
    ]  # fmt: skip
    assert raw.users is not None
    assert raw.users.rows() == [
        ("276725", "tyler, texas, usa", None),
        ("276726", "köln, n/a", 18),
        ("276727", "x", 90),
    ]
    kept = {reason for reason in raw.skipped if reason.startswith("kept: ")}
    assert kept == set(raw.skipped)
    assert raw.skipped["kept: items without metadata"] == 1


@pytest.mark.parametrize(
    ("zeros", "ratings", "counted"),
    [
        ("drop", [5, 3, 10, 7], "BX-Book-Ratings.csv: implicit zeros"),
        ("dislike", [0, 5, 0, 3, 10, 7], "kept: BX-Book-Ratings.csv: implicit zeros, as ratings of 0"),
        ("implicit", [None, 5, None, 3, 10, 7],
         "kept: BX-Book-Ratings.csv: implicit zeros, as events without a rating"),
    ],
)  # fmt: skip
def test_zeros_are_a_named_choice(
    tmp_path: Path, zeros: str, ratings: list[float | None], counted: str
) -> None:
    raw = load_bookcrossing(write_dump(tmp_path), tmp_path, zeros=zeros)  # type: ignore[arg-type]
    assert raw.interactions.frame["rating"].to_list() == ratings
    assert raw.skipped[counted] == 2
    assert A_CUT not in raw.skipped
    assert "cut" not in raw.source


def test_a_file_without_zeros_is_called_a_cut_and_one_of_zeros_is_refused(tmp_path: Path) -> None:
    rated = [row for row in RATINGS if row[2] != "0"]
    raw = load_bookcrossing(write_dump(tmp_path, ratings=list(rated)), tmp_path)
    assert raw.skipped[A_CUT] == 4
    assert raw.source.endswith("(a cut: no implicit zeros, so not the papers' data)")
    only = [row for row in RATINGS if row[2] == "0"]
    with pytest.raises(DataFormatError, match="every rating is an implicit zero; pass zeros=impl"):
        load_bookcrossing(write_dump(tmp_path, ratings=list(only)), tmp_path)


def test_an_unknown_choice_for_zeros() -> None:
    with pytest.raises(
        ValueError, match="zeros is 'keep'; expected one of drop, dislike, implicit"
    ):
        BookCrossingDataModule(zeros="keep")  # type: ignore[arg-type]


def test_isbns_meet_in_their_normal_form(tmp_path: Path) -> None:
    ratings = [
        ("1", "34545104x", "5"),
        ("2", "0-345-45104-X", "6"),
        ("2", "?", "7"),
        ("3", ".", "8"),
    ]
    books = [("034545104x", *BOOKS[0][1:]), ("034545104X", "Other", *BOOKS[0][2:])]
    folder = write_dump(tmp_path, ratings=list(ratings), books=list(books))
    raw = load_bookcrossing(folder, tmp_path)
    assert raw.interactions.frame["item_id"].to_list() == ["034545104X", "034545104X", "?", "."]
    assert raw.catalog.frame["title"].to_list() == ["Flesh Tones: A Novel", None, None]
    name = "kept: BX-Book-Ratings.csv:"
    assert raw.skipped == {
        "BX-Books.csv: repeated ISBN, the first row is taken": 1,
        f"{name} rows whose ISBN got a normal form": 2,
        f"{name} rows whose ISBN got lost leading zeros back": 1,
        f"{name} rows whose ISBN is not valid": 2,
        f"{name} ISBNs that met another in their normal form": 1,
        "kept: BX-Books.csv: rows whose ISBN got a normal form": 1,
        "kept: BX-Books.csv: ISBNs that met another in their normal form": 1,
        A_CUT: 4,
        "kept: items without metadata": 2,
    }


def test_ratings_of_unknown_books_can_be_left_out(tmp_path: Path) -> None:
    raw = load_bookcrossing(write_dump(tmp_path), tmp_path, require_metadata=True)
    known = {book[0] for book in BOOKS}
    expected = [(u, i) for u, i, r in RATINGS if i in known and r != "0"]
    assert raw.interactions.frame.select("user_id", "item_id").rows() == expected
    assert raw.skipped["ratings of books without metadata"] == 1
    assert set(raw.catalog.frame["item_id"]) == known


def test_years_publishers_and_editions(tmp_path: Path) -> None:
    years = ["0", "1", "1999", "2026", "2027", "2050", "1999.0", "DK Inc", ""]
    books = [(f"{n}", "One Title", "ONE author" if n % 2 else "One Author", year, "P", "", "", "")
             for n, year in enumerate(years)]  # fmt: skip
    books += [("a", "NULL", "", "1990", "", "ftp://x", " ", LARGE)]
    raw = load_bookcrossing(write_dump(tmp_path, books=list(books)), tmp_path)
    frame = raw.catalog.frame.head(10)
    found = [categories[1:] for categories in frame["categories"].to_list()[:9]]
    assert found == [[], ["1"], ["1999"], ["2026"], [], [], ["1999"], [], []]
    assert frame.row(9) == ("A", None, None, ["1990"], None, None, [LARGE])
    assert raw.skipped["kept: BX-Books.csv: years that are missing or not possible"] == 5
    assert raw.skipped["kept: BX-Books.csv: further ISBNs of one title and author"] == 8


SHIFTED = 'DK Readers: Creating the X-Men (Level 4: Proficient Readers)";Michael Teitelbaum'


def test_a_title_and_an_author_in_one_cell_are_parted(tmp_path: Path) -> None:
    """As three rows of the dump have it, where a title's closing quote is escaped."""
    row = ("078946697X", SHIFTED, "2000", "DK Publishing Inc", *IMAGES)
    folder = write_dump(tmp_path / "dump", books=[*BOOKS, row])
    assert rb'Readers)\";Michael Teitelbaum";"2000"' in (folder / "BX-Books.csv").read_bytes()
    exported = write_export(tmp_path / "export")
    lost = (
        *row[:1],
        SHIFTED.replace('"', '\\"') + '"',
        *row[2:],
        "",
    )  # a doubled-quote reader's view
    (exported / "BX-Books.csv").write_bytes(export(BOOK_NAMES, [*BOOKS, lost]))
    for place in (folder, exported):
        raw = load_bookcrossing(place, tmp_path)
        book = raw.catalog.frame.filter(item_id="078946697X").row(0)
        title = "DK Readers: Creating the X-Men (Level 4: Proficient Readers)"
        categories = ["DK Publishing Inc", "2000"]
        assert book[1:5] == (title, None, categories, "Michael Teitelbaum")
        assert book[6] == [LARGE, MEDIUM, SMALL]
        assert raw.skipped["kept: BX-Books.csv: rows with title and author in one cell"] == 1


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("BX-Book-Ratings.csv", b'"1";"034545104X"', "line 8: broken row: 2 fields where 3"),
        ("BX-Book-Ratings.csv", b'"1";"034545104X;"5"', "line 8: broken quotes"),
        ("BX-Book-Ratings.csv", b'"1";"034545104X";"11"', "line 8: rating off the scale: '11'"),
        ("BX-Book-Ratings.csv", b'"1";"034545104X";"-1"', "line 8: rating off the scale: '-1'"),
        ("BX-Book-Ratings.csv", b'"1";"034545104X";NULL', "line 8: rating off the scale: 'NULL'"),
        ("BX-Book-Ratings.csv", b'"1";" ";"5"', "line 8: empty id"),
        ("BX-Book-Ratings.csv", b'"";"034545104X";"5"', "line 8: empty id"),
        ("BX-Books.csv", b'"1";"Title";"Author";"1999"', "line 5: broken row: 4 fields where 8"),
        ("BX-Books.csv", b'"";"Title";"A";"1999";"P";"";"";""', "line 5: empty id"),
        ("BX-Users.csv", b'"276726";"x";NULL', "line 5: repeated id: '276726'"),
        ("BX-Users.csv", b'"9";"x";"old"', "line 5: bad age: 'old'"),
    ],
)
def test_bad_rows_are_named_or_counted(
    tmp_path: Path, name: str, line: bytes, message: str
) -> None:
    folder = write_dump(tmp_path)
    good = load_bookcrossing(folder, tmp_path)
    path = folder / name
    path.write_bytes(path.read_bytes() + line + b"\r\n")
    with pytest.raises(DataFormatError, match=message) as error:
        load_bookcrossing(folder, tmp_path)
    assert str(path) in str(error.value)
    raw = load_bookcrossing(folder, tmp_path, on_bad_row="skip")
    assert raw.interactions.frame.equals(good.interactions.frame)
    assert raw.catalog.frame.equals(good.catalog.frame)
    assert sum(raw.skipped.values()) == sum(good.skipped.values()) + 1


def test_the_first_bad_row_of_the_file_is_named_whatever_its_kind(tmp_path: Path) -> None:
    folder = write_dump(tmp_path)
    path = folder / "BX-Book-Ratings.csv"
    path.write_bytes(path.read_bytes() + b'"1";"";"5"\r\n"1"\r\n')
    with pytest.raises(DataFormatError, match="line 8: empty id"):
        load_bookcrossing(folder, tmp_path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'"User-ID";"ISBN";"Stars"', "expected one column called Book-Rating or Rating"),
        (b'"User-ID";"Book-Rating"', "expected one column called ISBN"),
        (b"User-ID ISBN Book-Rating", "is no header with ';' or ','"),
        (b"User-ID,ISBN,Book-Rating,Rating", "expected one column called Book-Rating or Rating"),
        (b"User-ID,ISBN,ISBN,Rating", "several, called ISBN"),
    ],
)
@pytest.mark.parametrize("mode", ["error", "skip"])
def test_a_column_is_never_guessed(tmp_path: Path, header: bytes, message: str, mode: str) -> None:
    folder = write_dump(tmp_path)
    path = folder / "BX-Book-Ratings.csv"
    path.write_bytes(header + b"\r\n" + path.read_bytes().split(b"\r\n", 1)[1])
    with pytest.raises(DataFormatError, match=f"line 1: .*{message}"):
        load_bookcrossing(folder, tmp_path, mode)


def test_the_remedy_names_the_files(tmp_path: Path) -> None:
    for root in (None, tmp_path):
        with pytest.raises(DataSourceError) as error:
            load_bookcrossing(root, tmp_path)
        assert "put BX-Book-Ratings.csv and BX-Books.csv of the original dump" in str(error.value)
        assert "BX-CSV-Dump.zip, in a folder and pass data.root=FOLDER" in str(error.value)


def test_the_choices_name_the_prepared_folder(tmp_path: Path) -> None:
    modules = [
        BookCrossingDataModule(root=str(write_dump(tmp_path)), cache=str(tmp_path), **choice)
        for choice in ({}, {"zeros": "dislike"}, {"require_metadata": True})
    ]
    assert len({str(module.asked()) for module in modules}) == 3
    assert [m.load_raw().interactions.frame.height for m in modules] == [4, 6, 3]


def test_plain_lines_never_reach_the_slow_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd: list[str] = []
    split = text_tables.Dialect.split
    monkeypatch.setattr(
        text_tables.Dialect, "split", lambda self, line: odd.append(line) or split(self, line)
    )
    load_bookcrossing(write_dump(tmp_path), tmp_path)
    with_escapes = [line for line in odd if "\\" in line]
    headers = [line for line in odd if "ISBN" in line or "User-ID" in line]
    assert len(with_escapes) == 2  # of BOOKS
    assert len(odd) == len(headers) + len(with_escapes)


# ---------------------------------------------------------------- fuzzing

MANY_RATINGS = [(f"{n % 4}", f"{n:010d}", f"{n % 11}") for n in range(12)]
MANY_BOOKS = [
    (f"{n:010d}", f'The "{n}" é; of', "Ã¼ber", f"{1990 + n}", "P", "", "", "") for n in range(12)
]
MANY_USERS = [(f"{n}", "köln, n/a, ", None if n % 2 else f"{n}") for n in range(12)]
FILES = {
    "ratings": ("BX-Book-Ratings.csv", RATING_NAMES, MANY_RATINGS),
    "books": ("BX-Books.csv", BOOK_NAMES, MANY_BOOKS),
    "users": ("BX-Users.csv", ("User-ID", "Location", "Age"), MANY_USERS),
}


@pytest.mark.parametrize("dialect", ["dump", "export"])
@pytest.mark.parametrize("kind", FILES)
def test_fuzzed_files_end_in_a_clear_error_or_a_count(
    tmp_path: Path, kind: str, dialect: str
) -> None:
    name, names, rows = FILES[kind]
    write = dump if dialect == "dump" else export
    good, path = write(names, list(rows)), write_dump(tmp_path) / name
    places = {f.name: f for f in tmp_path.iterdir()}
    read, messages = 0, []
    for data in damaged(good, b";" if dialect == "dump" else b",", CASES // 2):
        path.write_bytes(data)
        reader = Reader(places, "skip")
        try:
            kept = _read(reader, name, kind)
        except DataFormatError as error:
            messages.append(str(error))
            continue
        read += 1
        assert kept + sum(reader.skipped.values()) == rows_in(data)
    assert all(message.startswith(str(path)) for message in messages)
    assert read > CASES // 8, "nearly nothing was read: the accidents are too large to say much"


def _read(reader: Reader, name: str, kind: str) -> int:
    if kind == "ratings":
        return read_ratings(reader, name, "implicit").height
    return (read_books if kind == "books" else read_users)(reader, name).height


# ---------------------------------------------------------------- the real files


def lines_of(name: str) -> list[list[str]]:
    with gzip.open(DATA / "subset" / name, "rt", encoding="utf-8", newline="") as file:
        return list(csv.reader(file))[1:]


@needs_data
def test_the_real_cut(tmp_path: Path) -> None:
    raw = load_bookcrossing(DATA / "subset", tmp_path)
    events, rows = raw.interactions.frame, lines_of("BX-Ratings.csv.gz")
    written = {isbn for _, isbn, _ in rows}
    assert (len({u for u, _, _ in rows}), len(written), len(rows)) == (48_299, 18_185, 204_164)
    assert sum(isbn.upper().endswith("X") for isbn in written) == 1_449
    # One book is there twice, once with a small "x": 18,185 ISBNs as written are 18,184 books.
    books = {isbn.upper() for isbn in written}
    assert len(books) == 18_184
    assert events["user_id"].n_unique() == 48_299
    assert set(events["item_id"]) == books == set(raw.catalog.frame["item_id"])
    assert events["rating"].to_list() == [float(r) for _, _, r in rows]
    assert raw.skipped[A_CUT] == 204_164
    assert raw.skipped["kept: BX-Ratings.csv: ISBNs that met another in their normal form"] == 1
    assert raw.skipped["BX-Books.csv: repeated ISBN, the first row is taken"] == 1


@needs_data
def test_the_real_titles(tmp_path: Path) -> None:
    raw = load_bookcrossing(DATA / "subset", tmp_path)
    books = lines_of("BX-Books.csv.gz")
    name = "kept: BX-Books.csv:"
    odd = sum(not title.isascii() for _, title, _, _, _ in books)
    assert raw.skipped[f"{name} mojibake repaired in title"] == odd == 192
    broken = sum("\\" in title and title.endswith('"') for _, title, _, _, _ in books)
    assert raw.skipped[f"{name} escaped quotes repaired in title"] == broken
    years = sum(year in ("0", "2030") for _, _, _, year, _ in books)
    assert raw.skipped[f"{name} years that are missing or not possible"] == years == 317
    titles = dict(raw.catalog.frame.select("item_id", "title").rows())
    assert titles["0449003787"] == '"O" Is for Outlaw'
    assert titles["8478800336"].startswith("Cómo ser una mujer y no morir en el intento (Colección")
    assert titles["2266084372"] == "Pourquoi j'ai mangé mon père"
    marks = [title for title in titles.values() if re.search("[ÂÃ]", title)]
    assert len(marks) == raw.skipped[f"{name} titles with a letter lost for good"] == 5


@needs_data
def test_the_real_users_of_both_dialects(tmp_path: Path) -> None:
    part = DATA / "raw_format" / "BX-Users.part_latin1_crlf.csv.gz"
    users = read_users(Reader({"BX-Users.csv": part}, "error"), "BX-Users.csv")
    text = gzip.decompress(part.read_bytes()).decode("latin-1")
    assert users.height == text.count("\r\n") - 1 == 22_816
    assert users["age"].null_count() == text.count(";NULL\r\n")
    places = dict(users.select("user_id", "location").rows())
    assert places["276847"] == "köln, nordrhein-westfalen, germany"
    assert places["62853"] == 'esch-alzette, "n/a", luxembourg' or places["62853"].startswith(
        "esch"
    )
    cut = load_bookcrossing(DATA / "subset", tmp_path).users
    assert cut is not None
    assert cut.height == 48_299
    both = cut.join(users, on="user_id", suffix="_raw")
    assert both.height > 1_000
    assert both.filter(pl.col("age").ne_missing(pl.col("age_raw"))).height == 0
