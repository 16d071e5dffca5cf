"""``experiments/REPRODUCTION.md``: one file, of sections that ``make verify`` and ``make table`` write.

Whoever writes a section leaves the others as they are, and numbers of it that were not measured anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments import carried, published
from experiments.command import write_whole

VERIFY = "verify"
_SECTION = re.compile(
    r"<!-- (?P<key>[\w ]+): start -->\n(?P<text>.*?)\n?<!-- (?P=key): end -->", re.S
)


def place(repo: Path) -> Path:
    """The file."""
    return repo / "experiments" / "REPRODUCTION.md"


def key_of(paper: str, size: str) -> str:
    """The name of a section of ``make table``."""
    return f"{paper} {size}"


def sections(repo: Path) -> dict[str, str]:
    """What the file has, by section; nothing where there is no file."""
    file = place(repo)
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return {found["key"]: found["text"] for found in _SECTION.finditer(text)}


def write(repo: Path, key: str, lines: Sequence[str]) -> Path:
    """Write one section anew; its rows of what was not run have the number that stood there.

    Args:
        repo: the project's folder.
        key: the section.
        lines: its text; a table's column ``ours`` has the numbers.

    Raises:
        UserError: the file cannot be written.
    """
    before = sections(repo)
    merged = carried.with_numbers(lines, before.get(key, "").splitlines(), "ours")
    told = {**before, key: "\n".join(merged)}
    write_whole(place(repo), "\n".join(_document(told)) + "\n")
    return place(repo)


def _document(told: dict[str, str]) -> Iterator[str]:
    yield "# Reproduction"
    yield ""
    yield "Published numbers beside what was reached here, from run folders. ± is half of the 95 % interval,"
    yield "over seeds where there are several, else over test rows; * marks runs of code that has changed"
    yield f"since, {carried.MARK} runs that were not at hand when a table was written last. No number stands"
    yield "here that no run has produced."
    yield ""
    yield "## Numbers that experiments expect"
    yield ""
    yield from _section(told, VERIFY, "make verify")
    for paper in published.names():
        yield ""
        yield f"## {published.read(paper)['title']}"
        for size in published.SIZES:
            yield ""
            command = f"make table PAPER={paper} SIZE={size}"
            yield from _section(told, key_of(paper, size), command)


def _section(told: dict[str, str], key: str, command: str) -> Iterator[str]:
    yield f"<!-- {key}: start -->"
    yield told.get(key) or f"Nothing of it has been run: `{command}` lists it."
    yield f"<!-- {key}: end -->"
