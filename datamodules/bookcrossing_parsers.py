"""BookCrossing's three files, in the dialect of the original dump or of a later export.

The dump (Ziegler et al., WWW 2005): ``;`` between quoted cells, Latin-1, CRLF, quotes escaped by a
backslash, a bare NULL for what is missing. Exports: ``,`` (or ``;``) between cells, UTF-8, quotes doubled.
The header says which it is and where each column stands; a name that is not known here is refused.
There are no times, so events stand in the file's order, which means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import polars as pl

from datamodules.bookcrossing_books import read_books
from datamodules.bookcrossing_reader import Files, Reader
from datamodules.bookcrossing_text import repair_mojibake
from datamodules.delimited import OnBadRow
from datamodules.errors import DataFormatError
from datamodules.movielens_parsers import repeated_pairs
from datamodules.types import INTERACTION_SCHEMA, Catalog, Interactions, RawData

Zeros = Literal["drop", "dislike", "implicit"]

RATINGS_NAMES = ("BX-Book-Ratings.csv", "BX-Ratings.csv", "Ratings.csv")
BOOKS_NAMES = ("BX-Books.csv", "Books.csv")
USERS_NAMES = ("BX-Users.csv", "Users.csv")
A_CUT = "kept: ratings of a file without implicit zeros, which is a cut and not the papers' data"

_RATINGS = {"user_id": ("User-ID",), "item_id": ("ISBN",), "rating": ("Book-Rating", "Rating")}
_USERS = {"user_id": ("User-ID",), "age": ("Age", "User-Age")}
_PLACES = {
    "location": ("Location",),
    "city": ("User-City",),
    "state": ("User-State",),
    "country": ("User-Country",),
}


def parse_bookcrossing(
    files: Files,
    on_bad_row: OnBadRow = "error",
    zeros: Zeros = "drop",
    require_metadata: bool = False,
) -> RawData:
    """Ratings, books and (if there) users.

    Args:
        files: name -> path, one each of ``RATINGS_NAMES``, ``BOOKS_NAMES`` and, optional, ``USERS_NAMES``.
        on_bad_row: ``"error"`` or ``"skip"``.
        zeros: what a rating of 0, "implicit", becomes; see ``BookCrossingDataModule``.
        require_metadata: leave ratings out whose ISBN has no row among the books.

    Raises:
        DataFormatError: a file is not in its format, or a bad row that may not be skipped.
        ValueError: an unknown choice for ``zeros``.
    """
    if zeros not in get_args(Zeros):
        raise ValueError(f"zeros is {zeros!r}; expected one of {', '.join(get_args(Zeros))}.")
    reader = Reader(files, on_bad_row)
    events = read_ratings(reader, _present(files, RATINGS_NAMES), zeros)
    books = read_books(reader, _present(files, BOOKS_NAMES))
    users = next((name for name in USERS_NAMES if name in files), None)
    if require_metadata:
        whole = events.height
        events = events.join(books, on="item_id", how="semi", maintain_order="left")
        reader.skipped |= {"ratings of books without metadata": whole - events.height}
    rated = events.select(pl.col("item_id").unique(maintain_order=True))
    bare = rated.join(books, on="item_id", how="anti", maintain_order="left")
    reader.kept |= {
        "kept: items without metadata": bare.height,
        "kept: repeated (user, item) rows": repeated_pairs(events),
    }
    return RawData(
        interactions=Interactions(events, ordered=False),
        catalog=Catalog(pl.concat([books, bare], how="diagonal")),
        users=None if users is None else read_users(reader, users),
        skipped={reason: n for reason, n in (reader.skipped | reader.kept).items() if n},
        checksums=reader.checksums,
    )


def _present(files: Files, names: Sequence[str]) -> str:
    return next(name for name in names if name in files)


def read_ratings(reader: Reader, name: str, zeros: Zeros) -> pl.DataFrame:
    """Events with ``INTERACTION_SCHEMA`` and without times."""
    table, _ = reader.table(name, _RATINGS, {})
    table.reject(pl.col("user_id") == "", "empty id", "user_id", "a user id")
    scale = pl.col("rating").str.contains(r"^([0-9]|10)(\.0+)?$")
    table.reject(~scale, "rating off the scale", "rating", "a whole number from 0 to 10")
    reader.isbns(name, table)
    frame = reader.settle(table).with_columns(pl.col("rating").cast(pl.Float32))
    implicit = int((frame["rating"] == 0).sum())
    if not implicit:
        reader.kept[A_CUT] = frame.height
    elif zeros == "drop":
        reader.skipped[f"{name}: implicit zeros"] = implicit
        frame = frame.filter(pl.col("rating") > 0)
        if frame.is_empty():
            raise DataFormatError(
                f"{reader.files[name]}: every rating is an implicit zero; pass zeros=implicit to keep them."
            )
    elif zeros == "dislike":
        reader.note(name, {"implicit zeros, as ratings of 0": implicit})
    else:
        reader.note(name, {"implicit zeros, as events without a rating": implicit})
        frame = frame.with_columns(rating=pl.when(pl.col("rating") > 0).then("rating"))
    frame = frame.with_columns(timestamp=pl.lit(None, pl.Int64))
    return frame.select(list(INTERACTION_SCHEMA))


def read_users(reader: Reader, name: str) -> pl.DataFrame:
    """``user_id``, ``location`` ("city, state, country" without empty parts) and ``age`` in years."""
    table, _ = reader.table(name, _USERS, _PLACES)
    table.reject(pl.col("user_id") == "", "empty id", "user_id", "a user id")
    table.reject_repeats("user_id")
    # An export of the dump's quotes left one behind: 'canada"', '17"'.
    age = pl.col("age").str.strip_chars(' "').replace("NULL", "")
    bad = ~age.str.contains(r"^([0-9]{1,3}(\.0+)?)?$")
    table.reject(bad, "bad age", "age", "whole years, NULL or nothing")
    frame = reader.settle(table)
    places = [pl.col(column) for column in _PLACES if column in frame.columns]
    location = pl.concat_str(places, separator=",") if places else pl.lit(None, pl.String)
    parts = location.str.split(",").list.eval(pl.element().str.strip_chars(' "'))
    whole = parts.list.eval(pl.element().filter(pl.element() != "")).list.join(", ")
    frame = frame.select(
        "user_id",
        location=pl.when(~whole.is_in(["", "NULL"])).then(whole),
        age=pl.when(age != "").then(age).cast(pl.Float64).cast(pl.Int32),
    )
    return reader.mend(name, frame, r"[^\x00-\x7f]", repair_mojibake, "mojibake repaired")
