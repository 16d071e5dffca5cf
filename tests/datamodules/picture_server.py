"""A local web server with manners to be tested, and small pictures made for it."""

from __future__ import annotations

import io
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


def picture(format_name: str = "JPEG", size: tuple[int, int] = (8, 6), shade: int = 0) -> bytes:
    """Not one colour, so that every decoder has something to do."""
    image = Image.linear_gradient("L").resize(size).point(lambda v: (v + shade) % 256)
    out = io.BytesIO()
    image.convert("RGB").save(out, format_name)
    return out.getvalue()


class PictureServer(ThreadingHTTPServer):
    """``pages`` maps a path to what answers it; every request is noted with its time."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages: dict[str, Callable[[Handler], None]] = {}
        self.asked: list[tuple[str, float]] = []
        self.agents: set[str] = set()
        self.active = self.most_active = 0
        self.lock = threading.Lock()

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.server_port}/{path}"

    @property
    def counts(self) -> Counter[str]:
        return Counter(path for path, _ in self.asked)

    def times(self, path: str) -> list[float]:
        return [when for asked, when in self.asked if asked == path]


class Handler(BaseHTTPRequestHandler):
    server: PictureServer

    def do_GET(self) -> None:
        server, path = self.server, self.path[1:]
        with server.lock:
            server.asked.append((path, time.monotonic()))
            server.agents.add(self.headers["User-Agent"])
            server.active += 1
            server.most_active = max(server.most_active, server.active)
        try:
            server.pages.get(path, status(404))(self)
        except OSError:
            pass  # the client hung up
        finally:
            with server.lock:
                server.active -= 1

    def log_message(self, *args: object) -> None:
        """Silence."""


def body(data: bytes, pause: float = 0.0, length: int | None = -1) -> Callable[[Handler], None]:
    """200 with ``data``; ``length`` None leaves Content-Length out, another number lies."""

    def answer(handler: Handler) -> None:
        time.sleep(pause)
        handler.send_response(200)
        handler.send_header("Content-Type", "text/nonsense")  # what decides is the content
        if length is not None:
            handler.send_header("Content-Length", str(len(data) if length < 0 else length))
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def status(code: int, **headers: str) -> Callable[[Handler], None]:
    def answer(handler: Handler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def in_turn(*answers: Callable[[Handler], None]) -> Callable[[Handler], None]:
    """The first answer once, the second once, ..., the last for ever."""
    left = list(answers)
    return lambda handler: (left.pop(0) if len(left) > 1 else left[0])(handler)


def dripping(data: bytes, pause: float) -> Callable[[Handler], None]:
    """A byte every ``pause`` seconds: never silent, never done."""

    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for value in data:
            handler.wfile.write(bytes([value]))
            time.sleep(pause)

    return answer


@contextmanager
def serving() -> Iterator[PictureServer]:
    with PictureServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()
