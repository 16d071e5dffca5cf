"""Labelled examples for yes/no methods: a history, an item, and whether it was liked.

A recipe of examples turns histories into a table of them. Real dislikes come from ratings
(``SlidingWindows``, ``RatedTargets``), sampled ones from the catalogue (``WithNegatives``).

Legend: U users, N events, R examples. An example's history is ``items[start:stop]``.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, Protocol, get_args

import numpy as np

from datamodules.candidates import draw_candidates, exchange_candidates
from datamodules.samplers import hashed_order
from datamodules.types import TEST, TRAIN, VALID, Histories

Which = Literal["all", "last"]
Drawn = Literal["uniform", "popularity", "exchange"]
Balance = Literal["natural", "train", "all"]


@dataclass(frozen=True)
class ExampleTable:
    """R examples; columns are (R,)."""

    user: np.ndarray  # int64
    start: np.ndarray  # int64, first event of the history
    stop: np.ndarray  # int64, one past its last event; the target's place, where that is an event
    target: np.ndarray  # int64, item
    label: np.ndarray  # bool, liked
    code: np.ndarray  # int8, TRAIN | VALID | TEST

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: np.ndarray) -> ExampleTable:
        """Some of the rows, by number or by mask."""
        return ExampleTable(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


class Examples(Protocol):
    """A recipe of examples.

    Codes without an example are ranked, as without a recipe of examples.
    """

    @property
    def own_split(self) -> bool:
        """Whether it decides itself what each event is for, instead of the recipe's split."""
        ...

    @property
    def limits_training(self) -> bool:
        """Whether training events outside its training examples are context (``few_examples.codes_of``)."""
        ...

    @property
    def liked_above(self) -> float | None:
        """Events rated above it are likes; None where every event is one."""
        ...

    @property
    def together(self) -> int:
        """Training rows one after the other that stand in one batch; 1 where rows stand alone."""
        ...

    def __call__(self, histories: Histories, first_row: np.ndarray) -> ExampleTable:
        """The table; ``first_row`` (U + 1,) is where the file first names each user."""
        ...


@dataclass(frozen=True)
class SlidingWindows:
    """Every stretch of ``length`` events and the next one: TALLRec's films (arXiv 2305.00447, released code).

    Users stand in the order in which the file first names them, each user's windows in time order; the
    last ``newest`` of that list are kept and cut by position into train, valid and test. So valid and test
    hold few users (14 and 16 on MovieLens-100K), and AUC compares users more than items.

    Raises:
        ValueError: impossible arguments; on a call, missing ratings or too few windows.
    """

    length: int = 10
    liked_above: float = 3
    newest: int = 10_000
    valid: float = 0.1
    test: float = 0.1

    own_split = True
    limits_training = True
    together = 1

    def __post_init__(self) -> None:
        if self.length < 1 or self.newest < 1:
            raise ValueError(
                f"SlidingWindows got length={self.length}, newest={self.newest}; both must be 1 or more."
            )
        if not (0 <= self.valid < 1 and 0 < self.test < 1 and self.valid + self.test < 1):
            raise ValueError(
                f"SlidingWindows got valid={self.valid}, test={self.test}; expected fractions with "
                "valid + test < 1."
            )

    def __call__(self, histories: Histories, first_row: np.ndarray) -> ExampleTable:
        """At most ``newest`` windows."""
        user = np.argsort(first_row[1:], kind="stable") + 1  # (U,) in order of appearance
        counts = np.maximum(np.diff(histories.offsets)[user] - self.length, 0)
        owner = np.repeat(user, counts)
        within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        start = histories.offsets[owner] + within
        owner, start = owner[-self.newest :], start[-self.newest :]
        stop = start + self.length
        places = np.arange(len(owner))
        first_valid = round(len(owner) * (1 - self.valid - self.test))
        first_test = round(len(owner) * (1 - self.test))
        if not 0 < first_valid <= first_test < len(owner):
            raise ValueError(
                f"SlidingWindows(length={self.length}) found {len(owner)} windows, too few to cut into "
                "train, valid and test; use a shorter length or more data."
            )
        code = np.select([places >= first_test, places >= first_valid], [TEST, VALID], TRAIN)
        return rated_events(histories, owner, start, stop, code, self.liked_above)


@dataclass(frozen=True)
class RatedTargets:
    """The events that the split holds out or trains on, liked or not by their rating.

    TALLRec's books are ``RatedTargets(liked_above=5, length=10, train="last")`` on ``RandomByUser``.
    ``train``: every training event that has a history, or each user's last one. ``balance``: leave out
    events of the more frequent label, drawn by the seed, until both are as many, in no part (natural), in
    the training part, or in all.

    Raises:
        ValueError: impossible arguments; on a call, missing ratings.
    """

    liked_above: float
    length: int | None = None
    train: Which = "all"
    balance: Balance = "natural"
    seed: int = 0

    own_split = False
    limits_training = False
    together = 1

    def __post_init__(self) -> None:
        _check_choice("RatedTargets", "train", self.train, get_args(Which))
        _check_choice("RatedTargets", "balance", self.balance, get_args(Balance))

    def __call__(self, histories: Histories, first_row: np.ndarray) -> ExampleTable:
        """One example an event."""
        stop, user = _targets(histories, self.train, (TRAIN, VALID, TEST))
        start = _starts(histories, user, stop, self.length)
        table = rated_events(histories, user, start, stop, histories.split[stop], self.liked_above)
        parts = {"natural": (), "train": (TRAIN,), "all": (TRAIN, VALID, TEST)}[self.balance]
        keep = np.ones(len(table), dtype=bool)
        for code in parts:
            keep &= _balanced(table, code, self.seed)
        return table.take(keep)


@dataclass(frozen=True)
class WithNegatives:
    """Events as positives, each with ``count`` items that its user never touched as negatives.

    MLLM-MSR's training pairs (arXiv 2408.09698) are ``WithNegatives(1, train="last")`` on ``RandomByUser``.
    Test targets stay ranked among the recipe's candidates.

    Args:
        count: negatives of an event.
        length: of histories, at most; None shows them whole.
        train: events of a user that are learned from.
        seed: of the draws.
        by: ``uniform``, each item as likely as any other, which makes what is bought often a good guess;
            ``popularity``, in proportion to training events, which tells less; or ``exchange``, the targets
            of other rows that are learned from, each as often wrong as right, so that an item alone tells
            nothing (of rows that are validated with, by popularity).
        at_least: events before one that is learned from; a short history tells little of a taste.
        pairs: learn from an event and its negatives in one batch: what an answer owes to the history alone
            cancels then, and a step is about what tells them apart.

    Raises:
        ValueError: impossible arguments; on a call, a user who leaves too few items to draw from.
    """

    count: int = 1
    length: int | None = None
    train: Which = "all"
    seed: int = 0
    by: Drawn = "uniform"
    at_least: int = 1
    pairs: bool = False

    own_split = False
    limits_training = False
    liked_above = None

    @property
    def together(self) -> int:
        """Rows one after the other that stand in one batch."""
        return self.count + 1 if self.pairs else 1

    def __post_init__(self) -> None:
        _check_choice("WithNegatives", "train", self.train, get_args(Which))
        _check_choice("WithNegatives", "by", self.by, get_args(Drawn))
        if self.count < 1:
            raise ValueError(f"WithNegatives got count={self.count}; expected at least 1.")
        if self.at_least < 1:
            raise ValueError(f"WithNegatives got at_least={self.at_least}; expected at least 1.")

    def __call__(self, histories: Histories, first_row: np.ndarray) -> ExampleTable:
        """``count + 1`` examples an event, in random order."""
        stop, user = _targets(histories, self.train, (TRAIN, VALID))
        told = stop - histories.offsets[user] >= self.at_least
        stop, user = (each[told | (histories.split[stop] != TRAIN)] for each in (stop, user))
        target = histories.items[stop].astype(np.int64)
        weights = histories.train_counts()
        if self.by == "uniform":
            weights = np.ones_like(weights)
        drawn = np.zeros((len(stop), self.count + 1), dtype=np.int64)  # (R, count + 1)
        for code in (TRAIN, VALID):
            at = np.flatnonzero(histories.split[stop] == code)
            asked = (histories, user[at], target[at])
            if self.by == "exchange" and code == TRAIN:
                drawn[at] = exchange_candidates(*asked, self.count, self.seed)
            else:
                drawn[at] = draw_candidates(*asked, weights, self.count, code, self.seed)
        each = self.count + 1
        user, stop = np.repeat(user, each), np.repeat(stop, each)
        item = drawn.ravel()
        start = _starts(histories, user, stop, self.length)
        label = item == np.repeat(target, each)
        return ExampleTable(user, start, stop, item, label, histories.split[stop])


def rated_events(
    histories: Histories,
    user: np.ndarray,
    start: np.ndarray,
    stop: np.ndarray,
    code: np.ndarray,
    liked_above: float,
) -> ExampleTable:
    """Examples whose targets are the events at ``stop``."""
    ratings = histories.ratings
    if ratings is None or np.isnan(ratings).any():
        missing = "no ratings" if ratings is None else f"{np.isnan(ratings).sum()} without a rating"
        raise ValueError(
            f"likes above {liked_above:g} need a rating of every event, but the data has {missing}; "
            "use WithNegatives for data without ratings, or filter those rows out."
        )
    target = histories.items[stop].astype(np.int64)
    return ExampleTable(
        user.astype(np.int64),
        start,
        stop,
        target,
        ratings[stop] > liked_above,
        code.astype(np.int8),
    )


def _targets(
    histories: Histories, train: Which, codes: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Places (R,) and users (R,) of the events of these codes that have a history."""
    users = histories.users
    wanted = np.isin(histories.split, codes) & (np.arange(len(users)) > histories.offsets[users])
    if train == "last":
        last = np.full(histories.num_users + 1, -1, np.int64)  # (U + 1,) last training event
        learned = np.flatnonzero(histories.split == TRAIN)
        np.maximum.at(last, users[learned], learned)
        wanted &= (histories.split != TRAIN) | (last[users] == np.arange(len(users)))
    stop = np.flatnonzero(wanted)
    return stop, users[stop].astype(np.int64)


def _starts(
    histories: Histories, user: np.ndarray, stop: np.ndarray, length: int | None
) -> np.ndarray:
    """(R,) where histories of at most ``length`` events begin."""
    begin = histories.offsets[user]
    return begin if length is None else np.maximum(begin, stop - length)


def _balanced(table: ExampleTable, code: int, seed: int) -> np.ndarray:
    """(R,) bool: rows that stay when a part has as many likes as dislikes."""
    keep = np.ones(len(table), dtype=bool)
    part = table.code == code
    likes, dislikes = np.flatnonzero(part & table.label), np.flatnonzero(part & ~table.label)
    more, fewer = (likes, dislikes) if len(likes) > len(dislikes) else (dislikes, likes)
    keep[more[hashed_order(len(more), seed=seed)[len(fewer) :]]] = False
    return keep


def _check_choice(name: str, argument: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} got {argument}={value!r}; give one of {', '.join(known)}.")
