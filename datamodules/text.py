"""One rule for item text: what is markup goes, what was written stays.

``normalise_text`` is a pure function and, but for texts written for harm, idempotent.
"""

from __future__ import annotations

import html
import re
import unicodedata

import polars as pl

TITLE_LIMIT = 300  # characters
DESCRIPTION_LIMIT = 2_000

# Blocks whose content is code, then tags, then a tag cut off at the text's end ('<span class="a-size').
# Neither looks past the next opening of its kind, so that hostile text costs linear time.
_BLOCKS = re.compile(
    r"<!--(?:(?!<!--).)*?-->|<(script|style)\b[^<>]*>(?:(?!<\1).)*?</\1\s*>",
    re.DOTALL | re.IGNORECASE,
)
_TAGS = re.compile(r"</?[A-Za-z][^<>]*>|<![A-Za-z][^<>]*>")
_SCRAP = re.compile(r"<(?:!--|/?[A-Za-z][A-Za-z0-9]*(?:\s[^<>]*|/?))\Z", re.DOTALL)
_TAIL = re.compile(r'"\s*/>\Z')  # the end of a tag whose beginning was cut off: 'Magazines" />'
# "&amp;amp;lt;", as repeated escaping leaves it: all at once, so that each round costs linear time.
_AMPERSANDS = re.compile(r"&(?:amp;|#0*38;|#[xX]0*26;)+")
_ROUNDS = 20  # a text that was written for harm could ask for one a tag
_LONGEST = 100_000  # characters that are looked at: kilobytes of style sheets precede some texts
# What sends a text through Python at all; every other text is its own normal form.
_SUSPECT = r"[<&]|[^\x20-\x7e]|  |^ | $|/>$"


def normalise_text(text: str, limit: int = DESCRIPTION_LIMIT) -> str:
    """Plain text of at most ``limit`` characters.

    In this order, until nothing changes: comments, scripts and style sheets go with their content; tags
    (also one that is cut off at either end) become blanks; entities become their characters, so that
    markup that was escaped is met on the next round. Then control and other invisible characters go, runs of
    white space of any kind become one blank, and a text beyond the limit is cut at its last blank
    (in its second half; else in mid-word).
    Letters, case and punctuation are left alone.
    """
    text = text[:_LONGEST]
    for _ in range(_ROUNDS):
        bare = _SCRAP.sub(" ", _TAGS.sub(" ", _BLOCKS.sub(" ", text)))
        bare = bare if "<" in bare else _TAIL.sub(" ", bare)
        bare = _plain(html.unescape(_AMPERSANDS.sub("&", bare)))
        if bare == text:
            break
        text = bare
    if len(text) <= limit:
        return text
    head = text[: limit + 1].rpartition(" ")[0]
    return head if len(head) > limit // 2 else text[:limit].rstrip()


def _plain(text: str) -> str:
    """Without invisible characters, white space as single blanks."""
    kept = (c if c.isspace() or unicodedata.category(c)[0] != "C" else "" for c in text)
    return " ".join((text if text.isprintable() else "".join(kept)).split())


def normalise_column(texts: pl.Series, limit: int = DESCRIPTION_LIMIT) -> pl.Series:
    """``normalise_text`` of each string; what is empty afterwards is null.

    Texts that are their own normal form (most are) never leave Polars.
    """
    name = texts.name
    frame = texts.cast(pl.String).to_frame("text").with_row_index("row")
    odd = pl.col("text").str.contains(_SUSPECT) | (pl.col("text").str.len_chars() > limit)
    some = frame.filter(odd)
    mended = [normalise_text(text, limit) for text in some["text"]]
    if mended:
        rows = some["row"].to_numpy()
        whole = frame["text"].scatter(rows, pl.Series(mended, dtype=pl.String))
    else:
        whole = frame["text"]
    return whole.to_frame(name).select(pl.when(pl.col(name) != "").then(pl.col(name)).alias(name))[
        name
    ]


def usable_title(text: str | None) -> bool:
    """Whether a normalised title says anything: it holds a letter or a digit."""
    return text is not None and any(c.isalnum() for c in text)


def usable_titles(titles: pl.Series) -> pl.Series:
    """``usable_title`` of each, as booleans."""
    plain = titles.str.contains("[A-Za-z0-9]").fill_null(False)
    rows = (~plain).arg_true()
    rest = [usable_title(text) for text in titles.gather(rows)]
    return plain.scatter(rows, pl.Series(rest, dtype=pl.Boolean))
