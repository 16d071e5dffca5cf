"""What ``make demo`` shows of a finished experiment, in plain values: lists side by side, marks, texts.

Scores are ``Recommender``'s, so those of the evaluation. Shares are told where they mean something: a method
that asks of each item whether it is liked has the probability of a yes, one that chooses among candidates the
softmax of its scores over all of them, and so has the model that retrieved them.
"""

from __future__ import annotations

import math
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np

from datamodules.base import SequenceDataModule
from experiments.asked import Ask, Recommendations
from experiments.canvas import data_address
from experiments.errors import UserError
from experiments.recommender import CANDIDATES, Recommender
from experiments.shelf import Shelf
from experiments.stories import Written
from experiments.titles import plain
from lightning_modules.a_llmrec.wording import LONGEST_REQUEST
from lightning_modules.base import TOP_K
from lightning_modules.next_item import NextItemModule

MOST, USERS, FOUND = 50, 200, 12  # items of a list, users that are offered, titles that are found
EVENTS = 100  # of a history that somebody makes up
SHOWN = 24  # events of a history
REMEMBERED = 64  # answers
_PICTURES = 4000  # addresses in memory, some 8 KB each
Card = dict[str, Any]
Shares = Callable[[Sequence[float]], list[float]]


def softmax(scores: Sequence[float]) -> list[float]:
    """Shares that add up to 1."""
    each = [math.exp(s - max(scores)) for s in scores]
    return [e / sum(each) for e in each]


def yes(scores: Sequence[float]) -> list[float]:
    """Probabilities of a yes, of margins."""
    return [0.5 + 0.5 * math.tanh(s / 2) for s in scores]


def bare(words: str) -> str:
    """Words as they are searched: those of ``titles.plain`` without accents."""
    letters = unicodedata.normalize("NFKD", plain(words))
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


class Side(NamedTuple):
    """What one column says besides its rows."""

    title: str
    note: str
    shares: Shares | None


class Counter:
    """How often each item of some data was trained on, and whether evaluation counts it as cold or warm.

    Args:
        data: as a module was trained on it.
    """

    def __init__(self, data: SequenceDataModule) -> None:
        held = data.histories
        self.counts = held.train_counts()
        items = np.arange(1, held.num_items + 1)
        marks, names = data.recipe.groups(held, np.zeros(len(items), np.int64), items)
        each = [np.append(False, marks[:, i]) for i in range(len(names))]
        groups = dict(zip(names, each, strict=True))
        nothing = np.zeros(len(items) + 1, dtype=bool)
        self.cold = groups.get("cold_item", nothing)
        self.warm = groups.get("warm_item", nothing)

    def marks(self, item: int) -> Card:
        """``count`` and ``mark``, of an internal item; items that were added later were never trained on."""
        if item >= len(self.counts):
            return {"count": 0, "mark": "cold"}
        mark = "cold" if self.cold[item] else "warm" if self.warm[item] else ""
        return {"count": int(self.counts[item]), "mark": mark}


class Desk:
    """Answers the page's calls; each method is one, with plain arguments.

    Args:
        model: what is asked.
        beside: another finished experiment, which is asked the same.
        written: what an earlier stage wrote of users, step by step.
    """

    def __init__(
        self, model: Recommender, beside: Recommender | None = None, written: Written | None = None
    ) -> None:
        self.model, self.other, self._written = model, beside, written
        self.names = model.names
        self._shelf = Shelf(model.data.titles, model.data.item_images)
        self._address = lru_cache(_PICTURES)(self._drawn)
        self._counters: dict[int, Counter] = {}
        self._answers: OrderedDict[Any, Recommendations] = OrderedDict()
        self._lock, self._drawing = threading.Lock(), threading.Lock()

    # What the page asks ----------------------------------------------------------------------------------

    def about(self) -> dict[str, Any]:
        """What the experiment is, and what can be asked of it."""
        module, data = self.model.module, self.model.data
        users = self._users
        return {
            "experiment": self.model.name, "data": data.name, "users": len(users),
            "items": data.num_items, "beside": self.other.name if self.other else "",
            "first_users": users[:USERS], "most": MOST, "request_letters": LONGEST_REQUEST,
            "pictures": bool(data.item_images.mask.any()),
            "requests": module.reads_requests,
            "histories": module.reads_histories and not module.reads_summaries,
            "summaries": module.reads_summaries,
        }  # fmt: skip

    def somebody(self, number: int) -> str:
        """A user for any number."""
        return self._users[number % len(self._users)]

    def find(self, words: str) -> list[Card]:
        """Items whose titles hold all the words, the most trained first; else the likest ones."""
        wanted = bare(words[:LONGEST_REQUEST]).split()
        if not wanted:
            return []
        hits = [i for i, t in enumerate(self._bare_titles, 1) if all(w in t for w in wanted)]
        counts = self._counter(self.model).counts
        hits.sort(key=lambda i: (-counts[i], i))
        return [self._card(i) for i in (hits or self.names.near(words))[:FOUND]]

    def cards(self, items: list[str]) -> list[Card]:
        """Of raw ids.

        Raises:
            UserError: one is unknown.
        """
        return [self._card(self.names.of_id(str(raw))) for raw in items[:EVENTS]]

    def history(self, user: str) -> list[str]:
        """The newest raw items of a user, oldest first.

        Raises:
            UserError: there is no such user.
        """
        return self.model.history(Ask(user=str(user)))[-EVENTS:]

    def look(
        self, user: str = "", history: Sequence[str] = (), k: int = 10, request: str = "",
        keep_seen: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        """Everything that is shown of one user, or of a history.

        Raises:
            UserError: a value is impossible, or the method cannot be asked for that.
        """
        ask = self._asked(user, history, k, request, keep_seen)
        events = self.model.history(ask)
        found, columns = self._columns(ask, k)
        told: dict[str, Any] = {
            "who": f"The history of user {ask.user}" if ask.user else "Your own history",
            "history": [self._card(self.names.of_id(raw)) for raw in events[: -SHOWN - 1 : -1]],
            "events": len(events), "columns": columns, "steps": self.steps(ask.user) if ask.user else [],
            "preference": found.preference, "reason": found.reason, "dropped": found.dropped,
            "request": ask.request,
        }  # fmt: skip
        return told

    def steps(self, user: str) -> list[dict[str, Any]]:
        """What was written of a user, in the order in which it was."""
        notes = self._written.newest(self.model.user(user)) if self._written else []
        return [
            {"cards": [{**self._card(e.item), "disliked": e.disliked} for e in note.events],
             "text": note.text}
            for note in notes
        ]  # fmt: skip

    # What is shown ---------------------------------------------------------------------------------------

    def _asked(
        self, user: str, history: Sequence[str], k: int, request: str, keep_seen: bool
    ) -> Ask:
        user, request = str(user).strip(), str(request).strip()
        if not 1 <= k <= MOST:
            raise UserError(f"the list has {k} items, expected 1 to {MOST}")
        if len(request) > LONGEST_REQUEST or len(history) > EVENTS:
            raise UserError(
                f"a request has at most {LONGEST_REQUEST} letters, a history {EVENTS} items"
            )
        if not user and not history:
            raise UserError("nobody is asked for: pick a user, or add items to a history")
        given = None if user else tuple(map(str, history))
        return Ask(user or None, given, request=request, keep_seen=bool(keep_seen))

    def _columns(self, ask: Ask, k: int) -> tuple[Recommendations, list[dict[str, Any]]]:
        """The answer, and the lists: whose candidates were chosen among, the answer, the other's."""
        model, module = self.model, self.model.module
        pool = module.num_candidates or (max(CANDIDATES, k) if module.labelled else 0)
        count = min(TOP_K, max(k, pool))
        found = self._answer(model, ask, count)
        before: dict[str, int] | None = None
        if ask.request:
            usual = self._answer(model, replace(ask, request=""), count)
            before = {r.item: place for place, r in enumerate(usual.items, 1)}
        columns = []
        if pool and (first := model.retrieved(ask, count)) is not None:
            columns.append(self._column(model, self._retriever(pool), first, k, None))
        side = self._chooser(pool)
        columns.append(self._column(model, side, found, k, before))
        if self.other is not None:
            columns.append(self._beside(self.other, ask, k))
        return found, columns

    def _retriever(self, pool: int) -> Side:
        """The collaborative model's column."""
        own = self.model.module.retriever
        fallback = self.model.fallback
        module = own if own is not None else fallback.module if fallback else None
        name = type(module).__name__.removesuffix("Module")
        logits = isinstance(module, NextItemModule)
        share = f"; the share is the softmax of its scores over the {pool} candidates it hands on"
        note = f"{name}: what it would show by itself{share if logits else ''}"
        return Side("Collaborative model", note, softmax if logits else None)

    def _chooser(self, pool: int) -> Side:
        """The column of the experiment's method."""
        module = self.model.module
        title = "Language model" if hasattr(module, "llm") else self.model.name
        if module.labelled:
            return Side(title, "p is the probability of a yes, asked of each candidate", yes)
        if module.num_candidates:
            words = f"the share is the softmax of its scores over the {pool} candidates"
            return Side(title, f"chooses among what was retrieved; {words}", softmax)
        return Side(title, "its scores rank the whole catalogue", None)

    def _beside(self, other: Recommender, ask: Ask, k: int) -> dict[str, Any]:
        """Another experiment's column; why it has none is told in its place."""
        side = Side(other.name, "another finished experiment, asked the same", None)
        if other.module.labelled:
            side = side._replace(shares=yes, note="p is the probability of a yes")
        try:
            (same,) = self.model.asks_of(other, [replace(ask, request="")])
            return self._column(other, side, self._answer(other, same, k), k, None)
        except UserError as error:
            return {"title": side.title, "note": "", "rows": [], "error": str(error)}

    def _column(
        self, model: Recommender, side: Side, found: Recommendations, k: int,
        before: dict[str, int] | None,
    ) -> dict[str, Any]:  # fmt: skip
        scores = [r.score for r in found.items]
        told = side.shares(scores) if side.shares and scores else []
        shares: Sequence[float | None] = told or [None] * len(scores)
        full = max(told, default=1.0) if side.shares is softmax else 1.0
        rows = []
        for place, (r, share) in enumerate(zip(found.items, shares, strict=True), 1):
            card: Card = {"item": r.item, "title": r.title, "picture": self._picture_of(r.item)}
            card |= self._counter(model).marks(model.names.of_id(r.item))
            card |= {"place": place, "score": r.score, "share": share, "retrieved": r.retrieved}
            card |= {"bar": share and share / full}
            card |= {} if before is None else {"before": before.get(r.item, 0)}
            rows.append(card)
        return {"title": side.title, "note": side.note, "rows": rows[:k], "error": ""}

    def _answer(self, model: Recommender, ask: Ask, count: int) -> Recommendations:
        """What is asked again is remembered: a request is compared with the list without it."""
        key = (model is self.model, ask, count)
        with self._lock:
            found = self._answers.pop(key, None)
        if found is None:
            (found,) = model.answer([ask], count)
        with self._lock:
            self._answers[key] = found
            while len(self._answers) > REMEMBERED:
                self._answers.popitem(last=False)
        return found

    # Items and users -------------------------------------------------------------------------------------

    @cached_property
    def _users(self) -> list[str]:
        """Who can be asked for: of a method that reads what was written, whom it was written of."""
        data = self.model.data
        if not self.model.module.reads_summaries:
            return list(self.model.users)
        tested = np.unique(data.rows(data.test_code).user)
        return [str(raw) for raw in data.raw_users(tested)]

    @cached_property
    def _bare_titles(self) -> list[str]:
        return [bare(title) for title in self.names.titles]

    def _counter(self, model: Recommender) -> Counter:
        if id(model) not in self._counters:
            self._counters[id(model)] = Counter(model.data)
        return self._counters[id(model)]

    def _card(self, item: int) -> Card:
        """An item of the model's data, by its internal id."""
        title = self._shelf.title(item) or f"item {self.names.ids[item - 1]}"
        card = {"item": self.names.ids[item - 1], "title": title, "picture": self._address(item)}
        return card | self._counter(self.model).marks(item)

    def _picture_of(self, raw: str) -> str:
        return self._address(self.names.of_id(raw)) if self.names.knows(raw) else ""

    def _drawn(self, item: int) -> str:
        """The address of an item's small picture, which holds it; empty where there is none."""
        with self._drawing:  # one file is read
            image = self._shelf.picture(item)
        return "" if image is None else data_address(image, 80)
