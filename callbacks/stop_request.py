"""A request to stop: a signal sets a flag, and the work stops where it can go on from later.

Imports nothing slow, so that a process can listen before anything else: a signal that comes while it imports
is then neither lost nor deadly.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

# What a process ends with that stopped because it was asked to: "try again later" (EX_TEMPFAIL).
STATUS = 75
MARK = ".stopped"  # in the run folder: one of several processes stopped, whatever the others ended with
_requests = 0


class Stopped(Exception):  # noqa: N818 - no error
    """The work was stopped as asked; the same command goes on."""


def listen(*numbers: signal.Signals) -> None:
    """Note these signals from now on, and do nothing else about them."""
    for number in numbers:
        signal.signal(number, note)


def listen_to_interrupts(then: Callable[[], None] | None = None) -> None:
    """Note the first Ctrl-C, or do ``then``; the second interrupts. Where it is ignored it stays so.

    A shell's job in the background ignores it.
    """

    def first(*unused: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        (then or note)()

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, first)


def asked() -> bool:
    """Whether a signal has come."""
    return _requests > 0


def forget() -> None:
    """As if none had come."""
    global _requests
    _requests = 0


def note(*unused: Any) -> None:
    """A signal has come."""
    global _requests
    _requests += 1
