"""Processes of ours that find the slow imports done: each is forked from one process that has made them.

A stage starts in half a second instead of seven, of which six went into ``import lightning.pytorch``. What
is imported before a fork may neither hold threads of its own that a child would miss (so polars is left to
the children) nor have spoken to a GPU (CUDA does not survive a fork): where there is a GPU, under srun, and
wherever LLMREC_FORK=0 is set, ``experiments.processes`` starts fresh processes instead.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from experiments import launchers

SWITCH = "LLMREC_FORK"
ALWAYS = "lightning.pytorch"  # brings torch, torchmetrics, transformers and scipy
# NVIDIA's driver, WSL's, AMD's.
GPUS = tuple(map(Path, ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")))
LOOK_SECONDS = 0.02
_PASSED_ON = (signal.SIGINT, signal.SIGUSR1)  # to children, by the driver or the terminal


def possible(environment: Mapping[str, str]) -> bool:
    """Whether processes can be forked here from one that has imported torch."""
    wanted = environment.get(SWITCH, "").strip() != "0"
    alone = not launchers.through_srun(environment)
    return wanted and alone and sys.platform == "linux" and not any(p.exists() for p in GPUS)


class Child:
    """A forked process; the methods are those of ``subprocess.Popen`` that this package uses.

    Attributes:
        pid: of the child.
        returncode: its exit status, or the signal's number below zero; None while it runs.
    """

    def __init__(self, origin: Origin, pid: int, returncode: int | None = None) -> None:
        self._origin = origin
        self.pid = pid
        self.returncode = returncode

    def poll(self) -> int | None:
        """Exit status, if it has ended."""
        if self.returncode is None and self._origin.has_answered():
            self.wait()
        return self.returncode

    def wait(self) -> int:
        """Exit status, once it has ended."""
        if self.returncode is None:
            status = self._origin.answer()
            self.returncode = self._origin.ended() if status is None else status
        return self.returncode

    def send_signal(self, number: int) -> None:
        """To the child, if it still runs."""
        if self.poll() is None:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:  # it has ended this instant
                return

    def kill(self) -> None:
        """End it without asking."""
        self.send_signal(signal.SIGKILL)


class Origin:
    """The process that has imported what is slow, and forks one child at a time; begun with the first.

    Args:
        environment: of it and its children.
        imports: besides lightning, made while the first child runs.
    """

    def __init__(self, environment: Mapping[str, str], imports: Sequence[str]) -> None:
        self._environment = environment
        self._imports = imports
        self._read = b""

    @cached_property
    def _socket(self) -> socket.socket:
        """Ours of a pair; the process, begun here, has the other."""
        ours, its = socket.socketpair()
        with its:
            words = [sys.executable, "-m", "experiments.forked", str(its.fileno()), *self._imports]
            self._process = subprocess.Popen(words, env=self._environment, pass_fds=[its.fileno()])
        return ours

    def start(self, module: str, arguments: Sequence[str]) -> Child:
        """Run ``python -m module arguments`` without the wait for its imports."""
        with suppress(OSError):  # it is gone: the answer will be none
            self._socket.sendall(json.dumps([module, *arguments]).encode() + b"\n")
        if (pid := self.answer()) is None:
            return Child(self, self._process.pid, self.ended())
        return Child(self, pid)

    def has_answered(self) -> bool:
        """Whether ``answer`` would return at once."""
        try:
            gone = b"\n" not in self._read and not self._receive(socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        return gone or b"\n" in self._read

    def answer(self) -> int | None:
        """The next number it tells, by turns a child's pid and its exit status; None if it has ended."""
        while b"\n" not in self._read:
            if not self._receive():
                return None
        line, _, self._read = self._read.partition(b"\n")
        return int(line)

    def _receive(self, *flags: int) -> bytes:
        """Some of what it tells; nothing where it is gone."""
        try:
            got = self._socket.recv(4096, *flags)
        except ConnectionResetError:  # with a request of ours unread
            return b""
        self._read += got
        return got

    def ended(self) -> int:
        """What it has ended with."""
        return self._process.wait()

    def close(self) -> None:
        """End it, if it was begun; a stage that still runs sees it, and ends, too."""
        if "_socket" in self.__dict__:
            self._socket.close()
            self._process.terminate()
            self._process.wait()


def _serve(connection: socket.socket, imports: Sequence[str]) -> list[str] | None:
    """Fork a child for each request.

    Returns:
        In a child what it is to run; None where no more requests will come.
    """
    driver = os.getppid()
    ignored = (
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    )  # by a shell's job in the background
    for number in _PASSED_ON:
        signal.signal(number, signal.SIG_IGN)
    gc.disable()  # of what imports make nothing is garbage, and looking for it takes a fifth of the time
    importlib.import_module(ALWAYS)
    gc.freeze()  # collections in a child need not touch, and so copy, these pages
    requests = connection.makefile("r", encoding="utf-8")
    while request := requests.readline():
        signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
            gc.enable()
            words: list[str] = json.loads(request)
            return words
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
        connection.sendall(b"%d\n" % pid)
        for name in imports:
            importlib.import_module(name)
        gc.freeze()
        connection.sendall(b"%d\n" % _status(pid, driver))
    return None


def _status(pid: int, driver: int) -> int:
    """What a child has ended with."""
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if os.getppid() != driver:
            os._exit(75)  # the child sees it, and ends, too
        time.sleep(LOOK_SECONDS)


def _run(words: Sequence[str]) -> None:
    """What ``python -m`` does with these words."""
    module = words[0]
    sys.argv = list(words)
    os.environ["LLMREC_DRIVER"] = str(os.getppid())
    sys.modules.pop(module, None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def main(argv: Sequence[str]) -> None:
    """Serve the driver at the other end of a socket; in a child, be what was asked for."""
    with socket.socket(fileno=int(argv[0])) as connection:
        words = _serve(connection, argv[1:])
    if words is not None:
        _run(words)


if __name__ == "__main__":
    main(sys.argv[1:])
