"""A finished experiment in memory: ``load("sasrec/movielens_100k").recommend(users=[7], k=10)``.

Scores are those of the evaluation: the same module, data, collators and precision; with
``before_target=True`` also the same histories, so that a list is the one that was evaluated.

Legend: R rows that are asked for, C candidates, E items that are not wanted.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from datamodules.base import SequenceDataModule
from datamodules.requests import NOBODY, asking, asking_before, asking_each, asking_with
from datamodules.types import EvalRows, Histories, Rows
from experiments import asked, build
from experiments.artifacts import PlannedStage
from experiments.asked import Ask, Found, Recommendations, Recommended, best_of, in_order
from experiments.config import Experiment
from experiments.errors import UserError
from experiments.keys import nearest
from experiments.reasons import Metadata, checked
from experiments.recommend import CANDIDATES
from experiments.titles import MANY, ItemNames
from experiments.trainers import make_predictor
from lightning_modules.base import TOP_K, RankingModule
from lightning_modules.errors import ModelError


class Recommender:
    """Answers with a finished module. Calls from several threads wait for each other.

    Args:
        experiment: it is of.
        stage: the test whose module is asked.
        data: that it was trained on, perhaps with new items behind.
        retriever: whose best items are handed to a method that chooses among candidates and brings no
            collaborative model.
        new_items: raw ids of the new items.
    """

    def __init__(
        self, experiment: Experiment, stage: PlannedStage, data: SequenceDataModule,
        retriever: Recommender | None = None, new_items: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.new_items = tuple(new_items)
        self.experiment, self.stage, self.data = experiment, stage, data
        data.seed = stage.spec["seed"]
        (node,) = stage.spec["modules"].values()
        self.module: RankingModule = build.build_on(node, data, **stage.inputs)
        launch = experiment.config["launch"]
        precision = stage.spec["trainer"].get("precision")
        self._trainers: dict[int, Any] = {}
        self._new_trainer = lambda module: make_predictor(module, launch, precision)
        self.fallback = retriever
        self._held_out = data.rows(data.test_code)
        self._mask_seen = data.mask_seen
        self._lock = threading.RLock()

    @property
    def name(self) -> str:
        """Of the experiment."""
        return self.experiment.name

    @cached_property
    def names(self) -> ItemNames:
        """The catalogue by ids and titles."""
        return ItemNames(
            self.data.catalog["item_id"].to_list(), self.data.titles[1:], self.data.name
        )

    @cached_property
    def users(self) -> dict[str, int]:
        """Internal ids of raw ones."""
        raw = self.data.prepared.users["user_id"].cast(str).to_list()
        return {user: i for i, user in enumerate(raw, start=1)}

    # What is asked ---------------------------------------------------------------------------------------

    def recommend(
        self,
        users: str | int | Sequence[str | int] | None = None,
        k: int = 10,
        *,
        histories: Sequence[str] | Sequence[Sequence[str]] | None = None,
        exclude: str | Sequence[str] = (),
        request: str = "",
        before_target: bool = False,
        items: Sequence[str] | None = None,
        keep_seen: bool = False,
    ) -> list[Recommendations]:
        """A list for each user, or for each history; items are raw ids, or titles where no id is the same.

        Args:
            users: raw ids, one or several.
            k: items of a list, at most 100.
            histories: one list of items, or one for each row, oldest first; with ``users`` they stand in for
                the users' own.
            exclude, request, before_target, items, keep_seen: see ``Ask``.

        Raises:
            UserError: an id is unknown, or the method cannot be asked for that.
        """
        others = {"request": request, "before_target": before_target, "keep_seen": keep_seen}
        return self.answer(asked.asks_of(users, histories, self.names, exclude, items, **others), k)

    def answer(self, asks: Sequence[Ask], k: int = 10) -> list[Recommendations]:
        """``recommend`` for asks of any kinds, those of one kind in one pass.

        Raises:
            UserError: as ``recommend``.
        """
        if not 1 <= k <= TOP_K:
            raise UserError(f"k is {k}, expected 1 to {TOP_K}")
        found: dict[int, Recommendations] = {}
        with self._lock:
            for kind in dict.fromkeys(ask.kind for ask in asks):
                places = [i for i, ask in enumerate(asks) if ask.kind == kind]
                found |= zip(places, self._answer([asks[i] for i in places], k), strict=True)
        return [found[i] for i in range(len(asks))]

    @property
    def one_at_a_time(self) -> bool:
        """Whether asking for several lists together saves nothing: a language model reads each by itself."""
        return self._alone or self.module.reads_requests

    @property
    def _alone(self) -> bool:
        return self.module.labelled and not self.module.ranks_candidates

    # How it is answered ----------------------------------------------------------------------------------

    def _answer(self, asks: list[Ask], k: int) -> list[Recommendations]:
        module = self.module
        if self._alone and len(asks) > 1:
            return [told for ask in asks for told in self._answer([ask], k)]
        for ask in asks:
            self.require_possible(ask)
        module.request = asks[0].request or None
        self._mask(asks[0])
        candidates, places = self._candidates(asks, k)
        rows, histories = self._rows(asks, candidates)
        if self._alone:
            found = best_of(rows, self._ask(module, asking_each(rows), histories))
        else:
            module.explains = module.reads_requests
            found = self._ask(module, rows, histories, single=module.explains)
        for ask, own in zip(asks, found, strict=True):
            asked.require_told_apart(module, ask, own.scores)
        told = module.summaries(self._as_asked(rows, histories)) or [None] * len(asks)
        given = zip(asks, found, places, told, strict=True)
        return [self._as_told(*each, k) for each in given]

    def retrieved(self, ask: Ask, k: int) -> Recommendations | None:
        """What the collaborative model shows by itself that hands candidates over, if there is one."""
        plain = replace(ask, request="", items=None)
        if self.module.retriever is None:
            other = self.fallback
            return None if other is None else other.answer(self.asks_of(other, [plain]), k)[0]
        with self._lock:
            self._mask(plain)
            (found,) = self._ask(self.module.retriever, *self._rows([plain], None))
            return self._as_told(plain, found, None, None, k)

    def history(self, ask: Ask) -> list[str]:
        """Raw ids of the events that an ask is about, oldest first."""
        rows, histories = self._rows([replace(ask, items=None)], None)
        return self._raw_events(self._as_asked(rows, histories))[0]

    def _mask(self, ask: Ask) -> None:
        self.data.mask_seen = self._mask_seen if ask.before_target else not ask.keep_seen

    def require_possible(self, ask: Ask) -> None:
        """What the method can never be asked for raises UserError."""
        asked.require_possible(self.module, ask)

    def _candidates(
        self, asks: list[Ask], k: int
    ) -> tuple[np.ndarray | None, list[dict[int, int] | None]]:
        """(R, C) items to choose among, and each row's places in the list that they come from."""
        module = self.module
        if asks[0].items is not None:
            return np.array([self._items(ask.items or ()) for ask in asks], np.int32), [None] * len(
                asks
            )
        if not module.num_candidates and not module.labelled:
            return None, [None] * len(asks)
        if module.retriever is None and self.fallback is None:
            raise UserError(
                f"{type(module).__name__} chooses among candidates, and here it has no collaborative model "
                "to retrieve them: name a finished experiment that has one, RETRIEVER=sasrec/movielens_100k, "
                "say"
            )
        count = module.num_candidates or max(CANDIDATES, k)
        plain = [replace(ask, request="") for ask in asks]
        if module.retriever is not None:
            rows, histories = self._rows(plain, None)
            lists = [f.items[:count] for f in self._ask(module.retriever, rows, histories)]
        else:
            assert self.fallback is not None
            lists = self._retrieved(self.fallback, plain, count)
        # Lists of one length: what is short (a small catalogue) is filled with padding.
        width = max(map(len, lists))
        if not all(lists):
            raise UserError("the retriever found nothing that is not excluded")
        filled = np.array([own + [0] * (width - len(own)) for own in lists], np.int32)
        return filled, [{item: place for place, item in enumerate(own, 1)} for own in lists]

    def asks_of(self, other: Recommender, asks: list[Ask]) -> list[Ask]:
        """As another experiment is asked; one of other data with the histories' items that it knows."""
        known = other.names.knows
        asks = [replace(a, exclude=tuple(filter(known, a.exclude))) for a in asks]
        if other.data.prepared.digest == self.data.prepared.digest:
            return asks
        return [
            replace(ask, user=None, before_target=False, history=tuple(filter(known, own)))
            for ask, own in zip(asks, map(self.history, asks), strict=True)
        ]

    def _retrieved(self, other: Recommender, asks: list[Ask], count: int) -> list[list[int]]:
        """Another experiment's best items."""
        return [
            [self.names.of_id(r.item) for r in answer.items if self.names.knows(r.item)]
            for answer in other.answer(self.asks_of(other, asks), min(count, TOP_K))
        ]

    def _raw_events(self, rows: Rows) -> list[list[str]]:
        spans = zip(rows.start, rows.stop, strict=True)
        return [self.data.raw_items(rows.histories.items[a:b]).to_list() for a, b in spans]

    def _rows(
        self, asks: list[Ask], candidates: np.ndarray | None
    ) -> tuple[EvalRows, Histories | None]:
        """What the data module is asked for: rows, and histories that are not its own."""
        lists = [self._items(ask.exclude) for ask in asks]
        width = max(map(len, lists))
        unwanted = np.array([own + [0] * (width - len(own)) for own in lists], np.int32)
        users = [self.user(a.user) if a.user is not None else NOBODY for a in asks]
        held = self.data.histories
        try:
            if asks[0].history is not None:
                events = [self._items(ask.history or ()) for ask in asks]
                own, rows = asking_with(held, events, users, candidates, unwanted)
                return rows, own
            if asks[0].before_target or self.module.reads_summaries:
                return asking_before(self._held_out, users, candidates, unwanted), None
            return asking(held, users, candidates, unwanted), None
        except ValueError as error:
            raise UserError(str(error)) from error

    def _as_asked(self, rows: EvalRows, histories: Histories | None) -> Rows:
        held = histories or self.data.histories
        start = held.offsets[rows.user] if rows.start is None else rows.start
        return Rows(held, np.arange(len(rows.user)), rows.user, start, rows.position, 0, 0)

    def _ask(
        self,
        module: RankingModule,
        rows: EvalRows,
        histories: Histories | None,
        single: bool = False,
    ) -> list[Found]:
        """Each row's items, best first, without padding."""
        if id(module) not in self._trainers:
            self._trainers[id(module)] = self._new_trainer(module)
        usual, self.data.batch_size = self.data.batch_size, 1 if single else self.data.batch_size
        try:
            self.data.ask(rows, replace(histories or self.data.histories, kept=False))
            batches: list[Any] = self._trainers[id(module)].predict(module, datamodule=self.data)
        except (ModelError, ValueError) as error:
            raise UserError(str(error)) from error
        finally:
            self.data.batch_size = usual
            self.data.ask(self._held_out)
        # What is counted or solved for is the same every time.
        module.setup = _nothing  # type: ignore[method-assign]
        return in_order(batches)

    # What is told ------------------------------------------------------------------------------------------

    def _as_told(
        self, ask: Ask, found: Found, places: dict[int, int] | None, told: str | None, k: int
    ) -> Recommendations:
        banned = set(ask.exclude)
        ids, titles = self.names.ids, self.names.titles
        shown = tuple(
            Recommended(ids[i - 1], titles[i - 1], score, places.get(i) if places else None)
            for i, score in zip(found.items, found.scores, strict=True)
            if ids[i - 1] not in banned
        )
        if not found.reason or not shown or ids[found.items[0] - 1] in banned:
            return Recommendations(ask, shown[:k], preference=told)
        own = [titles[self.names.of_id(raw) - 1] for raw in self.history(ask)]
        kept = checked(
            found.reason, self._metadata.of(found.items[0]), self._metadata.known,
            shown[0].title, own,
        )  # fmt: skip
        return Recommendations(ask, shown[:k], kept.text, kept.dropped, told)

    @cached_property
    def _metadata(self) -> Metadata:
        return Metadata(self.data.catalog)

    def user(self, raw: str) -> int:
        """The internal id of a raw one; raises UserError with near ones where there is none."""
        if raw not in self.users:
            known = list(self.users)
            near = nearest(raw, known) if len(known) <= MANY else ""
            raise UserError(
                f"{self.data.name} has no user {raw!r}{near}; it has {len(known):,} users, "
                f"such as {', '.join(known[:3])}"
            )
        return self.users[raw]

    def _items(self, raw: Sequence[str]) -> list[int]:
        return [self.names.of_id(item) for item in raw]


def _nothing(stage: str) -> None:
    """In place of a module's ``setup`` once it has run."""
