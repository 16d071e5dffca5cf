"""Filters that shorten histories: a stretch of time, the newest events, the most frequent items.

They are filters as in ``filters.py``: fewer rows, in the same order.

Legend: N interactions (rows), D distinct ids, P distinct (user, item) pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from datamodules.dates import iso_seconds
from datamodules.raw_columns import id_codes, times_or_none
from datamodules.splits import sort_histories


@dataclass(frozen=True)
class DateRange:
    """Keep interactions from ``start`` until just before ``end``.

    Both are ISO dates or dates with a time, in UTC unless they say otherwise; None is open.

    Raises:
        ValueError: no bound, a date that is not ISO, ``end`` not after ``start``; on a call, when a
            timestamp is missing.
    """

    start: str | None = None
    end: str | None = None

    def __post_init__(self) -> None:
        first, stop = self._seconds()
        if (self.start is None and self.end is None) or first >= stop:
            raise ValueError(
                f"DateRange got start={self.start!r}, end={self.end!r}; give one of them, or an "
                "end after the start."
            )

    def __call__(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The rows with ``start <= time < end``."""
        missing = frame["timestamp"].null_count()
        if missing:
            raise ValueError(
                f"DateRange(start={self.start!r}, end={self.end!r}) needs a timestamp in every "
                f"interaction, but {missing} of {frame.height} have none; leave this filter out "
                "for data without times, or let the parser skip those rows."
            )
        first, stop = self._seconds()
        return frame.filter((pl.col("timestamp") >= first) & (pl.col("timestamp") < stop))

    def _seconds(self) -> tuple[float, float]:
        first = -np.inf if self.start is None else iso_seconds(self.start, "DateRange")
        return first, np.inf if self.end is None else iso_seconds(self.end, "DateRange")

    def describe(self) -> str:
        """For example ``2016-01-01 <= time < 2018-01-01``."""
        if self.start is None:
            return f"time < {self.end}"
        return f"time >= {self.start}" if self.end is None else f"{self.start} <= time < {self.end}"


@dataclass(frozen=True)
class Newest:
    """Keep the last ``count`` events of each user in time; ties, and no times, follow the file's order.

    Raises:
        ValueError: ``count`` below 1; on a call, when only some timestamps are missing.
    """

    count: int

    def __post_init__(self) -> None:
        _check_count("Newest", self.count)

    def __call__(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The newest rows of each user."""
        user = id_codes(frame["user_id"])
        time = times_or_none(frame, f"Newest(count={self.count})")
        kept = np.bincount(user)[user] <= self.count  # (N,) those of short histories
        row = np.flatnonzero(~kept)
        order = row[sort_histories(user[row], None if time is None else time[row])]
        place = _places(user[order][::-1])[::-1]  # 0 at each user's last event
        kept[order[place < self.count]] = True
        return frame.filter(pl.Series(kept))

    def describe(self) -> str:
        """For example ``newest 10 events of each user``."""
        return f"newest {self.count} events of each user"


def _places(group: np.ndarray) -> np.ndarray:
    """(N,) int64: how many neighbours of its own group stand before each element."""
    begins = np.flatnonzero(np.diff(group, prepend=-1))
    return np.arange(len(group)) - np.repeat(begins, np.diff(begins, append=len(group)))


def _check_count(name: str, count: int) -> None:
    if count < 1:
        raise ValueError(f"{name} got count={count}; expected 1 or more.")
