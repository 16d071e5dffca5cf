"""Splits that keep some users out of training altogether.

Legend: U users, N events. ``offsets`` (U + 2,): user ``u`` owns ``offsets[u]:offsets[u + 1]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from datamodules.splits import Split
from datamodules.types import CONTEXT, TEST


@dataclass(frozen=True)
class UnseenUsers:
    """Another split in which users with exactly ``events`` events are never trained on.

    Their last event is TEST, what is before it CONTEXT; everybody else keeps the base's codes. A-LLMRec's
    cold users (Kim et al., KDD 2024, 5.2.3) are ``UnseenUsers(LeaveOneOut(), events=3)``, reported apart by
    ``ExactUserGroups(events=3)``. A true 5-core has no such user.

    Raises:
        ValueError: ``events`` below 2, which leaves a target without history; on a call, no such user.
    """

    base: Split
    events: int = 3

    def __post_init__(self) -> None:
        if self.events < 2:
            raise ValueError(f"UnseenUsers got events={self.events}; expected 2 or more.")

    def __call__(
        self, offsets: np.ndarray, items: np.ndarray, timestamps: np.ndarray
    ) -> np.ndarray:
        """(N,) int8 codes."""
        split = self.base(offsets, items, timestamps).copy()
        unseen = np.flatnonzero(np.diff(offsets) == self.events)  # users
        if not len(unseen):
            raise ValueError(
                f"UnseenUsers(events={self.events}) found no user with exactly {self.events} events; "
                "filters that set a higher minimum leave none (a true k-core does)."
            )
        end = offsets[unseen + 1]
        for back in range(1, self.events + 1):
            split[end - back] = TEST if back == 1 else CONTEXT
        return split
