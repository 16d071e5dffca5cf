"""What commands do alike: exit status, numbers from variables, files for users."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from datamodules.errors import DataFormatError, DataSourceError
from datamodules.versioning import write_text
from experiments.errors import UserError
from experiments.messages import print_error


def exit_status(work: Callable[[], None]) -> int:
    """0 done, 2 failed (the reason is on the screen), 130 stopped by Ctrl-C."""
    try:
        work()
    except (UserError, DataSourceError, DataFormatError) as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def switched(name: str) -> bool:
    """Whether a variable says so: ``DRY=1``; empty and ``0`` do not."""
    return os.environ.get(name, "").strip() not in ("", "0")


def whole_number(name: str, text: str, least: int, most: int) -> int:
    """What a variable says.

    Raises:
        UserError: it is no whole number from ``least`` to ``most``.
    """
    if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
        raise UserError(f"{name}={text!r}, expected a whole number from {least} to {most}")
    return int(text)


def write_whole(
    file: Path, text: str, told: Callable[[OSError], str | None] = lambda error: None
) -> None:
    """Write a file for the user, whole or not at all.

    Args:
        file: where; folders are made.
        text: all of it.
        told: what to say of an error; None says which file, and why.

    Raises:
        UserError: it cannot be written.
    """
    try:
        write_text(file, text)
    except OSError as error:
        why = told(error) or f"{file} cannot be written: {error.strerror or error}"
        raise UserError(why) from error
