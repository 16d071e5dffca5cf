"""MovieLens for every method: all public releases, and the ML-1M text file of the SASRec papers."""

from __future__ import annotations

from typing import Any

from datamodules.base import SequenceDataModule
from datamodules.movielens_formats import load_movielens
from datamodules.types import RawData


class MovieLensDataModule(SequenceDataModule):
    """MovieLens as histories of film ids; every rating counts as one event.

    Args:
        release: ``100k``, ``1m``, ``10m``, ``20m``, ``25m``, ``32m``, ``latest-small``, or ``1m-sasrec``
            (the SASRec papers' "user item" lines: no ratings, no times).
        options: those of ``SequenceDataModule``.
    """

    def __init__(self, release: str = "100k", **options: Any) -> None:
        if (
            release == "100k"
        ):  # numbers its films by itself: by id, most posters would be another film's
            options.setdefault("image_ids", "title")
        super().__init__(f"movielens-{release}", **options)
        self.release = release

    def load_raw(self) -> RawData:
        """Fetch and parse the release."""
        return load_movielens(self.release, self.root, self.cache, self.on_bad_row)

    def asked(self) -> dict[str, Any]:
        """The release; local files are named by ``SequenceDataModule``."""
        return {"release": self.release}
