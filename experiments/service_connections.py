"""Connections of a service: how many may be open, and how long one may keep the service waiting.

uvicorn's own bound counts connections that have asked for nothing, refuses others in words that are no JSON,
and prints a line for each. For the end of headers, and for an answer to be read, it waits for ever.
"""

from __future__ import annotations

import asyncio
import math
import resource
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from experiments.batching import Limits
from experiments.service_metrics import ServiceMetrics

if TYPE_CHECKING:
    from experiments.service import Service

_MOST_FILES = 10240  # of a process; connections beyond some thousands take too much memory
_OWN_FILES = 128  # what the model and the event loop have open


def room() -> tuple[int, int]:
    """Connections that may be open, and those that may wait to be accepted.

    The process is allowed as many files as it may ask for. What was accepted in the last few rounds of the
    loop is open and not counted yet: a quarter is kept for that.
    """
    files, unlimited = resource.RLIMIT_NOFILE, resource.RLIM_INFINITY
    soft, hard = resource.getrlimit(files)
    wanted = _MOST_FILES if hard == unlimited else min(hard, _MOST_FILES)
    if soft != unlimited and soft < wanted:
        with suppress(ValueError, OSError):  # macOS refuses some numbers below its hard limit
            resource.setrlimit(files, (wanted, hard))
            soft = wanted
    allowed = _MOST_FILES if soft == unlimited else min(soft, _MOST_FILES)
    waiting = allowed // 16
    return max(16, allowed - 4 * waiting - _OWN_FILES), max(4, waiting)


class Connection(H11Protocol):
    """uvicorn's connection, with an end.

    Args:
        limits: ``headers`` and ``seconds``.
        metrics: that count what is refused or closed.
        most: connections; one beyond is closed as it opens.
        uvicorns: arguments that uvicorn gives.
    """

    def __init__(self, limits: Limits, metrics: ServiceMetrics, most: int, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._limits, self._metrics, self._most = limits, metrics, most
        self._owed: Any = None  # what the client has begun to send and has not finished
        self._sending: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """It is open: the first request must come."""
        super().connection_made(transport)
        if len(self.connections) > self._most:
            self._metrics.connection_refused()
            transport.abort()
        else:
            self._expect((h11.IDLE, None))

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed: nothing is expected any more."""
        self._expect(None)
        _cancel(self._reading)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes came: either a request is whole with them, or its rest must come in time."""
        super().data_received(data)
        if self.transport.is_closing():
            return
        state = self.conn.their_state
        refused = state is h11.SEND_BODY and self.cycle.response_complete
        self._expect((state, self.cycle) if state is h11.IDLE or refused else None)

    def on_response_complete(self) -> None:
        """An answer is given: it must be read."""
        super().on_response_complete()
        _cancel(self._reading)
        self._reading = None
        if self.transport.get_write_buffer_size():
            self._reading = self.loop.call_later(self._limits.seconds, self._unread)

    def send_400_response(self, msg: str) -> None:
        """No HTTP: told where a request is due, and else the end."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and (
            self.cycle is None or self.cycle.response_complete
        ):
            super().send_400_response(msg)
        else:
            self.transport.abort()

    def _expect(self, owed: Any) -> None:
        """The time runs from the beginning of what is owed: more of it does not prolong it."""
        if owed == self._owed:
            return
        self._owed = owed
        _cancel(self._sending)
        self._sending = owed and self.loop.call_later(self._limits.headers, self._late)

    def _unread(self) -> None:
        if self.transport.get_write_buffer_size():
            self._late()

    def _late(self) -> None:
        self._metrics.connection_late()
        self.transport.abort()


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def server(service: Service, most: int, waiting: int) -> uvicorn.Server:
    """A service's server.

    Args:
        service: what answers.
        most, waiting: see ``room``.
    """
    connection: Any = partial(Connection, service.limits, service.metrics, most)
    return uvicorn.Server(uvicorn.Config(
        service.app, http=connection, ws="none", backlog=waiting, log_level="error",
        access_log=False, server_header=False, lifespan="on",
        timeout_graceful_shutdown=math.ceil(service.limits.seconds) + 5,
    ))  # fmt: skip
