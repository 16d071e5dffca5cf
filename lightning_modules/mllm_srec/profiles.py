"""Who somebody is, in a line: what a history alone says of them, and what the data know besides.

Legend: B rows, I items, U users.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import polars as pl

from datamodules.types import ItemWords, Rows

_KINDS = 3  # that are named, at most


class Profiles:
    """The paper's field ``user profile`` (s41598-025-14251-1), which it does not say how to fill.

    Ours: how many events a row's history has, the categories that are most frequent among them, and what the
    data know of the user (age and occupation, where there are such columns). A line is a function of the
    row's events before its target and of the user's columns; neither the target nor anything later is read.
    Of equally frequent categories the one that was met last comes first; what all items are is not told.

    Args:
        words: what items are called.
        catalog: the items; without categories none are named.
        users: the users' columns by internal id, 1, 2, ...
        side: columns of ``users`` that are told, where the data have them.
    """

    def __init__(
        self, words: ItemWords, catalog: pl.DataFrame, users: pl.DataFrame, side: Sequence[str]
    ) -> None:
        self.words = words
        lists = [tuple(dict.fromkeys(entries or ())) for entries in catalog["categories"].to_list()]
        counts = Counter(entry for entries in lists for entry in entries)
        shared = {entry for entry, count in counts.items() if count == len(lists)}
        own = ([entry for entry in entries if entry not in shared] for entries in lists)
        self.kinds: list[list[str]] = [[], *own]  # (I + 1,)
        known = [name for name in side if name in users.columns]
        told = [[""] * len(users)] if not known else [
            ["" if value is None else f"{name} {value}" for value in users[name].to_list()]
            for name in known
        ]  # fmt: skip
        each = ("; ".join(filter(None, values)) for values in zip(*told, strict=True))
        self.side = ["", *each]  # (U + 1,)

    def __call__(self, rows: Rows) -> list[str]:
        """(B,) lines; whatever the rows ask about is not looked at."""
        stretches = zip(rows.user.tolist(), rows.start.tolist(), rows.stop.tolist(), strict=True)
        items = rows.histories.items
        return [self._line(items[start:stop], self.side[user]) for user, start, stop in stretches]

    def _line(self, items: np.ndarray, side: str) -> str:
        """Of one history, oldest first."""
        named = self.words.singular if len(items) == 1 else self.words.plural
        parts = [f"{self.words.past} {len(items)} {named}"]
        newest = [kind for item in items[::-1].tolist() for kind in self.kinds[item]]
        if kinds := [kind for kind, _ in Counter(newest).most_common(_KINDS)]:
            parts.append(f"mostly {', '.join(kinds)}")
        return "; ".join([*parts, *([side] if side else [])])
