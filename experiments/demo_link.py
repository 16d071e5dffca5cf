"""Two processes that talk: one JSON line a call, one JSON line an answer, over a pair of sockets.

The page needs Gradio, which fits into no environment with our other packages (see the Makefile); the model
answers from its own process. The pair is inherited: nobody else can reach it. The standard library alone.
"""

from __future__ import annotations

import json
import socket
import threading
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from typing import Any

LONGEST = 64 * 1024  # bytes of a call; answers hold pictures and may be longer
WORKERS = 4

Calls = Mapping[str, Callable[..., Any]]


class RefusedError(Exception):
    """What the other side says in place of an answer: a sentence for people."""


def serve(pair: socket.socket, calls: Calls, told: tuple[type[Exception], ...]) -> None:
    """Answer calls, several at once, until the other side has gone.

    Args:
        pair: this side of it.
        calls: what may be called, by name, with keyword arguments of plain values.
        told: exceptions whose words are for people; others are printed here, and the other side learns that
            something failed.
    """
    lock = threading.Lock()

    def answer(line: bytes) -> None:
        number: Any = None
        try:
            call = json.loads(line)
            number = call["number"]
            said = {"number": number, "result": calls[call["name"]](**call["arguments"])}
        except told as error:
            said = {"number": number, "error": str(error)}
        except Exception:  # one answer is lost, and the next one need not be
            traceback.print_exc()
            said = {"number": number, "error": "this failed; the terminal says why"}
        with lock, suppress(OSError):
            pair.sendall(json.dumps(said).encode() + b"\n")

    with pair.makefile("rb") as lines, ThreadPoolExecutor(WORKERS) as pool, suppress(OSError):
        while line := lines.readline(LONGEST):
            if not line.endswith(b"\n"):
                break
            pool.submit(answer, line)


class Link:
    """The calling side; threads may call at once.

    Args:
        pair: this side of it.
        ended: called once when the other side has gone.
    """

    def __init__(self, pair: socket.socket, ended: Callable[[], None] = lambda: None) -> None:
        self._pair, self._ended = pair, ended
        self._lock, self._numbers = threading.Lock(), count()
        self._waiting: dict[int, Future[Any]] = {}
        threading.Thread(target=self._listen, daemon=True).start()

    def __call__(self, name: str, **arguments: Any) -> Any:
        """What the other side answers.

        Raises:
            RefusedError: it does not; its words are for people.
        """
        number, answer = next(self._numbers), Future[Any]()
        call = {"number": number, "name": name, "arguments": arguments}
        line = json.dumps(call).encode() + b"\n"
        if len(line) > LONGEST:
            raise RefusedError("that is too long to be asked")
        with self._lock:
            self._waiting[number] = answer
            try:
                self._pair.sendall(line)
            except OSError as error:
                raise RefusedError("the model's process has ended") from error
        return answer.result()

    def _listen(self) -> None:
        with self._pair.makefile("rb") as lines, suppress(OSError):
            for line in lines:
                said = json.loads(line)
                answer = self._waiting.pop(said["number"], None)
                if answer is None:
                    continue
                if "error" in said:
                    answer.set_exception(RefusedError(said["error"]))
                else:
                    answer.set_result(said["result"])
        for answer in [*self._waiting.values()]:
            answer.set_exception(RefusedError("the model's process has ended"))
        self._ended()
