"""ISO dates as seconds, one reading for filters and splits."""

from __future__ import annotations

from datetime import datetime, timezone


def iso_seconds(date: str, asked_by: str) -> float:
    """Seconds since 1970 of an ISO date or date and time; UTC unless it says otherwise.

    Args:
        date: for example ``2020-03-31`` or ``2020-03-31T12:00:00+01:00``.
        asked_by: the class that was given it, for the message.

    Raises:
        ValueError: not ISO format.
    """
    try:
        moment = datetime.fromisoformat(date.replace("Z", "+00:00"))
    except ValueError as error:
        raise ValueError(
            f"{asked_by} got the date {date!r}; expected ISO format, such as 2020-03-31 or "
            "2020-03-31T12:00:00."
        ) from error
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return moment.timestamp()
