"""BookCrossing's books: what the dump and its exports did to titles is undone, as far as a rule reaches."""

from __future__ import annotations

from itertools import pairwise

import polars as pl

from datamodules.bookcrossing_reader import Reader
from datamodules.bookcrossing_text import has_lost_letter, repair_mojibake, repair_quotes
from datamodules.text import TITLE_LIMIT, normalise_column
from datamodules.types import CATALOG_SCHEMA

NEWEST_YEAR = 2026  # the dump, of 2004, has 2030 to 2050 for years not known, as it has 0

_BOOKS = {
    "item_id": ("ISBN",),
    "title": ("Book-Title", "Title"),
    "author": ("Book-Author", "Author"),
    "year": ("Year-Of-Publication", "Year"),
    "publisher": ("Publisher", "Book-Publisher"),
}
_IMAGES = {f"image_{size}": (f"Image-URL-{size.upper()}",) for size in "lms"}  # the largest first
_YEAR = r"^[0-9]{1,4}$"


def read_books(reader: Reader, name: str) -> pl.DataFrame:
    """Books with ``CATALOG_SCHEMA``; of several rows with one normal ISBN the first.

    ``brand`` is the author: who made it. ``categories`` are the publisher and the year (last).
    """
    table, dialect = reader.table(name, _BOOKS, _IMAGES, _pad_shifted)
    reader.isbns(name, table)
    frame = reader.settle(table)
    if not dialect.escapes:
        frame = reader.mend(name, frame, r"\\.*\"$", repair_quotes, "escaped quotes repaired")
    frame = _unshift(reader, name, frame)
    frame = reader.mend(name, frame, r"[^\x00-\x7f]", repair_mojibake, "mojibake repaired")
    lost = sum(map(has_lost_letter, frame["title"].filter(frame["title"].str.contains("Ã"))))
    distinct = frame.unique("item_id", keep="first", maintain_order=True)
    # "...x" and "...X" are one book.
    repeated = frame.height - distinct.height
    reader.skipped[f"{name}: repeated ISBN, the first row is taken"] = repeated
    books = _catalog(reader, name, distinct)
    counts = {
        "titles with a letter lost for good": lost,
        "further ISBNs of one title and author": _editions(books),
    }
    reader.note(name, counts)
    return books


def _pad_shifted(cells: list[str]) -> list[str]:
    """Three rows of the dump escape a title's closing quote, so that title and author are one cell."""
    shifted = len(cells) > 3 and '";' in cells[1] and cells[2].isdecimal()
    return [*cells, ""] if shifted else cells


def _unshift(reader: Reader, name: str, frame: pl.DataFrame) -> pl.DataFrame:
    """Title and author of such rows apart again, every later cell one to the right."""
    images = [column for column in ("image_s", "image_m", "image_l") if column in frame.columns]
    row = ["title", "author", "year", "publisher", *images]
    title = pl.col("title").str.extract_groups(r'^(.*)";(.*)$')
    both = [pl.col("title").str.contains('";'), pl.col("author").str.contains(_YEAR)]
    shifted = pl.all_horizontal(*both, ~pl.col("year").str.contains(_YEAR))
    moved = {
        "title": title.struct.field("1"),
        "author": title.struct.field("2"),
        **{later: pl.col(earlier) for earlier, later in pairwise(row[1:])},
    }
    reader.note(name, {"rows with title and author in one cell": frame.filter(shifted).height})
    return frame.with_columns(
        pl.when(shifted).then(value).otherwise(pl.col(column)).alias(column)
        for column, value in moved.items()
    )


def _catalog(reader: Reader, name: str, frame: pl.DataFrame) -> pl.DataFrame:
    year = pl.col("year").str.extract(r"^([0-9]{1,4})(?:\.0+)?$").cast(pl.Int32)
    known = pl.when(year.is_between(1, NEWEST_YEAR)).then(year).cast(pl.String)
    images = [pl.col(column) for column in _IMAGES if column in frame.columns]
    frame = frame.with_columns(
        *(_present_text(column, TITLE_LIMIT, frame) for column in ("title", "author", "publisher")),
        *(pl.when(image.str.contains("^https?://")).then(image) for image in images),
        year=known,
    )
    reader.note(name, {"years that are missing or not possible": frame["year"].null_count()})
    lists = {"categories": [pl.col("publisher"), pl.col("year")], "images": images}
    none = pl.lit(None, pl.String)
    books = frame.select(
        "item_id",
        "title",
        none.alias("description"),
        pl.col("author").alias("brand"),
        pl.lit(None, pl.Float32).alias("price"),
        *(
            pl.concat_list(parts or [none]).list.drop_nulls().alias(column)
            for column, parts in lists.items()
        ),
    )
    return books.select(list(CATALOG_SCHEMA))


def _present_text(column: str, limit: int, frame: pl.DataFrame) -> pl.Series:
    """Normalised, with a null for NULL."""
    texts = normalise_column(frame[column], limit)
    return texts.set(texts == "NULL", None)


def _editions(books: pl.DataFrame) -> int:
    """Books whose title and author an earlier ISBN has."""
    known = books.drop_nulls("title").select(
        pl.col("title", "brand").str.to_lowercase().fill_null("")
    )
    return known.height - known.unique().height
