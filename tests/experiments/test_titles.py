"""Items by what somebody types, and what of a reason the metadata support."""

from __future__ import annotations

import polars as pl
import pytest

from experiments.errors import UserError
from experiments.reasons import Metadata, checked
from experiments.titles import ItemNames, plain

TITLES = ["Toy Story (1995)", "Matrix, The (1999)", "Alien (1979)", "Aliens (1986)", "Heat (1995)",
          "Heat (1972)", "Alien 3 (1992)", "1"]  # fmt: skip
NAMES = ItemNames([str(10 * i) for i in range(1, 8)] + ["x1"], TITLES, "films")


@pytest.mark.parametrize(
    ("typed", "item"),
    [("10", 1), (" toy story ", 1), ("TOY STORY (1995)", 1), ("the matrix", 2), ("Matrix, The", 2),
     ("alien", 3), ("heat (1972)", 6), ("Alien-3", 7), ("1", 8)],
)  # fmt: skip
def test_an_item_is_found(typed: str, item: int) -> None:
    assert NAMES.find(typed) == item


@pytest.mark.parametrize(
    ("typed", "words"),
    [("heat", r"2 items named 'heat': give the id of 50 \(Heat \(1995\)\) or of 60"),
     ("toy storey", r"did you mean 10 \(Toy Story \(1995\)\)\?"),
     ("matrix", r"did you mean 20 \(Matrix, The"),
     ("zzzzz", "it has 8 items, such as 10"), ("; $(x)", "it has 8 items")],
)  # fmt: skip
def test_what_is_not_found_is_told_with_near_ones(typed: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        NAMES.find(typed)


def test_an_id_that_is_another_items_title_is_asked_about() -> None:
    names = ItemNames(["7", "8"], ["Film", "7"], "films")
    with pytest.raises(UserError, match="2 items named '7'"):
        names.find("7")


def test_a_large_catalogue_is_searched_by_words() -> None:
    names = ItemNames(
        [str(i) for i in range(30_000)], [f"Film {i}" for i in range(30_000)], "films"
    )
    assert names.near("film 29999 again")[0] == 30_000
    with pytest.raises(UserError, match="no item 'nothing of it'; it has 30,000 items"):
        names.find("nothing of it")


def test_titles_are_compared_without_year_articles_and_signs() -> None:
    assert plain("Good, the Bad & the Ugly, The (1966)") == "the good the bad the ugly"


CATALOG = pl.DataFrame(
    {"categories": [["Comedy", "Children's"], ["Sci-Fi"], None], "brand": ["Pixar", None, "Fox"]}
)


@pytest.mark.parametrize(
    ("said", "text", "dropped"),
    [
        ("because it is a comedy", "because it is a comedy", 0),
        ("because it is a sci-fi film and Pixar made it", "because Pixar made it", 1),
        ("because it is a great film", None, 1),  # names nothing that could be looked up
        ("because it is from 1995, it is a comedy from 1988", "because it is from 1995", 1),
        ('because you liked "Alien (1979)" and "Heat; or not"', 'because you liked "Alien (1979)"', 1),
        ("because it is by Fox and for comedies", None, 2),  # Fox is another's; 'comedies' is no name
        ("", None, 0),
    ],
)  # fmt: skip
def test_statements_stand_or_fall_by_metadata(said: str, text: str | None, dropped: int) -> None:
    known = Metadata(CATALOG)
    found = checked(said, known.of(1), known.known, "Toy Story (1995)", ["Alien (1979)"])
    assert (found.text, found.dropped) == (text, dropped)


def test_metadata_of_an_item_without_any() -> None:
    assert Metadata(CATALOG).of(3) == {"fox"}
    assert Metadata(CATALOG).known == {"comedy", "children s", "sci fi", "pixar", "fox"}
