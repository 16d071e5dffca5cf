"""A numbered list in place of one question: the model names the best of it. Nothing is trained.

Legend: B rows, R test rows, n candidates of a list, k that are to be named.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from datamodules.samplers import hashed_order
from datamodules.types import Batch, EvalRows, Histories, Rows
from lightning_modules.calibration import AnswerRates
from lightning_modules.llm.generation import plain
from lightning_modules.llm.layouts import lay_out
from lightning_modules.llm.prompt_tokens import prompts_of
from lightning_modules.tallrec.prompts import Question, YesNoPrompt
from lightning_modules.tallrec.writing import WritingModule

_EACH = 32  # tokens for one line: a number, a long title with its quotes, a line break


@dataclass(frozen=True)
class ListPrompt(YesNoPrompt):
    """The question for the best ``top`` of a numbered list.

    Raises:
        ValueError: nothing is to be named.
    """

    top: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top < 1:
            raise ValueError(f"top must be at least 1, got {self.top}")

    def instruction(self) -> str:
        """What is asked of everybody."""
        return (
            f"Somebody has told us which {self.plural} they liked and which they disliked. Of the numbered "
            f"{self.plural} choose the {self.top} that they will like most. Answer with {self.top} lines, "
            "the best first, each a line copied from the list, and nothing else."
        )

    def listing(self, history: Question, names: Sequence[str]) -> str:
        """What is known of one person, and the candidates' names (n,)."""
        known = self.input(history).rpartition("\n")[0]  # without the question about one item
        return "\n".join(
            [known, "Candidates:", *(f'{i}. "{name}"' for i, name in enumerate(names, 1))]
        )


@dataclass(frozen=True)
class CandidateList:
    """What one list asks about."""

    start: int  # the history is the events start..stop-1
    stop: int
    items: tuple[int, ...]  # (n,) in the order in which they are shown


class ListwiseModule(WritingModule):
    """The user's own labelled test items as a list, of which the model names the best k.

    Protocol: a user's test rows, in time order, are cut into lists of like sizes, at most ``list_size`` long,
    shuffled by the seed. Every list is shown with the history of its *oldest* row, because those of the later
    ones hold the labels of the earlier ones. So the model sees older histories than when it is asked one
    question a row, and no label of a candidate. Rows and labels are those of all other methods.

    A row's score is the share of the list's other candidates that are expected below its item: named ones in
    their order, the others tied behind them (``implied_scores``). A refusal, an answer that names none of the
    list (``named_items``), says nothing: all of its list get 0.5, which is also what a list of one gets. AUC
    is pooled over lists, as for the other methods; whoever is better at telling users apart gains nothing
    from lists, so look at ``uauc`` beside it.

    Args:
        prompt: what is asked.
        list_size: candidates of a list, at most.
        seed: of the order in which candidates are shown.
        options: see ``TALLRecModule``.

    Raises:
        ValueError: lists that hold nothing to choose from, or a probe.
    """

    def __init__(
        self,
        prompt: ListPrompt | None = None,
        list_size: int = 10,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.list_prompt = prompt or ListPrompt()
        super().__init__(prompt=self.list_prompt, **options)
        if list_size <= self.list_prompt.top:
            raise ValueError(
                f"list_size is {list_size}, expected more than the {self.list_prompt.top} that are named"
            )
        if self.probe != "none":
            raise ValueError("lists have no probes: set probe=none")
        self.list_size, self.seed = list_size, seed

    @cached_property
    def lists(self) -> list[CandidateList]:
        """(R,) the list of each test row."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        return candidate_lists(data.rows(data.test_code), data.histories, self.list_size, self.seed)

    def _text(self, rows: Rows, row: int, skip: int) -> str:
        asked = self.lists[int(rows.row[row])]
        oldest = Rows(
            rows.histories, rows.row[:1], rows.user[row : row + 1], np.array([asked.start]),
            np.array([asked.stop]), 0, self.seed, target=np.array([asked.items[0]]),
            liked_above=rows.liked_above,
        )  # fmt: skip
        return self._listed(self._question(oldest, 0, skip), [self.shown[i] for i in asked.items])

    def _listed(self, history: Question, names: Sequence[str]) -> str:
        texts = (self.list_prompt.instruction(), self.list_prompt.listing(history, names))
        return lay_out(self.tokenizer, self.llm.chat_template, *texts)

    def example_prompt(self) -> str:
        """A list without a history."""
        return self._listed(Question((), (), "X"), ["X", "Y"])

    def filled_prompts(self) -> list[str]:
        """Lists behind histories of several titles, and behind none."""
        histories = Question(("A", "B"), ("C", "D"), "X"), Question((), (), "X")
        return [self._listed(history, ["X", "Y", "Z"]) for history in histories]

    def wording(self) -> str:
        """Also the lists' size and order."""
        parts = f"{super().wording()} {self.list_size} {self.seed}"
        return hashlib.sha256(parts.encode()).hexdigest()

    def answer_room(self) -> int:
        """So many lines."""
        return _EACH * self.list_prompt.top

    def _named(self, batch: Batch) -> list[list[int]]:
        """(B) the places in each row's list of what its answer names; empty: a refusal."""
        found = []
        written = self.write(prompts_of(batch), self.answer_room())
        for row, tokens in zip(batch.row.tolist(), written, strict=True):
            text = self.said(tokens)
            if len(tokens) == self.answer_room():  # cut off, perhaps amid a number
                text = text.rpartition("\n")[0]
            names = [self.shown[item] for item in self.lists[row].items]
            found.append(named_items(text, names, self.list_prompt.top))
        return found

    def encode(self, batch: Batch) -> Tensor:
        """(B,) float64: each row's own part of its list's ``implied_scores``."""
        assert batch.target is not None
        found = []
        rows = zip(batch.row.tolist(), batch.target.tolist(), self._named(batch), strict=True)
        for row, target, named in rows:
            items = self.lists[row].items
            found.append(implied_scores(named, len(items))[items.index(target)])
        return torch.tensor(found, dtype=torch.float64, device=batch.user.device)

    def label_metric(self) -> Metric | None:
        """Refusals, over rows."""
        return AnswerRates(asks_yes=False)

    def label_values(self, batch: Batch, scores: Tensor) -> tuple[Tensor, ...]:
        """(B,) 0 at refusals; the texts are known by now."""
        return (
            torch.tensor([float(len(n) > 0) for n in self._named(batch)], device=scores.device),
        )


def candidate_lists(
    rows: EvalRows, histories: Histories, list_size: int, seed: int
) -> list[CandidateList]:
    """(R,) the list of each row, see ``ListwiseModule``; an item that is asked about twice stands once."""
    found: list[CandidateList | None] = [None] * len(rows.user)
    for user in np.unique(rows.user):
        own = np.flatnonzero(rows.user == user)
        own = own[np.argsort(rows.position[own], kind="stable")]
        for number, part in enumerate(np.array_split(own, -(-len(own) // list_size))):
            first = part[0]
            begin = histories.offsets[user] if rows.start is None else rows.start[first]
            order = hashed_order(len(part), int(user), number, seed=seed)
            items = tuple(dict.fromkeys(rows.target[part[order]].tolist()))
            made = CandidateList(int(begin), int(rows.position[first]), items)
            for row in part:
                found[row] = made
    return [made for made in found if made is not None]


def named_items(text: str, names: Sequence[str], most: int) -> list[int]:
    """Which of a list a text names, one a line, in its order: 0-based places, at most the first ``most``.

    A line names an item by its number, its title, or both, as ``_on_line`` reads them. Whatever else a line
    says is not counted, nor is an item that is named again.

    Args:
        text: what was written.
        names: (n,) the list, as it was shown.
        most: so many are asked for.
    """
    titles = [plain(name) for name in names]
    found: list[int] = []
    numbered = 0  # lines so far that begin with a number
    for line in filter(None, map(plain, text.splitlines())):
        parts = re.fullmatch(r"([0-9]{1,6})(?:\s*[.,:)-]\s*(.*))?", line)
        numbered += parts is not None
        item = _on_line(line, titles, parts, numbered)
        if item is not None and item not in found:
            found.append(item)
    return found[:most]


def _on_line(
    line: str, titles: Sequence[str], parts: re.Match[str] | None, place: int
) -> int | None:
    """The one item that a line names exactly; None where it names none, or might name several.

    A title may stand behind its item's number or behind the line's own ``place``, since models count what
    they write; behind any other number it is a contradiction.
    """
    could = {i for i, title in enumerate(titles) if title == line}
    if parts is not None:
        number, title = int(parts[1]), plain(parts[2] or "")
        same = {i for i, known in enumerate(titles) if known == title}
        if number - 1 in (same if title else range(len(titles))):
            could.add(number - 1)
        elif title and number == place:
            could |= same
    return could.pop() if len(could) == 1 else None


def implied_scores(named: Sequence[int], count: int) -> list[float]:
    """(n,) expected shares of the other candidates below each: 1 at the first named, ties behind the last.

    Without an answer, or with one candidate alone, every score is 0.5.
    """
    if not named or count < 2:
        return [0.5] * count
    scores = [(count - len(named) - 1) / 2 / (count - 1)] * count
    for place, index in enumerate(named):
        scores[index] = (count - 1 - place) / (count - 1)
    return scores
