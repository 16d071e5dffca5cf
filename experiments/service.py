"""A finished experiment over HTTP: what is asked for, what is refused, and how the service fares.

Requests are data: ids are looked up, words become part of a prompt, and nothing is opened, loaded or run that
a request names.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from experiments.asked import Ask, Recommendations, plain_values
from experiments.batching import Batcher, BrokenError, FullError, Limits
from experiments.errors import UserError
from experiments.service_guard import Guard
from experiments.service_metrics import ServiceMetrics
from experiments.service_page import page
from experiments.service_schema import About, Answer, Answers, Asked, AskedMany, Health, Refusal

_MOST_TOLD = 3  # mistakes of one request
_SEARCHES = 4  # unknown names whose near ones are looked for at once
_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": Refusal, "description": "not JSON"},
    404: {"model": Refusal, "description": "no such user or item"},
    413: {"model": Refusal, "description": "too large"},
    422: {"model": Refusal, "description": "not what can be asked"},
    503: {"model": Refusal, "description": "too much to do, or not ready: see Retry-After"},
    504: {"model": Refusal, "description": "no answer within the time limit"},
}


class Service:
    """The application, and what it holds.

    Args:
        load: the finished experiment, a ``Recommender``; called on the thread that asks it.
        limits: see there.
        about: ``GET /model`` of the loaded model.
        failed: called when loading failed; ``batcher.error`` says why.
    """

    def __init__(
        self, load: Callable[[], Any], limits: Limits, about: Callable[[Any], dict[str, Any]],
        failed: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.limits, self.about, self.metrics = limits, about, ServiceMetrics()
        self.batcher = Batcher(load, limits, self.metrics.batch, failed)
        self._searching = 0
        inner = FastAPI(
            title="Recommendations", version="1", docs_url=None, redoc_url=None,
            lifespan=self._life, description=__doc__.split("\n\n")[0],
        )  # fmt: skip
        self._answer_errors(inner)
        self._route(inner)
        self.app = Guard(inner, limits, self.metrics, inner.openapi()["paths"])

    @asynccontextmanager
    async def _life(self, app: FastAPI) -> AsyncIterator[None]:
        self.batcher.start()
        yield
        await asyncio.to_thread(self.batcher.close)

    # Routes ----------------------------------------------------------------------------------------------

    def _route(self, app: FastAPI) -> None:
        @app.post("/recommend", response_model=Answer, responses=_REFUSALS)
        async def recommend(asked: Asked, request: Request) -> JSONResponse:
            """One list, for a user or behind a history."""
            (told,) = await self._told([asked], request)
            return JSONResponse(told)

        @app.post("/recommend/batch", response_model=Answers, responses=_REFUSALS)
        async def recommend_batch(asked: AskedMany, request: Request) -> JSONResponse:
            """Several lists; all are answered, or none."""
            return JSONResponse({"lists": await self._told(asked.asks, request, "asks[{}]: ")})

        @app.get("/health", response_model=Health, responses={503: {"model": Health}})
        async def health() -> JSONResponse:
            """200 when the service can be asked, 503 while it loads or ends."""
            ready = self.batcher.ready
            return JSONResponse({"alive": True, "ready": ready}, 200 if ready else 503)

        @app.get("/model", response_model=About, responses={503: _REFUSALS[503]})
        async def model() -> JSONResponse:
            """What answers, and what its test has measured."""
            return JSONResponse(self.about(self._model()))

        @app.get("/metrics", response_class=PlainTextResponse)
        async def metrics() -> PlainTextResponse:
            """Counts and times as Prometheus reads them."""
            waiting, ready = self.batcher.waiting, self.batcher.ready
            text = self.metrics.text({
                "llmrec_queue_length": ("Asks that wait.", waiting),
                "llmrec_ready": ("1 when the service can be asked.", ready),
            })  # fmt: skip
            return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

        @app.get("/docs", include_in_schema=False)
        async def docs() -> HTMLResponse:
            return HTMLResponse(page(app.openapi()))

    # Asking ----------------------------------------------------------------------------------------------

    def _model(self) -> Any:
        if self.batcher.model is None:
            raise FullError("the model is being loaded")
        return self.batcher.model

    async def _told(
        self, asked: Sequence[Asked], request: Request, place: str = ""
    ) -> list[dict[str, Any]]:
        """Plain answers; ``place`` names the ask in an error."""
        model, asks = self._model(), []
        if len(asked) > (most := self.limits.queue):
            raise HTTPException(
                413,
                f"asks: there are {len(asked)}, and the queue holds {most}: ask for fewer at once",
            )
        for i, each in enumerate(asked):
            try:
                asks.append((await self._found(model, each), each.k))
            except HTTPException as error:
                raise HTTPException(
                    error.status_code, place.format(i) + str(error.detail)
                ) from error
        lists = await self._answers(asks, request, place)
        return [plain_values(found, model.name, model.names) for found in lists]

    async def _found(self, model: Any, asked: Asked) -> Ask:
        """Users and items looked up; 404 where there is none, 422 where the method cannot do that."""
        user = asked.user
        if user is not None and user not in model.users:
            await self._unknown(model.user, user)
        ask = Ask(
            user,
            await self._items(model, asked.history),
            await self._items(model, asked.exclude) or (),
            asked.request.strip(),
            asked.before_target,
            await self._items(model, asked.items),
            asked.keep_seen,
        )
        try:
            model.require_possible(ask)
        except UserError as error:
            raise HTTPException(422, str(error)) from error
        return ask

    async def _items(self, model: Any, names: list[str] | None) -> tuple[str, ...] | None:
        return None if names is None else tuple([await self._item(model, name) for name in names])

    async def _item(self, model: Any, name: str) -> str:
        names = model.names
        if names.knows(name):
            return name
        try:
            found = names.named(name)  # a title
        except UserError as error:
            raise HTTPException(404, str(error)) from error
        item: str = names.ids[(found or await self._unknown(names.find, name)) - 1]
        return item

    async def _unknown(self, find: Callable[[str], int], name: str) -> int:
        """404 with near ones. They take a while to find: not on the loop, and for a few at once."""
        if self._searching >= _SEARCHES:
            raise HTTPException(
                404, f"there is no {name!r}; near ones are looked for on quieter days"
            )
        self._searching += 1
        try:
            return await asyncio.to_thread(find, name)
        except UserError as error:
            raise HTTPException(404, str(error)) from error
        finally:
            self._searching -= 1

    async def _answers(
        self, asks: Sequence[tuple[Ask, int]], request: Request, place: str
    ) -> list[Recommendations]:
        """What the model says, within the time limit and while the client is there."""
        futures = [asyncio.wrap_future(f) for f in self.batcher.submit(asks)]
        work = asyncio.gather(*futures, return_exceptions=True)
        gone = asyncio.ensure_future(request.receive())
        left = self.limits.seconds - (time.perf_counter() - request.scope["started"])
        either: set[asyncio.Future[Any]] = {work, gone}
        try:
            await asyncio.wait(either, timeout=max(0.0, left), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                late = f"no answer within {self.limits.seconds:g} s: ask later, or for less"
                raise HTTPException(*((499, "the client has gone") if gone.done() else (504, late)))
            found = work.result()
        finally:
            gone.cancel()
            work.cancel()  # and each of its futures: what is not computed yet never is
        for i, each in enumerate(found):
            if isinstance(each, UserError):
                raise HTTPException(422, place.format(i) + str(each))
            if isinstance(each, BrokenError):
                raise HTTPException(500, str(each))
            if isinstance(each, BaseException):
                raise each
        return [each for each in found if isinstance(each, Recommendations)]

    # Refusing --------------------------------------------------------------------------------------------

    def _answer_errors(self, app: FastAPI) -> None:
        @app.exception_handler(RequestValidationError)
        async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
            mistakes = error.errors()
            status = 400 if mistakes[0]["type"] == "json_invalid" else 422
            told = [_mistake(each) for each in mistakes[:_MOST_TOLD]]
            more = len(mistakes) - len(told)
            return _refusal(status, "; ".join(told) + (f"; and {more} more" if more else ""))

        @app.exception_handler(StarletteHTTPException)
        async def refused(request: Request, error: StarletteHTTPException) -> JSONResponse:
            unread = (
                error.status_code == 400
            )  # FastAPI's, of depths and numbers that Python refuses
            words = "the body is no JSON that can be read" if unread else str(error.detail)
            return _refusal(error.status_code, words, error.headers)

        @app.exception_handler(FullError)
        async def full(request: Request, error: FullError) -> JSONResponse:
            return _refusal(503, f"{error}: ask again later", _RETRY)

        @app.exception_handler(Exception)
        async def failed(request: Request, error: Exception) -> JSONResponse:
            return _refusal(500, "the service failed; its screen says how")


_RETRY = {"Retry-After": "1"}


def _refusal(status: int, words: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    sendable = words.encode("utf-8", "replace").decode("utf-8")
    return JSONResponse({"error": sendable}, status, headers=dict(headers or {}))


def _mistake(error: Mapping[str, Any]) -> str:
    """``k: Input should be ...``, without what was given, which may be long."""
    if error["type"] == "json_invalid":
        return f"the body is no JSON: {error['ctx']['error']}"
    path = [
        ascii(part)[1:-1][:60] if isinstance(part, str) else f"[{part}]" for part in error["loc"]
    ]
    where = ".".join(path[1:]).replace(".[", "[")
    words = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        words = "there is no such key"
    if not where and error["type"] in ("model_attributes_type", "model_type", "missing"):
        words = (
            "the body must be a JSON object, sent with the header Content-Type: application/json"
        )
    return f"{where}: {words}" if where else words
