"""What was done to BookCrossing's ISBNs and titles on their way, undone by stated rules.

Every function is pure. A rule changes a text only where it fits; what fits none stays as it is written.
"""

from __future__ import annotations

import re

import polars as pl

# What surrounds or divides an ISBN and says nothing: blanks, hyphens, quotes, dots, escapes.
_NOISE = re.compile(r"[\s\-\u2010-\u2015'\"`´\u2018\u2019\u201c\u201d.\\]+")
_ISBN_10 = re.compile(r"[0-9]{9}[0-9X]")
_ISBN_13 = re.compile(r"97[89][0-9]{10}")
_SHORT = re.compile(
    r"[0-9]{6,8}[0-9X]"
)  # "000" is the longest run of zeros that an ISBN begins with

VALID, RESTORED, INVALID = "valid", "restored", "invalid"

# Cp1252 has signs where Latin-1 has none: "€" is byte 80.
_SIGNS = {byte: bytes([byte]).decode("cp1252", "ignore") for byte in range(0x80, 0xA0)}
_BYTES = {sign: byte for byte, sign in _SIGNS.items() if sign}
# A western letter's two bytes in UTF-8 when each is read by itself: one of these, then a sign.
_MARKER = re.compile("[ÂÃÅÆËâ][\u0080-\u00bf" + "".join(map(re.escape, _BYTES)) + "]")
# Cp1252's sign for byte 83 has no place in Latin-1: the dump has "?" there, which only this can be.
_LOST_83 = re.compile("\u00c3\\?\u00c2(?=[\u00a0-\u00bf])")
# Both bytes of a letter that is C3 80 to C3 9F in UTF-8. Only one of those letters is small.
_LOST_LETTER = re.compile("\u00c3\\?\u00c2\\?")
_SMALL_BEFORE = re.compile("(?<=[a-z\u00e0-\u00ff])\u00c3\\?\u00c2\\?")
_ROUNDS = 4  # each undoes one reading in the wrong encoding; two are known to have happened


def tidy_isbn(text: str) -> str:
    """Capital X, and no blank, hyphen, quote, dot or backslash; a text of nothing else keeps them."""
    return _NOISE.sub("", text).upper() or text.strip()


def is_isbn(text: str) -> bool:
    """Whether a tidy text is an ISBN of 10 or 13 digits whose check digit holds."""
    if _ISBN_10.fullmatch(text):
        digits = [10 if digit == "X" else int(digit) for digit in text]
        return (
            sum(weight * digit for weight, digit in zip(range(10, 0, -1), digits, strict=True)) % 11
            == 0
        )
    if _ISBN_13.fullmatch(text):
        return sum((1, 3)[n % 2] * int(digit) for n, digit in enumerate(text)) % 10 == 0
    return False


def normalise_isbn(text: str) -> tuple[str, str]:
    """The normal form of an ISBN, and whether it is ``VALID``, ``RESTORED`` or ``INVALID``.

    One to three leading zeros, which spreadsheets drop, are put back only where the check digit then
    holds; a text that is no ISBN either way keeps its tidy form, so that equal texts still meet.
    """
    tidy = tidy_isbn(text)
    if is_isbn(tidy):
        return tidy, VALID
    if _SHORT.fullmatch(tidy) and is_isbn(tidy.zfill(10)):
        return tidy.zfill(10), RESTORED
    return tidy, INVALID


def normalise_isbns(raw: pl.Series) -> pl.DataFrame:
    """Columns ``isbn`` and ``kind`` of each raw text; each different text is looked at once."""
    texts = raw.unique()
    pairs = [normalise_isbn(text) for text in texts]
    columns = {"isbn": [isbn for isbn, _ in pairs], "kind": [kind for _, kind in pairs]}
    table = pl.DataFrame(columns, schema={"isbn": pl.String(), "kind": pl.String()})
    table = table.with_columns(raw=texts)
    found = raw.to_frame("raw").join(table, on="raw", how="left", maintain_order="left")
    return found.select("isbn", "kind")


def repair_mojibake(text: str) -> str:
    """Undo UTF-8 that was read as Latin-1 or cp1252, as often as it happened.

    The whole text is written back as bytes (each letter of Latin-1 and sign of cp1252 has one) and read
    as UTF-8. A round counts only if every byte takes part, if the release's own encoding could hold what
    comes out, and if fewer marks of such a reading are left: "Fiancé" and "NESCAFÉ®" fail this and stay.

    The dump also lost bytes to "?": "Ã?Â¼" can only have been "Ã\\x83Â¼"; and of the letters that leave
    "Ã?Â?" only ß is small, so it is ß after a small letter and stays elsewhere.
    """
    for _ in range(_ROUNDS):
        better = _read_again(_LOST_83.sub("\u00c3\u0083\u00c2", text))
        if better is None:
            break
        text = better
    return _SMALL_BEFORE.sub("ß", text)


def has_lost_letter(text: str) -> bool:
    """Whether a letter is left that no rule can bring back."""
    return "Ã?" in text


def _read_again(text: str) -> str | None:
    """One reading undone, or None. What lies between lost letters is read piece by piece."""
    pieces = []
    for piece in _LOST_LETTER.split(text):
        try:
            pieces.append(_as_bytes(piece).decode("utf-8"))
            _as_bytes(pieces[-1])
        except ValueError:  # a character without a byte, or bytes that are no UTF-8
            return None
    better = "\u00c3?\u00c2?".join(pieces)
    return better if _marks(better) < _marks(text) else None


def _as_bytes(text: str) -> bytes:
    """Raises ValueError for a letter of neither encoding (its number is above 255)."""
    return bytes(_BYTES.get(letter, ord(letter)) for letter in text)


def _marks(text: str) -> int:
    return len(_MARKER.findall(text))


def repair_quotes(text: str) -> str:
    r"""Undo a backslash-escaped field that was read with doubled quotes.

    ``"\"O\" Is for Outlaw"`` came out as ``\O\" Is for Outlaw"``: the first escaped quote was taken for
    the field's end, and the true end for a letter. So a text that has a backslash and ends in a quote loses
    that quote and gets the first back.
    """
    if not text.endswith('"') or "\\" not in text:
        return text
    whole = re.sub(r'\\(?!")', r'\\"', text[:-1], count=1)
    return whole.replace('\\"', '"')
