"""BookCrossing (Ziegler et al., WWW 2005): ratings of books from 0 to 10, without times."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from datamodules.base import SequenceDataModule
from datamodules.bookcrossing_parsers import (
    A_CUT,
    BOOKS_NAMES,
    RATINGS_NAMES,
    USERS_NAMES,
    Zeros,
    parse_bookcrossing,
)
from datamodules.delimited import OnBadRow
from datamodules.sources import LocalFolder, first_available
from datamodules.types import RawData

ARCHIVE = "BX-CSV-Dump.zip"
REMEDY = (
    "put BX-Book-Ratings.csv and BX-Books.csv of the original dump (if you have it, BX-Users.csv too), or "
    f"its {ARCHIVE}, in a folder and pass data.root=FOLDER. The official host is gone; copies and exports "
    "are about, and of an export the names may also be BX-Ratings.csv, or Ratings.csv and Books.csv. "
    "Only a file with about 1,149,780 ratings, 62 % of them 0, is the papers' data."
)


def load_bookcrossing(
    root: str | Path | None,
    cache: Path,
    on_bad_row: OnBadRow = "error",
    zeros: Zeros = "drop",
    require_metadata: bool = False,
) -> RawData:
    """Find the files and parse them.

    Args:
        root: a folder with the raw files or the official zip, or that zip.
        cache: where the zip is unpacked.
        on_bad_row: ``"error"``, or ``"skip"`` to leave bad rows out and count them in ``skipped``.
        zeros: see ``BookCrossingDataModule``.
        require_metadata: see ``BookCrossingDataModule``.

    Raises:
        DataSourceError: the files are not there; the message says which to put where.
        DataFormatError: a file is not in its format.
    """
    sources = []
    if root is not None:
        place = Path(root).expanduser()
        sources = [
            LocalFolder(place, (ratings, books), USERS_NAMES, (ARCHIVE,))
            for ratings in RATINGS_NAMES
            for books in BOOKS_NAMES
        ]
    files, source = first_available(sources, cache, "BookCrossing", REMEDY)
    raw = parse_bookcrossing(files, on_bad_row, zeros, require_metadata)
    cut = " (a cut: no implicit zeros, so not the papers' data)" if A_CUT in raw.skipped else ""
    return replace(raw, source=f"BookCrossing from {source.name}{cut}")


class BookCrossingDataModule(SequenceDataModule):
    """BookCrossing as histories of ISBNs. It has no times: each history is shuffled by a seed.

    ``root``, a folder with the raw files or BX-CSV-Dump.zip, or that zip, is its only source.

    About 62 % of the dump's rows have the rating 0, "implicit": the reader had the book and did not rate it.

    Args:
        zeros: ``drop`` leaves implicit rows out; ``dislike`` keeps them with the rating 0, which is below
            every threshold (TALLRec's data); ``implicit`` keeps them as events with a null rating, so that
            they are part of histories and never a label.
        require_metadata: leave ratings out whose ISBN has no row among the books (TALLRec joins the two).
        options: those of ``SequenceDataModule``.
    """

    def __init__(
        self, zeros: Zeros = "drop", require_metadata: bool = False, **options: Any
    ) -> None:
        super().__init__("bookcrossing", **options)
        if zeros not in get_args(Zeros):
            raise ValueError(f"zeros is {zeros!r}; expected one of {', '.join(get_args(Zeros))}.")
        self.zeros: Zeros = zeros
        self.require_metadata = require_metadata

    def load_raw(self) -> RawData:
        """Find and parse the files."""
        return load_bookcrossing(
            self.root, self.cache, self.on_bad_row, self.zeros, self.require_metadata
        )

    def asked(self) -> dict[str, Any]:
        """What the parser is told; local files are named by ``SequenceDataModule``."""
        return {"zeros": self.zeros, "require_metadata": self.require_metadata}
