"""Who is asked next: at most so many requests at once, so many a host, and none of a host that is tired.

Thread-safe, and free of network and files: workers ``take`` a request and ``give`` its answer back.
"""

from __future__ import annotations

import heapq
import random
import threading
import time
from collections import deque
from dataclasses import dataclass, field

from datamodules.image_http import Answer, host_of


@dataclass(frozen=True)
class Politeness:
    """How hosts are treated."""

    workers: int = 8  # requests at once
    per_host: int = 4  # of them to one host
    delay: float = 0.0  # seconds between two requests to one host
    attempts: int = 3  # of one address in one run, where another try may help
    backoff: float = 1.0  # seconds before the second attempt; doubled each time
    longest_wait: float = 120.0  # seconds; a host that asks for more is left alone for this run
    patience: int = 20  # failures in a row before a host is left alone
    first_patience: int = 6  # the same for a host that has never answered


@dataclass
class Task:
    """One item and where it is in its list of addresses."""

    item: str
    addresses: tuple[str, ...]
    number: int = 0
    attempt: int = 1

    @property
    def address(self) -> str:
        """What to ask now."""
        return self.addresses[self.number]


@dataclass
class Host:
    """What is known of a host in this run."""

    waiting: deque[Task] = field(default_factory=deque)
    active: int = 0
    not_before: float = 0.0
    failures: int = 0  # in a row
    answered: bool = False
    closed: str = ""  # why it is left alone


class TaskQueue:
    """Tasks by host, with retries and the rules of ``Politeness``."""

    def __init__(self, politeness: Politeness) -> None:
        self.politeness = politeness
        self.hosts: dict[str, Host] = {}
        self.untried: list[Task] = []  # their last address lies on a host that is left alone
        self.closings: list[str] = []  # messages that nobody has told yet
        self._later: list[tuple[float, int, Task]] = []
        self._changed = threading.Condition()
        self._count = self._stopped = 0

    def add(self, task: Task) -> None:
        """Put a task in line."""
        with self._changed:
            self._enqueue(task)
            self._changed.notify()

    def stop(self) -> None:
        """Let every ``take`` return None from now on."""
        with self._changed:
            self._stopped = 1
            self._changed.notify_all()

    def take(self) -> Task | None:
        """The next task that may be asked now (waits for it); None when all is done or stopped."""
        with self._changed:
            while not self._stopped:
                now = time.monotonic()
                while self._later and self._later[0][0] <= now:
                    self._enqueue(heapq.heappop(self._later)[2])
                if (task := self._ready(now)) is not None:
                    return task
                if self._idle():
                    self._changed.notify_all()
                    return None
                self._changed.wait(self._pause(now))
            return None

    def give(self, task: Task, answer: Answer) -> bool:
        """Take note of an answer; returns whether it is the last word on this address."""
        with self._changed:
            host = self.hosts[host_of(task.address)]
            host.active -= 1
            self._note(host_of(task.address), host, answer)
            final = not self._again(task, host, answer)
            if final and answer.status != "ok":
                self._next_address(task)
            self._changed.notify_all()
            return final

    def _enqueue(self, task: Task) -> None:
        host = self.hosts.setdefault(host_of(task.address), Host())
        if host.closed:
            self._next_address(task, tried=False)
        else:
            host.waiting.append(task)

    def _next_address(self, task: Task, tried: bool = True) -> None:
        if task.number + 1 < len(task.addresses):
            self._enqueue(Task(task.item, task.addresses, task.number + 1))
        elif not tried:
            self.untried.append(task)

    def _ready(self, now: float) -> Task | None:
        for name, host in self.hosts.items():
            free = host.active < self.politeness.per_host and now >= host.not_before
            if host.waiting and free:
                host.active += 1
                host.not_before = now + self.politeness.delay
                self.hosts[name] = self.hosts.pop(name)  # to the end: hosts take turns
                return host.waiting.popleft()
        return None

    def _idle(self) -> bool:
        return not self._later and not any(h.waiting or h.active for h in self.hosts.values())

    def _pause(self, now: float) -> float:
        """Seconds until something may be ready by itself."""
        due = [host.not_before for host in self.hosts.values() if host.waiting]
        due += [self._later[0][0]] if self._later else []
        return min([max(0.001, time_ - now) for time_ in due if time_ > now], default=1.0)

    def _note(self, name: str, host: Host, answer: Answer) -> None:
        """Count failures in a row, and leave the host alone when it is enough."""
        rules = self.politeness
        host.answered |= answer.status not in ("no connection", "timeout")
        host.failures = host.failures + 1 if answer.refused else 0
        patience = rules.patience if host.answered else min(rules.first_patience, rules.patience)
        if host.closed:
            return
        if answer.wait is not None and answer.wait > rules.longest_wait:
            host.closed = f"it asks to come back in {answer.wait:,.0f} s"
        elif host.failures >= patience:
            host.closed = (
                f"{host.failures} requests in a row failed, the last with {answer.status!r}"
            )
        if host.closed:
            waiting, host.waiting = host.waiting, deque()
            self.closings.append(
                f"{name}: {host.closed}; it is left alone for this run ({len(waiting):,} images wait)"
            )
            for task in waiting:
                self._next_address(task, tried=False)

    def _again(self, task: Task, host: Host, answer: Answer) -> bool:
        """Put a task back for another attempt, if one may help."""
        if not answer.again or task.attempt >= self.politeness.attempts or host.closed:
            return False
        wait = self.politeness.backoff * 2 ** (task.attempt - 1) * random.uniform(1, 1.5)
        wait = min(max(wait, answer.wait or 0), self.politeness.longest_wait)
        due = time.monotonic() + wait
        if answer.status in ("http 429", "http 503"):  # the host itself is busy, not this image
            host.not_before = max(host.not_before, due)
        self._count += 1
        heapq.heappush(
            self._later, (due, self._count, Task(task.item, task.addresses, task.number, task.attempt + 1))
        )  # fmt: skip
        return True
