"""Damaged copies of a good file: bytes flipped, lines cut, doubled or lost, fields missing."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

CASES = 500


def damaged(data: bytes, separator: bytes, cases: int = CASES) -> Iterator[bytes]:
    """Each with one to four accidents; the same ones every time."""
    for seed in range(cases):
        rng = random.Random(seed)
        copy = data
        for _ in range(rng.randint(1, 4)):
            copy = rng.choice(ACCIDENTS)(copy, separator, rng)
        yield copy


def flip_bytes(data: bytes, separator: bytes, rng: random.Random) -> bytes:
    copy = bytearray(data or b"?")
    for _ in range(rng.randint(1, 6)):
        copy[rng.randrange(len(copy))] = rng.randrange(256)
    return bytes(copy)


def set_signs(data: bytes, separator: bytes, rng: random.Random) -> bytes:
    """Signs that mean something to a parser, where they do not belong."""
    place = rng.randrange(len(data) + 1)
    sign = rng.choice(
        [b'"', b"\\", separator, b"\n", b"\r", b"NULL", b" ", b"\xc3", b"-", b"\xef\xbb\xbf"]
    )
    return data[:place] + sign + data[place:]


def cut_the_end(data: bytes, separator: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def drop_a_field(data: bytes, separator: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    number = rng.randrange(len(lines))
    fields = lines[number].split(separator)
    del fields[rng.randrange(len(fields))]
    lines[number] = separator.join(fields)
    return b"\n".join(lines)


def move_a_line(data: bytes, separator: bytes, rng: random.Random) -> bytes:
    """Lost, doubled, or cut in two."""
    lines = data.split(b"\n")
    number = rng.randrange(len(lines))
    line = lines.pop(number)
    middle = rng.randrange(len(line) + 1)
    lines[number:number] = rng.choice([[], [line, line], [line[:middle], line[middle:]]])
    return b"\n".join(lines)


Accident = Callable[[bytes, bytes, random.Random], bytes]
ACCIDENTS: list[Accident] = [flip_bytes, set_signs, cut_the_end, drop_a_field, move_a_line]


def rows_in(data: bytes, blanks: bytes = b"\r", header: bool = True) -> int:
    """Lines that are not blank, without the header, counted without the code under test."""
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")[int(header) :]
    return sum(line.strip(blanks) != b"" for line in lines)
