"""What stages take as inputs: earlier stages' files, or the user's, whose content counts alone."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from datamodules.sources import file_digest
from datamodules.versioning import value_digest
from experiments.errors import UserError


def is_place(source: Any) -> bool:
    """Whether a stage's input is a file or folder of the user's, not an earlier stage's file."""
    return str(source).startswith(("/", "~", "./", "../"))


def stages_before(stage: dict[str, Any]) -> set[str]:
    """The stages that a stage takes inputs from."""
    sources = (stage.get("inputs") or {}).values()
    return {str(source).partition("/")[0] for source in sources if not is_place(source)}


def needed_by(name: str, stages: dict[str, dict[str, Any]]) -> set[str]:
    """The stages that a stage takes inputs from, directly or not."""
    found, new = set[str](), stages_before(stages[name])
    while new := new & stages.keys() - found:
        found |= new
        new = set[str]().union(*(stages_before(stages[n]) for n in new))
    return found


def content_of(place: Path, where: str) -> str:
    """Digest of a file, or of the files that lie in a folder (an adapter's weights and settings).

    Args:
        place: with ``~`` expanded.
        where: the key that names it, for the message.

    Raises:
        UserError: there is nothing of that name.
    """
    if place.is_file():
        return _file_content(place, place.stat().st_mtime_ns)
    files = sorted(f for f in place.glob("*") if f.is_file())
    if not files:
        raise UserError(f"{where} is {place}, which is neither a file nor a folder with files")
    return value_digest([(f.name, _file_content(f, f.stat().st_mtime_ns)) for f in files])


@cache
def _file_content(file: Path, changed: int) -> str:
    return file_digest(file)
