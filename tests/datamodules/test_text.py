"""The one rule for item text."""

from __future__ import annotations

import time

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.text import normalise_column, normalise_text, usable_title, usable_titles


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("Soap", "Soap"),
        ("", ""),
        (" a \t b\n\nc ", "a b c"),
        ("a\u00a0b\u2003c\u3000d", "a b c d"),
        ("AT&amp;T", "AT&T"),
        ("AT&T", "AT&T"),
        ("&amp;amp;amp;quot;x&quot;", '"x"'),
        ("Caf&eacute; &#233; &#xE9; é", "Café é é é"),
        ("<b>bold</b>ness", "bold ness"),
        ("one<br/>two<BR>three", "one two three"),
        ("&lt;b&gt;bold&lt;/b&gt;", "bold"),
        ("a<!-- c --><style>p{}</style><script x='1'>f(1 < 2)</script>b", "a b"),
        ('<span class="a-size-medium a-color-secondary"', ""),
        ("text <span class='x", "text"),
        (' Magazines" />', "Magazines"),
        ("5 < 6 and 7 > 4", "5 < 6 and 7 > 4"),
        ("I <3 you", "I <3 you"),
        ("a\u200bb\u00adc\x00d\x07e\ufeff", "abcde"),
        ("日本語 タイトル", "日本語 タイトル"),
        ("👍🏽 ok", "👍🏽 ok"),
    ],
)
def test_markup_goes_and_what_was_written_stays(written: str, plain: str) -> None:
    assert normalise_text(written) == plain
    assert normalise_text(plain) == plain


def test_a_long_text_ends_at_a_blank_of_its_second_half() -> None:
    assert normalise_text("aaaa bbbb cccc", 9) == "aaaa bbbb"
    assert normalise_text("aaaa bbbb cccc", 12) == "aaaa bbbb"
    assert normalise_text("aaaa bbbb cccc", 14) == "aaaa bbbb cccc"
    assert normalise_text("a" * 50, 10) == "a" * 10
    assert normalise_text("a " + "b" * 50, 10) == "a " + "b" * 8


written = st.text(
    st.sampled_from("ab1 <>&;/\"'=!-#\n\t\u00a0\u200b\x00é") | st.characters(exclude_categories=["Cs"]),
    max_size=60,
) | st.lists(
    st.sampled_from(["&amp;", "&lt;", "&quot;", "<b>", "</b>", "<script>", "</script>", "<!--", "-->", "<a ",
                     "x", " ", '" />', "&", ";", "#60", "lt;"]),
    max_size=12,
).map("".join)  # fmt: skip


@given(written, st.integers(1, 80))
def test_no_limit_is_passed_and_no_blank_or_invisible_character_is_left(
    text: str, limit: int
) -> None:
    plain = normalise_text(text, limit)
    assert len(plain) <= limit
    assert plain == " ".join(plain.split())
    assert "\x00" not in plain
    assert "\u200b" not in plain


@given(written)
def test_twice_is_once(text: str) -> None:
    once = normalise_text(text)
    assert normalise_text(once) == once


@given(st.lists(st.none() | written, max_size=8), st.integers(1, 60))
def test_the_column_is_the_function_of_each_text(texts: list[str | None], limit: int) -> None:
    column = pl.Series("title", texts, dtype=pl.String)
    found = normalise_column(column, limit)
    assert found.name == "title"
    assert found.to_list() == [
        (normalise_text(t, limit) or None) if t is not None else None for t in texts
    ]


@pytest.mark.parametrize(
    "text",
    ["<a" + " " * 99_000 + "<", "<a " * 33_000, "<script" * 14_000, "<!--" * 25_000, "&amp;" * 20_000 + "lt;",
     "<script>" + "</script " * 11_000, "&lt;" * 20_000 + "b>", '"' + " " * 99_000, "<" * 100_000,
     "</script" + " " * 99_000, '" ' * 50_000],
)  # fmt: skip
def test_hostile_text_takes_no_long_time(text: str) -> None:
    began = time.perf_counter()
    normalise_text(text)
    assert time.perf_counter() - began < 3  # a quadratic rule takes a minute


@pytest.mark.parametrize(
    ("title", "usable"),
    [
        (None, False),
        ("", False),
        ("--", False),
        ("...!", False),
        ("7", True),
        ("a", True),
        ("日", True),
    ],
)
def test_a_usable_title_has_a_letter_or_digit(title: str | None, usable: bool) -> None:
    assert usable_title(title) is usable
    column = pl.Series([title, "x", title], dtype=pl.String)
    assert usable_titles(column).to_list() == [usable, True, usable]
