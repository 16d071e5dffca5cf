"""Around a service: how many requests at once, how large a body, how long it may take; and counts."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from experiments.batching import Limits
from experiments.service_metrics import ServiceMetrics

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

ALWAYS = ("/health", "/metrics")  # answered however much there is to do; they have no body


class RefusedError(Exception):
    """An HTTP status and why."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


class Guard:
    """An ASGI application that hands whole bodies of a bounded size to another.

    Args:
        app: the other.
        limits: of a request.
        metrics: that count.
        paths: that are counted by their names.
    """

    def __init__(
        self, app: App, limits: Limits, metrics: ServiceMetrics, paths: Collection[str]
    ) -> None:
        self.app, self.limits, self.metrics, self.paths = app, limits, metrics, frozenset(paths)
        self._working = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        scope["started"] = start
        try:
            if scope["path"] in ALWAYS:
                await self.app(scope, _again(b"", receive), noted)
            else:
                await self._work(scope, receive, noted)
        except RefusedError as error:
            await _refuse(noted, error)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.request(path, status, time.perf_counter() - start)

    async def _work(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One of so many at once."""
        if self._working >= self.limits.requests:
            busy = f"{self._working} requests are in work already: ask again later"
            raise RefusedError(503, busy)
        self._working += 1
        try:
            body = await self._whole(scope, receive)
            await self.app(scope, _again(body, receive), send)
        finally:
            self._working -= 1

    async def _whole(self, scope: MutableMapping[str, Any], receive: Receive) -> bytes:
        try:
            return await asyncio.wait_for(self._body(scope, receive), self.limits.seconds)
        except asyncio.TimeoutError as error:
            late = f"the request did not come within {self.limits.seconds:g} s"
            raise RefusedError(408, late) from error

    async def _body(self, scope: MutableMapping[str, Any], receive: Receive) -> bytes:
        most = self.limits.kilobytes * 1024
        refused = RefusedError(413, f"the body has more than {self.limits.kilobytes} KiB")
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or len(length) > 18 or int(length) > most:
            raise refused
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise RefusedError(499, "the client has gone")
            body += message.get("body", b"")
            if len(body) > most:
                raise refused
            if not message.get("more_body", False):
                return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """The body once more, and then what else comes: that the client has gone."""
    told = False

    async def own() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return own


async def _refuse(send: Send, error: RefusedError) -> None:
    # What is still to come of a request that is too large or too slow is not read: the connection ends.
    content = json.dumps({"error": str(error)}).encode()
    then = (b"retry-after", b"1") if error.status == 503 else (b"connection", b"close")
    headers = [(b"content-type", b"application/json"), then,
               (b"content-length", str(len(content)).encode())]  # fmt: skip
    start = {"type": "http.response.start", "status": error.status, "headers": headers}
    await send(start)
    await send({"type": "http.response.body", "body": content})
