"""Damaged Amazon files: every row is kept or counted, or the error says where; both readers agree."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from datamodules import json_lines
from datamodules.amazon_metadata import read_metadata
from datamodules.amazon_releases import RELEASES
from datamodules.amazon_reviews import read_reviews
from datamodules.errors import DataFormatError
from tests.datamodules.amazon_files import (
    METADATA,
    REVIEWS,
    Event,
    item,
    items_file,
    ratings,
    review,
)
from tests.datamodules.amazon_files import (
    json_lines as written,
)

FILES, CASES = 130, 4  # damaged copies in a file: 520 cases a parser
EVENTS: list[Event] = [
    (f"A{n % 4}X", f"B00000000{n % 3}", n % 5 + 1.0, 10**9 + n) for n in range(8)
]
REVIEWED = pl.Series(["B000000000", "B000000001", "B000000002"])
# (columns of the result, rows left out by reason, rows that are kept by reason)
Result = tuple[list[tuple[Any, ...]], dict[str, int]]
OTHER: list[Any] = [
    None, True, 0, 7, -1, 3.5, 1e300, "", "x", "5.0", "\ud800", "é\u2028", [], ["x"], [[1]], [None, 5],
    {}, {"a": 1}, "['a', 'b']", "<b", "&amp;", 10**25, "9" * 400,
]  # fmt: skip


def records(year: int, metadata: bool) -> list[dict[str, Any]]:
    if metadata:
        return [item(year, f"B00000000{n % 4}", title=f"Title {n}") for n in range(5)]
    return [review(year, event) for event in EVENTS]


def damaged(
    rng: random.Random, rows: list[dict[str, Any]] | None, data: bytes, write: Any
) -> bytes:
    """One to three faults: fields gone or of another type; bytes flipped, lost or put in; lines cut."""
    if rows is not None and rng.random() < 0.6:
        rows = [dict(row) for row in rows]
        for _ in range(rng.randint(1, 3)):
            row = rng.choice(rows)
            key = rng.choice(sorted(row) or ["asin"])
            if rng.random() < 0.3:
                row.pop(key, None)
            else:
                row[key] = rng.choice(OTHER)
        data = write(rows)
        if rng.random() < 0.5:
            return data
    raw = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at, what = rng.randrange(len(raw)), rng.randrange(5)
        if what == 0:
            raw[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            del raw[at : at + rng.randint(1, 20)]
        elif what == 2:
            raw[at:at] = rng.choice(
                [b"\n", b"\r", b"\0", b'"', b"{", b"\xff", b"[" * 2000, b" \n\n"]
            )
        elif what == 3:
            end = raw.find(b"\n", at)
            del raw[at : end if end >= 0 else len(raw)]
        else:
            raw[at:at] = raw[rng.randrange(len(raw)) :][:60]
        raw = raw or bytearray(b"\n")
    return bytes(raw)


def outcome(read: Callable[[], Any], schema: list[str]) -> Result | str:
    """Rows and counts, or the message."""
    try:
        found = read()
    except DataFormatError as error:
        return str(error)
    strings = found.frame.with_columns(pl.col(pl.Categorical).cast(pl.String))
    return strings.select(schema).rows(), found.counts


def check(path: Path, data: bytes, header: bool, read: Callable[[str], Any], columns: list[str],
          rows_of: Callable[[Result], int], monkeypatch: pytest.MonkeyPatch) -> bool:  # fmt: skip
    """All that must hold of one damaged file; True if anything was kept."""
    path.write_bytes(gzip.compress(data, 0) if path.suffix == ".gz" else data)
    skipping = outcome(partial(read, "skip"), columns)
    strict = outcome(partial(read, "error"), columns)
    with monkeypatch.context() as patch:
        patch.setattr(json_lines, "_lines", lambda data: None)  # no block is read fast
        careful = outcome(partial(read, "skip"), columns)
    assert skipping == careful, data
    if isinstance(skipping, str):
        assert skipping.startswith(str(path)), skipping
        assert isinstance(strict, str)
        return False
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")[int(header) :]
    total = sum(1 for line in lines if line.strip())
    assert rows_of(skipping) == total, data
    if isinstance(strict, str):
        assert strict.startswith(f"{path}, line "), strict
    else:
        assert strict == skipping
    return True


def left_out(counts: dict[str, int]) -> int:
    return sum(n for what, n in counts.items() if not what.startswith("kept: "))


EVENT_COLUMNS = ["user_id", "item_id", "rating", "timestamp"]


@pytest.mark.parametrize(
    ("year", "kind"),
    [(2014, "5core"), (2018, "5core"), (2023, "full"), (2014, "ratings"), (2018, "ratings"), (2023, "5core")],
)  # fmt: skip
def test_every_event_is_kept_or_counted(
    tmp_path: Path, year: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = RELEASES[year].kind(kind)[1]
    rows = None if layout.csv else records(year, metadata=False)
    head = b"" if layout.header is None else layout.header.encode() + b"\n"
    data = ratings(year, EVENTS).removeprefix(head) if rows is None else written(rows)
    rng = random.Random(f"{year}{kind}")
    path = tmp_path / REVIEWS[year, kind]
    survived = 0
    for _ in range(FILES):
        copies = b"\n".join(damaged(rng, rows, data, written) for _ in range(CASES))
        survived += check(
            path, head + copies, bool(head), partial(read_reviews, path, layout), EVENT_COLUMNS,
            lambda result: len(result[0]) + left_out(result[1]), monkeypatch,
        )  # fmt: skip
    assert survived > FILES // 2


@pytest.mark.parametrize("year", [2014, 2018, 2023])
def test_every_item_is_kept_or_counted(
    tmp_path: Path, year: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = records(year, metadata=True)

    def write(some: list[dict[str, Any]]) -> bytes:
        return items_file(year, some)

    columns = ["item_id", "title", "description", "categories", "brand", "price", "images"]
    rng = random.Random(year)
    path = tmp_path / METADATA[year]
    survived = 0
    for _ in range(FILES):
        copies = b"\n".join(damaged(rng, rows, write(rows), write) for _ in range(CASES))
        survived += check(
            path, copies, False, partial(read_metadata, path, year, REVIEWED), columns,
            lambda result: len(result[0]) + left_out(result[1]), monkeypatch,
        )  # fmt: skip
    assert survived > FILES // 2


@pytest.mark.parametrize("year", [2014, 2018, 2023])
def test_a_damaged_gzip_file_is_refused(tmp_path: Path, year: int) -> None:
    kind = "full"
    layout = RELEASES[year].kind(kind)[1]
    data = written(records(year, metadata=False))
    packed = gzip.compress(data, mtime=0)
    path = tmp_path / f"{REVIEWS[year, kind]}.gz"
    whole = len(EVENTS)
    rng = random.Random(year)
    for _ in range(100):
        raw = bytearray(packed)
        if rng.random() < 0.5:
            del raw[rng.randrange(1, len(raw)) :]
        else:
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        path.write_bytes(raw)
        result = outcome(lambda: read_reviews(path, layout, "skip"), EVENT_COLUMNS)
        # A flipped bit of the header's time or system changes nothing; all others must be noticed.
        assert isinstance(result, str) or len(result[0]) == whole


def test_a_record_of_every_type_in_every_field_ends_the_same_in_both_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for year in (2018, 2023):
        path = tmp_path / METADATA[year]
        for key in records(year, metadata=True)[0]:
            rows = [item(year, "B000000001") | {key: value} for value in OTHER]
            data = "".join(json.dumps(row) + "\n" for row in rows).encode()
            check(
                path, data, False, partial(read_metadata, path, year, REVIEWED),
                ["item_id", "title", "description", "brand", "price"],
                lambda result: len(result[0]) + left_out(result[1]), monkeypatch,
            )  # fmt: skip
