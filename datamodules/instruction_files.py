"""Instruction files in Alpaca's format: a JSON list, or JSON lines, of instruction, input and output.

Taori et al., "Stanford Alpaca", 2023. Other keys are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from datamodules.delimited import read_raw
from datamodules.errors import DataFormatError
from datamodules.json_lines import parse_json

COLUMNS = ("instruction", "input", "output")
_REMEDY = "correct it, or give the data on_bad_row=skip, which leaves such rows out and counts them"


def read_instructions(
    path: Path, on_bad_row: str = "error"
) -> tuple[pl.DataFrame, dict[str, int], str]:
    """The rows of a file that can be learned from.

    A row whose instruction or output is blank is always left out and counted: Alpaca's own file has some.

    Args:
        path: a JSON list or JSON lines, plain or ``.gz``, UTF-8.
        on_bad_row: ``error`` stops at the first row that is not in the format; ``skip`` counts those, too.

    Returns:
        A frame with ``COLUMNS`` as text (a missing or null input is ""), in the file's order; rows left out
        by reason; the SHA-256 of the unpacked bytes.

    Raises:
        DataFormatError: the file is not JSON, a row is bad, or no row is left.
    """
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"on_bad_row is {on_bad_row!r}, expected 'error' or 'skip'")
    data, digest = read_raw(path)
    kept: list[tuple[str, str, str]] = []
    left_out: dict[str, int] = {}
    for place, record in _records(path, data.removeprefix(b"\xef\xbb\xbf")):
        try:
            row = _row(record)
        except ValueError as error:
            if on_bad_row == "error":
                raise DataFormatError(f"{path}, {place}: {error}; {_REMEDY}.") from error
            reason = str(error).partition(":")[0]
            left_out[reason] = left_out.get(reason, 0) + 1
            continue
        blank = [name for name, text in zip(COLUMNS, row, strict=True) if not text.strip()]
        if told := [name for name in blank if name != "input"]:
            reason = f"blank {told[0]}"
            left_out[reason] = left_out.get(reason, 0) + 1
            continue
        kept.append(row)
    if not kept:
        raise DataFormatError(
            f"{path}: no row can be learned from ({left_out or 'there is none'}); expected objects with "
            f"the keys {', '.join(COLUMNS)}."
        )
    frame = pl.DataFrame(kept, schema=dict.fromkeys(COLUMNS, pl.String()), orient="row")
    return frame, left_out, digest


def _records(path: Path, data: bytes) -> Iterator[tuple[str, Any]]:
    """Where each record stands, and the record; in JSON lines the bytes of its line."""
    if not data.lstrip().startswith(b"["):
        for number, line in enumerate(data.split(b"\n"), start=1):
            if line.strip():
                yield f"line {number}", line
        return
    try:
        records = json.loads(data.decode())
    except (ValueError, RecursionError, MemoryError) as error:
        told = str(error)[:200] or type(error).__name__
        raise DataFormatError(f"{path}: broken JSON ({told}); get the file again.") from error
    for number, record in enumerate(records, start=1):
        yield f"row {number}", record


def _row(record: Any) -> tuple[str, str, str]:
    """Instruction, input and output. Raises ValueError, "reason: detail"."""
    if isinstance(record, bytes):
        try:
            record = parse_json(record.decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"bytes of an unknown encoding: {error.reason}, utf-8 due") from error
    if not isinstance(record, dict):
        raise ValueError(f"not an object: {str(record)[:80]!r}")
    if missing := [name for name in COLUMNS if name != "input" and name not in record]:
        known = ", ".join(map(str, record))[:120] or "none"
        raise ValueError(f"no {missing[0]}: its keys are {known}")
    found = [record["instruction"], record.get("input"), record["output"]]
    found[1] = "" if found[1] is None else found[1]
    for name, text in zip(COLUMNS, found, strict=True):
        if not isinstance(text, str):
            raise ValueError(f"{name} is no text: {str(text)[:80]!r}")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a pair, "\ud800": no character
            raise ValueError(f"{name} holds half a character: {error.reason}") from error
    return found[0], found[1], found[2]
