"""Published numbers whose runs are elsewhere: they stay, marked, until they are measured anew."""

from __future__ import annotations

import pytest

from experiments import carried

HEAD = ["| method | column | paper | ours | n | fingerprint |", "|---|---|---|---|---|---|"]


def section(*rows: str, told: str = "Table 1: hits") -> list[str]:
    return ["### SIZE=cpu", "", told, "", *HEAD, *rows, "", "* source: a paper"]


OLD = [
    *section(
        "| SASRec | A | 0.5000 | 0.4000 ±0.01* | 60 | f1 |",
        "| SASRec | B | 0.5000 | 0.3000 | 60 | f2 |",
        "| CTRL | A | 0.1000 | no experiment | - | - |",
    ),
    "* fingerprint f1: name a, ties stable",
    "* fingerprint f2: name b, ties stable",
]


def test_what_was_not_run_keeps_its_number_and_what_was_run_is_new() -> None:
    new = section(
        "| SASRec | A | 0.5000 | - | - | - |",
        "| SASRec | B | 0.5000 | 0.3500 | 80 | f3 |",
        "| CTRL | A | 0.1000 | no experiment | - | - |",
    )
    assert carried.with_numbers(new, OLD, "ours") == [
        *section(
            "| SASRec | A | 0.5000 | 0.4000 ±0.01 ‡ | 60 | f1 |",
            "| SASRec | B | 0.5000 | 0.3500 | 80 | f3 |",
            "| CTRL | A | 0.1000 | no experiment | - | - |",
        ),
        "* fingerprint f1: name a, ties stable",
        "",
        f"{carried.TOLD}: 1 rows.",
    ]


def test_writing_again_marks_once_and_loses_nothing() -> None:
    nothing = section("| SASRec | A | 0.5000 | - | - | - |", "| SASRec | B | 0.5000 | - | - | - |")
    once = carried.with_numbers(nothing, OLD, "ours")
    assert once.count(f"{carried.TOLD}: 2 rows.") == 1
    assert carried.with_numbers(nothing, once, "ours") == once


@pytest.mark.parametrize("new", [
    section("| SASRec | A | 0.5100 | - | - | - |"),  # the published number was corrected
    section("| GRU4Rec | A | 0.5000 | - | - | - |"),
    section("| SASRec | A | 0.5000 | - | - | - |", told="Table 2: hits"),
])  # fmt: skip
def test_a_number_is_of_its_own_cell_alone(new: list[str]) -> None:
    assert carried.with_numbers(new, OLD, "ours") == new


def test_other_columns_carry_nothing() -> None:
    new = section("| SASRec | A | 0.5000 | - | - | - |")
    old = ["Table 1: hits", "", "| method | hits |", "|---|---|", "| SASRec | 0.4 |"]
    assert carried.with_numbers(new, old, "ours") == new
    assert carried.with_numbers(new, [], "ours") == new


# ---------------------------------------------------------------- rows of make results

METHODS = ["| method | seeds | ndcg |", "|---|---|---|"]


def table(fingerprint: str, *rows: str) -> list[str]:
    return ["", f"## data, fingerprint {fingerprint}", "", "* filters: none", "", *METHODS, *rows]


def test_rows_and_tables_of_other_machines_stay() -> None:
    new = ["# Results", *table("f1", "| sasrec/movielens_100k | 1 | 0.11 |")]
    old = [
        "# Results", "Told otherwise.",
        *table("f1", "| sasrec/movielens_100k * | 3 | 0.10 |", "| gru4rec/movielens_100k * | 1 | 0.09 |",
               "| sasrec/gone | 1 | 0.20 |"),
        *table("f2", "| sasrec/movielens_100k `seed=1` | 1 | 0.12 |", "| popularity | - | 0.05 |"),
        *table("f3", "| sasrec/gone | 1 | 0.20 |"),
    ]  # fmt: skip
    told = carried.with_rows(new, old, "method", ["method"])
    assert told == [
        "# Results",
        *table("f1", "| sasrec/movielens_100k | 1 | 0.11 |", "| gru4rec/movielens_100k ‡ | 1 | 0.09 |"),
        *table("f2", "| sasrec/movielens_100k `seed=1` ‡ | 1 | 0.12 |", "| popularity ‡ | - | 0.05 |"),
    ]  # fmt: skip
    assert carried.with_rows(new, told, "method", ["method"]) == told


def test_a_table_of_other_columns_is_taken_anew() -> None:
    new = ["## data", "", *METHODS, "| random | - | 0.01 |"]
    old = ["## data", "", "| method | hits |", "|---|---|", "| popularity | 0.4 |"]
    assert carried.with_rows(new, old, "method", ["method"]) == new
