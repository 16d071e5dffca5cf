"""What each event is for: TRAIN, VALID, TEST or CONTEXT (history only): pure functions on arrays.

A split is called with CSR arrays whose events are already in history order: by user, then time,
ties in the raw file's order (``sort_histories``). It never moves an event, so a held-out event's
history is every earlier event of its user, whatever that event is for.

Legend: U users, N events. ``offsets`` (U + 2,): user ``u`` owns ``offsets[u]:offsets[u + 1]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np

from datamodules.dates import iso_seconds
from datamodules.samplers import distinct, hashed_order
from datamodules.types import CONTEXT, SPLIT_NAMES, TEST, TRAIN, VALID

Targets = Literal["all", "first", "last"]
TIME_FIELDS = ("leakage", "tied_last_two_users", "tied_last_two_share", "tied_events_share")


class Split(Protocol):
    """Codes of N events in history order."""

    def __call__(
        self, offsets: np.ndarray, items: np.ndarray, timestamps: np.ndarray
    ) -> np.ndarray:
        """(N,) int8 codes."""
        ...


def sort_histories(user: np.ndarray, timestamp: np.ndarray | None) -> np.ndarray:
    """(N,) int64: the stable order by user, then time; ties (or no times) keep the file's order."""
    if timestamp is None:
        return np.argsort(user, kind="stable")
    return np.lexsort((timestamp, user))


def _owners(offsets: np.ndarray) -> np.ndarray:
    """(N,) int64: the user of each event."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def _check_fractions(name: str, valid: float, test: float) -> None:
    if not (0 <= valid < 1 and 0 < test < 1 and valid + test < 1):
        raise ValueError(
            f"{name} got valid={valid}, test={test}; expected fractions with 0 <= valid, 0 < test "
            "and valid + test < 1."
        )


def _share(fraction: float, total: int) -> int:
    """How many of ``total``: the nearest whole number, at least 1 of a fraction above 0."""
    return max(1, round(fraction * total)) if fraction else 0


@dataclass(frozen=True)
class LeaveOneOut:
    """Each user's last event is TEST, the one before VALID, the rest TRAIN.

    Users with fewer than ``min_events`` events are all TRAIN (SASRec, Kang & McAuley 2018: 3).

    Raises:
        ValueError: ``min_events`` below 3, which would leave a validation target without history.
    """

    min_events: int = 3

    def __post_init__(self) -> None:
        if self.min_events < 3:
            raise ValueError(
                f"LeaveOneOut got min_events={self.min_events}; expected 3 or more, so that each "
                "evaluated user keeps at least one training event."
            )

    def __call__(
        self, offsets: np.ndarray, items: np.ndarray, timestamps: np.ndarray
    ) -> np.ndarray:
        """(N,) int8 codes."""
        split = np.full(len(items), TRAIN, dtype=np.int8)
        ends = offsets[1:][np.diff(offsets) >= self.min_events]
        split[ends - 1] = TEST
        split[ends - 2] = VALID
        return split


@dataclass(frozen=True)
class GlobalTemporal:
    """One cut in time for everybody: TRAIN, then VALID, then TEST.

    ``valid`` and ``test`` are both fractions of the events (the newest ``test`` of them are TEST,
    the ``valid`` before those VALID) or both ISO dates at which that part begins (UTC unless they
    say otherwise). An event at exactly a boundary belongs to the later part, so events that share a
    timestamp are never parted and a fraction may come out larger. ``valid=0`` makes no VALID part.

    With ``targets`` first or last, only each user's first or last event of VALID and of TEST keeps
    its code; the others become CONTEXT. A target may be its user's first event (``split_report``
    counts those as ``no_history``).

    Raises:
        ValueError: impossible arguments; on a call, no timestamps or an empty part.
    """

    valid: float | str
    test: float | str
    targets: Targets = "all"

    def __post_init__(self) -> None:
        if self.targets not in get_args(Targets):
            raise ValueError(
                f"GlobalTemporal got targets={self.targets!r}; give 'all', 'first' or 'last'."
            )
        if isinstance(self.valid, str) != isinstance(self.test, str):
            raise ValueError(
                f"GlobalTemporal got valid={self.valid!r}, test={self.test!r}; give two fractions "
                "or two ISO dates."
            )
        if isinstance(self.valid, str) and isinstance(self.test, str):
            if self._second(self.valid) >= self._second(self.test):
                raise ValueError(
                    f"GlobalTemporal got valid={self.valid!r}, test={self.test!r}; VALID must "
                    "begin before TEST."
                )
        else:
            _check_fractions("GlobalTemporal", float(self.valid), float(self.test))

    def __call__(
        self, offsets: np.ndarray, items: np.ndarray, timestamps: np.ndarray | None
    ) -> np.ndarray:
        """(N,) int8 codes."""
        if timestamps is None or not np.any(timestamps):
            raise ValueError(
                "GlobalTemporal needs timestamps, but this data has none; use LeaveOneOut or "
                "RandomByUser."
            )
        valid_from, test_from = self._boundaries(timestamps)
        split = np.full(len(items), TRAIN, dtype=np.int8)
        split[timestamps >= valid_from] = VALID
        split[timestamps >= test_from] = TEST
        self._check_parts(split, valid_from, test_from)
        if self.targets != "all":
            for code in (VALID, TEST):
                split[self._surplus(offsets, split, code)] = CONTEXT
        return split

    def _boundaries(self, timestamps: np.ndarray) -> tuple[float, float]:
        """Seconds at which VALID and TEST begin."""
        if isinstance(self.valid, str) or isinstance(self.test, str):
            return self._second(str(self.valid)), self._second(str(self.test))
        times = np.sort(timestamps)
        test_at = len(times) - _share(self.test, len(times))
        valid_at = max(test_at - _share(self.valid, len(times)), 0)
        return float(times[valid_at]), float(times[test_at])

    def _second(self, date: str) -> float:
        return iso_seconds(date, type(self).__name__)

    def _check_parts(self, split: np.ndarray, valid_from: float, test_from: float) -> None:
        wanted = (TRAIN, TEST) if self.valid == 0 else (TRAIN, VALID, TEST)
        empty = [SPLIT_NAMES[code] for code in wanted if not (split == code).any()]
        if empty:
            raise ValueError(
                f"GlobalTemporal(valid={self.valid!r}, test={self.test!r}) begins VALID at second "
                f"{valid_from:.0f} and TEST at {test_from:.0f}, which leaves no event for "
                f"{' and '.join(empty)}; move the boundaries (events that share a timestamp stay "
                "together)."
            )

    def _surplus(self, offsets: np.ndarray, split: np.ndarray, code: int) -> np.ndarray:
        """Positions of a code's events that are not their user's first (last) of that code."""
        position = eval_positions(split, code)
        user = _owners(offsets)[position]
        same = user[1:] == user[:-1]
        keep_first = self.targets == "first"
        return position[np.append(False, same) if keep_first else np.append(same, False)]


@dataclass(frozen=True)
class RandomByUser:
    """Users are split at random: held-out users are never trained on, unless ``earlier`` says train.

    The last event of a VALID (TEST) user is its target and its other events are CONTEXT, or TRAIN: small
    data then teach what all users did before. The fractions are of the users with at least two events; users
    with a single event have no history to be asked about and go to TRAIN.

    Raises:
        ValueError: impossible arguments; on a call, too few users for one in each part.
    """

    valid: float = 0.1
    test: float = 0.1
    seed: int = 0
    earlier: Literal["context", "train"] = "context"

    def __post_init__(self) -> None:
        _check_fractions("RandomByUser", self.valid, self.test)
        if self.earlier not in ("context", "train"):
            raise ValueError(f"RandomByUser got earlier={self.earlier!r}; give context or train.")

    def __call__(
        self, offsets: np.ndarray, items: np.ndarray, timestamps: np.ndarray
    ) -> np.ndarray:
        """(N,) int8 codes."""
        users = np.flatnonzero(np.diff(offsets) >= 2)
        tests, valids = _share(self.test, len(users)), _share(self.valid, len(users))
        if tests + valids >= len(users):
            raise ValueError(
                f"RandomByUser(valid={self.valid}, test={self.test}) found {len(users)} users with "
                "at least two events, too few for training, validation and test users; use more "
                "data or LeaveOneOut."
            )
        drawn = users[hashed_order(len(users), seed=self.seed)]
        split = np.full(len(items), TRAIN, dtype=np.int8)
        if self.earlier == "context":
            split[np.isin(_owners(offsets), drawn[: tests + valids])] = CONTEXT
        split[offsets[drawn[:tests] + 1] - 1] = TEST
        split[offsets[drawn[tests : tests + valids] + 1] - 1] = VALID
        return split


@dataclass(frozen=True)
class FewShot:
    """Another split with only K training users, or only K training events; the rest is CONTEXT.

    ``examples`` are drawn among the TRAIN events that have an earlier event of the same user: an
    event without history teaches a sequential model nothing.

    Raises:
        ValueError: not exactly one of ``users`` and ``examples``; on a call, fewer than K to draw.
    """

    base: Split
    users: int | None = None
    examples: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        given = [k for k in (self.users, self.examples) if k is not None]
        if len(given) != 1 or given[0] < 1:
            raise ValueError(
                f"FewShot got users={self.users}, examples={self.examples}; give exactly one of "
                "them, 1 or more."
            )

    def __call__(
        self, offsets: np.ndarray, items: np.ndarray, timestamps: np.ndarray
    ) -> np.ndarray:
        """(N,) int8 codes."""
        split = self.base(offsets, items, timestamps).copy()
        train = eval_positions(split, TRAIN)
        owner = _owners(offsets)
        if self.users is not None:
            drawn = self._draw(distinct(owner[train]), self.users, "users with training events")
            kept = train[np.isin(owner[train], drawn)]
        else:
            usable = train[train > offsets[owner[train]]]
            kept = self._draw(usable, int(self.examples or 0), "training events with a history")
        split[train] = CONTEXT
        split[kept] = TRAIN
        return split

    def _draw(self, pool: np.ndarray, wanted: int, what: str) -> np.ndarray:
        if wanted > len(pool):
            raise ValueError(
                f"FewShot was asked for {wanted} {what}, but the base split has {len(pool)}; ask "
                "for fewer or use the base split itself."
            )
        return pool[hashed_order(len(pool), seed=self.seed)[:wanted]]


def eval_positions(split: np.ndarray, code: int) -> np.ndarray:
    """(R,) int64: the events with one code, in history order."""
    return np.flatnonzero(split == code)


def split_report(
    offsets: np.ndarray, items: np.ndarray, split: np.ndarray, timestamps: np.ndarray | None
) -> dict[str, Any]:
    """Counts, cold targets, leakage and ties of a split, as plain numbers for the data report.

    Returns:
        For each code's name its ``events``, ``users`` and ``items``; for valid and test also
        ``cold_users`` and ``cold_items`` (distinct ones without a TRAIN event) and ``no_history``
        (targets that are their user's first event). Besides, None without timestamps:
        ``leakage``, the share of TEST targets older than the newest TRAIN event;
        ``tied_last_two_users`` and ``tied_last_two_share``, users with at least two events whose
        last two have the same time; ``tied_events_share``, events whose user has another one at
        the same time.
    """
    owner = _owners(offsets)
    train = split == TRAIN
    train_users, train_items = distinct(owner[train]), distinct(items[train])
    report: dict[str, Any] = {}
    for code, name in SPLIT_NAMES.items():
        at = eval_positions(split, code)
        users, products = distinct(owner[at]), distinct(items[at])
        report[name] = {"events": len(at), "users": len(users), "items": len(products)}
        if code in (VALID, TEST):
            report[name] |= {
                "cold_users": int((~np.isin(users, train_users)).sum()),
                "cold_items": int((~np.isin(products, train_items)).sum()),
                "no_history": int((at == offsets[owner[at]]).sum()),
            }
    if timestamps is None or not np.any(timestamps):
        return report | dict.fromkeys(TIME_FIELDS)
    return report | _time_report(offsets, split, timestamps)


def _time_report(offsets: np.ndarray, split: np.ndarray, timestamps: np.ndarray) -> dict[str, Any]:
    train, test = timestamps[split == TRAIN], timestamps[split == TEST]
    owner = _owners(offsets)
    # Events of a user are in time order, so equal times are neighbours.
    tie = (timestamps[1:] == timestamps[:-1]) & (owner[1:] == owner[:-1])  # (N - 1,)
    last = offsets[1:][np.diff(offsets) >= 2] - 1
    tied_users = int(tie[last - 1].sum())
    in_tie = np.append(tie, False) | np.append(False, tie)  # (N,)
    values = (
        float((test < train.max()).mean()) if len(train) and len(test) else None,
        tied_users,
        tied_users / len(last) if len(last) else None,
        float(in_tie.mean()),
    )
    return dict(zip(TIME_FIELDS, values, strict=True))
