"""``make demo`` on a real tiny run: the desk's lists are the Recommender's, and a browser shows them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest

from experiments.asked import Ask
from experiments.demo_desk import EVENTS, Desk
from experiments.errors import UserError
from experiments.recommender import Recommender
from experiments.titles import ItemNames
from tests.conftest import REPO
from tests.ranks import free_port
from tests.recipes.conftest import EXPERIMENT, chromium

PAGE = Path(os.environ.get("LLMREC_DEMO_PYTHON") or REPO / ".venv-demo" / "bin" / "python")
EVIL = "<img src=x onerror=document.title='stolen'>${document.title='stolen'}{{value}}"
WAIT = 60


@pytest.fixture(scope="module")
def desk(model: Recommender) -> Desk:
    return Desk(model, beside=model)


def test_lists_are_those_of_the_recommender(desk: Desk, model: Recommender) -> None:
    view = desk.look(user="7", k=12)
    (expected,) = model.recommend("7", 12)
    own, beside = view["columns"]
    for column in (own, beside):
        assert [(r["item"], r["score"]) for r in column["rows"]] == [
            (r.item, r.score) for r in expected.items
        ]
        assert [r["place"] for r in column["rows"]] == list(range(1, 13))
        assert all(r["share"] is None and r["retrieved"] is None for r in column["rows"])
    held = model.data.histories
    events = model.data.raw_items(held.items[held.offsets[7] : held.offsets[8]]).to_list()
    assert desk.history("7") == events
    assert [c["item"] for c in view["history"]] == events[::-1][:24]
    assert view["events"] == len(events)
    copied = desk.look(history=events, k=12)["columns"][0]["rows"]
    assert [r["item"] for r in copied] == [r.item for r in expected.items]


def test_marks_are_those_of_the_evaluation(desk: Desk, model: Recommender, finished: Any) -> None:
    """A test row says whether its target counts as cold or warm."""
    held = model.data.rows(model.data.test_code)
    table = pl.read_parquet(finished.folder("evaluate") / "scores.evaluate.parquet")
    targets = model.data.raw_items(held.target).to_list()
    cards = [desk.cards([raw])[0] for raw in targets]
    assert [c["mark"] == "cold" for c in cards] == table["cold_item"].to_list()
    assert [c["mark"] == "warm" for c in cards] == table["warm_item"].to_list()
    assert {c["mark"] for c in cards} == {"cold", "warm", ""}
    events = model.data.histories
    trained = [0] * (model.data.num_items + 1)
    for user in range(1, len(events.offsets) - 1):
        own = events.items[events.offsets[user] : events.offsets[user + 1]].tolist()
        for item in own[:-2]:  # leave-one-out holds out two
            trained[item] += 1
    everything = [c for i in range(0, 80, 40) for c in desk.cards(model.names.ids[i : i + 40])]
    assert [c["count"] for c in everything] == trained[1:]


def test_what_was_seen_is_shown_if_it_is_wanted(desk: Desk, model: Recommender) -> None:
    """A history's next films follow it, and those in it, too, once they are not left out."""
    history = ["10", "11", "12"]
    left_out = [r["item"] for r in desk.look(history=history, k=50)["columns"][0]["rows"]]
    kept = [
        r["item"] for r in desk.look(history=history, k=50, keep_seen=True)["columns"][0]["rows"]
    ]
    assert not set(left_out) & set(history)
    assert set(kept) & set(history)
    assert [i for i in kept if i not in history] == left_out[
        : len([i for i in kept if i not in history])
    ]
    assert [r["item"] for r in desk.look(history=history, k=50)["columns"][0]["rows"]] == left_out


def test_an_experiment_of_other_data_is_asked_with_what_it_knows(
    desk: Desk, model: Recommender
) -> None:
    even = ItemNames([str(i) for i in range(2, 82, 2)], ["x"] * 40, "even")
    prepared = SimpleNamespace(digest="another")
    other: Any = SimpleNamespace(names=even, data=SimpleNamespace(prepared=prepared))
    told = Ask(user="7", exclude=("3", "4"), keep_seen=True)
    kept = tuple(item for item in desk.history("7") if int(item) % 2 == 0)
    assert model.asks_of(other, [told]) == [Ask(history=kept, exclude=("4",), keep_seen=True)]
    prepared.digest = model.data.prepared.digest
    assert model.asks_of(other, [told]) == [replace(told, exclude=("4",))]


def test_titles_are_found_by_words_in_any_order(desk: Desk) -> None:
    found = {c["title"].split(" (")[0] for c in desk.find("3 FILM")}
    holding = {f"Film {i}" for i in range(1, 81) if "3" in str(i)}  # 17, of which 12 are shown
    assert len(found) == 12
    assert found < holding
    counts = [c["count"] for c in desk.find("film")]
    assert counts == sorted(counts, reverse=True)
    assert [c["title"] for c in desk.find("amélie CAFÉ")] == ["Café Amélie, été à la Señora (1997)"]
    assert [c["item"] for c in desk.find("amelie Cafe ete")] == ["7"]
    assert "31" in [c["item"] for c in desk.find("fllm 31")]  # no title holds it: the likest
    assert desk.find(" ") == []


@pytest.mark.parametrize(
    ("asked", "words"),
    [({}, "nobody is asked for"), ({"user": "6x"}, r"no user '6x'; did you mean"),
     ({"user": "1", "k": 0}, "expected 1 to 50"), ({"user": "1", "k": 51}, "expected 1 to 50"),
     ({"user": "1", "request": "sad"}, "reads no words"), ({"history": [EVIL]}, "has no item"),
     ({"history": ["1"] * (EVENTS + 1)}, f"a history {EVENTS} items"),
     ({"user": "1", "request": "x" * 301}, "at most 300 letters")],
)  # fmt: skip
def test_what_cannot_be_asked(desk: Desk, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        desk.look(**asked)


def test_the_page_says_what_can_be_asked(desk: Desk) -> None:
    about = desk.about()
    assert (about["users"], about["items"], about["beside"]) == (60, 80, EXPERIMENT)
    assert (about["requests"], about["histories"], about["summaries"]) == (False, True, False)
    assert about["first_users"][:3] == ["1", "2", "3"] or len(about["first_users"]) == 60
    assert desk.somebody(61) == about["first_users"][1]
    json.dumps([about, desk.look(user="1")])  # plain values


# In a browser ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(
    finished: Any, tiny: list[str], command_environment: Callable[[Path], dict[str, str]],
) -> Iterator[str]:  # fmt: skip
    """A page that is served."""
    if not PAGE.is_file():
        pytest.skip("no Gradio: make .venv-demo/.ready")
    port = free_port()
    told = {"PORT": str(port), "LLMREC_DEMO_PYTHON": str(PAGE)}
    words = [sys.executable, "-m", "experiments.demo", EXPERIMENT, *tiny]
    process = subprocess.Popen(
        words, cwd=REPO, env={**command_environment(finished.runs), **told}, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith(f"http://127.0.0.1:{port} shows {EXPERIMENT}"), process.wait(5)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    assert process.wait(40) == 0
    with socket.socket() as gone:
        assert gone.connect_ex(("127.0.0.1", port)) != 0  # the page has ended, too


@pytest.fixture(scope="module")
def browser(address: str) -> Iterator[Any]:
    """Chromium on the page."""
    with chromium(address) as found:
        yield found


def listed(browser: Any) -> list[str]:
    """Titles of the list that is shown."""
    titles: list[str] = browser.execute_script(
        "return [...document.querySelectorAll('#answer ol.list .told > div')].map(d => d.innerText)"
    )
    return titles


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_a_user_and_a_history_are_asked_for_in_a_browser(
    browser: Any, address: str, model: Recommender
) -> None:
    def titles(found: list[Any]) -> list[str]:
        return [r.title for r in found[0].items]

    wait_for(lambda: listed(browser) == titles(model.recommend("1", 10)))
    user = browser.find_element("css selector", "#user input")
    user.clear()
    user.send_keys("60\n")
    wait_for(lambda: listed(browser) == titles(model.recommend("60", 10)))
    user.clear()
    user.send_keys(EVIL + "\n")
    notice = "document.querySelector('#answer .warn')"
    wait_for(lambda: browser.execute_script(f"return {notice} !== null"))
    assert EVIL in browser.execute_script(f"return {notice}.innerText")
    assert browser.title == EXPERIMENT

    browser.find_elements("css selector", "#whose input")[1].click()
    wait_for(lambda: "Build a history" in browser.find_element("css selector", "#answer").text)
    browser.find_element("css selector", "#search textarea, #search input").send_keys("film 31")
    button = "button[data-item='31']"
    wait_for(lambda: bool(browser.find_elements("css selector", f"#found {button}")))
    browser.find_element("css selector", f"#found {button}").click()
    wait_for(lambda: listed(browser) == titles(model.recommend(histories=["31"])))
    browser.find_element("css selector", f"#chosen {button}").click()
    wait_for(lambda: listed(browser) == [])

    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    asked = [json.loads(line["message"])["message"] for line in browser.get_log("performance")]
    addresses = [
        m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"
    ]
    assert [a for a in addresses if not a.startswith((f"{address}/", "data:"))] == []
    assert browser.get_log("browser") == []
