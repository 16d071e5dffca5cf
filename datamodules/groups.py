"""Cold and warm items and users: which evaluation rows are reported apart.

A-LLMRec (Kim et al., KDD 2024, arXiv 2404.11343, 5.2.2) calls the 35 % most and least interacted
items warm and cold, which can be read as 35 % of the items or of the interactions: both are here.
Counts are of TRAIN events; items and users without any take part with a count of 0. Nothing is colder than
what was trained as often: where so many ids have one count that both groups would hold some of them, the
count alone decides, and the data report and every table say so.

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

    At the edge of one group equal counts are ordered by internal id, lower ids counting as colder. Ids of a
    count that both groups would hold are all in one of them, and in none where that would be no less
    arbitrary: they are cold where nothing has fewer events, warm where nothing has more, neither where both
    or none of it is so. A group is then larger or smaller than its fraction.

    Arguments:
        counts: (I + 1,) training events of each id; entry 0 is padding and belongs to no group.
        fraction: in (0, 0.5], so that no id is both.
        by: ``count`` takes ``fraction`` of the ids (rounded down) from either end;
            ``interactions`` takes as cold the least-trained ids that together hold at most
            ``fraction`` of the events, as warm the fewest most-trained that hold at least it.

    Returns:
        cold and warm, (I + 1,) bool each.
    """
    order, colds, warms = ends = _ends(counts, fraction, by)
    if (shared := _shared(counts, *ends)) is not None:
        own = np.arange(len(counts)) > 0
        fewer, same, more = (
            own & found for found in (counts < shared, counts == shared, counts > shared)
        )
        cold_end, warm_end = not fewer.any(), not more.any()
        return (
            same if cold_end and not warm_end else fewer,
            same if warm_end and not cold_end else more,
        )
    cold, warm = np.zeros((2, len(counts)), dtype=bool)
    cold[order[:colds]] = True
    warm[order[len(order) - warms :]] = True
    return cold, warm


def shared_count(counts: np.ndarray, fraction: float, by: By) -> int | None:
    """The count of so many ids that the least and the most trained share would both hold some of them.

    None where there is none. Arguments as of ``extremes``.
    """
    return _shared(counts, *_ends(counts, fraction, by))


def _shared(counts: np.ndarray, order: np.ndarray, colds: int, warms: int) -> int | None:
    """``shared_count`` of what ``_ends`` gives."""
    if not colds or not warms:
        return None
    most, least = counts[order[colds - 1]], counts[order[len(order) - warms]]
    return int(most) if most == least else None


def _ends(counts: np.ndarray, fraction: float, by: By) -> tuple[np.ndarray, int, int]:
    """Ids, coldest first (I,), and how many of either end the fraction takes."""
    slack = 1e-9  # 0.29 * 100 is 28.999... in floats
    order = 1 + np.argsort(counts[1:], kind="stable")
    if by == "count":
        size = int(fraction * len(order) + slack)
        return order, size, size
    share = fraction * counts[1:].sum()
    colds = int((np.cumsum(counts[order]) <= share + slack).sum())
    warms = int((np.cumsum(counts[order[::-1]]) < share - slack).sum()) + 1 if share else 0
    return order, colds, warms


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


def _sizes(
    members: list[np.ndarray], histories: Histories, shared: dict[str, int | None]
) -> dict[str, int]:
    """Items and users in all and in each group, and the training counts at the groups' edges.

    Of a kind (item, user) whose ends share a count: ``tied_KIND_events``, that count, and ``tied_KIND``, how
    many have it.
    """
    counts = [histories.train_counts()] * 2 + [histories.user_train_counts()] * 2
    sizes = {"items": histories.num_items, "users": histories.num_users}
    for name, ids, count in zip(GROUP_NAMES[1:], members, counts, strict=True):
        sizes[name] = int(ids.sum())
        if ids.any():
            sizes[f"{name}_min_events"] = int(count[ids].min())
            sizes[f"{name}_max_events"] = int(count[ids].max())
    for kind, events in shared.items():
        if events is not None:
            count = counts[0] if kind == "item" else counts[-1]
            sizes[f"tied_{kind}"] = int((count[1:] == events).sum())
            sizes[f"tied_{kind}_events"] = events
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
        shared = {
            "item": shared_count(histories.train_counts(), self.item_fraction, self.by),
            "user": shared_count(histories.user_train_counts(), self.user_fraction, self.by),
        }
        return _sizes(self._members(histories), histories, shared)

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
        shared = {"item": shared_count(histories.train_counts(), self.item_fraction, "count")}
        return _sizes(self._members(histories), histories, shared)

    def _members(self, histories: Histories) -> list[np.ndarray]:
        events = np.diff(histories.offsets)  # (U + 1,)
        items = extremes(histories.train_counts(), self.item_fraction, "count")
        return [*items, events == self.events, events > self.events]
