"""What an earlier stage has written about users: one text for each stretch of history.

Legend: B rows.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import polars as pl

from datamodules.types import Rows
from datamodules.written import read_written
from lightning_modules.errors import ModelError

_KEYS = ("user", "start", "stop")


class Preferences:
    """The table of a stage that summarises users (columns user, start, stop, text), by row.

    Args:
        path: Parquet; a text is null where nothing is known of a user.

    Raises:
        ValueError: see ``read_written``; or two texts of one stretch.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path).expanduser()
        table = read_written(self.path, (*_KEYS, "text"))
        self.texts: list[str | None] = table["text"].to_list()
        keys = zip(*(table[name].to_list() for name in _KEYS), strict=True)
        self._place = {key: i for i, key in enumerate(keys)}
        if len(self._place) < len(table):
            raise ValueError(f"{path} tells several texts of one user's stretch of history")
        content = [*(table[name].cast(pl.Int64).to_numpy().tobytes() for name in _KEYS)]
        digest = hashlib.sha256(b"".join(content))
        for text in self.texts:
            digest.update(repr(text).encode())
        self.digest = digest.hexdigest()

    def of(self, rows: Rows) -> np.ndarray:
        """(B,) which of ``texts`` belongs to each row.

        Raises:
            ModelError: none does.
        """
        columns = (rows.user.tolist(), rows.start.tolist(), rows.stop.tolist())
        keys = list(zip(*columns, strict=True))
        missing = [key for key in keys if key not in self._place]
        if missing:
            user, start, stop = missing[0]
            raise ModelError(
                f"{self.path} has no text for {len(missing):,} of {len(keys):,} rows, such as user {user} "
                f"with the events {start} to {stop - 1}: it was written of other data or another split, so "
                "run the stage that writes it on this data"
            )
        return np.array([self._place[key] for key in keys], dtype=np.int64)
