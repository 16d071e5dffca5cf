"""Learning from few labelled examples, and which events are then still training events.

Legend: U users, N events, R examples.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from datamodules.examples import Examples, ExampleTable, rated_events
from datamodules.samplers import hashed_order
from datamodules.types import CONTEXT, SPLIT_NAMES, TEST, TRAIN, VALID, Histories


@dataclass(frozen=True)
class FewExamples:
    """Another recipe with only ``count`` training examples (TALLRec's K), drawn by the seed.

    ``valid`` also limits the validation examples: a few-shot result that was selected on a thousand
    validation labels is none. Events outside the kept training examples become context.

    ``behind`` also asks about the events that the kept training examples show as history, each one that has
    at least so many shown before it. They are labels that prompts tell and that sequence models learn from:
    K examples of ten events hold more than K answers.

    Raises:
        ValueError: impossible arguments; on a call, fewer than were asked for, or no ratings.
    """

    base: Examples
    count: int
    valid: int | None = None
    seed: int = 0
    behind: int | None = None

    limits_training = True
    together = 1

    def __post_init__(self) -> None:
        if self.base.together > 1:
            raise ValueError(
                f"FewExamples draws rows one by one, and its base puts {self.base.together} into one step: "
                "take pairs=false."
            )
        if self.count < 1 or (self.valid is not None and self.valid < 1):
            raise ValueError(
                f"FewExamples got count={self.count}, valid={self.valid}; expected 1 or more."
            )
        if self.behind is not None and (self.behind < 1 or self.liked_above is None):
            raise ValueError(
                f"FewExamples got behind={self.behind}; expected 1 or more, and a base that tells likes by "
                "ratings (liked_above)."
            )

    @property
    def own_split(self) -> bool:
        """That of the base."""
        return self.base.own_split

    @property
    def liked_above(self) -> float | None:
        """That of the base."""
        return self.base.liked_above

    def __call__(self, histories: Histories, first_row: np.ndarray) -> ExampleTable:
        """The base's table with fewer rows, the kept ones in their order."""
        table = self.base(histories, first_row)
        table = _limited("FewExamples", table, {TRAIN: self.count, VALID: self.valid}, self.seed)
        return table if self.behind is None else self._with_shown(table, histories, self.behind)

    def _with_shown(self, table: ExampleTable, histories: Histories, behind: int) -> ExampleTable:
        """The table, and behind it the events inside its training examples' histories, each once."""
        train = table.take(table.code == TRAIN)
        first = train.start + behind  # (R,) place of the first event that is asked about
        each = np.maximum(train.stop - first, 0)  # (R,) how many there are
        row = np.repeat(np.arange(len(train)), each)
        within = np.arange(len(row)) - np.repeat(np.cumsum(each) - each, each)
        stop = first[row] + within
        # Windows overlap: of an event that several show, the longest history is asked.
        longest = np.lexsort((train.start[row], stop))
        stop, row = stop[longest], row[longest]
        fresh = np.append(True, stop[1:] != stop[:-1])[: len(stop)] & ~np.isin(stop, train.stop)
        row, stop = row[fresh], stop[fresh]
        assert self.liked_above is not None
        shown = rated_events(
            histories, train.user[row], train.start[row], stop, train.code[row], self.liked_above
        )
        pairs = ((getattr(table, f.name), getattr(shown, f.name)) for f in fields(table))
        return ExampleTable(*(np.concatenate(pair) for pair in pairs))


@dataclass(frozen=True)
class SampledTest:
    """Another recipe with only ``count`` test examples, drawn by the seed: for methods that are slow to test.

    What is learned stays as the base has it. Where the base cuts the events itself, other test events become
    context.

    Raises:
        ValueError: impossible arguments; on a call, fewer than were asked for.
    """

    base: Examples
    count: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"SampledTest got count={self.count}; expected 1 or more.")

    @property
    def own_split(self) -> bool:
        """That of the base."""
        return self.base.own_split

    @property
    def limits_training(self) -> bool:
        """That of the base."""
        return self.base.limits_training

    @property
    def liked_above(self) -> float | None:
        """That of the base."""
        return self.base.liked_above

    @property
    def together(self) -> int:
        """That of the base, whose training rows are all kept."""
        return self.base.together

    def __call__(self, histories: Histories, first_row: np.ndarray) -> ExampleTable:
        """The base's table with fewer test rows, the kept ones in their order."""
        table = self.base(histories, first_row)
        return _limited("SampledTest", table, {TEST: self.count}, self.seed)


def asked_by(examples: Examples) -> Examples:
    """The recipe behind limited ones: what its rows ask, however many of them are learned from or tested."""
    while isinstance(examples, (FewExamples, SampledTest)):
        examples = examples.base
    return examples


def _limited(
    name: str, table: ExampleTable, wanted: dict[int, int | None], seed: int
) -> ExampleTable:
    """The table with at most so many rows of each part (None: all), drawn by the seed, in their order."""
    keep = np.ones(len(table), dtype=bool)
    for code, count in wanted.items():
        rows = np.flatnonzero(table.code == code)
        if count is None:
            continue
        if count > len(rows):
            raise ValueError(
                f"{name} was asked for {count} {SPLIT_NAMES[code]} examples, but there are {len(rows)}; "
                "ask for fewer."
            )
        keep[rows] = False
        keep[rows[hashed_order(len(rows), seed=seed)[:count]]] = True
    return table.take(keep)


def codes_of(table: ExampleTable, histories: Histories, own_split: bool) -> np.ndarray:
    """(N,) int8 codes of events where only the training examples may be learned from.

    TRAIN is what a training example shows, its history and its target; other training events are context.
    With ``own_split`` the targets of its other examples are VALID and TEST, and nothing else is.
    """
    held_out = np.isin(histories.split, (VALID, TEST)) & (not own_split)
    codes = np.where(held_out, histories.split, CONTEXT).astype(np.int8)
    train = table.take(table.code == TRAIN)
    edges = np.zeros(len(codes) + 1, dtype=np.int64)
    np.add.at(edges, train.start, 1)
    np.add.at(edges, train.stop + 1, -1)
    codes[(np.cumsum(edges)[:-1] > 0) & ~held_out] = TRAIN
    for code in (VALID, TEST) if own_split else ():
        codes[table.stop[table.code == code]] = code
    return codes
