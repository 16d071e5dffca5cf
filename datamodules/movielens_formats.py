"""The releases of MovieLens: where each comes from, how it is written, how large it is.

Checksums: the MD5 that GroupLens publishes beside a zip (``.zip.md5``), or the SHA-256 in the
checksum list of TensorFlow Datasets. Counts are those of the ratings files themselves: users and
items with at least one rating (the README of 10m says 71,567 users, which is its largest user id,
and those of the larger releases count unrated films too).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from datamodules import movielens_parsers as parsers
from datamodules.delimited import OnBadRow
from datamodules.movielens_tags import TAGS_CSV, TAGS_DAT
from datamodules.sources import Download, LocalFolder, Source, Wheel, first_available
from datamodules.types import RawData

_BASE = "https://files.grouplens.org/datasets/movielens/"
_WHEEL_FOLDER = "recbole/dataset_example/ml-100k/"


@dataclass(frozen=True)
class MovieLensRelease:
    """One release.

    ``required`` and ``optional`` are the file names that its parser reads; ``required`` may have
    several sets, each with its parser, of which the first that is found is taken.
    """

    name: str
    required: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...]
    parse: tuple[parsers.Parser, ...]
    encoding: str
    separator: str
    scale: tuple[float, ...] | None  # ratings that it knows; None = it has none
    users: int
    items: int  # rated ones
    interactions: int
    folder: str = ""  # inside the official zip, and where a local copy is looked for first
    archive: str = ""
    checksum: str = ""
    wheel: Wheel | None = None
    hint: str = ""  # where a file without official address is known to lie

    def sources(self, root: str | Path | None = None) -> tuple[Source, ...]:
        """In order of preference; with ``root`` that folder alone."""
        if root is not None:
            place, archives = Path(root).expanduser(), (self.archive,) if self.archive else ()
            return tuple(
                LocalFolder(place, required, self.optional, archives, self.folder)
                for required in self.required
            )
        found: list[Source] = []
        if self.archive:
            url = _BASE + self.archive
            found.append(Download(url, self.required[0], self.optional, self.checksum))
        return (*found, self.wheel) if self.wheel is not None else tuple(found)

    @property
    def remedy(self) -> str:
        """Which files to put where."""
        names = " or ".join(_listed(required) for required in self.required)
        extra = f" (if you have them, {_listed(self.optional)} too)" if self.optional else ""
        whole = f", or the official {self.archive}," if self.archive else ""
        address = f"; its address is {_BASE}{self.archive}" if self.archive else f"; {self.hint}"
        return f"put {names}{extra}{whole} in a folder and pass data.root=FOLDER{address}."


def _listed(names: tuple[str, ...]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _csv_release(name: str, checksum: str, counts: tuple[int, int, int]) -> MovieLensRelease:
    users, items, interactions = counts
    return MovieLensRelease(
        name=name,
        required=(("ratings.csv", "movies.csv"),),
        optional=(TAGS_CSV,),
        parse=(parsers.parse_csv,),
        encoding="utf-8",
        separator=",",
        scale=parsers.HALF_STARS,
        users=users,
        items=items,
        interactions=interactions,
        folder=f"ml-{name}",
        archive=f"ml-{name}.zip",
        checksum=checksum,
    )


_ML_100K = MovieLensRelease(
    name="100k",
    required=(("u.data", "u.item"), ("ml-100k.inter", "ml-100k.item")),
    optional=("u.user", "ml-100k.user"),
    parse=(parsers.parse_100k, parsers.parse_100k_wheel),
    encoding="latin-1",
    separator="\t",
    scale=parsers.WHOLE_STARS,
    users=943,
    items=1_682,
    interactions=100_000,
    folder="ml-100k",
    archive="ml-100k.zip",
    checksum="sha256:50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
    wheel=Wheel(
        "recbole",
        "1.2.1",
        "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        tuple(f"{_WHEEL_FOLDER}ml-100k.{suffix}" for suffix in ("inter", "item", "user")),
    ),
)
_ML_1M = MovieLensRelease(
    name="1m",
    required=(("ratings.dat", "movies.dat"),),
    optional=("users.dat",),
    parse=(parsers.parse_1m,),
    encoding="latin-1",
    separator="::",
    scale=parsers.WHOLE_STARS,
    users=6_040,
    items=3_706,
    interactions=1_000_209,
    folder="ml-1m",
    archive="ml-1m.zip",
    checksum="sha256:a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
)
_ML_1M_SASREC = replace(
    _ML_1M,
    name="1m-sasrec",
    required=tuple((name,) for name in parsers.SASREC_NAMES),
    optional=(parsers.SASREC_ITEM_MAP, parsers.SASREC_USER_MAP, "movies.dat", "users.dat"),
    parse=(parsers.parse_1m_sasrec, parsers.parse_1m_sasrec),
    separator=" ",
    encoding="utf-8",
    scale=None,
    items=3_416,
    interactions=999_611,
    archive="",
    checksum="",
    hint="ml-1m.txt lies in the data folder of the SASRec authors' repository",
)
_ML_10M = replace(
    _ML_1M,
    name="10m",
    optional=(TAGS_DAT,),
    parse=(parsers.parse_10m,),
    encoding="utf-8",
    scale=parsers.HALF_STARS,
    users=69_878,
    items=10_677,
    interactions=10_000_054,
    folder="ml-10M100K",
    archive="ml-10m.zip",
    checksum="md5:ce571fd55effeba0271552578f2648bd",
)
RELEASES: dict[str, MovieLensRelease] = {
    release.name: release
    for release in (
        _ML_100K,
        _ML_1M,
        _ML_1M_SASREC,
        _ML_10M,
        _csv_release(
            "20m",
            "sha256:96f243c338a8665f6bcc89c53edf6ee39162a846940de6b7c8c48aeada765ff3",
            (138_493, 26_744, 20_000_263),
        ),
        _csv_release(
            "25m",
            "sha256:8b21cfb7eb1706b4ec0aac894368d90acf26ebdfb6aced3ebd4ad5bd1eb9c6aa",
            (162_541, 59_047, 25_000_095),
        ),
        _csv_release("32m", "md5:d472be332d4daa821edc399621853b57", (200_948, 84_432, 32_000_204)),
        _csv_release(
            "latest-small",
            "sha256:696d65a3dfceac7c45750ad32df2c259311949efec81f0f144fdfb91ebc9e436",
            (610, 9_724, 100_836),
        ),
    )
}


def find_release(name: str) -> MovieLensRelease:
    """The release of that name. Raises ValueError naming the known ones and the nearest."""
    if name in RELEASES:
        return RELEASES[name]
    bare = str(name).lower().replace("_", "-").removeprefix("movielens-").removeprefix("ml-")
    near = difflib.get_close_matches(bare, RELEASES, n=1, cutoff=0.4)
    suggestion = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"Unknown MovieLens release {name!r}; known are {', '.join(RELEASES)}.{suggestion}"
    )


def load_movielens(
    release: str, root: str | Path | None, cache: Path, on_bad_row: OnBadRow = "error"
) -> RawData:
    """Get one release and parse it.

    Args:
        release: a key of ``RELEASES``.
        root: a folder with the raw files or the official zip, or that zip; None = fetch it.
        cache: where fetched and unpacked files are kept (``sources.cache_root()``).
        on_bad_row: ``"error"``, or ``"skip"`` to leave bad rows out and count them in ``skipped``.

    Raises:
        ValueError: an unknown release.
        DataSourceError: no source has it; the message says which file to put where.
        DataFormatError: a file is not in its format.
    """
    known = find_release(release)
    files, source = first_available(
        known.sources(root), cache, f"MovieLens {release}", known.remedy
    )
    pairs = zip(known.required, known.parse, strict=True)
    parser = next(parser for required, parser in pairs if set(required) <= set(files))
    return replace(parser(files, on_bad_row), source=f"MovieLens {release} from {source.name}")


def differences(raw: RawData, release: MovieLensRelease) -> dict[str, tuple[int, int]]:
    """Published counts that the data do not have: name -> (found, published). Empty is well."""
    frame = raw.interactions.frame
    found = frame.select(
        users=pl.col("user_id").n_unique(),
        items=pl.col("item_id").n_unique(),
        interactions=pl.len(),
    ).row(0, named=True)
    pairs = {name: (int(found[name]), int(getattr(release, name))) for name in found}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
