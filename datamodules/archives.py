"""Take members out of a zip or tar archive, safely and all or nothing.

An archive is somebody else's file: a member may try to leave the folder (absolute path, ``..``, a
link), hide behind another of the same name, or be cut off. Every name is checked before the first
byte is written, and the target folder appears only when all members are complete.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from filelock import FileLock

from datamodules.errors import DataSourceError

ARCHIVE_SUFFIXES = (".zip", ".whl", ".tar", ".tar.gz", ".tgz")
Wanted = Callable[[str], bool]

_BROKEN = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error)


def is_archive(name: str) -> bool:
    """Whether a file of this name is one that ``extract`` understands."""
    return name.lower().endswith(ARCHIVE_SUFFIXES)


def extract(archive: Path, target: Path, wanted: Wanted = lambda name: True) -> Path:
    """Write the wanted members of ``archive`` below ``target`` and return ``target``.

    A target that is there already is complete and is left as it is. ``wanted`` is asked with each
    member's path; *all* names are checked, wanted or not.

    Raises:
        DataSourceError: the archive is truncated, damaged, no archive, or has an unsafe member.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if target.is_dir():
            return target
        for stale in target.parent.glob(f".{glob_escape(target.name)}.part-*"):
            shutil.rmtree(stale)  # left by a killed run: we hold the lock, so nobody writes there
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=target.parent))
        try:
            _extract_into(archive, part, wanted)
            os.replace(part, target)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    return target


def glob_escape(name: str) -> str:
    """``name`` with the characters that ``Path.glob`` treats as patterns taken literally."""
    return re.sub(r"([*?[])", r"[\1]", name)


def check_member_names(names: Iterable[str], archive: Path) -> None:
    """Raise DataSourceError unless every name stays inside the folder and none comes twice."""
    seen: set[str] = set()
    for name in names:
        parts = name.split("/")
        if not name.strip("/") or name.startswith("/") or ".." in parts:
            raise _unsafe(archive, name, "it points outside the folder it is unpacked into")
        if "\\" in name or "\0" in name or ":" in parts[0]:
            raise _unsafe(archive, name, "its path has a drive letter, a backslash or a NUL")
        # Case and "a//b" or "./a" spellings name one file on some file systems.
        key = "/".join(part for part in parts if part not in ("", ".")).casefold()
        if key in seen:
            raise _unsafe(archive, name, "it occurs twice")
        seen.add(key)


def _unsafe(archive: Path, name: str, why: str) -> DataSourceError:
    return DataSourceError(
        f"{archive}: refusing to unpack member {name!r}, because {why}; "
        "delete the archive and get it from its publisher."
    )


def _extract_into(archive: Path, folder: Path, wanted: Wanted) -> None:
    is_zip = archive.name.lower().endswith((".zip", ".whl"))
    found = False
    try:
        for name, size, stream in (_zip_members if is_zip else _tar_members)(archive, wanted):
            found = True
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                shutil.copyfileobj(stream, file, 1 << 20)
                written = file.tell()
            if written != size:
                raise EOFError(f"member {name!r} has {written} of {size} bytes")
    except _BROKEN as error:
        reason = (str(error).splitlines() or ["it ends too early"])[0].rstrip(":")
        raise DataSourceError(
            f"{archive}: the archive is truncated, damaged or of another type ({reason}); "
            "delete it and run again, or put a complete copy in its place."
        ) from error
    if not found:
        raise DataSourceError(
            f"{archive}: the archive holds none of the files that are looked for; "
            "get it from its publisher again, or put the files themselves in the folder."
        )


def _zip_members(archive: Path, wanted: Wanted) -> Iterator[tuple[str, int, IO[bytes]]]:
    with zipfile.ZipFile(archive) as file:
        infos = file.infolist()
        # ``orig_filename``: zipfile itself cuts names at NUL and turns backslashes on Windows.
        check_member_names((info.orig_filename for info in infos), archive)
        for info in infos:
            if stat.S_ISLNK(info.external_attr >> 16):
                raise _unsafe(archive, info.filename, "it is a link")
            if info.flag_bits & 1:
                raise _unsafe(archive, info.filename, "it is encrypted")
        for info in infos:
            if not info.is_dir() and wanted(info.filename):
                with file.open(info) as stream:
                    yield info.filename, info.file_size, stream


def _tar_members(archive: Path, wanted: Wanted) -> Iterator[tuple[str, int, IO[bytes]]]:
    with tarfile.open(archive) as file:
        members = file.getmembers()
        check_member_names((member.name for member in members), archive)
        for member in members:
            if not (member.isfile() or member.isdir()):
                raise _unsafe(archive, member.name, "it is a link or a device")
        for member in members:
            stream = file.extractfile(member) if member.isfile() else None
            if stream is not None and wanted(member.name):
                yield member.name, member.size, stream
