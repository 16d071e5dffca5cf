"""Tiny files in every raw format of MovieLens, written without the code that reads them."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Callable
from pathlib import Path

from datamodules import movielens_parsers as parsers
from datamodules.types import RawData

Event = tuple[str, str, float, int]
Film = tuple[str, str, list[str]]
EVENTS: list[Event] = [("1", "10", 3, 978300760), ("2", "10", 5, 0), ("1", "7", 1, 978300760)]
FILMS: list[Film] = [("7", "Amélie (2001)", ["Comedy", "Romance"]), ("10", "Alien: 3", [])]


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
