"""What a finished run wrote of single users and answered about them, read from its tables alone.

Legend: R rows of the test.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from datamodules.base import SequenceDataModule
from datamodules.samplers import hashed_order
from datamodules.types import Rows
from datamodules.written import read_written
from experiments import build
from experiments.artifacts import PlannedStage
from experiments.errors import UserError
from lightning_modules.llm.yes_no import YesNoModule
from lightning_modules.user_summaries import UserSummariesModule
from lightning_modules.user_summaries.blocks import Cut, Plan

PREFERENCES = "preferences"  # the input of a yes/no method that reads what was written of users


@dataclass(frozen=True)
class Event:
    """An item of a history, by internal id, and whether it was disliked, where the data tell it."""

    item: int
    disliked: bool = False


@dataclass(frozen=True)
class Note:
    """One text of a user: the events it is about, oldest first (none: it joins earlier texts)."""

    events: list[Event]
    text: str


@dataclass(frozen=True)
class Answer:
    """An item that was asked about."""

    item: int
    probability: float  # of a yes
    right: bool  # what the user took next, or liked


@dataclass(frozen=True)
class Story:
    """One history: its texts in the order in which they were written, and the answers, likeliest first."""

    user: str  # raw id
    notes: list[Note]
    answers: list[Answer]

    @property
    def places(self) -> tuple[int, int]:
        """First and last place, from 1, of the likeliest right answer and its ties; 0 where none is right."""
        right = [a.probability for a in self.answers if a.right]
        if not right:
            return 0, 0
        above = sum(a.probability > max(right) for a in self.answers)
        return above + 1, above + sum(a.probability == max(right) for a in self.answers)


def stages_of(planned: Sequence[PlannedStage]) -> tuple[PlannedStage, PlannedStage]:
    """The first yes/no test that reads texts of users, and the stage that writes them.

    Raises:
        UserError: there is none, or it is not finished.
    """
    by_folder = {s.folder: s for s in planned if s.folder is not None}
    tests = [s for s in planned if s.spec["run"] == "test" and PREFERENCES in s.spec["inputs"]]
    tests = [s for s in tests if _is(s, YesNoModule)]
    if not tests:
        raise UserError(
            "no test of this experiment asks for yes or no with texts of users (inputs: {preferences: ...}): "
            "take one such as mllm_msr/toy_shop"
        )
    test = tests[0]
    if not test.done:
        raise UserError(
            f"its stage {test.name} is not finished ({test.why}): make exp with the same words first"
        )
    writer = by_folder.get(Path(test.inputs[PREFERENCES]).parent)
    if writer is None or not _is(writer, UserSummariesModule):
        raise UserError(
            f"the texts that its stage {test.name} reads were written by no stage of its own"
        )
    return test, writer


def _is(stage: PlannedStage, kind: type) -> bool:
    nodes = stage.spec["modules"].values()
    return all(issubclass(build.locate(node["_target_"]), kind) for node in nodes)


def told(
    test: PlannedStage, writer: PlannedStage, data: SequenceDataModule, count: int
) -> list[Story]:
    """Stories of as many users, drawn at random, the same ones each time.

    Args:
        test, writer: as ``stages_of`` has them.
        data: of the test.
        count: how many users, at most.

    Raises:
        UserError: a file is missing.
    """
    written = Written(test, writer, data)
    rows = written.rows
    assert test.folder is not None
    answers = _answers(test.folder, rows, data)
    stories = []
    for first in drawn_rows(rows.user, count):
        key = _key(rows, first)
        own = np.flatnonzero(rows.user == rows.user[first]).tolist()
        same = [r for r in own if _key(rows, r) == key]
        found = sorted((a for r in same for a in answers[r]), key=lambda a: -a.probability)
        who = str(data.raw_users(rows.user[[first]])[0])
        stories.append(Story(who, written.notes(first), found))
    return stories


class Written:
    """What was written of the tested histories.

    Args:
        test, writer: as ``stages_of`` has them.
        data: of the test.
    """

    def __init__(self, test: PlannedStage, writer: PlannedStage, data: SequenceDataModule) -> None:
        self.rows = data.every_row("test")
        self._texts = _texts(Path(test.inputs[PREFERENCES]))
        (node,) = writer.spec["modules"].values()
        self._cut = Cut(**{f.name: node[f.name] for f in fields(Cut) if f.name in node})
        self._longest = node.get("max_length")

    def notes(self, row: int) -> list[Note]:
        """The texts of one row's history, in the order in which they were written."""
        texts = self._texts.get(_key(self.rows, row), [])
        return list(_notes(self._cut, self._longest, self.rows, row, texts))

    def newest(self, user: int) -> list[Note]:
        """Those of a user's newest tested history; none of a user without one."""
        own = np.flatnonzero(self.rows.user == user)
        return self.notes(int(own[self.rows.stop[own].argmax()])) if len(own) else []


def drawn_rows(user: np.ndarray, count: int) -> list[int]:
    """A row of each of ``count`` users, in a random order that is always the same.

    Args:
        user: (R,).
    """
    order = hashed_order(len(user), seed=0)
    first = np.sort(np.unique(user[order], return_index=True)[1])[:count]
    return [int(row) for row in order[first]]


def _key(rows: Rows, row: int) -> tuple[int, int, int]:
    return int(rows.user[row]), int(rows.start[row]), int(rows.stop[row])


def _texts(file: Path) -> dict[tuple[int, int, int], list[str]]:
    """The texts after each call, by user, start and stop."""
    columns = ("user", "start", "stop", "steps")
    lines = read_written(file, columns).select(columns).iter_rows()
    return {(user, start, stop): steps for user, start, stop, steps in lines}


def _answers(folder: Path, rows: Rows, data: SequenceDataModule) -> list[list[Answer]]:
    """(R,) what was asked in each row."""
    files = list(folder.glob("scores.*.parquet"))
    if len(files) != 1:
        raise UserError(
            f"{folder} has {len(files)} scores files, expected one: make exp tests anew"
        )
    table = pl.read_parquet(files[0])
    right = "label" if "label" in table.columns else "is_target"
    if right not in table.columns:
        raise UserError(
            f"{files[0]} holds ranks in the whole catalogue: this page is of candidates or labelled rows"
        )
    number = {str(raw): item for item, raw in enumerate(data.catalog["item_id"], start=1)}
    found: list[list[Answer]] = [[] for _ in rows.user]
    for row, raw, score, true in table.select("row", "item_id", "score", right).iter_rows():
        found[row].append(Answer(number[str(raw)], 0.5 + 0.5 * math.tanh(score / 2), true))
    return found


def _notes(
    cut: Cut, longest: int | None, rows: Rows, row: int, texts: Sequence[str]
) -> Iterator[Note]:
    """The texts of a row's history beside the events that each is about."""
    user, start, stop = _key(rows, row)
    start = start if longest is None else max(start, stop - longest)
    plan = Plan.of(cut, [user], [(start, stop)])
    (chain,) = plan.chains
    for number, text in zip(chain, texts, strict=True):
        step = plan.steps[number]
        yield Note([_event(rows, at) for at in range(step.start, step.stop)], text)


def _event(rows: Rows, at: int) -> Event:
    histories: Any = rows.histories
    disliked = rows.liked_above is not None and bool(histories.ratings[at] <= rows.liked_above)
    return Event(int(histories.items[at]), disliked)
