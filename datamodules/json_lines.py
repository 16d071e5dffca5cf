"""Read files of one record a line, of any size: fast where they are right, exact about the line where not.

A plain or ``.gz`` file comes in blocks of whole lines, unpacked in a thread while the last block is
parsed. Polars parses a block at once and strictly; when it objects, or something does not add up, the
block is halved, and what is left of it in the end goes line by line through the careful reader, which
alone decides what is a bad row and names its line. Blank lines are ignored.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import polars as pl

from datamodules.delimited import BadRows
from datamodules.errors import DataFormatError
from datamodules.line_blocks import Block, ahead, read_blocks

# Blocks that are parsed at once, each with its text in memory; one more than cores, as each also waits.
WORKERS = min(4, (os.cpu_count() or 1) + 1)
FEW_LINES = 256  # where halving a block costs more than reading its lines one by one
_LONGEST_LITERAL = 4 << 20  # characters; a metadata row has some thousands
_STRINGS = re.compile(r"'[^'\\]*(?:\\.[^'\\]*)*'|\"[^\"\\]*(?:\\.[^\"\\]*)*\"", re.DOTALL)
# A sign that is not a number's own: "1+1+1...", "- - - 1" nest without brackets, and deeply.
_OPERATOR = re.compile(r"(?<![:,\[({ eE])[+-]|[+-](?![0-9])")

T = TypeVar("T")
Fast = Callable[[bytes, pl.Series], "pl.DataFrame | None"]
Careful = Callable[[str], dict[str, Any]]


class JsonLines:
    """One file's rows as frames, in file order.

    Args:
        path: the file; gzip is known by its first bytes.
        bad: counts bad rows, or refuses the first.
        fast: (bytes of a block, its lines) -> one row a line, or None where anything is odd.
        careful: one line -> the same row; ValueError("reason: detail") = bad row.
        schema: the rows' columns. ``line``, a hash of the whole line, comes on top.
        header: the first line that the file must have, or None.
    """

    def __init__(
        self,
        path: Path,
        bad: BadRows,
        fast: Fast | None,
        careful: Careful,
        schema: dict[str, Any],
        header: str | None = None,
    ) -> None:
        self.path, self.bad, self.fast, self.careful = path, bad, fast, careful
        self.schema, self.header = schema, header
        self.rows = 0  # read so far, bad ones included
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Of the unpacked bytes, once all frames are read."""
        return self._digest.hexdigest()

    def frames(self) -> Iterator[pl.DataFrame]:
        """The good rows, some blocks' worth at a time. Raises DataFormatError, see ``mapped``."""
        return self.mapped(lambda frame: frame)

    def mapped(self, work: Callable[[pl.DataFrame], T]) -> Iterator[T]:
        """``work`` of the good rows, some blocks' worth at a time and in the file's order.

        It is done in threads, beside the parsing of other blocks; memory holds a few of them.

        Raises:
            DataFormatError: the file is empty, not text, damaged, has another header, or a bad row
                that may not be skipped.
        """
        # Polars reads JSON lines on one core and without the interpreter's lock, so blocks are read side by
        # side; their frames come out in the file's order, and so do errors and line numbers.
        with ThreadPoolExecutor(WORKERS) as pool:
            waiting: deque[tuple[Block, Future[tuple[int, T] | None]]] = deque()
            for block in ahead(read_blocks(self.path, self._digest)):
                if block.first_line == 1:
                    block = self._without_header(block)
                waiting.append((block, pool.submit(self._worked, block, work)))
                if len(waiting) > WORKERS:
                    yield from self._finished(*waiting.popleft(), work)
            while waiting:
                yield from self._finished(*waiting.popleft(), work)
        if self.rows == 0:
            raise DataFormatError(f"{self.path}: there is no row in the file; get it again.")

    def _without_header(self, block: Block) -> Block:
        data = block.data.removeprefix(b"\xef\xbb\xbf")
        first, _, rest = data.partition(b"\n")
        first = first.rstrip(b"\r")
        if b"\0" in first:
            raise DataFormatError(
                f"{self.path}, line 1: a NUL byte, so this is UTF-16, UTF-32 or no text at all; "
                "save it as UTF-8, or get it again."
            )
        if self.header is None:
            return Block(1, data)
        if first != self.header.encode():
            raise DataFormatError(
                f"{self.path}, line 1: the header is {first[:200].decode(errors='replace')!r}, "
                f"expected {self.header!r}; get the file of this release again."
            )
        return Block(2, rest)

    def _at_once(self, block: Block) -> pl.DataFrame | None:
        """A whole block by Polars; None where it objects or something does not add up."""
        lines = _lines(block.data) if self.fast is not None else None
        if lines is None or self.fast is None:
            return None
        frame = self.fast(block.data, lines) if len(lines) else None
        if frame is None or frame.height != len(lines):
            return None
        return frame.with_columns(lines.hash().alias("line"))

    def _worked(self, block: Block, work: Callable[[pl.DataFrame], T]) -> tuple[int, T] | None:
        """(rows, what was made of them) of a whole block, or None."""
        frame = self._at_once(block)
        return None if frame is None else (frame.height, work(frame))

    def _finished(
        self,
        block: Block,
        future: Future[tuple[int, T] | None],
        work: Callable[[pl.DataFrame], T],
    ) -> Iterator[T]:
        """One result where Polars agreed, else those of both halves."""
        made = future.result()
        if made is not None:
            self.rows += made[0]
            yield made[1]
        else:
            yield from map(work, self._parts(block))

    def _parts(self, block: Block) -> Iterator[pl.DataFrame]:
        if self.fast is None or block.data.count(b"\n") <= FEW_LINES:
            yield self._read_carefully(block)
            return
        for half in block.halves():
            frame = self._at_once(half)
            if frame is None:
                yield from self._parts(half)
            else:
                self.rows += frame.height
                yield frame

    def _read_carefully(self, block: Block) -> pl.DataFrame:
        rows: list[dict[str, Any]] = []
        texts: list[str] = []
        for number, raw in block.rows():
            self.rows += 1
            try:
                text = raw.decode()
                rows.append(self.careful(text))
                texts.append(text)
            except UnicodeDecodeError as error:
                self.bad.add(number, "bytes of an unknown encoding", f"{error.reason}, utf-8 due")
            except ValueError as error:
                reason, _, detail = str(error).partition(": ")
                self.bad.add(number, reason, detail)
        frame = pl.DataFrame(rows, schema=self.schema)
        return frame.with_columns(pl.Series(texts, dtype=pl.String).hash().alias("line"))


def _lines(data: bytes) -> pl.Series | None:
    """The lines that are not empty; None where they are not UTF-8."""
    try:
        lines = pl.read_lines(data).to_series()
    except pl.exceptions.PolarsError:
        return None
    # A line of blanks only stays, and as Polars makes no row of it, the careful reader sees it.
    return lines.filter(lines.str.len_bytes() > 0)


def parse_json(text: str) -> dict[str, Any]:
    """A JSON object; of repeated keys the first counts, as in Polars. Raises ValueError."""
    try:
        value = json.loads(text, object_pairs_hook=_first_wins, parse_constant=_no_constant)
    except (ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"broken JSON: {str(error)[:200] or type(error).__name__}") from error
    return _as_object(value)


def parse_literal(text: str) -> Any:
    """A Python literal (a dict, list, text or number), without running anything. Raises ValueError.

    Not an expression: signs that add or negate are refused, as chains of them overflow Python's own
    parser; brackets nest at most 200 deep there.
    """
    if len(text) > _LONGEST_LITERAL or _OPERATOR.search(_STRINGS.sub("", text)):
        raise ValueError("broken Python literal: too long, or an expression")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in a text is no fault of the reader's
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        reason = str(error)[:200] or type(error).__name__
        raise ValueError(f"broken Python literal: {reason}") from error


def parse_loose(text: str) -> dict[str, Any]:
    """A record of the 2014 release: JSON, or else a Python literal. Raises ValueError."""
    if text.lstrip().startswith('{"'):
        try:
            return parse_json(text)
        except ValueError:
            pass  # a literal whose first key is in double quotes
    return _as_object(parse_literal(text.strip()))


def _as_object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"not an object: {str(value)[:80]!r}, expected keys and values")
    return value


def _first_wins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return dict(reversed(pairs))


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
