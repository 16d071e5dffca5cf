"""Blocks of lines, gzip in all its states, and the two ways to read a record."""

from __future__ import annotations

import gzip
import hashlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules import json_lines, line_blocks
from datamodules.delimited import BadRows
from datamodules.errors import DataFormatError
from datamodules.json_lines import JsonLines, parse_json, parse_literal, parse_loose
from datamodules.line_blocks import Block, ahead, read_blocks


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_blocks, "BLOCK_BYTES", 64)
    monkeypatch.setattr(line_blocks, "_PIECE", 16)
    monkeypatch.setattr(json_lines, "FEW_LINES", 2)


def whole(line: str) -> dict[str, Any]:
    value = parse_json(line)
    if not isinstance(value.get("n"), int):
        raise ValueError("no number: n is due")
    return {"n": value["n"]}


def fast(data: bytes, lines: pl.Series) -> pl.DataFrame | None:
    try:
        frame = pl.read_ndjson(data, schema={"n": pl.Int64()})
    except pl.exceptions.PolarsError:
        return None
    return None if frame["n"].null_count() else frame


def read(path: Path, mode: str = "error", header: str | None = None) -> tuple[list[int], JsonLines]:
    lines = JsonLines(path, BadRows(path, mode), fast, whole, {"n": pl.Int64()}, header)
    return [n for frame in lines.frames() for n in frame["n"]], lines


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n", b"\n  \n"])
@pytest.mark.parametrize("last", [True, False])
def test_every_line_comes_once_and_in_order(tmp_path: Path, end: bytes, last: bool) -> None:
    data = end.join(b'{"n": %d}' % n for n in range(100)) + (end if last else b"")
    members = gzip.compress(data[:333]) + gzip.compress(data[333:]) + b"\0" * 100
    for name, content in (("a.jsonl", data), ("a.jsonl.gz", members), ("b.jsonl", members)):
        (tmp_path / name).write_bytes(content)
        numbers, lines = read(tmp_path / name)
        assert numbers == list(range(100))
        assert lines.rows == 100
        assert lines.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.usefixtures("small_blocks")
def test_a_bad_line_deep_in_the_file_is_named(tmp_path: Path) -> None:
    rows = [b'{"n": %d}' % n for n in range(100)]
    rows[70] = b'{"n": 7'
    rows[90] = b'{"n": "\xff"}'
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(rows))
    with pytest.raises(DataFormatError, match=r"a\.jsonl, line 71: broken JSON"):
        read(path)
    numbers, lines = read(path, "skip")
    assert numbers == [n for n in range(100) if n not in (70, 90)]
    assert lines.bad.skipped == {
        "a.jsonl: broken JSON": 1,
        "a.jsonl: bytes of an unknown encoding": 1,
    }


@pytest.mark.usefixtures("small_blocks")
@given(
    st.lists(st.sampled_from([b'{"n": 5}', b"", b" ", b'{"m": 5}', b"\xc3", b"[]"]), max_size=40)
)
def test_blocks_cut_anywhere_give_back_the_file(tmp_path_factory: Any, rows: list[bytes]) -> None:
    path = tmp_path_factory.mktemp("b") / "a.jsonl"
    data = b"\n".join([b'{"n": 5}', *rows])
    path.write_bytes(data)
    blocks = list(read_blocks(path, hashlib.sha256()))
    assert b"".join(b.data for b in blocks) == data
    assert [b.first_line for b in blocks] == [
        1 + data.count(b"\n", 0, sum(len(p.data) for p in blocks[:k])) for k in range(len(blocks))
    ]
    numbers, lines = read(path, "skip")
    assert lines.rows == sum(1 for row in rows if row.strip()) + 1
    assert len(numbers) + sum(lines.bad.skipped.values()) == lines.rows
    assert len(numbers) == rows.count(b'{"n": 5}') + 1


def test_halves_keep_lines_whole_and_numbered() -> None:
    block = Block(11, b"aaaa\nb\nc\n")
    first, second = block.halves()
    assert (first, second) == (Block(11, b"aaaa\n"), Block(12, b"b\nc\n"))
    assert Block(3, b"long line").halves() == (Block(3, b"long line"), Block(3, b""))


def damaged_packs() -> list[tuple[str, bytes, str]]:
    data = b'{"n": 1}\n' * 5000
    packed = gzip.compress(data)
    broken = bytearray(packed)
    broken[-6] ^= 1  # in the checksum
    return [
        ("a.gz", packed[:-20], "truncated or damaged"),
        ("a.gz", packed[:-3], "truncated or damaged"),
        ("a.gz", bytes(broken), "truncated or damaged"),
        ("a.gz", packed + b"rubbish", "truncated or damaged"),
        ("a.gz", data, "no gzip file"),
        ("a.gz", b"", "no gzip file"),
        ("a.gz", gzip.compress(b" \n\n", mtime=0), "the file is empty"),
        ("a.jsonl", b"", "the file is empty"),
        ("a.jsonl", b"\n \n", "the file is empty"),
        ("a.jsonl", '{"n": 1}\n'.encode("utf-16"), "line 1: a NUL byte, so this is UTF-16"),
    ]


@pytest.mark.parametrize(("name", "content", "message"), damaged_packs())
def test_a_damaged_file_is_never_read_as_a_shorter_one(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    for mode in ("error", "skip"):
        with pytest.raises(DataFormatError, match=message) as error:
            read(tmp_path / name, mode)
        assert str(tmp_path / name) in str(error.value)


def test_a_header_is_asked_for_and_a_byte_order_mark_is_not_in_the_way(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbfn\r\n{"n": 3}\n{"n":')
    with pytest.raises(DataFormatError, match="line 3: broken JSON"):
        read(path, header="n")
    assert read(path, "skip", header="n")[0] == [3]
    with pytest.raises(DataFormatError, match="line 1: the header is 'n', expected 'm'"):
        read(path, "skip", header="m")
    path.write_bytes(b"n\n")
    with pytest.raises(DataFormatError, match="no row in the file"):
        read(path, header="n")


@pytest.mark.usefixtures("small_blocks")
def test_a_line_without_end_stops_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_blocks, "_LONGEST_LINE", 256)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 1}\n' + b"x" * 5000)
    with pytest.raises(DataFormatError, match="line 2: the line is longer than"):
        read(path, "skip")


def test_a_thread_stays_ahead_by_no_more_than_its_depth_and_ends_with_its_reader() -> None:
    made = []

    def numbers() -> Any:
        try:
            for n in range(1000):
                made.append(n)
                yield n
        finally:
            made.append("closed")

    before = set(threading.enumerate())
    reader = ahead(numbers(), depth=2)
    assert [next(reader), next(reader)] == [0, 1]
    time.sleep(0.05)
    assert len(made) <= 2 + 2 + 1 + 1
    reader.close()
    assert made[-1] == "closed"
    assert set(threading.enumerate()) <= before  # threads of other tests may have ended


def test_an_error_in_the_thread_is_raised_in_the_reader() -> None:
    def failing() -> Any:
        yield 1
        raise DataFormatError("here")

    before = set(threading.enumerate())
    with pytest.raises(DataFormatError, match="here"):
        list(ahead(failing()))
    assert set(threading.enumerate()) <= before  # threads of other tests may have ended


@pytest.mark.parametrize(
    "line",
    ["", "[1]", "null", '"a"', "{", '{"a": NaN}', '{"a": Infinity}', '{"a": 1} x', "{'a': 1}",
     '{"a": "\t"}', '{"a": ' + "[" * 200_000 + "]" * 200_000 + "}", '{"a": ' + "9" * 5000 + "}"],
)  # fmt: skip
def test_what_is_no_json_object_is_a_value_error(line: str) -> None:
    with pytest.raises(ValueError, match=r"^(broken JSON|not an object): "):
        parse_json(line)


def test_of_repeated_keys_the_first_counts_as_in_polars() -> None:
    line = '{"a": 1, "b": 2, "a": 3}'
    schema = {"a": pl.Int64(), "b": pl.Int64()}
    assert pl.read_ndjson(line.encode(), schema=schema).row(0, named=True) == {"a": 1, "b": 2}
    assert parse_json(line) == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    "text",
    ["", "1 +", "__import__('os')", "open('x')", "[].append", "f'{1}'", "1+1", "+".join("1" * 100_000),
     "-" * 100_000 + "1", "- " * 1000 + "1", "(" * 100_000, "[" * 150 + "]" * 149, "{[]: 1}", "'a\0b'",
     "not " * 50_000 + "1", "lambda: 1", "'x' * 10**9", "[1 for _ in 'a']", "a", "{**{}}", "'\ud800'",
     "'" + "x" * (5 << 20) + "'"],
)  # fmt: skip
def test_what_is_no_literal_is_a_value_error_and_never_runs(text: str) -> None:
    with pytest.raises(ValueError, match=r"^broken Python literal: "):
        parse_literal(text)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.text(max_size=20)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(st.dictionaries(st.text(max_size=5), values, max_size=5))
def test_any_record_comes_back_from_both_ways_of_writing_it(record: dict[str, Any]) -> None:
    assert parse_literal(repr(record)) == record
    assert parse_loose(repr(record)) == record
    assert parse_loose(json.dumps(record)) == record
    assert parse_json(json.dumps(record, ensure_ascii=False)) == record
