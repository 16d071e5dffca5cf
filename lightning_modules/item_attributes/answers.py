"""Answers about attributes: a JSON object of exactly the fields that were asked for, or none at all."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

UNKNOWN = "unknown"
LONGEST = 60  # characters of a value: a longer one is a description
_OBJECT = re.compile(r"\{[^{}]*\}")
_BLANK = re.compile(r"\W+")


def parsed(text: str, names: Sequence[str]) -> dict[str, str] | None:
    """The values by name of the first JSON object in a text; None where it is no answer.

    It must have exactly these fields, whatever their order and their case, each with a text, a number or a
    list of texts; null and blanks are ``UNKNOWN``.
    """
    found = _OBJECT.search(text)
    if found is None:
        return None
    try:
        told = json.loads(found[0])
    except ValueError:
        return None
    values = {str(name).strip().casefold(): value for name, value in told.items()}
    if set(values) != {name.casefold() for name in names} or len(told) != len(values):
        return None
    read = {name: _value(values[name.casefold()]) for name in names}
    return read if all(value is not None for value in read.values()) else None  # type: ignore[return-value]


def _value(told: object) -> str | None:
    """A value on one line; None where it is no value."""
    if isinstance(told, list) and all(isinstance(one, str) for one in told):
        told = ", ".join(told)
    if told is None:
        return UNKNOWN
    if isinstance(told, bool) or not isinstance(told, (str, int, float)):
        return None
    return short_answer(str(told))


def short_answer(text: str) -> str | None:
    """An answer of a few words, without the sentence's end; None where it is more than that.

    However it is written: ``Unknown.`` is ``UNKNOWN``.
    """
    line = " ".join(text.split()).rstrip(".!?").strip()
    if len(line) > LONGEST:
        return None
    said = _BLANK.sub("", line).casefold()
    return line if said not in ("", UNKNOWN) else UNKNOWN


def told(values: Mapping[str, str]) -> str:
    """Values as a text for later prompts: ``colour: red; use: play``; what is unknown is left out."""
    return "; ".join(f"{name}: {value}" for name, value in values.items() if value != UNKNOWN)
