"""Lines for whoever started a command: what is going on, results, errors, and paths as one types them."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path


def say(text: str) -> None:
    """A line about what is going on (stderr, so that stdout holds results only)."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def put(text: str) -> None:
    """A line that belongs to the results (stdout)."""
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
