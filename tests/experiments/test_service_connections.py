"""Sockets of a real server around a stand-in model: half requests, too many, slow bodies, unread answers."""

from __future__ import annotations

import json
import re
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("fastapi")

from experiments.batching import Limits
from experiments.serve import listening
from experiments.service import Service
from experiments.service_connections import room, server
from tests.experiments.test_service import Model, until

HALF = b"POST /recommend HTTP/1.1\r\nHost: x\r\n"


def request(path: str, asked: Any = None, body: bytes | None = None, length: int = 0) -> bytes:
    """A whole one, or one whose body has more bytes than are given."""
    body = json.dumps(asked).encode() if body is None else body
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    if asked is None and not length:
        return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    return f"{head}Content-Length: {length or len(body)}\r\n\r\n".encode() + body


def answer(wire: socket.socket) -> tuple[int, str, str]:
    """Status, headers and body of the next answer."""
    told = b""
    while b"\r\n\r\n" not in told:
        more = wire.recv(1)
        assert more, told
        told += more
    head = told.decode().lower()
    left = int(re.findall(r"content-length: (\d+)", head)[0])
    body = b""
    while len(body) < left:
        body += wire.recv(left - len(body))
    return int(head.split()[1]), head, body.decode()


class Place:
    """Where a server listens."""

    def __init__(self, port: int) -> None:
        self.port = port

    def open(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def ask(self, path: str, asked: Any = None) -> tuple[int, str, str]:
        with self.open() as wire:
            wire.sendall(request(path, asked))
            return answer(wire)

    def count(self, name: str) -> int:
        return int(re.findall(rf"^{re.escape(name)} (\d+)$", self.ask("/metrics")[2], re.M)[0])


@contextmanager
def serving(model: Model, most: int = 500, **limits: Any) -> Iterator[Place]:
    service = Service(lambda: model, replace(Limits(seconds=20), **limits), lambda m: {})
    running = server(service, most, 1000)
    with listening("127.0.0.1", 0) as place:
        found = Place(place.getsockname()[1])
        thread = threading.Thread(target=running.run, kwargs={"sockets": [place]})
        thread.start()
        try:
            until(lambda: service.batcher.ready and running.started)
            yield found
        finally:
            model.go_on.set()
            running.should_exit = True
            thread.join(20)
    assert not thread.is_alive()


def ends(wire: socket.socket) -> bool:
    try:
        return wire.recv(1) == b""
    except ConnectionResetError:
        return True


def refuses(wire: socket.socket, more: bytes) -> bool:
    try:
        wire.sendall(more)
    except OSError:
        return True
    return False


def test_headers_must_end_in_time_and_answers_may_take_longer(
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = Model()
    with serving(model, headers=0.4) as place, place.open() as dripping, place.open() as silent:
        until(lambda: refuses(dripping, b"G"))  # more of it does not prolong the time
        with place.open() as kept:
            kept.sendall(request("/health"))
            assert answer(kept)[0] == 200
            time.sleep(0.5)  # between requests it may be silent for longer
            kept.sendall(request("/recommend", {"user": 7}) + HALF)
            assert answer(kept)[0] == 200
            kept.sendall(b"A: b\r\n")
            again = time.monotonic()
            assert ends(kept)
            assert 0.3 < time.monotonic() - again < 3
        assert ends(silent)
        assert place.count("llmrec_connections_late_total") == 3
        model.hold()
        with place.open() as slow:
            slow.sendall(request("/recommend", {"user": 8}))
            assert model.entered.wait(10)
            time.sleep(0.6)
            model.go_on.set()
            assert answer(slow)[0] == 200
    assert capfd.readouterr().err == ""


@pytest.fixture
def files() -> Iterator[None]:
    """As many as before may be open after a test."""
    held = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, held)


@pytest.mark.usefixtures("files")
def test_six_hundred_that_never_ask_keep_nobody_from_asking(
    capfd: pytest.CaptureFixture[str],
) -> None:
    room()  # both ends are this process's own
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 1500:
        pytest.skip("a process may open fewer than 1,500 files here")
    with serving(Model(), most=602, requests=2) as place, ExitStack() as opened:
        for _ in range(600):
            opened.enter_context(place.open()).sendall(HALF)
        assert place.ask("/health")[0] == 200
        told = place.ask("/recommend", {"user": 7, "k": 1})
        assert json.loads(told[2])["items"][0]["item"] == "2"
        assert place.count("llmrec_connections_refused_total") == 0
        two = [opened.enter_context(place.open()) for _ in range(2)]
        for wire in two:  # they are among the most
            wire.sendall(request("/health"))
            assert answer(wire)[0] == 200
        for _ in range(3):
            assert ends(opened.enter_context(place.open()))
        two.pop().close()
        until(lambda: _answers(place))
        assert place.count("llmrec_connections_refused_total") >= 3
    assert capfd.readouterr().err == ""


def _answers(place: Place) -> bool:
    try:
        return place.ask("/health")[0] == 200
    except (AssertionError, OSError):
        return False


def test_more_requests_than_are_worked_on_are_refused_as_all_others_are(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """One that computes and one whose body is slow are two; the third sends its body in vain, and asks on."""
    model = Model()
    with serving(model, requests=2, headers=0.6) as place:
        model.hold()
        with place.open() as first, place.open() as second, place.open() as third:
            first.sendall(request("/recommend", {"user": 7}))
            assert model.entered.wait(10)
            second.sendall(request("/recommend", body=b'{"us', length=11))
            until(lambda: place.ask("/docs")[0] == 503)
            third.sendall(request("/recommend", body=b"{", length=200_000))
            status, head, body = answer(third)
            assert (status, "retry-after: 1\r\n" in head) == (503, True)
            assert "content-type: application/json" in head
            told = {"error": "2 requests are in work already: ask again later"}
            assert json.loads(body) == told
            assert place.ask("/health")[0] == 200
            name = 'llmrec_requests_total{path="/recommend",status="503"}'
            assert place.count(name) == 1
            third.sendall(b" " * 199_999 + request("/health"))
            assert answer(third)[0] == 200
            third.sendall(request("/recommend", body=b"{", length=9))
            assert answer(third)[0] == 503
            third.sendall(b" ")
            assert ends(third)  # the rest of what was refused does not come
            second.sendall(b'er": 9}')
            model.go_on.set()
            assert [answer(first)[0], answer(second)[0]] == [200, 200]
        assert place.ask("/recommend", {"user": 7})[0] == 200
    assert capfd.readouterr().err == ""


def test_what_is_no_http_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    chunked = b"POST /recommend HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    upgrade = (
        b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    )
    with serving(Model()) as place:
        with place.open() as wire:
            wire.sendall(b"\x16\x03\x01 hello\r\n\r\n")
            assert wire.recv(12) == b"HTTP/1.1 400"
        with place.open() as wire:
            wire.sendall(chunked)
            until(lambda: place.count("llmrec_connections_late_total") == 0)
            wire.sendall(b"no length\r\n")
            assert ends(wire)
        with place.open() as wire:
            wire.sendall(upgrade)
            assert answer(wire)[0] == 200
        until(lambda: place.count('llmrec_requests_total{path="/recommend",status="499"}') == 1)
    assert capfd.readouterr().err == ""


def test_answers_that_are_not_read_end_the_connection() -> None:
    with serving(Model(), seconds=0.5) as place, socket.socket() as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.settimeout(10)
        wire.connect(("127.0.0.1", place.port))
        wire.setblocking(False)
        asked = request("/openapi.json") * 100

        def closed() -> bool:
            try:
                wire.send(asked)
            except BlockingIOError:
                return place.count("llmrec_connections_late_total") == 1
            except OSError:
                return True
            return False

        until(closed)
        assert place.count("llmrec_connections_late_total") == 1
        assert place.ask("/recommend", {"user": 7})[0] == 200


def test_room_is_what_the_process_may_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """The soft limit rises to the hard one, and a part is kept for files and for what is not counted yet."""
    held = [0, 0]
    monkeypatch.setattr(resource, "getrlimit", lambda which: tuple(held))
    monkeypatch.setattr(resource, "setrlimit", lambda which, to: held.__setitem__(slice(None), to))
    for soft, hard, raised, expected in (
        (1024, 1024, 1024, (1024 - 4 * 64 - 128, 64)),
        (1024, 4096, 4096, (4096 - 4 * 256 - 128, 256)),
        (256, resource.RLIM_INFINITY, 10240, (10240 - 4 * 640 - 128, 640)),
        (50_000, 60_000, 50_000, (10240 - 4 * 640 - 128, 640)),
        (64, 64, 64, (16, 4)),
    ):
        held[:] = soft, hard
        assert room() == expected
        assert held == [raised, hard]
