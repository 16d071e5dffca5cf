"""Lines for whoever started a command: what is going on, results, errors, and paths as one types them."""

from __future__ import annotations

import os
import re
import sys
import traceback
from pathlib import Path

# What moves a terminal's cursor, colours or turns round what follows, or cannot be written as UTF-8: control
# characters but for ends of lines and tabs, overrides of the direction of writing, halves of surrogate pairs.
_HARMFUL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def harmless(text: str) -> str:
    """Text for a terminal: what others wrote (titles, say) cannot steer it; such characters are escaped."""
    return _HARMFUL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def say(text: str) -> None:
    """A line about what is going on (stderr, so that stdout holds results only), made ``harmless``."""
    print(harmless(text), file=sys.stderr, flush=True)  # noqa: T201


def put(text: str) -> None:
    """A line that belongs to the results (stdout), made ``harmless``."""
    print(harmless(text))  # noqa: T201


def put_exactly(text: str) -> None:
    """What another program reads, as it stands (stdout)."""
    print(text)  # noqa: T201


def print_error(error: Exception) -> None:
    """One sentence; LLMREC_TRACEBACK=1 shows where it came from."""
    if os.environ.get("LLMREC_TRACEBACK"):
        traceback.print_exception(error)
    say(f"error: {error}")


def short(path: Path | None) -> str:
    """A path as the user would type it."""
    if path is None:
        return "no folder yet"
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
