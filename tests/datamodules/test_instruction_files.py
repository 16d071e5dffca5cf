"""Alpaca's format: any rows come back as they were written, and any fault is told with its place."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datamodules.errors import DataFormatError
from datamodules.instruction_files import COLUMNS, read_instructions

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)
SAID = TEXT.filter(str.strip)
ROW = st.fixed_dictionaries({"instruction": SAID, "input": TEXT, "output": SAID})
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*COLUMNS, "x"]), inner),
    max_leaves=8,
)  # fmt: skip
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "alpaca"
GOOD = {"instruction": "Add.", "input": "1 and 2", "output": "3"}


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    def write(data: bytes | list[Any], lines: bool = False, name: str = "some.json") -> Path:
        path = tmp_path / name
        if isinstance(data, list):
            text = "\n".join(map(json.dumps, data)) if lines else json.dumps(data)
            data = text.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file that every example of a property test writes anew."""
    return tmp_path_factory.mktemp("files") / "some.json"


@given(st.lists(ROW, min_size=1, max_size=5), st.booleans(), st.booleans())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_rows_come_back_as_they_were_written(
    scratch: Path, rows: list[dict[str, str]], lines: bool, ascii_only: bool
) -> None:
    extended = [{"id": 7, **row, "text": "ignored"} for row in rows]
    written = [json.dumps(row, ensure_ascii=ascii_only) for row in extended]
    text = "\n".join(written) + "\n" if lines else "[" + ",\n".join(written) + "]"
    scratch.write_bytes(text.encode())
    frame, left_out, digest = read_instructions(scratch)
    assert frame.to_dicts() == [{name: row[name] for name in COLUMNS} for row in rows]
    assert left_out == {}
    assert digest == hashlib.sha256(text.encode()).hexdigest()


@given(st.binary(max_size=60) | JSON.map(lambda v: json.dumps(v).encode())
       | st.lists(JSON, max_size=4).map(lambda v: "\n".join(map(json.dumps, v)).encode()))  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_whatever_the_file_holds_it_is_rows_or_a_told_error(scratch: Path, data: bytes) -> None:
    scratch.write_bytes(data)
    for on_bad_row in ("error", "skip"):
        with contextlib.suppress(DataFormatError):  # any other exception fails
            frame, _, _ = read_instructions(scratch, on_bad_row)
            assert frame.height > 0
            assert all(r["instruction"].strip() and r["output"].strip() for r in frame.to_dicts())


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (7, "not an object: '7'"),
        ({"instruction": "a"}, "no output: its keys are instruction"),
        ({"output": "a"}, "no instruction: its keys are output"),
        ({**GOOD, "output": 3}, "output is no text: '3'"),
        ({**GOOD, "input": ["a"]}, "input is no text"),
        ({**GOOD, "instruction": None}, "instruction is no text: 'None'"),
        ({**GOOD, "output": "\ud800"}, "output holds half a character"),
    ],
)
@pytest.mark.parametrize("lines", [False, True])
def test_a_bad_row_stops_with_its_place_or_is_counted(
    file: Callable[..., Path], bad: Any, reason: str, lines: bool
) -> None:
    path = file([GOOD, bad, GOOD], lines)
    with pytest.raises(DataFormatError) as caught:
        read_instructions(path)
    assert f"{path}, {'line' if lines else 'row'} 2: {reason}" in str(caught.value)
    assert "on_bad_row=skip" in str(caught.value)
    frame, left_out, _ = read_instructions(path, "skip")
    assert frame.height == 2
    assert left_out == {reason.partition(":")[0]: 1}


def test_blank_rows_are_always_left_out_and_counted(file: Callable[..., Path]) -> None:
    rows = [GOOD, {**GOOD, "output": " \n"}, {**GOOD, "instruction": ""}, {**GOOD, "output": ""}]
    frame, left_out, _ = read_instructions(file(rows))
    assert frame.height == 1
    assert left_out == {"blank output": 2, "blank instruction": 1}
    with pytest.raises(DataFormatError, match=r"no row can be learned from.*blank output"):
        read_instructions(file(rows[1:]))


def test_an_input_may_be_missing_null_or_empty(file: Callable[..., Path]) -> None:
    without = {k: v for k, v in GOOD.items() if k != "input"}
    frame, _, _ = read_instructions(file([without, {**GOOD, "input": None}, {**GOOD, "input": ""}]))
    assert frame["input"].to_list() == ["", "", ""]


@pytest.mark.parametrize(
    ("data", "told"),
    [(b" \n", "empty"), (b'[{"instruction": ', "broken JSON"), (b"[]", "there is none"),
     (b'{"instruction": ', "line 1: broken JSON"), (b"[" * 100_000, "broken JSON"),
     ('[{"output": "é"}]'.encode("latin-1"), "broken JSON")],
)  # fmt: skip
def test_a_file_that_is_none_says_so(file: Callable[..., Path], data: bytes, told: str) -> None:
    with pytest.raises(DataFormatError, match=told):
        read_instructions(file(data))


def test_gzip_a_byte_order_mark_and_blank_lines_are_read(file: Callable[..., Path]) -> None:
    line = json.dumps(GOOD).encode()
    text = b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line + b"\n\n"
    assert read_instructions(file(text))[0].height == 2
    assert read_instructions(file(text, name="some.jsonl.gz"))[0].height == 2


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real instructions here: {SHARED} is absent")
def test_real_files_have_the_rows_that_json_finds() -> None:
    for name in ("alpaca_tiny.json", "alpaca_en_demo.json"):
        rows = json.loads((SHARED / name).read_text(encoding="utf-8"))
        frame, left_out, _ = read_instructions(SHARED / name)
        assert frame["output"].to_list() == [r["output"] for r in rows if r["output"].strip()]
        assert frame.height + sum(left_out.values()) == len(rows)
    with pytest.raises(DataFormatError, match=r"line 1: no output: its keys are .*instances"):
        read_instructions(SHARED / "seed_tasks.jsonl")
