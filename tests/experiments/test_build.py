"""From plain values to objects: what binds, what is refused and in which words."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest

from datamodules.candidates import UniformCandidates
from datamodules.errors import DataFormatError
from experiments import build
from experiments.errors import UserError

UNIFORM = "datamodules.candidates.UniformCandidates"
SASREC = "lightning_modules.sasrec.SASRecModule"
ADAPTER, LLM = "lightning_modules.llm.AdapterSpec", "lightning_modules.llm.BackboneSpec"
WHEEL = "datamodules.sources.Wheel"
TALLREC = "lightning_modules.tallrec.TALLRecModule"
DATA = "datamodules.movielens.MovieLensDataModule"


def problems(node: Any, given: tuple[str, ...] = ()) -> list[str]:
    return list(build.problems(node, "here", given))


def test_nested_objects_are_built_with_plain_containers() -> None:
    node = {"_target_": DATA, "candidates": {"_target_": UNIFORM, "count": 7}, "expected": {"users": 3},
            "filters": [{"_target_": "datamodules.filters.KCore", "user": 2}]}  # fmt: skip
    assert problems(node) == []
    data = build.build(node)
    assert data.recipe.candidates == UniformCandidates(count=7)
    assert type(data.expected) is dict
    assert data.recipe.filters[0].user == 2


def test_extra_arguments_reach_the_constructor() -> None:
    module = build.build({"_target_": SASREC, "hidden_size": 8}, num_items=11)
    assert module.num_items == 11
    assert module.item_vectors().shape == (12, 8)


class Pair:
    """Holds what it is given."""

    def __init__(self, first: Any, second: Any, third: Any, fourth: int = 0) -> None:
        self.first, self.second, self.third, self.fourth = first, second, third, fourth


def test_facts_go_to_those_who_ask() -> None:
    data = SimpleNamespace(num_items=3, num_users=4)  # without a catalogue: nobody may ask for it
    assert build.build_on({"_target_": SASREC}, data).num_items == 3
    assert build.build_on({"_target_": "lightning_modules.markov.MarkovModule"}, data)


def test_a_table_of_texts_that_nothing_reads_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"SASRecModule reads no texts of items: .*catalog\.summary"
    ):
        build.build_on(
            {"_target_": SASREC}, SimpleNamespace(num_items=3), **{"catalog.summary": "x.parquet"}
        )


def test_a_table_of_texts_is_of_this_catalogue_and_whole(tmp_path: Path) -> None:
    catalog = pl.DataFrame({"title": ["x", "y"]})
    file = tmp_path / "predictions.parquet"

    def told() -> list[str | None]:
        found = build._with_texts(catalog, {"catalog.summary": str(file)})
        return list(found["summary"])

    pl.DataFrame({"item": [1, 2], "text": ["a", None]}).write_parquet(file)
    assert told() == ["a", None]
    for columns, error, words in (
        (
            {"item": [1, 2, 3], "text": ["a", "b", "c"]},
            UserError,
            "has texts of 3 items, and the data has 2",
        ),
        ({"item": [2, 1], "text": ["b", "a"]}, UserError, "does not number its items 1 to 2"),
        ({"item": [1, 2]}, DataFormatError, "has no column text: name predictions.parquet"),
    ):
        pl.DataFrame(columns).write_parquet(file)
        with pytest.raises(error, match=words):
            told()
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(
        DataFormatError, match=r"cannot be read .*: delete its folder, and make exp makes"
    ):
        told()


def test_facts_go_to_nested_objects_that_ask() -> None:
    data = SimpleNamespace(num_items=3)
    inner = {"_target_": SASREC, "hidden_size": 8}
    spec = {"_target_": UNIFORM, "count": 7}  # asks for nothing
    node = {"_target_": "tests.experiments.test_build.Pair", "first": inner, "second": spec}
    pair = build.build_on({**node, "third": {**node, "third": None}}, data, fourth=4)
    assert (pair.first.num_items, pair.second.count, pair.fourth) == (3, 7, 4)
    assert pair.third.first.item_vectors().shape == (4, 8)


class Loads(Pair):
    """Notes the checkpoint that it is to load."""

    loaded = ""

    def load_weights(self, path: str) -> None:
        """Note it."""
        self.loaded = path


def test_inputs_go_to_the_object_that_they_name() -> None:
    target = "tests.experiments.test_build.Loads"
    inner = {"_target_": target, "second": 1, "third": None}
    node = {"_target_": target, "first": {"_target_": target, "first": inner, "second": 2},
            "second": {"_target_": UNIFORM}}  # fmt: skip
    given = {"third": 3, "weights": "outer", "first.third": 4, "first.first.first": 5,
             "first.first.weights": "inner"}  # fmt: skip
    assert problems(node, tuple(given)) == []
    pair = build.build_on(node, SimpleNamespace(), **given)
    assert (pair.third, pair.loaded) == (3, "outer")
    assert (pair.first.third, pair.first.loaded) == (4, "")
    assert (pair.first.first.first, pair.first.first.loaded) == (5, "inner")
    lost = problems(node, ("third", "nobody.third", "first.third", "first.first.firts"))
    assert "no object 'nobody'" in lost[-1]
    assert any("'firts'" in line and "first.first" in line for line in lost)
    assert any("needs 'first'" in line for line in lost)


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"_target_": UNIFORM, "cuont": 3}, ["here", "'cuont'", "did you mean 'count'?"]),
        ({"_target_": UNIFORM, "count": "many"}, ["here.count is 'many'", "integer"]),
        ({"_target_": SASREC, "loss": "mse"}, ["here.loss is 'mse'", "'ce'", "'gbce'"]),
        ({"_target_": SASREC, "betas": [0.9]}, ["here.betas"]),
        ({"_target_": SASREC, "num_items": 5}, ["num_items comes from the data"]),
        ({"_target_": "datamodules.nowhere.X"}, ["here", "datamodules.nowhere.X"]),
        ({"_target_": "datamodules.candidates.Uniform"}, ["has no 'Uniform'"]),
        ({"a": [{"b": {"_target_": UNIFORM, "x": 1}}]}, ["here.a[0].b", "'x'"]),
        ({"_target_": DATA, "filters": [{"_target_": UNIFORM, "sed": 1}]}, ["here.filters[0]", "'seed'"]),
        ({"_target_": "SASRecModule"}, ["here", "SASRecModule"]),
        ({"_target_": ADAPTER, "rank": 0, "alpha": -1}, ["here: ", "rank must be", "alpha must be"]),
        ({"_target_": ADAPTER, "rank": 0, "method": "loraa"}, ["here.method is 'loraa'"]),
        ({"_target_": LLM, "source": {"_target_": WHEEL, "package": "x", "version": "1", "sha256": "0",
                                      "members": ["a"]}, "revision": "main"},
         ["here: ", "revision is the commit of a hub id"]),
        ({"_target_": TALLREC, "llm": {"_target_": LLM, "max_length": 0},
          "adapter": {"_target_": ADAPTER}}, ["here.llm: ", "max_length must be"]),
    ],
)  # fmt: skip
def test_one_problem_says_where_and_what(node: dict[str, Any], words: list[str]) -> None:
    (said,) = problems(node)
    for word in words:
        assert word in said, said


def test_a_missing_argument_is_a_problem_unless_it_will_be_given() -> None:
    node = {"_target_": "lightning.pytorch.loggers.TensorBoardLogger"}
    assert problems(node) == [f"here: {node['_target_']} needs 'save_dir'"]
    assert problems(node, ("save_dir",)) == []


def test_a_given_argument_must_exist() -> None:
    assert "'backbone'" in problems({"_target_": SASREC}, ("backbone",))[0]


def test_all_of_them_at_once() -> None:
    node = {"_target_": DATA, "relase": "1m", "on_bad_row": 3,
            "candidates": {"_target_": UNIFORM, "count": "x", "sed": 1}}  # fmt: skip
    assert len(problems(node)) == 4


def test_what_a_constructor_refuses_is_the_users_problem() -> None:
    with pytest.raises(UserError, match=r"UniformCandidates: .*count=0") as caught:
        build.build({"_target_": UNIFORM, "count": 0})
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="max_length"):
        build.build({"_target_": SASREC, "max_length": 0}, num_items=3)
