"""A plain or ``.gz`` text file of any size, in blocks of whole lines, unpacked in a thread of its own."""

from __future__ import annotations

import queue
import threading
import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from datamodules.errors import DataFormatError

BLOCK_BYTES = 16 << 20  # 32 MB blocks come from fresh pages each time: a tenth slower
_PIECE = 2 << 20
_LONGEST_LINE = 64 << 20
_BLANK = b" \t\r\v\f"

T = TypeVar("T")


@dataclass(frozen=True)
class Block:
    """Whole lines of a file, the first of them numbered ``first_line`` (from 1)."""

    first_line: int
    data: bytes

    def halves(self) -> tuple[Block, Block]:
        """Both halves, cut at a line's end near the middle; of one line the second is empty."""
        middle = len(self.data) // 2
        cut = self.data.rfind(b"\n", 0, middle) + 1 or self.data.find(b"\n", middle) + 1
        cut = cut or len(self.data)
        head = self.data[:cut]
        return Block(self.first_line, head), Block(
            self.first_line + head.count(b"\n"), self.data[cut:]
        )

    def rows(self) -> Iterator[tuple[int, bytes]]:
        """(line number, line without its end) of each line that is not blank."""
        for number, line in enumerate(self.data.split(b"\n"), self.first_line):
            if line.strip(_BLANK):
                yield number, line.removesuffix(b"\r")


def read_blocks(path: Path, digest: Any) -> Generator[Block, None, None]:
    """Whole lines, some 16 MB at a time; ``digest`` gets all bytes.

    Raises:
        DataFormatError: the file is empty, damaged, or a line of it is longer than 48 MiB.
    """
    number = 1
    parts: list[bytes] = []
    size = 0
    for piece in _pieces(path):
        digest.update(piece)
        cut = piece.rfind(b"\n") + 1 if size + len(piece) >= BLOCK_BYTES else 0
        if not cut:
            parts.append(piece)
            size += len(piece)
            if size > _LONGEST_LINE:
                raise _endless(path, number + sum(part.count(b"\n") for part in parts))
            continue
        data = b"".join((*parts, memoryview(piece)[:cut]))
        yield Block(number, data)
        number += data.count(b"\n")
        parts, size = [piece[cut:]], len(piece) - cut
    rest = b"".join(parts)
    if number == 1 and not rest.strip():
        raise DataFormatError(f"{path}: the file is empty; get it again.")
    if rest:
        yield Block(number, rest)


def _endless(path: Path, line: int) -> DataFormatError:
    return DataFormatError(
        f"{path}, line {line}: the line is longer than {_LONGEST_LINE - BLOCK_BYTES >> 20} MiB; this is "
        "no file of one record a line, get it again."
    )


def _pieces(path: Path) -> Iterator[bytes]:
    """A file's bytes, unpacked, with a progress bar for what takes longer than two seconds."""
    from tqdm import tqdm

    with (
        path.open("rb") as file,
        tqdm(total=path.stat().st_size, unit="B", unit_scale=True, delay=2, desc=path.name) as bar,
    ):
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if path.suffix == ".gz" and not packed:
            raise DataFormatError(
                f"{path}: this is no gzip file; get it again, or take .gz off its name if it is "
                "unpacked already."
            )
        for piece in _unpacked(file, path) if packed else iter(lambda: file.read(_PIECE), b""):
            bar.update(file.tell() - bar.n)
            yield piece


def _unpacked(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Every member of a gzip file, some megabytes at a time whatever its ratio (``zlib`` checks the CRC)."""
    member = None
    try:
        while chunk := file.read(1 << 20):
            while chunk:
                if member is None:
                    chunk = chunk.lstrip(b"\0")  # tapes and some tools pad behind the end
                    member = zlib.decompressobj(wbits=31) if chunk else None
                    continue
                yield member.decompress(chunk, _PIECE)
                chunk = member.unused_data if member.eof else member.unconsumed_tail
                member = None if member.eof else member
        while member is not None and not member.eof:
            if not (piece := member.decompress(b"", _PIECE)):
                raise EOFError("it ends early")
            yield piece
    except (EOFError, zlib.error) as error:
        raise DataFormatError(
            f"{path}: the gzip file is truncated or damaged ({error}); get it again."
        ) from error


def ahead(items: Generator[T, None, None], depth: int = 2) -> Iterator[T]:
    """The same items, made in a thread that is at most ``depth`` ahead and ends with this iterator."""
    results: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stop = threading.Event()

    def put(kind: str, value: Any) -> None:
        while not stop.is_set():
            try:
                results.put((kind, value), timeout=0.1)
                break
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put("item", item)
                if stop.is_set():
                    break
            put("end", None)
        except BaseException as error:
            put("error", error)
        finally:
            items.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (got := results.get())[0] == "item":
            yield got[1]
        if got[0] == "error":
            raise got[1]
    finally:
        stop.set()
        thread.join()
