"""Some of the held-out rows, for methods that take seconds a row.

Legend: R rows, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from datamodules.samplers import hashed_order
from datamodules.types import EvalRows

SOME_ROWS = 111  # stream of random numbers, see samplers.py


def some_of(rows: int, most: int | None, seed: int) -> np.ndarray:
    """At most ``most`` of so many row numbers (None: all), drawn by the seed, in their order."""
    if most is None or most >= rows:
        return np.arange(rows)
    return np.sort(hashed_order(rows, SOME_ROWS, seed=seed)[:most])


def take_rows(rows: EvalRows, keep: np.ndarray) -> EvalRows:
    """Rows by number."""
    columns = {f.name: getattr(rows, f.name) for f in fields(rows) if f.name != "group_names"}
    kept: dict[str, Any] = {n: None if c is None else c[keep] for n, c in columns.items()}
    return replace(rows, **kept)


@dataclass(frozen=True)
class RowSample:
    """``count`` rows drawn by the seed, and all other rows of the groups ``whole``, which are rare.

    What is drawn is in all of its groups. A further row is in the groups ``whole`` alone, so that no mean
    over ``all``, or over another group, is bent towards the rare ones: each is over a random sample.

    Raises:
        ValueError: no row; on a call, a group that the rows do not have, ``all``, or rows with labels.
    """

    count: int
    whole: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "whole", tuple(self.whole))
        if self.count < 1 or "all" in self.whole:
            raise ValueError(
                f"RowSample got count={self.count}, whole={self.whole}; expected at least 1 row, and groups "
                "other than all"
            )

    def __call__(self, rows: EvalRows) -> EvalRows:
        """The sample, in the order of the rows; each user's rows weigh 1 together, as before."""
        if rows.label is not None:
            raise ValueError("RowSample is for rows that are ranked: take few_examples.SampledTest")
        if unknown := sorted(set(self.whole) - set(rows.group_names)):
            raise ValueError(f"RowSample: no group {', '.join(unknown)} in {rows.group_names}")
        drawn = np.zeros(len(rows.user), dtype=bool)
        drawn[some_of(len(drawn), self.count, self.seed)] = True
        kept_whole = np.array([name in self.whole for name in rows.group_names])  # (G,)
        keep = drawn | (rows.groups & kept_whole).any(1)
        groups = rows.groups & (drawn[:, None] | kept_whole)
        sample = take_rows(replace(rows, groups=groups), np.flatnonzero(keep))
        held = np.bincount(sample.user)
        return replace(sample, weight=1.0 / held[sample.user])
