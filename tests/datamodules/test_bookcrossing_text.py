"""ISBNs, mojibake and broken quotes: what each rule mends, and what it leaves alone."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.bookcrossing_text import (
    INVALID,
    RESTORED,
    VALID,
    has_lost_letter,
    is_isbn,
    normalise_isbn,
    normalise_isbns,
    repair_mojibake,
    repair_quotes,
)


def with_check_digit(nine: int) -> str:
    """An ISBN-10 by the definition: the one last digit that makes the weighted sum a multiple of 11."""
    body = f"{nine:09d}"
    total = sum((10 - n) * int(digit) for n, digit in enumerate(body))
    return body + "0123456789X"[-total % 11]


ISBN = st.integers(0, 10**9 - 1).map(with_check_digit)


@given(isbn=ISBN, digit=st.integers(0, 9), place=st.integers(0, 8))
def test_the_check_digit_finds_every_single_wrong_digit(isbn: str, digit: int, place: int) -> None:
    assert is_isbn(isbn)
    changed = isbn[:place] + str(digit) + isbn[place + 1 :]
    assert is_isbn(changed) == (changed == isbn)


@given(isbn=ISBN, noise=st.lists(st.sampled_from(" -.'\"\\\u2013"), min_size=11, max_size=11))
def test_noise_and_case_do_not_matter(isbn: str, noise: list[str]) -> None:
    written = "".join(n + d for n, d in zip(noise, isbn + " ", strict=True)).lower()
    assert normalise_isbn(written) == (isbn, VALID)


@given(nine=st.integers(10**5, 10**9 - 1))
def test_lost_zeros_come_back_up_to_three(nine: int) -> None:
    isbn = with_check_digit(nine)
    bare = isbn.lstrip("0")
    assert normalise_isbn(bare) == (isbn, VALID if bare == isbn else RESTORED) or len(bare) < 7
    if len(bare) < 7:
        assert normalise_isbn(bare) == (bare, INVALID)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0-306-40615-2", ("0306406152", VALID)),  # the example of the ISBN standard's article
        ("306406152", ("0306406152", RESTORED)),
        ("306406153", ("306406153", INVALID)),  # the check digit fails, so nothing is put before it
        ("978-0-306-40615-7", ("9780306406157", VALID)),
        ("9780306406158", ("9780306406158", INVALID)),
        ("B0000VZEH8", ("B0000VZEH8", INVALID)),
        ("080442957x", ("080442957X", VALID)),
        (" . ", (".", INVALID)),
        ("X123456789", ("X123456789", INVALID)),
        ("٠٣٠٦٤٠٦١٥٢", ("٠٣٠٦٤٠٦١٥٢", INVALID)),  # digits of another script
    ],
)
def test_isbns_one_by_one(text: str, expected: tuple[str, str]) -> None:
    assert normalise_isbn(text) == expected


@given(texts=st.lists(st.text(max_size=14)))
@settings(max_examples=50, deadline=None)
def test_a_column_is_its_texts_one_by_one_and_normal_forms_stay(texts: list[str]) -> None:
    frame = normalise_isbns(pl.Series("x", texts, dtype=pl.String()))
    assert frame.rows() == [normalise_isbn(text) for text in texts]
    for isbn, _ in frame.rows():
        assert normalise_isbn(isbn)[0] == isbn


# ---------------------------------------------------------------- mojibake


def garbled(text: str, encoding: str, times: int) -> str:
    """UTF-8 read in the wrong encoding; bytes that cp1252 lacks are read as Latin-1, as browsers do."""
    for _ in range(times):
        raw = text.encode()
        text = "".join(
            bytes([b]).decode(encoding)
            if encoding == "latin-1" or b not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)
            else chr(b)
            for b in raw
        )
    return text


WESTERN = st.text(st.sampled_from("abzé üßñÉÅøçàÂÃæ¿»€’œ -:'"), min_size=1).filter(
    lambda t: not t.isascii() and repair_mojibake(t) == t
)


@given(text=WESTERN, encoding=st.sampled_from(["latin-1", "cp1252"]), times=st.integers(1, 2))
def test_what_was_garbled_once_or_twice_is_whole_again(
    text: str, encoding: str, times: int
) -> None:
    assert repair_mojibake(garbled(text, encoding, times)) == text


@given(text=st.text(max_size=60))
def test_repairing_is_idempotent_and_leaves_ascii_alone(text: str) -> None:
    once = repair_mojibake(text)
    assert repair_mojibake(once) == once
    if text.isascii():
        assert once == text


@pytest.mark.parametrize(
    "text",
    ["Fiancé", "NESCAFÉ®", "São Tomé", "ÉTÉ", "Ångström", "Ã", "Â", "naïve café", "Œuvre", "日本",
     "Ä®", "Björn’s", "Peças & Ãs", "5€"],
)  # fmt: skip
def test_a_right_text_stays(text: str) -> None:
    assert repair_mojibake(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CÃ³mo ser una mujer", "Cómo ser una mujer"),
        ("C\u00c3\u0083\u00c2\u00b3mo", "Cómo"),  # twice, as in the cut
        ("Die PrÃ?Â¼fung.", "Die Prüfung."),  # once with a lost byte, as in the dump
        (
            "Die Pr\u00c3\u0083?\u00c3\u0082\u00c2\u00bcfung.",
            "Die Prüfung.",
        ),  # and once more, as in the cut
        ("Schade, daÃ?Â? du", "Schade, daß du"),
        (
            "Survivor, die Ã?Â?berlebende.",
            "Survivor, die Ã?Â?berlebende.",
        ),  # Ü, Ä, Ö, É ...: not known
        ("Ã?Â?lschiefer fÃ?Â¼r", "Ã?Â?lschiefer für"),
        ("itâ€™s", "it’s"),
    ],
)
def test_mojibake_one_by_one(text: str, expected: str) -> None:
    assert repair_mojibake(text) == expected
    assert has_lost_letter(repair_mojibake(text)) == ("Ã?Â?" in expected)


# ---------------------------------------------------------------- quotes


def misread(text: str) -> str:
    """A field with backslash-escaped quotes as a reader of doubled quotes takes it."""
    raw = text.replace('"', '\\"') + '"'  # what follows the opening quote
    first = raw.index('"')
    return raw[:first] + raw[first + 1 :] if first < len(raw) - 1 else raw[:-1]


@given(text=st.text("abc \",:'", max_size=20))
def test_misread_quotes_come_back(text: str) -> None:
    assert repair_quotes(misread(text)) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('\\O\\" Is for Outlaw"', '"O" Is for Outlaw'),
        ('The Sequel to \\Gone With the Wind\\""', 'The Sequel to "Gone With the Wind"'),
        ('Say "hello"', 'Say "hello"'),
        ("AC\\DC", "AC\\DC"),
        ("", ""),
    ],
)
def test_quotes_one_by_one(text: str, expected: str) -> None:
    assert repair_quotes(text) == expected
