"""Time limits as sbatch writes them."""

from __future__ import annotations

import re

from experiments.errors import UserError


def seconds_of(time: str) -> int:
    """Of a time limit as sbatch reads it: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS.

    Raises:
        UserError: it is none of these, or zero.
    """
    found = re.fullmatch(r"(?:(\d{1,4})-)?(\d{1,6})(?::(\d{1,2}))?(?::(\d{1,2}))?", time)
    if not found:
        raise UserError(
            f"TIME={time!r}, expected hours, minutes and seconds (12:00:00) or 2-12:00:00"
        )
    days, *parts = found.groups()
    first, second, third = (int(p or 0) for p in parts)
    if days is not None:
        seconds = int(days) * 86400 + first * 3600 + second * 60 + third
    elif parts[2] is not None:
        seconds = first * 3600 + second * 60 + third
    else:
        seconds = first * 60 + second
    if seconds == 0:
        raise UserError(f"TIME={time!r} is no time at all, expected for instance TIME=12:00:00")
    return seconds
