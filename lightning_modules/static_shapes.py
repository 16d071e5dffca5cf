"""Whether a graph is being written down: no shape and no branch may then depend on a value."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_STATIC: ContextVar[bool] = ContextVar("static shapes", default=False)


@contextmanager
def static_shapes() -> Iterator[None]:
    """While it is open, models compute their padding, too."""
    token = _STATIC.set(True)
    try:
        yield
    finally:
        _STATIC.reset(token)


def are_static() -> bool:
    """Whether ``static_shapes`` is open."""
    return _STATIC.get()
