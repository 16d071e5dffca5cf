"""``make prepare``: which categories a process takes, and the whole command on two small ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.amazon_releases import categories
from experiments.errors import UserError
from experiments.prepare import chosen, share

REPO = Path(__file__).resolve().parents[2]


def test_all_and_lists_of_categories() -> None:
    names, rest = chosen("data/amazon_2023", ["data.category=all", "data.reviews=full"])
    assert names == list(categories(2023))
    assert len(set(names)) == len(names) > 30
    assert rest == ["data.reviews=full"]
    assert chosen("data/amazon_2018", ["data.category=[Gift_Cards, Software]"])[0] == [
        "Gift_Cards", "Software",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("data/amazon_2018", [], "name the categories"),
        ("data/movielens_100k", ["data.category=all"], "has no categories"),
        ("data/amazon_2018", ["data.category=[]"], "names no category"),
        ("data/amazon_2018", ["data.category=[Softwar]"], "Did you mean 'Software'"),
    ],
)
def test_what_cannot_be_swept_is_said(name: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        chosen(name, overrides)


def _array(task: int, first: int, last: int, count: int, step: int = 1) -> dict[str, str]:
    told = {"ID": task, "MIN": first, "MAX": last, "COUNT": count, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{key}": str(value) for key, value in told.items()}


@given(st.integers(0, 40), st.integers(2, 9), st.integers(0, 5), st.integers(1, 3))
def test_the_tasks_of_an_array_share_everything_and_overlap_nowhere(
    size: int, tasks: int, first: int, step: int
) -> None:
    names = [f"c{n}" for n in range(size)]
    numbers = range(first, first + tasks * step, step)
    parts = [share(names, _array(n, first, numbers[-1], tasks, step)) for n in numbers]
    assert sorted(name for part in parts for name in part) == sorted(names)
    assert share(names, {}) == share(names, _array(0, 0, 0, 1)) == names


def test_single_tasks_of_an_array_are_numbers_of_categories() -> None:
    names = [f"c{n}" for n in range(33)]
    assert share(names, _array(5, 5, 5, 1)) == ["c5"]
    assert [share(names, _array(n, 1, 7, 3)) for n in (1, 5, 7)] == [["c1"], ["c5"], ["c7"]]
    with pytest.raises(UserError, match="there are 33, numbered from 0; submit --array=0-32"):
        share(names, _array(33, 33, 33, 1))
    with pytest.raises(UserError, match="SLURM_ARRAY_TASK_MIN is ''"):
        share(names, {"SLURM_ARRAY_TASK_ID": "1"})


def _write_category(folder: Path, category: str, users: int) -> None:
    """Files of the 2018 release: every user reviews the same six products, a day apart."""
    reviews = [
        {
            "reviewerID": f"A{user}", "asin": f"B{item}", "overall": 5.0, "reviewText": "good",
            "unixReviewTime": 1_400_000_000 + 86_400 * (user + item), "summary": "good",
        }
        for user in range(users) for item in range(6)
    ]  # fmt: skip
    items = [{"asin": f"B{item}", "title": f"Thing {item}"} for item in range(6)]
    for name, rows in ((f"{category}_5.json", reviews), (f"meta_{category}.json", items)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_two_categories_are_prepared_and_a_missing_one_is_named(tmp_path: Path) -> None:
    _write_category(tmp_path, "Gift_Cards", 7)
    _write_category(tmp_path, "Software", 9)
    environment = {
        **os.environ, "NAME": "amazon_2018", "JOBS": "2", "LLMREC_CACHE": str(tmp_path / "cache"),
        "ARGS": f"data.category=[Gift_Cards,Software,Appliances] data.root={tmp_path}",
        "PYTHONPATH": str(REPO),
    }  # fmt: skip
    command = [sys.executable, "-m", "experiments.prepare"]
    done = subprocess.run(
        command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 2, done.stderr
    lines = {line.split()[1]: line for line in done.stdout.splitlines() if "│" in line}
    told = {name: [p.strip() for p in line.split("│")[2:5]] for name, line in lines.items()}
    assert told["Gift_Cards"] == ["7", "6", "42"]
    assert told["Software"] == ["9", "6", "54"]
    assert told["Appliances"] == ["-", "-", "-"]
    assert "1 of 3 failed, see above: data.category=[Appliances]" in done.stderr
    assert "put Appliances_5.json.gz" in done.stderr or "Appliances_5.json" in done.stderr
