"""The raw formats of MovieLens, each parsed into ``RawData`` by one function.

A parser takes the mapping of file names to paths that a source returned and knows nothing of where
they came from. Raw ids stay strings, events stay in file order, titles lose blanks at their ends
and nothing else. Categories are the genres ("unknown" and "(no genres listed)" are none) and then the
year that ends the title; where there is a file of tags, they are the description (``movielens_tags``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import polars as pl

from datamodules.delimited import BadRows, Layout, OnBadRow, read_events, read_raw, read_rows
from datamodules.errors import DataFormatError
from datamodules.movielens_tags import TAGS_CSV, TAGS_DAT, tag_descriptions
from datamodules.raw_columns import occurs_again
from datamodules.types import CATALOG_SCHEMA, INTERACTION_SCHEMA, Catalog, Interactions, RawData

USER_SCHEMA: dict[str, pl.DataType] = {
    "user_id": pl.String(),
    "gender": pl.String(),  # "F" | "M"
    "age": pl.Int32(),  # years; in 1m the first year of a bracket, 1 = under 18
    "occupation": pl.String(),
    "zip": pl.String(),
}
WHOLE_STARS = (1.0, 2.0, 3.0, 4.0, 5.0)
HALF_STARS = tuple(half / 2 for half in range(1, 11))

EVENT = ("user_id", "item_id", "rating", "timestamp")
# u.item's flags, in the order of u.genre.
GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary",
    "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi",
    "Thriller", "War", "Western",
)  # fmt: skip
# users.dat of 1m has numbers; the names are those of its README.
OCCUPATIONS_1M = (
    "other", "academic/educator", "artist", "clerical/admin", "college/grad student",
    "customer service", "doctor/health care", "executive/managerial", "farmer", "homemaker",
    "K-12 student", "lawyer", "programmer", "retired", "sales/marketing", "scientist",
    "self-employed", "technician/engineer", "tradesman/craftsman", "unemployed", "writer",
)  # fmt: skip
NO_GENRE = ("unknown", "(no genres listed)", "")
_YEAR = r"\(([0-9]{4})\)$"  # "Toy Story (1995)"

Files = Mapping[str, Path]
Item = tuple[str, str | None, list[str]]  # id, title, genres
Parser = Callable[[Files, OnBadRow], RawData]
T = TypeVar("T")


@dataclass
class _Reader:
    """Reads the files of one release and keeps count of checksums and of rows left out."""

    files: Files
    on_bad_row: OnBadRow
    skipped: dict[str, int] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)

    def _raw(self, name: str) -> bytes:
        data, self.checksums[name] = read_raw(self.files[name])
        return data

    def events(self, name: str, layout: Layout, scale: Sequence[float] | None) -> pl.DataFrame:
        data = self._raw(name)
        frame, skipped = read_events(self.files[name], data, layout, scale, self.on_bad_row)
        self.skipped |= skipped
        return frame

    def rows(self, name: str, layout: Layout, make: Callable[[list[str]], T]) -> list[T]:
        """``make(fields)`` of each row whose first field, its id, is new; ValueError = bad row."""
        bad = BadRows(self.files[name], self.on_bad_row)
        made: list[T] = []
        first_line: dict[str, int] = {}
        for line, fields in read_rows(self._raw(name), layout, bad):
            try:
                key = fields[0]
                if key in first_line:
                    raise ValueError(f"repeated id: {key!r} is on line {first_line[key]} as well")
                made.append(make(fields))
                first_line[key] = line
            except ValueError as error:
                reason, _, detail = str(error).partition(": ")
                bad.add(line, reason, detail)
        self.skipped |= bad.skipped
        return made

    def _descriptions(self) -> pl.DataFrame | None:
        name = next((name for name in (TAGS_CSV, TAGS_DAT) if name in self.files), None)
        if name is None:
            return None
        frame, skipped = tag_descriptions(self.files[name], self._raw(name), self.on_bad_row)
        self.skipped |= skipped
        return frame

    def raw_data(
        self, events: pl.DataFrame, items: Iterable[Item], users: list[dict[str, object]] | None
    ) -> RawData:
        """Put the parts together; count what is odd but kept."""
        catalog, without = catalog_frame(events, items, self._descriptions())
        counts = {
            "kept: items without metadata": without,
            "kept: repeated (user, item) rows": repeated_pairs(events),
        }
        counts = {reason: count for reason, count in counts.items() if count}
        return RawData(
            interactions=Interactions(events),
            catalog=Catalog(catalog),
            users=None if users is None else pl.DataFrame(users, schema=USER_SCHEMA),
            skipped=self.skipped | counts,
            checksums=self.checksums,
        )


def catalog_frame(
    events: pl.DataFrame, items: Iterable[Item], descriptions: pl.DataFrame | None = None
) -> tuple[pl.DataFrame, int]:
    """Items of the metadata, then rated items without any (null title), and how many those are."""
    rows = [(item_id, title, genres) for item_id, title, genres in items]
    schema = {"item_id": pl.String(), "title": pl.String(), "categories": pl.List(pl.String())}
    known = pl.DataFrame(rows, schema=schema, orient="row")
    year = pl.concat_list(pl.col("title").str.extract(_YEAR)).list.drop_nulls()
    known = known.with_columns(pl.col("categories").list.concat(year))
    rated = events.select(pl.col("item_id").unique(maintain_order=True))
    bare = rated.join(known, on="item_id", how="anti", maintain_order="left")
    whole = pl.concat([known, bare], how="diagonal")
    if descriptions is not None:
        whole = whole.join(descriptions, on="item_id", how="left", maintain_order="left")
    absent = [
        pl.lit(None, t).alias(name)
        for name, t in CATALOG_SCHEMA.items()
        if name not in whole.columns
    ]
    return whole.with_columns(absent).select(list(CATALOG_SCHEMA)), bare.height


def repeated_pairs(events: pl.DataFrame) -> int:
    """Rows whose (user, item) occurred in an earlier row."""
    # Equal pairs have equal hashes, so the slow exact count only sees rows whose hash repeats.
    hashes = events.select(pl.col("user_id").hash(seed=1) ^ pl.col("item_id").hash(seed=2))
    suspects = events.filter(occurs_again(hashes.to_series())).select("user_id", "item_id")
    return suspects.height - suspects.unique().height


def split_genres(text: str, separator: str) -> list[str]:
    """``"Comedy|Drama"`` -> its genres; the words for "none" give an empty list."""
    return [genre for genre in text.strip().split(separator) if genre not in NO_GENRE]


def parse_100k(files: Files, on_bad_row: OnBadRow = "error") -> RawData:
    """u.data, u.item, u.user (optional) of the official 100K release."""
    reader = _Reader(files, on_bad_row)
    events = reader.events("u.data", Layout("\t", EVENT, encoding="latin-1"), WHOLE_STARS)
    columns = ("item_id", "title", "date", "video_date", "url", *GENRES_100K)
    items = reader.rows("u.item", Layout("|", columns, encoding="latin-1"), _item_100k)
    layout = Layout("|", ("user_id", "age", "gender", "occupation", "zip"), encoding="latin-1")
    users = reader.rows("u.user", layout, _user) if "u.user" in files else None
    return reader.raw_data(events, items, users)


def _item_100k(fields: list[str]) -> Item:
    item_id, title, *_ = fields
    flags = fields[5:]
    if not set(flags) <= {"0", "1"}:
        raise ValueError(f"bad genre flag: {'|'.join(flags)}, expected 0 or 1 for each genre")
    genres = [name for name, flag in zip(GENRES_100K, flags, strict=True) if flag == "1"]
    return item_id, title.strip() or None, [genre for genre in genres if genre not in NO_GENRE]


def _user(fields: list[str]) -> dict[str, object]:
    """(id, age, gender, occupation, zip) as a row of ``USER_SCHEMA``."""
    user_id, age, gender, occupation, zip_code = fields
    if not age.isdecimal():
        raise ValueError(f"bad age: {age!r}, expected whole years")
    return {
        "user_id": user_id,
        "gender": gender,
        "age": int(age),
        "occupation": occupation,
        "zip": zip_code,
    }


def parse_100k_wheel(files: Files, on_bad_row: OnBadRow = "error") -> RawData:
    """ml-100k.inter, .item and .user (optional): the same release as RecBole ships it.

    Rows are u.data's, in its order. Titles lack the year; it is put back from the release year, so
    that all 1,682 agree with u.item (whose item 267, "unknown", is misspelt here).
    """
    reader = _Reader(files, on_bad_row)
    header = {
        "user_id:token": "user_id",
        "item_id:token": "item_id",
        "rating:float": "rating",
        "timestamp:float": "timestamp",
    }
    events = reader.events("ml-100k.inter", Layout("\t", header=header), WHOLE_STARS)
    names = ("item_id:token", "movie_title:token_seq", "release_year:token", "class:token_seq")
    layout = Layout("\t", header={name: name for name in names})
    items = reader.rows("ml-100k.item", layout, _item_wheel)
    user_names = ("user_id", "age", "gender", "occupation", "zip_code")
    layout = Layout("\t", header={f"{name}:token": name for name in user_names})
    users = reader.rows("ml-100k.user", layout, _user) if "ml-100k.user" in files else None
    return reader.raw_data(events, items, users)


def _item_wheel(fields: list[str]) -> Item:
    item_id, title, year, genres = fields
    # Not only years: "... (1995) (V)" has "V" there, and item 267 has "unkonwn" in both columns.
    title = "unknown" if year == "unkonwn" else f"{title} ({year})"
    return item_id, title.strip() or None, split_genres(genres, " ")


def parse_1m(files: Files, on_bad_row: OnBadRow = "error") -> RawData:
    """ratings.dat, movies.dat, users.dat (optional): ``::`` between fields, Latin-1."""
    reader = _Reader(files, on_bad_row)
    events = reader.events("ratings.dat", Layout("::", EVENT, encoding="latin-1"), WHOLE_STARS)
    return reader.raw_data(events, _movies_dat(reader, "latin-1"), _users_dat(reader))


def parse_10m(files: Files, on_bad_row: OnBadRow = "error") -> RawData:
    """ratings.dat with half stars, movies.dat, tags.dat (optional): ``::`` between, UTF-8, no users."""
    reader = _Reader(files, on_bad_row)
    events = reader.events("ratings.dat", Layout("::", EVENT), HALF_STARS)
    return reader.raw_data(events, _movies_dat(reader, "utf-8"), None)


def _movies_dat(reader: _Reader, encoding: str) -> list[Item]:
    layout = Layout("::", ("item_id", "title", "genres"), encoding=encoding)
    return reader.rows("movies.dat", layout, _movie)


def _movie(fields: list[str]) -> Item:
    item_id, title, genres = fields
    if not item_id:
        raise ValueError("empty id: expected an item id")
    return item_id, title.strip() or None, split_genres(genres, "|")


def _users_dat(reader: _Reader) -> list[dict[str, object]] | None:
    if "users.dat" not in reader.files:
        return None
    columns = ("user_id", "gender", "age", "occupation", "zip")
    return reader.rows("users.dat", Layout("::", columns, encoding="latin-1"), _user_1m)


def _user_1m(fields: list[str]) -> dict[str, object]:
    user_id, gender, age, code, zip_code = fields
    if not code.isdecimal() or int(code) >= len(OCCUPATIONS_1M):
        raise ValueError(f"bad occupation: {code!r}, expected a number from 0 to 20")
    return _user([user_id, age, gender, OCCUPATIONS_1M[int(code)], zip_code])


def parse_csv(files: Files, on_bad_row: OnBadRow = "error") -> RawData:
    """ratings.csv (half stars), movies.csv, tags.csv (optional) of the later releases: UTF-8, quoted."""
    reader = _Reader(files, on_bad_row)
    header = {"userId": "user_id", "movieId": "item_id", "rating": "rating"}
    header["timestamp"] = "timestamp"
    events = reader.events("ratings.csv", Layout(",", header=header, quoted=True), HALF_STARS)
    layout = Layout(",", header={n: n for n in ("movieId", "title", "genres")}, quoted=True)
    return reader.raw_data(events, reader.rows("movies.csv", layout, _movie), None)


def parse_1m_sasrec(files: Files, on_bad_row: OnBadRow = "error") -> RawData:
    """The text file of the SASRec papers: "user item" lines, each user's in time order.

    There are no ratings and no times. Where ``sas_to_original_items.txt`` (and ``..._users.txt``)
    lie beside it, raw ids become those of MovieLens 1M, and movies.dat and users.dat give titles
    and attributes; without a map its ids are other numbers than theirs, so those are not used.

    Raises:
        DataFormatError: as in every format, and for an id that its map does not have.
    """
    reader = _Reader(files, on_bad_row)
    name = next(name for name in SASREC_NAMES if name in files)
    events = reader.events(name, Layout(" ", ("user_id", "item_id")), None)
    items: list[Item] = []
    users = None
    if SASREC_ITEM_MAP in files:
        events = _to_original(reader, events, "item_id", SASREC_ITEM_MAP, name)
        items = _movies_dat(reader, "latin-1") if "movies.dat" in files else []
    if SASREC_USER_MAP in files:
        events = _to_original(reader, events, "user_id", SASREC_USER_MAP, name)
        users = _users_dat(reader)
    return reader.raw_data(events, items, users)


SASREC_NAMES = ("ml-1m_sasrec.txt", "ml-1m.txt")
SASREC_ITEM_MAP, SASREC_USER_MAP = "sas_to_original_items.txt", "sas_to_original_users.txt"


def _pair(fields: list[str]) -> tuple[str, str]:
    sasrec, original = fields
    return sasrec, original


def _to_original(
    reader: _Reader, events: pl.DataFrame, column: str, map_name: str, events_name: str
) -> pl.DataFrame:
    pairs = reader.rows(map_name, Layout(" ", ("sasrec", "original")), _pair)
    originals = dict(pairs)
    if len(set(originals.values())) < len(originals):
        raise DataFormatError(f"{reader.files[map_name]}: two ids map to one; get the file again.")
    mapped = events[column].replace_strict(originals, default=None, return_dtype=pl.String())
    if mapped.null_count():
        row = int(mapped.is_null().arg_max() or 0)
        raise DataFormatError(
            f"{reader.files[events_name]}: {column} {events[column][row]!r} (event {row + 1}) is "
            f"not in {reader.files[map_name]}; put the two files of one origin together."
        )
    return events.with_columns(mapped.alias(column)).select(list(INTERACTION_SCHEMA))
