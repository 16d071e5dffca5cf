"""Digests of code and of values, and atomic notes: what names a folder and tells that it is stale."""

from __future__ import annotations

import ast
import atexit
import contextlib
import glob
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from datamodules.errors import DataSourceError
from datamodules.sources import cache_root

logger = logging.getLogger(__name__)
_PYTHON = sys.version  # another one writes syntax trees in another way
_MEMORY_CHANGED: list[str] = []


def code_digest(files: Iterable[Path]) -> str:
    """Digest of what Python files do: comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda f: f.name):
        digest.update(file.name.encode() + b"\0" + _remembered(file).encode() + b"\0")
    return digest.hexdigest()[:16]


@cache
def package_digest() -> str:
    """Of this package as it is imported: what is prepared by other code lies in another folder."""
    return code_digest(Path(__file__).parent.glob("*.py"))


def value_digest(value: Any, length: int = 12) -> str:
    """Digest of a JSON-like value; the order of keys does not matter.

    Raises:
        TypeError: the value holds something that JSON cannot write.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def folder_stats(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files in a folder and one folder down, where sources look.

    When they change, so does what is prepared from them. Nothing deeper is read: a user may name a
    folder that holds much else.
    """
    if not folder.is_dir():
        return []
    files = [f for f in (*folder.glob("*"), *folder.glob("*/*")) if f.is_file()]
    stats = ((str(f.relative_to(folder)), f.stat()) for f in files)
    return sorted((name, s.st_size, s.st_mtime_ns) for name, s in stats)


def place_stats(place: str | Path) -> list[tuple[str, int, int]]:
    """``folder_stats`` of a folder; of a file its own name, size and time."""
    path = Path(place).expanduser()
    if not path.is_file():
        return folder_stats(path)
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns)]


def read_json(path: Path, kind: type = dict) -> Any:
    """The content of a JSON file, or None where there is none, it is not whole or of another kind."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, kind) else None


def write_json(path: Path, value: Any) -> None:
    """Write atomically, see ``write_text``."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write atomically: a reader (or a kill) never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def publish_folder(folder: Path, last: str, write: Callable[[Path], None]) -> None:
    """Make a folder whole or not at all: written beside its place, then renamed.

    Of several processes one writes and the others wait for it. What a killed one has left is deleted.

    Args:
        folder: its place.
        last: a file that every whole folder has.
        write: fills the folder that it is given.

    Raises:
        DataSourceError: the place cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if not (folder / last).is_file():
                _write_folder(folder, write)
    except OSError as error:
        raise DataSourceError(
            f"{folder} cannot be written ({error}): make room or give rights, or set LLMREC_CACHE to another "
            "folder."
        ) from error


def _write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*.part"):
        shutil.rmtree(left, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        write(part)
        part.chmod(0o755)  # mkdtemp's folders are private; a cache may be shared
        if folder.exists():  # without its last file: damaged
            shutil.rmtree(folder)
        os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout  # slow to import, and planning imports this module

    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("%s: another process is making it; waiting for that", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def damaged(folder: Path, error: object) -> DataSourceError:
    """The error for a cache folder that cannot be read."""
    return DataSourceError(f"{folder} is damaged ({error}): delete it and run again.")


def _remembered(file: Path) -> str:
    """Digest of ``_meaning``, kept by the file's place, size and time: parsing all takes half a second."""
    stat = file.stat()
    place, state = str(file.resolve()), [stat.st_size, stat.st_mtime_ns, _PYTHON]
    known = _memory().get(place)
    if not isinstance(known, list) or len(known) != 2 or known[0] != state:
        meaning = hashlib.sha256(_meaning(file).encode()).hexdigest()
        known = _memory()[place] = [state, meaning]
        _MEMORY_CHANGED.append(place)
    return str(known[1])


@cache
def _memory() -> dict[str, Any]:
    """Place -> [[size, time, Python], digest], read once and written when the process ends."""
    file = cache_root() / "index" / "code.json"
    memory: dict[str, Any] = read_json(file) or {}
    atexit.register(_keep, file, memory)
    return memory


def _keep(file: Path, memory: dict[str, Any]) -> None:
    if _MEMORY_CHANGED:
        there = {place: entry for place, entry in memory.items() if Path(place).is_file()}
        with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
            write_json(file, there)


def _meaning(file: Path) -> str:
    tree = ast.parse(file.read_text(encoding="utf-8"), filename=file.name)
    _without_docstrings(tree)
    return ast.dump(tree)


def _without_docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> None:
    """Only definitions are looked into: walking every node would cost planning its second."""
    if node.body and _is_docstring(node.body[0]):
        node.body = node.body[1:] or [ast.Pass()]
    for part in node.body:
        if isinstance(part, (ast.ClassDef, ast.FunctionDef)):
            _without_docstrings(part)


def _is_docstring(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
