"""Generated texts that runs share: one append-only file of JSON lines for each model that writes.

A line holds ``key``, ``tokens``, ``text`` and a ``check`` sum of the first two. What cannot be read, or does
not agree with its sum, is left out with a warning and written again by whoever needs it.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

logger = logging.getLogger(__name__)
Line = dict[str, Any]


class GenerationStore:
    """The texts of one file, by key; a text is read when it is asked for.

    Args:
        file: made with its folder when the first text is added. Several processes may add at once.
    """

    def __init__(self, file: Path) -> None:
        self.file = Path(file)
        self._places: dict[str, tuple[int, int]] = {}  # key -> where its line begins, and its bytes
        self._read = 0  # bytes that were looked at
        self.look()

    def look(self) -> None:
        """Note what was added since, by anybody. The first of several lines of a key is its text."""
        if not self.file.is_file():
            return
        with self.file.open("rb") as lines:
            lines.seek(self._read)
            wrong = 0
            for line in lines:
                if not line.endswith(b"\n"):  # somebody is writing it, or was killed
                    break
                entry = parsed(line)
                if entry is None:
                    wrong += 1
                else:
                    self._places.setdefault(entry["key"], (self._read, len(line)))
                self._read += len(line)
        _warn(self.file, wrong)

    def get(self, key: str) -> list[int] | None:
        """The tokens of a text; None where nobody has written it, or its line is not there any more."""
        if key not in self._places:
            return None
        start, size = self._places[key]
        try:
            with self.file.open("rb") as lines:
                lines.seek(start)
                entry = parsed(lines.read(size))
        except FileNotFoundError:
            return None
        return None if entry is None or entry["key"] != key else entry["tokens"]

    def add(self, lines: Sequence[Line]) -> None:
        """Append texts, whole, whoever else does."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.file.with_name(f".{self.file.name}.lock")):
            append(self.file, lines)


def line_of(key: str, tokens: Sequence[int], text: str) -> Line:
    """What is stored of a text."""
    return {"key": key, "tokens": list(tokens), "text": text, "check": _check(key, tokens)}


def append(file: Path, lines: Iterable[Line]) -> None:
    """Write lines behind the whole ones of a file; half a line that a kill has left is cut off."""
    with file.open("ab+") as out:
        if out.tell():
            out.seek(-1, 2)
            if out.read(1) != b"\n":
                cut_half_line(file)
        out.write("".join(json.dumps(line) + "\n" for line in lines).encode())


def cut_half_line(file: Path) -> None:
    """Shorten a file to its whole lines; one that does not exist is made."""
    with file.open("ab+") as out:
        out.seek(0)
        out.truncate(len(_whole(out.read())))


def read_lines(file: Path) -> list[Line]:
    """The whole lines of a file; what cannot be read is left out with a warning, and is written again."""
    lines = _whole(file.read_bytes()).split(b"\n")[:-1]
    found = [entry for entry in map(parsed, lines) if entry is not None]
    _warn(file, len(lines) - len(found))
    return found


def parsed(line: bytes) -> Line | None:
    """A line's entry; None where it is none, or not what was written."""
    try:
        entry: Line = json.loads(line)
        key, tokens = entry["key"], entry["tokens"]
        sound = isinstance(key, str) and all(type(i) is int for i in tokens)
        return entry if sound and entry.get("check") == _check(key, tokens) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _check(key: str, tokens: Sequence[int]) -> int:
    return zlib.crc32(f"{key} {' '.join(map(str, tokens))}".encode())


def _warn(file: Path, wrong: int) -> None:
    if wrong:
        logger.warning("%s: %d unreadable lines left out", file, wrong)


def _whole(content: bytes) -> bytes:
    return content[: content.rfind(b"\n") + 1]
