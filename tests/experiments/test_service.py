"""The service around a stand-in model: what is refused, batches, time limits, full queues, the end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("fastapi")

from fastapi.testclient import TestClient

from experiments.asked import Ask, Recommendations, Recommended, require_items
from experiments.batching import Batcher, FullError, Limits
from experiments.errors import UserError
from experiments.serve import limits_of, listening
from experiments.service import Service
from experiments.service_metrics import Histogram
from experiments.service_schema import Answer, Answers, Health
from experiments.titles import ItemNames

TITLES = ["Alien (1979)", "Big (1988)", "Clue (1985)", "Dune (1984)"]
JSON = {"Content-Type": "application/json"}


class Model:
    """Ranks items by (user + item) mod 5; holds every call until it is let go on."""

    name, one_at_a_time = "stand/in", False

    def __init__(self) -> None:
        self.names = ItemNames(["1", "2", "3", "4"], TITLES, "films")
        self.users = {str(user): user for user in range(1, 301)}
        self.calls: list[list[str | None]] = []
        self.asks: list[Ask] = []
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def hold(self) -> None:
        self.entered.clear()
        self.go_on.clear()

    def user(self, raw: str) -> int:
        raise UserError(f"films has no user {raw!r}; did you mean '30'?")

    def require_possible(self, ask: Ask) -> None:
        require_items(ask)
        if ask.request:
            raise UserError("Model reads no words")

    def answer(self, asks: Sequence[Ask], k: int = 10) -> list[Recommendations]:
        self.calls.append([ask.user for ask in asks])
        self.asks += asks
        self.entered.set()
        assert self.go_on.wait(20)
        if any(ask.user == "13" for ask in asks):
            raise UserError("user 13 has all items already")
        if any(ask.user == "14" for ask in asks):
            raise RuntimeError("out of memory at 0x7f")
        return [Recommendations(ask, tuple(ranked(ask.user)[:k])) for ask in asks]


def ranked(user: str | None) -> list[Recommended]:
    scores = {item: float((int(user or 0) + item) % 5) for item in range(1, 5)}
    order = sorted(scores, key=lambda item: (-scores[item], item))
    return [Recommended(str(item), TITLES[item - 1], scores[item]) for item in order]


@pytest.fixture
def model() -> Model:
    return Model()


def served(model: Any, **limits: Any) -> TestClient:
    """Not started: ``with`` does that."""
    service = Service(lambda: model, replace(Limits(seconds=20), **limits), lambda m: {})
    client = TestClient(service.app, raise_server_exceptions=False)
    client.service = service  # type: ignore[attr-defined]
    return client


@pytest.fixture
def client(model: Model) -> Iterator[TestClient]:
    with served(model) as client:
        until(lambda: client.get("/health").status_code == 200)
        yield client


def until(true: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_what_a_list_is_asked_for_with_reaches_the_model(model: Model) -> None:
    with served(model) as client:
        until(lambda: client.get("/health").status_code == 200)
        asked = {
            "user": 7,
            "history": ["dune"],
            "exclude": [1],
            "items": [2, "3"],
            "keep_seen": True,
        }
        assert client.post("/recommend", json=asked).status_code == 200
        assert model.asks == [Ask("7", ("4",), ("1",), items=("2", "3"), keep_seen=True)]
        asked = {"user": 7, "before_target": True, "keep_seen": True}
        told = client.post("/recommend", json=asked)
        assert told.status_code == 422
        assert "leave keep_seen out" in told.json()["error"]


def test_an_answer_is_the_models_and_fits_its_description(client: TestClient) -> None:
    told = client.post("/recommend", json={"user": 7, "k": 3, "exclude": ["clue", 1]})
    assert told.status_code == 200
    answer = Answer.model_validate_json(told.text)
    assert [(s.item, s.title, s.score) for s in answer.items] == [
        (r.item, r.title, r.score) for r in ranked("7")[:3]
    ]
    assert answer.user == "7"
    many = {"asks": [{"history": ["Dune", 2]}, {"user": "9", "k": 1}]}
    lists = Answers.model_validate_json(client.post("/recommend/batch", json=many).text).lists
    assert [(e.item, e.title) for e in lists[0].history or []] == [
        ("4", TITLES[3]), ("2", TITLES[1])
    ]  # fmt: skip
    assert [s.item for s in lists[1].items] == [ranked("9")[0].item]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [("[", 400, "the body is no JSON: "), ("[" * 100_000, 400, "no JSON that can be read"),
     ('{"user": ' + "9" * 5000 + "}", 400, "no JSON that can be read"), ("\xff{", 400, "no JSON"),
     ("[]", 422, "must be a JSON object"), ("{}", 422, "nobody is asked for"),
     ('{"user": true}', 422, "user: expected a text of 1 to 200 signs, or a whole number"),
     (json.dumps({"user": "x" * 201}), 422, "user: expected a text"),
     ('{"user": 1, "k": "3"}', 422, "k: Input should be a valid integer"),
     ('{"user": 1, "k": 101}', 422, "k: Input should be less than or equal to 100"),
     ('{"user": 1, "path": "/etc/passwd"}', 422, "path: there is no such key"),
     ('{"user": 1, "' + "\\ud800" + '": 1}', 422, "unicode"),
     (json.dumps({"history": ["1"] * 1001}), 422, "history: List should have at most 1000 items"),
     (json.dumps({"user": 1, "request": "x" * 1001}), 422, "at most 1000 characters"),
     ('{"user": 1, "items": []}', 422, "items: List should have at least 1"),
     ('{"history": []}', 422, "history: List should have at least 1"),
     ('{"user": 1, "items": ["2", "2"]}', 422, "items holds an item twice"),
     ('{"user": 1, "items": ["2", "Alien", "big"]}', 422, "items holds an item twice"),
     ('{"history": ["1"], "before_target": true}', 422, "leave history out"),
     ('{"user": 1, "request": "sad"}', 422, "Model reads no words"),
     ('{"user": "301"}', 404, "films has no user '301'; did you mean '30'"),
     ('{"user": "\\ud800"}', 404, "films has no user '\\ud800'"),
     ('{"user": 1, "exclude": ["Aliens"]}', 404, "has no item 'Aliens'; did you mean 1 (Alien"),
     ('{"user": 13}', 422, "user 13 has all items already"),
     (" " * 1_048_577, 413, "the body has more than 1024 KiB")],
)  # fmt: skip
def test_what_is_refused_says_why(client: TestClient, body: str, status: int, words: str) -> None:
    told = client.post("/recommend", content=body.encode("latin-1"), headers=JSON)
    assert told.status_code == status, told.text
    assert set(told.json()) == {"error"}
    assert words in told.json()["error"]
    assert len(told.text) < 600
    assert client.post("/recommend", json={"user": 1}).status_code == 200


def test_a_body_is_measured_while_it_is_read(client: TestClient) -> None:
    """Without a Content-Length, and with one that is none."""
    sent: list[int] = []

    def parts() -> Iterator[bytes]:
        for i in range(100):
            sent.append(i)
            yield b" " * 65_536

    told = client.post("/recommend", content=parts(), headers=JSON)
    assert told.status_code == 413
    huge = client.post("/recommend", content=b"{}", headers={**JSON, "Content-Length": "9" * 40})
    assert huge.status_code == 413
    assert client.post("/recommend", content=b'{"user": 1}').status_code == 422  # no Content-Type


def test_an_ask_of_a_batch_is_named(client: TestClient) -> None:
    for asks, status, words in (
        ([{"user": 1}, {"user": 1, "k": 0}], 422, "asks[1].k: "),
        ([{"user": 1}, {"user": 999}], 404, "asks[1]: films has no user"),
        ([{"user": 1}, {"user": 2}, {"user": 13}], 422, "asks[2]: user 13 has all"),
        (
            [{"user": 1}, {"user": 1, "items": [2, "big"]}],
            422,
            "asks[1]: items holds an item twice",
        ),
        ([{"user": 1}] * 101, 422, "asks: List should have at most 100 items"),
    ):
        told = client.post("/recommend/batch", json={"asks": asks})
        assert (told.status_code, told.json()["error"].startswith(words)) == (status, True)


def test_a_failure_of_the_model_tells_nothing_of_itself(
    client: TestClient, capsys: pytest.CaptureFixture[str]
) -> None:
    told = client.post("/recommend", json={"user": 14})
    assert told.status_code == 500
    assert told.json() == {"error": "the model failed; the service's screen says how"}
    assert "RuntimeError: out of memory" in capsys.readouterr().err
    assert client.post("/recommend", json={"user": 15}).status_code == 200


def test_what_comes_while_the_model_computes_is_one_call(client: TestClient, model: Model) -> None:
    model.hold()
    with ThreadPoolExecutor(20) as pool:
        first = pool.submit(client.post, "/recommend", json={"user": 1})
        assert model.entered.wait(10)
        others = [
            pool.submit(client.post, "/recommend", json={"user": u, "k": 1 + u % 4})
            for u in range(2, 18)
        ]
        until(lambda: client.service.batcher.waiting == 16)  # type: ignore[attr-defined]
        model.go_on.set()
        assert first.result().status_code == 200
        answers = {u: f.result() for u, f in zip(range(2, 18), others, strict=True)}
    assert model.calls[0] == ["1"]
    assert sorted(map(int, filter(None, model.calls[1]))) == list(range(2, 18))
    assert answers.pop(13).status_code == 422  # and they alone: what fails is asked again by halves
    assert answers.pop(14).status_code == 500
    for user, told in answers.items():
        shown = [item["item"] for item in told.json()["items"]]
        assert shown == [r.item for r in ranked(str(user))][: 1 + user % 4]
    told = client.get("/metrics").text
    assert 'llmrec_batch_size_bucket{le="1"} 1' in told
    assert "llmrec_batch_size_sum 17.000000" in told
    assert "llmrec_queue_length 0" in told
    assert 'llmrec_requests_total{path="/recommend",status="422"} 1' in told


def test_late_is_504_and_what_nobody_waits_for_is_not_computed(model: Model) -> None:
    with served(model, seconds=0.4) as client, ThreadPoolExecutor(4) as pool:
        until(lambda: client.get("/health").status_code == 200)
        model.hold()
        running = pool.submit(client.post, "/recommend", json={"user": 1})
        assert model.entered.wait(10)
        waiting = pool.submit(client.post, "/recommend", json={"user": 2})
        for late in (running, waiting):
            assert late.result().status_code == 504
            assert "no answer within 0.4 s" in late.result().json()["error"]
        model.go_on.set()
        assert client.post("/recommend", json={"user": 3}).status_code == 200
    assert model.calls == [["1"], ["3"]]


def test_the_work_of_a_client_that_has_gone_is_dropped(model: Model) -> None:
    """Straight to the application: the test's client never goes."""
    with served(model, wait=300) as client:
        until(lambda: client.get("/health").status_code == 200)
        service = client.service  # type: ignore[attr-defined]
        waited: list[int] = []
        sent: list[Any] = []
        content = b'{"user": 5}'
        parts = [{"type": "http.request", "body": content}, {"type": "http.disconnect"}]

        async def receive() -> Any:
            waited.append(service.batcher.waiting)
            return parts.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": "/recommend", "query_string": b"",
            "headers": [(b"content-type", b"application/json")], "http_version": "1.1",
            "scheme": "http", "server": ("t", 80), "client": ("t", 1), "root_path": "",
        }  # fmt: skip
        client.portal.call(service.app, scope, receive, send)  # type: ignore[union-attr]
        assert sent[0]["status"] == 499
        assert waited == [0, 1]  # it was in the queue when the client went
        assert client.post("/recommend", json={"user": 6}).status_code == 200
    assert model.calls == [["6"]]


def test_a_full_queue_is_503_and_says_when_to_come_back(model: Model) -> None:
    with served(model, queue=2) as client, ThreadPoolExecutor(4) as pool:
        until(lambda: client.get("/health").status_code == 200)
        model.hold()
        first = pool.submit(client.post, "/recommend", json={"user": 1})
        assert model.entered.wait(10)
        others = [pool.submit(client.post, "/recommend", json={"user": u}) for u in (2, 3)]
        until(lambda: client.service.batcher.waiting == 2)  # type: ignore[attr-defined]
        assert "llmrec_queue_length 2" in client.get("/metrics").text
        told = client.post("/recommend", json={"user": 4})
        assert (told.status_code, told.headers["Retry-After"]) == (503, "1")
        assert told.json()["error"] == (
            "2 asks wait already, and there is room for 0: ask again later"
        )
        model.go_on.set()
        assert [f.result().status_code for f in (first, *others)] == [200] * 3


def test_a_batch_that_the_queue_never_holds_is_too_large(model: Model) -> None:
    with served(model, queue=3) as client:
        until(lambda: client.get("/health").status_code == 200)
        told = client.post("/recommend/batch", json={"asks": [{"user": 1}] * 4})
        assert told.status_code == 413
        assert told.json() == {
            "error": "asks: there are 4, and the queue holds 3: ask for fewer at once"
        }
        assert "Retry-After" not in told.headers
        told = client.post("/recommend/batch", json={"asks": [{"user": 1}] * 3})
        assert told.status_code == 200


def test_until_the_model_is_loaded_it_is_alive_and_not_ready(model: Model) -> None:
    loaded = threading.Event()

    def load() -> Model:
        assert loaded.wait(20)
        return model

    service = Service(load, Limits(), lambda m: {})
    with TestClient(service.app) as client:
        told = client.get("/health")
        assert told.status_code == 503
        assert Health.model_validate_json(told.text) == Health(alive=True, ready=False)
        refused = client.post("/recommend", json={"user": 1})
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert "the model is being loaded" in refused.json()["error"]
        assert client.get("/model").status_code == 503
        loaded.set()
        until(lambda: client.get("/health").json() == {"alive": True, "ready": True})


def test_a_model_that_cannot_be_loaded_ends_the_service() -> None:
    ended = threading.Event()

    def load() -> Model:
        raise UserError("x/y has not been trained")

    service = Service(load, Limits(), lambda m: {}, ended.set)
    with TestClient(service.app) as client:
        assert ended.wait(10)
        assert str(service.batcher.error) == "x/y has not been trained"
        assert client.get("/health").json() == {"alive": True, "ready": False}


def test_the_end_waits_for_what_was_accepted(model: Model) -> None:
    batcher = Batcher(lambda: model, Limits(batch=2))
    batcher.start()
    until(lambda: batcher.ready)
    model.hold()
    futures = batcher.submit([(Ask(str(user)), 2) for user in range(1, 8)])
    assert model.entered.wait(10)
    futures[6].cancel()
    end = threading.Thread(target=batcher.close)
    end.start()
    until(lambda: not batcher.ready)
    with pytest.raises(FullError, match="the service ends"):
        batcher.submit([(Ask("1"), 1)])
    model.go_on.set()
    end.join(10)
    assert not end.is_alive()
    assert [[r.item for r in f.result(0).items] for f in futures[:6]] == [
        [r.item for r in ranked(str(user))[:2]] for user in range(1, 7)
    ]
    assert model.calls == [["1", "2"], ["3", "4"], ["5", "6"]]


def test_lists_of_one_kind_are_asked_for_together(model: Model) -> None:
    """The oldest and its kind first; lists up to 20 are of one kind, and a longer one is not."""
    asks = [(Ask("1"), 1), (Ask("2", before_target=True), 1), (Ask("3"), 20), (Ask("4"), 21)]
    for alone, expected in (
        (False, [["1", "3"], ["2"], ["4"]]),
        (True, [["1"], ["2"], ["3"], ["4"]]),
    ):
        model.one_at_a_time, model.calls = alone, []
        batcher = Batcher(lambda: model, Limits(wait=1))
        batcher.start()
        until(lambda batcher=batcher: batcher.ready)
        for future in batcher.submit(asks):
            future.result(10)
        assert model.calls == expected
        batcher.close()


def test_the_page_needs_no_other_host(client: TestClient) -> None:
    told = client.get("/docs")
    assert told.status_code == 200
    for words in ("POST /recommend/batch", "GET /metrics", "before_target", "from 1, to 100"):
        assert words in told.text
    assert "<script" not in told.text
    assert "//cdn" not in told.text
    described = client.get("/openapi.json").json()
    asked = described["components"]["schemas"]["Asked"]
    assert asked["additionalProperties"] is False
    assert asked["properties"]["k"]["maximum"] == 100
    assert client.get("/redoc").status_code == 404


def test_a_histogram_adds_up() -> None:
    made = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        made.add(value)
    assert list(made.lines("s", 'path="/"')) == [
        's_bucket{path="/",le="1.0"} 2', 's_bucket{path="/",le="2.0"} 3',
        's_bucket{path="/",le="+Inf"} 4', 's_sum{path="/"} 12.000000', 's_count{path="/"} 4',
    ]  # fmt: skip


def test_limits_and_addresses_are_read() -> None:
    assert limits_of("seconds=1.5 batch=7") == Limits(seconds=1.5, batch=7)
    for text, words in (
        ("secs=1", "LIMITS has no 'secs'; did you mean 'seconds'"),
        ("batch=1.5", "'batch=1.5', expected a positive whole number"),
        ("wait=nan", "'wait=nan', expected a positive number"), ("queue", "'queue'"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            limits_of(text)
    with listening("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"PORT={port} cannot be listened on: Address already"):
            listening("127.0.0.1", port)
    with pytest.raises(UserError, match=r"HOST=no\.such\.host\.invalid"):
        listening("no.such.host.invalid", 0)
