"""``make recommend``: one user's list from a finished run, and what is said where there is none."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from datamodules.movielens import MovieLensDataModule
from experiments.errors import UserError
from experiments.recommendation import internal_user, recommend
from lightning_modules.popularity import PopularityModule
from tests.recipes.conftest import EXPERIMENT, ask


@pytest.fixture(scope="module")
def had(tiny_movielens: Path) -> dict[str, set[str]]:
    """Raw items of each raw user."""
    events = pl.read_csv(
        tiny_movielens / "u.data", separator="\t", has_header=False,
        new_columns=["user", "item", "rating", "time"], infer_schema_length=0,
    )  # fmt: skip
    return {str(u[0]): set(part["item"]) for u, part in events.group_by("user")}


def items_of(result: subprocess.CompletedProcess[str]) -> list[str]:
    """The table's second column."""
    lines = [line.split("│")[1:-1] for line in result.stdout.splitlines() if line.startswith("│")]
    return [cells[1].strip() for cells in lines]


def test_a_list_of_what_the_user_does_not_have(
    finished: Any, tiny: list[str], command_environment: Any, had: dict[str, set[str]]
) -> None:
    """SASRec's list is its own ranking of the catalogue: the products that it is defined by."""
    for user in ("1", "60"):
        result = ask(command_environment(finished.runs), EXPERIMENT, *tiny, LLMREC_USER=user, K="7")
        assert result.returncode == 0, result.stderr[-2000:]
        found = items_of(result)
        assert len(set(found)) == 7
        assert not set(found) & had[user]
        assert f"user {user}, {EXPERIMENT}" in result.stdout


@pytest.mark.parametrize(
    ("variables", "words"),
    [({}, "USER is missing"),
     ({"LLMREC_USER": "1", "K": "0"}, "K='0', expected a whole number from 1 to 100"),
     ({"LLMREC_USER": "1", "K": "ten"}, "K='ten'")],
)  # fmt: skip
def test_what_is_told_at_once(
    finished: Any, tiny: list[str], command_environment: Any, variables: dict[str, str], words: str
) -> None:
    result = ask(command_environment(finished.runs), EXPERIMENT, *tiny, **variables)
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_what_only_the_data_or_the_method_can_tell(tiny_movielens: Path) -> None:
    data = MovieLensDataModule(root=str(tiny_movielens))
    assert internal_user(data, data.raw_users(np.array([7]))[0]) == 7
    with pytest.raises(UserError, match=r"has no user '6x'; did you mean '6'\?; it has 60 users"):
        internal_user(data, "6x")
    launch = {"accelerator": "cpu", "threads": 1}
    with pytest.raises(UserError, match="PopularityModule reads no words"):
        recommend(PopularityModule(), data, launch, 1, 'a "sad" $(one); `two`')
    with pytest.raises(UserError, match="are numbered 1 to 60"):
        recommend(PopularityModule(), data, launch, 61)


def test_popularitys_list_is_the_most_trained_items_that_are_new(tiny_movielens: Path) -> None:
    data = MovieLensDataModule(root=str(tiny_movielens))
    found = recommend(PopularityModule(), data, {"accelerator": "cpu", "threads": 1}, 5)
    held = data.histories
    own = set(held.items[held.offsets[5] : held.offsets[6]].tolist())
    counts = held.train_counts()
    order = sorted(range(1, held.num_items + 1), key=lambda i: (-counts[i], i))
    expected = [i for i in order if i not in own]
    assert found.items == expected[:100]
    assert found.places is None


def test_a_run_must_be_finished(
    tiny: list[str], command_environment: Callable[[Path], dict[str, str]], tmp_path: Path
) -> None:
    result = ask(command_environment(tmp_path), EXPERIMENT, *tiny, LLMREC_USER="1")
    assert result.returncode == 2
    assert f"(train): make exp NAME={EXPERIMENT}" in result.stderr
