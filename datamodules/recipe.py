"""What to do with a release's rows: the parts that, with the rows themselves, name a protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from datamodules.candidates import Candidates
from datamodules.examples import Examples
from datamodules.few_examples import asked_by
from datamodules.filters import Filter
from datamodules.orders import Order
from datamodules.splits import Split
from datamodules.types import Histories


class Groups(Protocol):
    """Marks cold and warm rows."""

    def __call__(
        self, histories: Histories, user: np.ndarray, target: np.ndarray
    ) -> tuple[np.ndarray, tuple[str, ...]]:
        """Membership (R, G) of rows with these users and targets (R,), and the G names."""
        ...

    def sizes(self, histories: Histories) -> dict[str, int]:
        """Users and items in each group, for the data report."""
        ...


@dataclass(frozen=True)
class Recipe:
    """What to do with a release's rows.

    ``order_seed`` shuffles the histories of a release that has neither times nor an order.
    """

    name: str
    filters: Sequence[Filter]
    split: Split
    candidates: Candidates
    groups: Groups
    examples: Examples | None = None
    order_seed: int = 0
    order: Order | None = None  # another order of histories than time

    def describe(self, ordered: bool = True, timed: bool = True) -> dict[str, Any]:
        """Plain values that name the protocol (dataclass reprs list every argument)."""
        own = self.examples is not None and self.examples.own_split
        told: dict[str, Any] = {
            "name": self.name,
            "filters": [repr(f) for f in self.filters],
            "split": "by the examples" if own else repr(self.split),
            "ties": "stable sort by user and time; equal times keep the raw file's order",
            "candidates": repr(self.candidates),
            "groups": repr(self.groups),
        }
        if not timed:
            told["ties"] = "no times: the raw file's order"
        if not ordered:
            told["ties"] = (
                f"no times and no order: each history is shuffled by seed {self.order_seed}"
            )
        if self.order is not None:
            told["order"] = repr(self.order)
        if self.examples is None:
            return told
        told["examples"] = repr(self.examples)
        asks = asked_by(self.examples)
        return told if asks is self.examples else {**told, "asks": repr(asks)}
