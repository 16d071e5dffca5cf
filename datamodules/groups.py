"""Cold and warm items and users: which evaluation rows are reported apart.

A-LLMRec (Kim et al., KDD 2024, arXiv 2404.11343, 5.2.2) calls the 35 % most and least interacted
items warm and cold, which can be read as 35 % of the items or of the interactions: both are here.
Counts are of TRAIN events; items and users without any take part with a count of 0.

Legend: R evaluation rows, U users, I items, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from datamodules.types import Histories

By = Literal["count", "interactions"]
GROUP_NAMES = ("all", "cold_item", "warm_item", "cold_user", "warm_user")


def extremes(counts: np.ndarray, fraction: float, by: By) -> tuple[np.ndarray, np.ndarray]:
    """Which ids are among the least (cold) and the most (warm) trained.

    Equal counts are ordered by internal id, lower ids counting as colder.

    Arguments:
        counts: (I + 1,) training events of each id; entry 0 is padding and belongs to no group.
        fraction: in (0, 0.5], so that no id is both.
        by: ``count`` takes ``fraction`` of the ids (rounded down) from either end;
            ``interactions`` takes as cold the least-trained ids that together hold at most
            ``fraction`` of the events, as warm the fewest most-trained that hold at least it.

    Returns:
        cold and warm, (I + 1,) bool each.
    """
    slack = 1e-9  # 0.29 * 100 is 28.999... in floats
    order = 1 + np.argsort(counts[1:], kind="stable")  # coldest first
    if by == "count":
        colds = warms = int(fraction * len(order) + slack)
    else:
        share = fraction * counts[1:].sum()
        colds = int((np.cumsum(counts[order]) <= share + slack).sum())
        warms = int((np.cumsum(counts[order[::-1]]) < share - slack).sum()) + 1 if share else 0
    cold, warm = np.zeros((2, len(counts)), dtype=bool)
    cold[order[:colds]] = True
    warm[order[len(order) - warms :]] = True
    return cold, warm


def _check_fraction(name: str, **fractions: float) -> None:
    for argument, fraction in fractions.items():
        if not 0 < fraction <= 0.5:
            raise ValueError(
                f"{name} got {argument}={fraction}; expected more than 0 and at most 0.5, so that "
                "cold and warm do not overlap."
            )


def _mark_rows(
    members: list[np.ndarray], user: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Rows by the groups of their target item and user, (R, G) bool, and the G names."""
    cold_item, warm_item, cold_user, warm_user = members
    columns = (cold_item[target], warm_item[target], cold_user[user], warm_user[user])
    return np.stack([np.ones(len(user), dtype=bool), *columns], axis=1), GROUP_NAMES


def _sizes(members: list[np.ndarray], histories: Histories) -> dict[str, int]:
    """Items and users in all and in each group, and the training counts at the groups' edges."""
    counts = [histories.train_counts()] * 2 + [histories.user_train_counts()] * 2
    sizes = {"items": histories.num_items, "users": histories.num_users}
    for name, ids, count in zip(GROUP_NAMES[1:], members, counts, strict=True):
        sizes[name] = int(ids.sum())
        if ids.any():
            sizes[f"{name}_min_events"] = int(count[ids].min())
            sizes[f"{name}_max_events"] = int(count[ids].max())
    return sizes


@dataclass(frozen=True)
class QuantileGroups:
    """The least and the most trained share of the items, and of the users.

    Users who are not trained on at all (``RandomByUser``) have a count of 0 and are the coldest.

    Raises:
        ValueError: a fraction outside (0, 0.5] or an unknown ``by``.
    """

    item_fraction: float = 0.35
    user_fraction: float = 0.35
    by: By = "count"

    def __post_init__(self) -> None:
        _check_fraction(
            "QuantileGroups", item_fraction=self.item_fraction, user_fraction=self.user_fraction
        )
        if self.by not in get_args(By):
            raise ValueError(
                f"QuantileGroups got by={self.by!r}; give 'count' (a share of the items) or "
                "'interactions' (a share of the training events)."
            )

    def __call__(
        self, histories: Histories, user: np.ndarray, target: np.ndarray
    ) -> tuple[np.ndarray, tuple[str, ...]]:
        """Groups of R rows: (R, G) bool and the G names."""
        return _mark_rows(self._members(histories), user, target)

    def sizes(self, histories: Histories) -> dict[str, int]:
        """Members of each group (items or users) with their least and most training events."""
        return _sizes(self._members(histories), histories)

    def _members(self, histories: Histories) -> list[np.ndarray]:
        items = extremes(histories.train_counts(), self.item_fraction, self.by)
        users = extremes(histories.user_train_counts(), self.user_fraction, self.by)
        return [*items, *users]


@dataclass(frozen=True)
class ExactUserGroups:
    """Cold users have exactly ``events`` interactions in all, warm users more.

    All means TRAIN, VALID, TEST and CONTEXT together: three events under leave-one-out leave a
    single one to train on (A-LLMRec 5.2.3). A true 5-core has no such user. Items are as in
    ``QuantileGroups(by="count")``.

    Raises:
        ValueError: ``events`` below 1 or a fraction outside (0, 0.5].
    """

    events: int = 3
    item_fraction: float = 0.35

    def __post_init__(self) -> None:
        _check_fraction("ExactUserGroups", item_fraction=self.item_fraction)
        if self.events < 1:
            raise ValueError(f"ExactUserGroups got events={self.events}; expected 1 or more.")

    def __call__(
        self, histories: Histories, user: np.ndarray, target: np.ndarray
    ) -> tuple[np.ndarray, tuple[str, ...]]:
        """Groups of R rows: (R, G) bool and the G names."""
        return _mark_rows(self._members(histories), user, target)

    def sizes(self, histories: Histories) -> dict[str, int]:
        """Members of each group (items or users) with their least and most training events."""
        return _sizes(self._members(histories), histories)

    def _members(self, histories: Histories) -> list[np.ndarray]:
        events = np.diff(histories.offsets)  # (U + 1,)
        items = extremes(histories.train_counts(), self.item_fraction, "count")
        return [*items, events == self.events, events > self.events]
