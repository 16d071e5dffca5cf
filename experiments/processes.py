"""A part of a command in a process of its own: started, asked to stop, its end understood. No torch here."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from callbacks import stop_request
from callbacks.stop_request import Stopped
from experiments import faults, forked, launchers, lock, messages
from experiments.errors import UserError

RESEND_SECONDS = 5.0
Child = subprocess.Popen[bytes] | forked.Child


_origin: forked.Origin | None = None


@contextmanager
def forking(imports: Sequence[str] = ()) -> Iterator[None]:
    """Within it processes find the slow imports done, where that is possible (see ``forked``).

    Args:
        imports: packages besides lightning that most of the processes need.
    """
    global _origin
    if _origin is not None or not forked.possible(os.environ):
        yield
        return
    _origin = forked.Origin(launchers.environment_of(None), imports)
    try:
        yield
    finally:
        _origin.close()
        _origin = None


def in_process(
    module: str,
    arguments: list[str],
    folder: Path | None = None,
    launch: dict[str, Any] | None = None,
) -> None:
    """Run one of our modules in a process of its own (or in several, see ``launchers``), and pass signals on.

    Raises:
        UserError: it ended badly; what it had to say stands above.
        Stopped: it, or we, were asked to stop.
    """
    child: Child
    if _origin is not None:
        child = _origin.start(module, arguments)
    else:
        words = launchers.command(module, arguments, launch, os.environ)
        child = subprocess.Popen(words, env=launchers.environment_of(launch))
    if folder is not None:
        lock.add_child(folder, child.pid)
    # What has no run folder has nothing to save.
    resend = signal.SIGUSR1 if folder is not None else signal.SIGTERM
    try:
        with _asking(child, resend, saves=folder is not None):
            status = child.wait()
    except (
        KeyboardInterrupt
    ):  # a second Ctrl-C, which reached the child too; SIGTERM reached only us
        _stop(child)
        raise KeyboardInterrupt(faults.left_by(folder)) from None
    marked = mark_taken(folder / stop_request.MARK) if folder else False
    if status == stop_request.STATUS or (status not in (0, 2) and (marked or stop_request.asked())):
        raise Stopped
    if status == 130:
        raise KeyboardInterrupt(faults.left_by(folder))
    if status == 2 or (status and folder and mark_taken(folder / launchers.REFUSED)):
        raise SystemExit(2)  # it has said what is wrong
    if status < 0 or status > 128:  # srun tells of a task's signal like a shell
        raise UserError(faults.killed(-status if status < 0 else status - 128, launch))
    if status:
        log = f" (logs: {messages.short(folder)})" if folder else ""
        raise UserError(f"{module} ended with status {status}{log}; the reason stands above")


@contextmanager
def _asking(child: Child, number: signal.Signals, saves: bool) -> Iterator[None]:
    """Pass a request to stop on to the child, again and again: what is just being started may not hear it.

    With ``saves`` the first Ctrl-C is such a request, too.
    """

    def send(*unused: Any) -> None:
        if child.poll() is None:
            child.send_signal(number)

    def note(*unused: Any) -> None:
        stop_request.note()
        signal.setitimer(signal.ITIMER_REAL, 0.01, RESEND_SECONDS)

    def interrupt() -> None:
        messages.say("stopping where it can go on from; Ctrl-C again stops at once")
        note()

    signal.signal(signal.SIGALRM, send)
    signal.signal(signal.SIGUSR1, note)
    before = signal.getsignal(signal.SIGINT)
    if saves:
        stop_request.listen_to_interrupts(interrupt)
    if stop_request.asked():  # before there was a child
        signal.setitimer(signal.ITIMER_REAL, 0.01, RESEND_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGINT, before)
        stop_request.listen(signal.SIGUSR1)


def mark_taken(mark: Path) -> bool:
    """Whether a task has left its mark; it is taken away."""
    found = mark.is_file()
    mark.unlink(missing_ok=True)
    return found


def _stop(child: Child) -> None:
    child.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 30
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    child.kill()
    child.wait()
