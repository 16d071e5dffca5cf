"""The three files of BookCrossing in both dialects, written without the code that reads them."""

from __future__ import annotations

import csv
import io
from pathlib import Path

RATINGS = [
    ("276725", "034545104X", "0"), ("276726", "0155061224", "5"), ("276727", "0446520802", "0"),
    ("276727", "052165615X", "3"), ("276729", "034545104X", "10"), ("276726", "034545104X", "7"),
]  # fmt: skip
IMAGES = tuple(f"http://images.example/P/{size}.jpg" for size in ("small", "medium", "large"))
BOOKS = [
    ("034545104X", "Flesh Tones: A Novel", "M. J. Rose", "2002", "Ballantine Books", *IMAGES),
    ("0155061224", 'The "Rites" of Passage; or &amp;', "Judith Rae", "0", "Heinle", *IMAGES),
    ("0446520802", "Études \\ é", "André Gide", "2030", "Café & Co", *IMAGES),
]  # fmt: skip
USERS = [
    ("276725", "tyler, texas, usa", None),
    ("276726", "köln, n/a, ", "18"),
    ("276727", "x", "90"),
]
RATING_NAMES = ("User-ID", "ISBN", "Book-Rating")
BOOK_NAMES = (
    "ISBN", "Book-Title", "Book-Author", "Year-Of-Publication", "Publisher",
    "Image-URL-S", "Image-URL-M", "Image-URL-L",
)  # fmt: skip
USER_NAMES = ("User-ID", "Location", "Age")

Rows = list[tuple[str | None, ...]]


def dump(names: tuple[str, ...], rows: Rows) -> bytes:
    r"""As MySQL wrote it: ``;``, all quoted, ``\"``, NULL without quotes, Latin-1, CRLF."""

    def cell(text: str | None) -> str:
        if text is None:
            return "NULL"
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    lines = (";".join(map(cell, row)) + "\r\n" for row in [names, *rows])
    return "".join(lines).encode("latin-1")


def export(names: tuple[str, ...], rows: Rows, separator: str = ",") -> bytes:
    """As a spreadsheet writes it: quotes doubled where there are any, UTF-8."""
    out = io.StringIO()
    csv.writer(out, delimiter=separator, lineterminator="\n").writerows([names, *rows])
    return out.getvalue().encode()


def write_dump(
    folder: Path, ratings: Rows | None = None, books: Rows | None = None, users: Rows | None = None
) -> Path:
    """The original dump with these rows."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "BX-Book-Ratings.csv").write_bytes(dump(RATING_NAMES, ratings or list(RATINGS)))
    (folder / "BX-Books.csv").write_bytes(dump(BOOK_NAMES, books or list(BOOKS)))
    (folder / "BX-Users.csv").write_bytes(dump(USER_NAMES, users or list(USERS)))
    return folder


def write_export(folder: Path, separator: str = ",") -> Path:
    """The same rows as an export with the names of the "BX-" cut."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "BX-Ratings.csv").write_bytes(export(RATING_NAMES, list(RATINGS), separator))
    (folder / "BX-Books.csv").write_bytes(export(BOOK_NAMES, list(BOOKS), separator))
    (folder / "BX-Users.csv").write_bytes(export(USER_NAMES, list(USERS), separator))
    return folder
