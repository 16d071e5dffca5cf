"""Asks of many requests, answered together on one thread: a model is not made for several.

What waits is bounded, and what nobody waits for any more is dropped before it is computed. Those are answered
in one call that are of one kind with the oldest; the others keep their places. No torch here.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

from experiments.asked import Ask, Recommendations
from experiments.errors import UserError
from experiments.recommend import CANDIDATES


@dataclass(frozen=True)
class Limits:
    """What a service takes on.

    Args:
        seconds: for one request, from its first byte to the answer.
        queue: asks that wait, at most.
        batch: asks of one call of the model, at most.
        wait: milliseconds that the first of a batch waits for others.
        kilobytes: of a request's body, at most.
        requests: that are read or answered at once, at most.
        headers: seconds from the first byte of a request, or from a connection's opening, to the last header.
    """

    seconds: float = 30.0
    queue: int = 1024
    batch: int = 256
    wait: float = 5.0
    kilobytes: int = 1024
    requests: int = 1024
    headers: float = 10.0


class Answers(Protocol):
    """``Recommender``, as far as it is asked here."""

    @property
    def one_at_a_time(self) -> bool:
        """Whether batches save nothing."""

    def answer(self, asks: Sequence[Ask], k: int = 10) -> list[Recommendations]:
        """A list for each ask."""


class FullError(Exception):
    """The queue is full, the model is not there yet, or the service ends; ask again later."""


class BrokenError(Exception):
    """The model failed in a way that is not the request's fault; what happened is on the screen."""


@dataclass(eq=False)
class Waiting:
    """One ask in the queue."""

    ask: Ask
    k: int
    answer: Future[Recommendations] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)

    @property
    def depth(self) -> int:
        """Length of the list that is made; up to ``CANDIDATES`` the same candidates are chosen among."""
        return max(self.k, CANDIDATES)

    @cached_property
    def kind(self) -> tuple[Any, ...]:
        """What those share that one call can answer."""
        return self.depth, *self.ask.kind


class Batcher:
    """The queue, and the thread that loads the model and asks it.

    Args:
        load: returns the model; called on the thread.
        limits: of the queue and of a batch.
        answered: told of each call: how many asks, and the seconds.
        failed: called when the model could not be loaded; ``error`` says why.
    """

    def __init__(
        self, load: Callable[[], Answers], limits: Limits,
        answered: Callable[[int, float], None] = lambda asks, seconds: None,
        failed: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.model: Any = None
        self.error: BaseException | None = None
        self._load, self._limits = load, limits
        self._answered, self._failed = answered, failed
        self._queue: deque[Waiting] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)

    def start(self) -> None:
        """Load the model, and answer."""
        self._thread.start()

    def close(self) -> None:
        """Take nothing more, answer what waits, and end."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    @property
    def ready(self) -> bool:
        """Whether asks are taken."""
        return self.model is not None and not self._closing

    @property
    def waiting(self) -> int:
        """Asks in the queue."""
        return len(self._queue)

    def submit(self, asks: Sequence[tuple[Ask, int]]) -> list[Future[Recommendations]]:
        """Put asks and the lengths of their lists into the queue, all or none.

        Raises:
            FullError: there is no room, or the service is not ready.
        """
        made = [Waiting(ask, k) for ask, k in asks]
        with self._changed:
            if not self.ready:
                raise FullError(
                    "the service ends" if self._closing else "the model is being loaded"
                )
            if len(self._queue) + len(made) > self._limits.queue:
                self._drop()
            if (room := self._limits.queue - len(self._queue)) < len(made):
                raise FullError(
                    f"{len(self._queue)} asks wait already, and there is room for {room}"
                )
            self._queue.extend(made)
            self._changed.notify_all()
        return [each.answer for each in made]

    # On the thread ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            self.model = self._load()
        except (Exception, SystemExit) as error:
            self.error = error
            self._failed()
            return
        while (batch := self._next()) is not None:
            taken = [each for each in batch if each.answer.set_running_or_notify_cancel()]
            if taken:
                start = time.monotonic()
                self._answer(taken)
                self._answered(len(taken), time.monotonic() - start)

    def _next(self) -> list[Waiting] | None:
        """The oldest ask and those that are answered with it; None: it is over."""
        most = 1 if self.model.one_at_a_time else self._limits.batch
        with self._changed:
            while True:
                self._drop()
                if not self._queue and self._closing:
                    return None
                if not self._queue:
                    self._changed.wait()
                    continue
                kind = self._queue[0].kind
                batch = [each for each in self._queue if each.kind == kind][:most]
                left = self._queue[0].arrived + self._limits.wait / 1000 - time.monotonic()
                if len(batch) == most or left <= 0 or self._closing:
                    gone = set(map(id, batch))
                    self._queue = deque(each for each in self._queue if id(each) not in gone)
                    return batch
                self._changed.wait(left)

    def _drop(self) -> None:
        """Forget what nobody waits for any more."""
        if any(each.answer.cancelled() for each in self._queue):
            self._queue = deque(each for each in self._queue if not each.answer.cancelled())

    def _answer(self, batch: list[Waiting]) -> None:
        """Ask the model; a call that fails is made again by halves: one ask spoils no other's answer."""
        lists: list[Recommendations] | None = None
        try:
            lists = self.model.answer([each.ask for each in batch], batch[0].depth)
        except Exception as error:
            if len(batch) == 1:
                batch[0].answer.set_exception(_told(error))
                return
        if lists is None:  # out of the handler, which holds what the failed call has allocated
            middle = len(batch) // 2
            self._answer(batch[:middle])
            self._answer(batch[middle:])
            return
        for each, told in zip(batch, lists, strict=True):
            each.answer.set_result(replace(told, items=told.items[: each.k]))


def _told(error: Exception) -> Exception:
    """What the user can mend as it is; of all else, that it happened."""
    if isinstance(error, UserError):
        return error
    traceback.print_exception(error)
    return BrokenError("the model failed; the service's screen says how")
