"""The two ways in which data fails: it cannot be had, or it is not what its format promises."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


class DataSourceError(RuntimeError):
    """Bytes could not be had: no network, no file, a wrong checksum, a damaged archive."""


class DataFormatError(ValueError):
    """A file was read and is not in its format; the message names file, line, fault and remedy."""


def each_or_all_errors(makers: Iterable[Callable[[], T]]) -> list[T]:
    """What each call returns; where data cannot be had, all that is missing is told at once.

    Raises:
        DataSourceError: at least one call did; the message joins theirs.
    """
    made, missing = list[T](), list[str]()
    for make in makers:
        try:
            made.append(make())
        except DataSourceError as error:
            missing.append(str(error))
    if missing:
        raise DataSourceError("\n".join(dict.fromkeys(missing)))
    return made
