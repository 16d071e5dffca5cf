"""``make recommend``: one user's list from a finished run, and what is said where there is none."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from experiments import load
from experiments.asked import frame
from experiments.errors import UserError
from experiments.recommender import Recommender
from tests.conftest import REPO
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
     ({"LLMREC_USER": "1", "K": "ten"}, "K='ten'"),
     ({"LLMREC_USER": "1", "FORMAT": "xml"}, "FORMAT='xml', expected table or json"),
     ({"LLMREC_USER": "1", "ITEMS": "no such file"}, "ITEMS='no such file' is no file")],
)  # fmt: skip
def test_what_is_told_at_once(
    finished: Any, tiny: list[str], command_environment: Any, variables: dict[str, str], words: str
) -> None:
    result = ask(command_environment(finished.runs), EXPERIMENT, *tiny, **variables)
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_scores_are_those_of_the_evaluation(model: Recommender, finished: Any) -> None:
    """The list before the target, user by user and in one batch, is the tested one."""
    table = pl.read_parquet(finished.folder("evaluate") / "scores.evaluate.parquet")
    users = table["user_id"].to_list()
    together = model.recommend(users, 100, before_target=True)
    (alone,) = model.recommend(users[3], 100, before_target=True)
    for row, told in zip(table.iter_rows(named=True), together, strict=True):
        assert told.ask.user == row["user_id"]
        found = {r.item: r.score for r in told.items}
        expected = dict(zip(row["top_items"], row["top_scores"], strict=True))
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert [r.item for r in alone.items] == table["top_items"].to_list()[3]


def test_a_history_says_what_its_user_would(model: Recommender) -> None:
    """SASRec knows nobody: a user's events as a made-up history give their list, less what is excluded."""
    (own,) = model.recommend(5, 4)
    held = model.data.histories
    events = model.data.raw_items(held.items[held.offsets[5] : held.offsets[6]]).to_list()
    first, second = own.items[0].item, own.items[1].item
    lists = model.recommend(histories=[events, events[:3]], k=4, exclude=[first])
    assert lists[0].items[0].item == second
    assert lists[0].items[0].score == pytest.approx(own.items[1].score, rel=1e-6)
    assert len(lists[1].items) == 4
    table = frame(lists)
    assert table.columns == ["row", "user", "place", "item", "title", "score", "retrieved"]
    assert table["row"].to_list() == [0] * 4 + [1] * 4
    by_title = model.recommend(histories=[model.data.titles[int(held.items[held.offsets[5]])]])
    assert by_title[0].ask.history == (events[0],)
    assert by_title[0].items == model.recommend(histories=[events[0]])[0].items
    (again,) = model.recommend(histories=[events], k=100, keep_seen=True)
    assert set(events) <= {r.item for r in again.items}


def test_some_items_alone_are_ranked(model: Recommender) -> None:
    (everything,) = model.recommend(9, 100)
    some = [everything.items[i].item for i in (30, 2, 11)]
    (told,) = model.recommend(9, items=some)
    assert [r.item for r in told.items] == [some[1], some[2], some[0]]
    assert told.items[0].score == pytest.approx(everything.items[2].score, abs=1e-6)


def test_what_is_made_for_one_question_is_kept_for_no_other(
    model: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts are known by places in histories, which are the same in every one that is made up."""
    seen: list[Any] = []
    ask_data = model.data.ask

    def noted(rows: Any, histories: Any = None) -> None:
        seen.append(histories)
        ask_data(rows, histories)

    monkeypatch.setattr(model.data, "ask", noted)
    model.recommend(1)
    model.recommend(histories=[["1", "2"], ["3", "4"]])
    assert [h.kept for h in seen if h is not None] == [False, False]
    assert model.data.histories.kept


def test_threads_get_what_they_asked_for(model: Recommender) -> None:
    expected = {u: model.recommend(u, 3)[0].items for u in range(1, 13)}
    with ThreadPoolExecutor(6) as pool:
        found = dict(
            zip(expected, pool.map(lambda u: model.recommend(u, 3)[0].items, expected), strict=True)
        )
    for user, items in expected.items():
        assert [r.item for r in found[user]] == [r.item for r in items]


@pytest.mark.parametrize(
    ("asked", "words"),
    [({"users": "6x"}, r"has no user '6x'; did you mean '6'\?; it has 60 users"),
     ({"users": 1, "exclude": ["801"]}, r"has no item '801'; did you mean 80 \(Film 80"),
     ({"users": 1, "request": 'a "sad" $(one); `two`'}, "SASRecModule reads no words"),
     ({"users": [1, 2], "histories": [["1"]]}, "2 users and 1 histories"),
     ({"users": 1, "items": []}, "items holds no item"),
     ({"users": 1, "items": ["5", "6", "Film 5 (1905)"]}, "items holds an item twice"),
     ({"users": 1, "exclude": "801"}, r"has no item '801'; did you mean 80 \(Film 80"),
     ({"histories": [[]]}, "SASRecModule tells no items apart behind an empty history"),
     ({}, "nobody is asked for"), ({"users": 1, "k": 101}, "expected 1 to 100"),
     ({"histories": [[str(i) for i in range(1, 81)]]}, "all 80 items already")],
)  # fmt: skip
def test_what_cannot_be_asked(model: Recommender, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        model.recommend(**asked)


def test_popularitys_list_is_the_most_trained_items_that_are_new(
    tiny_movielens: Path, finish: Callable[..., Any], data_cache: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    words = [
        f"data.root={tiny_movielens}",
        "data.expected=null",
        "launch.accelerator=cpu",
        "~stages.reference",
    ]
    run = finish("popularity/movielens_100k", words)
    monkeypatch.setenv("LLMREC_RUNS", str(run.runs))
    model = load("popularity/movielens_100k", *words)
    held = model.data.histories
    own = set(held.items[held.offsets[5] : held.offsets[6]].tolist())
    counts = held.train_counts()
    order = sorted(range(1, held.num_items + 1), key=lambda i: (-counts[i], i))
    expected = [model.names.ids[i - 1] for i in order if i not in own]
    assert [r.item for r in model.recommend(5, 100)[0].items] == expected


def test_what_people_write_reaches_python_as_it_is(
    finished: Any, tiny: list[str], command_environment: Any, tmp_path: Path
) -> None:
    """Quotes, $, backticks and ; through the real Makefile; nothing of it is run."""
    trap = tmp_path / "ran"
    history = f"\"Film 3 (1903)\"$(touch {trap}); `touch {trap}`; $$HOME 'quoted'"
    result = subprocess.run(
        ["make", "--no-print-directory", "recommend", f"NAME={EXPERIMENT}", f"HISTORY={history}",
         f"ARGS={shlex.join(tiny)}", f"EXCLUDE=$(shell touch {trap})", f"REQUEST=`touch {trap}`",
         f"VENV={tmp_path}", f"PY={sys.executable}", f"READY={tmp_path}"],
        cwd=REPO, env=command_environment(finished.runs), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert f"has no item '\"Film 3 (1903)\"$(touch {trap})'" in result.stderr
    assert not trap.exists()


def test_titles_make_a_history_and_json_can_be_read(
    finished: Any, tiny: list[str], command_environment: Any
) -> None:
    history = "Film 3 (1903); film 4; 5; CAFÉ AMÉLIE, ÉTÉ À LA SEÑORA (1997)"
    result = ask(
        command_environment(finished.runs), EXPERIMENT, *tiny, HISTORY=history, FORMAT="json", K="3",
        EXCLUDE="Film 8 (1908);9",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    told = json.loads(result.stdout)
    assert [event["item"] for event in told["history"]] == ["3", "4", "5", "7"]
    shown = [line["item"] for line in told["items"]]
    assert len(shown) == 3
    assert not set(shown) & {"3", "4", "5", "7", "8", "9"}
    assert told["user"] is None


def test_ids_alone_know_no_new_items(
    finished: Any, tiny: list[str], command_environment: Any, tmp_path: Path
) -> None:
    items = tmp_path / "new items; $(x).jsonl"
    items.write_text('{"item_id": "n1", "title": "Film of tomorrow"}\n')
    result = ask(
        command_environment(finished.runs), EXPERIMENT, *tiny, LLMREC_USER="1", ITEMS=str(items)
    )
    assert result.returncode == 2
    assert "SASRecModule knows items by what it has learned of their ids" in result.stderr


def test_a_run_must_be_finished(
    tiny: list[str], command_environment: Callable[[Path], dict[str, str]], tmp_path: Path
) -> None:
    result = ask(command_environment(tmp_path), EXPERIMENT, *tiny, LLMREC_USER="1")
    assert result.returncode == 2
    assert f"(train): make exp NAME={EXPERIMENT}" in result.stderr
