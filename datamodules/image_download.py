"""Download the images of a catalogue: politely, in parallel, resumable, each one decoded before it counts.

Of an item's addresses the first that gives a whole image wins. Files are named by their content and
appear by one rename; ``image_state`` says what is remembered, ``image_queue`` how hosts are treated,
``image_http`` what one request may cost. Threads, not processes: the work is waiting and decoding,
and neither holds the interpreter's lock.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
from filelock import FileLock, Timeout

from datamodules.errors import DataSourceError
from datamodules.image_decoding import DAMAGED, BadImageError, inspect, shrink
from datamodules.image_http import Answer, Limits, fetch, host_of
from datamodules.image_queue import Politeness, Task, TaskQueue
from datamodules.image_state import OK, PERMANENT, TOO_LARGE, Record, State, stored_sizes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """How to download.

    ``max_side``: images with a longer side (pixels) are stored as a smaller JPEG; None keeps the bytes
    as they were sent.
    """

    politeness: Politeness = field(default_factory=Politeness)
    limits: Limits = field(default_factory=Limits)
    max_side: int | None = None


@dataclass(frozen=True)
class Summary:
    """What a download folder has for the items that were asked for, and what this run added."""

    folder: Path
    items: int
    with_address: int
    downloaded: int
    bytes: int  # of their images; equal images count once
    missing: dict[str, int]  # by reason, the most frequent first
    new: int
    left_alone: tuple[str, ...] = ()  # hosts that stopped serving, and why


def download_images(items: pl.DataFrame, folder: Path, options: Options | None = None) -> Summary:
    """Fetch what is still missing of ``items`` into ``folder``; the same call goes on after any end.

    Images that an earlier run stored, and addresses that failed for good (``image_state.PERMANENT``), are
    not asked again; everything else is.

    Args:
        items: ``item_id`` and ``images`` (addresses, the best first), one row an item.
        folder: see ``images.download_folder``.
        options: limits and manners.

    Raises:
        DataSourceError: no host could be reached, another run holds the folder, or it cannot be written.
    """
    options = options or Options()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _held(folder), _state(folder) as state:
            tasks = list(_tasks(items, state, options))
            crawl = _Crawl(folder, state, options, tasks)
            try:
                crawl.run()
            finally:  # also after Ctrl-C
                if state.records:
                    table = state.publish(items)
            crawl.require_any_host()
            if not state.records:
                table = state.publish(items)
            return _summary(folder, items, table, crawl)
    except OSError as error:
        raise DataSourceError(f"{folder}: images cannot be stored there ({error}).") from error


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise DataSourceError(
            f"another run is downloading into {folder}; wait for it, or stop it and run again."
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _state(folder: Path) -> Iterator[State]:
    state = State(folder)
    try:
        yield state
    finally:
        state.close()


def _tasks(items: pl.DataFrame, state: State, options: Options) -> Iterator[Task]:
    """Items that have neither their image nor only dead addresses."""
    state.forget_all_but(stored_sizes(state.folder))
    for item, images in items.select("item_id", "images").iter_rows():
        addresses = tuple(dict.fromkeys(address for address in images or () if address))
        known = state.records.get(item, {})
        mine = [known[address] for address in addresses if address in known]
        if any(_stored(record, options) for record in mine):
            continue
        dead = {record.address for record in mine if _dead(record, options)}
        if left := tuple(address for address in addresses if address not in dead):
            yield Task(item, left)


def _stored(record: Record, options: Options) -> bool:
    return record.status == OK and record.max_side == options.max_side


def _dead(record: Record, options: Options) -> bool:
    too_large = record.status == TOO_LARGE and record.max_bytes >= options.limits.max_bytes
    return record.status in PERMANENT or too_large


class _Crawl:
    """One run: workers fetch, decode and store; this thread alone writes the log."""

    def __init__(self, folder: Path, state: State, options: Options, tasks: list[Task]) -> None:
        self.folder, self.state, self.options, self.tasks = folder, state, options, tasks
        self.queue = TaskQueue(options.politeness)
        self.new = 0
        self.left_alone: list[str] = []
        self._answers: queue.Queue[tuple[Task, Record | None] | Exception | None] = queue.Queue()

    def run(self) -> None:
        """Until every task has its last word, or Ctrl-C. Raises OSError if the disk fails."""
        from tqdm import tqdm

        for task in self.tasks:
            self.queue.add(task)
        count = min(self.options.politeness.workers, len(self.tasks))
        for _ in range(count):
            # Daemons: a worker that waits for a silent host must not hold the process back at its end.
            threading.Thread(target=self._work, daemon=True).start()
        try:
            with tqdm(total=len(self.tasks), unit="image", disable=None) as bar:
                while count:
                    count -= self._next(bar)
        finally:
            self.queue.stop()
            while not self._answers.empty():
                self._log(self._answers.get())

    def require_any_host(self) -> None:
        """Raise DataSourceError if there was much to ask and nobody answered."""
        hosts = self.queue.hosts
        if self.tasks and not any(host.answered for host in hosts.values()):
            names = ", ".join(sorted(hosts)[:3]) + (" ..." if len(hosts) > 3 else "")
            raise DataSourceError(
                f"no image could be fetched: none of {len(hosts)} hosts answered ({names}). Check the "
                "network (HTTP_PROXY and HTTPS_PROXY are obeyed) and run again, or give images of your "
                "own by data.images=PATH."
            )

    def _next(self, bar: Any) -> int:
        """Handle one answer; returns 1 when a worker has ended."""
        while self.queue.closings:
            self.left_alone.append(self.queue.closings.pop(0))
            logger.warning("%s", self.left_alone[-1])
        try:
            answer = self._answers.get(timeout=0.2)  # not for ever, so that Ctrl-C is heard
        except queue.Empty:
            return 0
        if answer is None:
            return 1
        bar.update(self._log(answer))
        bar.set_postfix(new=self.new, missing=bar.n - self.new, refresh=False)
        return 0

    def _log(self, answer: tuple[Task, Record | None] | Exception | None) -> int:
        """Write a last word down; returns how many items are finished by it."""
        if isinstance(answer, Exception):
            raise answer
        if answer is None or answer[1] is None:
            return 0
        task, record = answer[0], answer[1]
        # A host that never answered says something about the network, nothing about the image.
        if self.queue.hosts[host_of(record.address)].answered:
            self.state.add(record)
        self.new += record.status == OK
        return int(record.status == OK or task.number + 1 == len(task.addresses))

    def _work(self) -> None:
        try:
            while (task := self.queue.take()) is not None:
                record, answer = self._one(task)
                final = self.queue.give(task, answer)
                self._answers.put((task, record if final else None))
        except Exception as error:  # the disk, or a fault of ours: told by the thread that asked
            self._answers.put(error)
        finally:
            self._answers.put(None)

    def _one(self, task: Task) -> tuple[Record, Answer]:
        """Fetch, decode, store."""
        max_side, max_bytes = self.options.max_side, self.options.limits.max_bytes
        answer = fetch(task.address, self.options.limits)
        record = Record(task.item, task.address, OK, max_side=max_side, max_bytes=max_bytes)
        if answer.status == OK:
            try:
                data = answer.data if max_side is None else shrink(answer.data, max_side)
                record = record._replace(**_facts(data))
            except BadImageError as error:
                answer = _unusable(error, answer)
            else:
                _store(self.folder / record.path, data)
        return record._replace(status=answer.status), answer


def _facts(data: bytes) -> dict[str, Any]:
    """What a record says of an image. Raises BadImageError."""
    facts = inspect(data)
    sha256 = hashlib.sha256(data).hexdigest()
    return {**asdict(facts), "bytes": len(data), "sha256": sha256}


def _unusable(error: BadImageError, answer: Answer) -> Answer:
    # Where the host did not say how long the image is, a damaged one may be one that was cut off.
    if error.reason == DAMAGED and not answer.complete:
        return Answer("cut off", again=True)
    return Answer(error.reason)


def _store(path: Path, data: bytes) -> None:
    """Write atomically: the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{threading.get_ident()}.part")
    part.write_bytes(data)
    os.replace(part, path)


def _summary(folder: Path, items: pl.DataFrame, table: pl.DataFrame, crawl: _Crawl) -> Summary:
    good = table.filter(pl.col("status") == OK)
    missing = Counter(table.filter(pl.col("status") != OK)["status"].to_list())
    return Summary(
        folder=folder,
        items=items.height,
        with_address=int((items["images"].list.len().fill_null(0) > 0).sum()),
        downloaded=good.height,
        bytes=int(good.unique("sha256")["bytes"].sum()),
        missing=dict(missing.most_common()),
        new=crawl.new,
        left_alone=tuple(crawl.left_alone),
    )
