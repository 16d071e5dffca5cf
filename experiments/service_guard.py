"""Around a service: how large a body may be, how long it may take to come, and what is counted."""

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

        try:
            body = await asyncio.wait_for(self._body(scope, receive), self.limits.seconds)
        except RefusedError as error:
            await _refuse(noted, error)
        except asyncio.TimeoutError:
            late = f"the request did not come within {self.limits.seconds:g} s"
            await _refuse(noted, RefusedError(408, late))
        else:
            scope["started"] = start
            await self.app(scope, _again(body, receive), noted)
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.request(path, status, time.perf_counter() - start)

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
    # What is still to come is not read: the connection ends.
    content = json.dumps({"error": str(error)}).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close"),
               (b"content-length", str(len(content)).encode())]  # fmt: skip
    start = {"type": "http.response.start", "status": error.status, "headers": headers}
    await send(start)
    await send({"type": "http.response.body", "body": content})
