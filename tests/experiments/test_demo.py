"""The page of ``make demo`` without a browser: what is markup, who talks to whom, what is refused."""

from __future__ import annotations

import ast
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from experiments import demo_html
from experiments.demo import Place
from experiments.demo_desk import softmax, yes
from experiments.demo_link import LONGEST, Link, RefusedError, serve
from experiments.errors import UserError
from tests.conftest import REPO

EVIL = "</p><script>alert(1)</script> \"'&<img src=x onerror=alert(2)> ${1+1} {{value}} `x` \\"
TEMPLATE = set("${}`\\")


class Seen(HTMLParser):
    """Tags with their attributes, and all text, as a browser reads them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def of(self, name: str) -> list[str]:
        """Classes that hold this one."""
        return [a["class"] or "" for _, a in self.tags if name in (a.get("class") or "").split()]


def card(**more: Any) -> dict[str, Any]:
    return {"item": EVIL, "title": EVIL, "picture": "", "count": 3, "mark": "cold", **more}


def row(place: int, **more: Any) -> dict[str, Any]:
    told = {"place": place, "score": 1.25, "share": None, "bar": None, "retrieved": None}
    return card(**{**told, **more})


def view(**more: Any) -> dict[str, Any]:
    column = {"title": EVIL, "note": EVIL, "rows": [row(1)], "error": EVIL}
    told = {
        "who": EVIL, "history": [card(disliked=True)], "events": 1, "columns": [column],
        "steps": [{"cards": [card()], "text": EVIL}], "preference": EVIL, "reason": EVIL, "dropped": 2,
        "request": EVIL,
    }  # fmt: skip
    return {**told, **more}


ABOUT = {"experiment": EVIL, "data": EVIL, "users": 1, "items": 2, "beside": EVIL}


@pytest.mark.parametrize(
    "page",
    [demo_html.answer(view()), demo_html.answer(view(steps=[])), demo_html.head(ABOUT),
     demo_html.notice(EVIL), demo_html.found([card(picture='javascript:"x"')], EVIL),
     demo_html.chosen([card(picture='data:image/jpeg;base64,"x')])],
)  # fmt: skip
def test_titles_texts_and_requests_are_never_markup(page: str) -> None:
    seen = Seen(page)
    assert {name for name, _ in seen.tags} <= {
        "div", "p", "h1", "h2", "h3", "span", "button", "ol", "li", "b", "i", "section", "blockquote", "img"
    }  # fmt: skip
    assert not [a for _, attributes in seen.tags for a in attributes if a.startswith("on")]
    assert any(EVIL in text for text in seen.text)
    # Gradio makes a template of it, in which these would be read.
    assert not set(page) & TEMPLATE
    for name, attributes in seen.tags:
        if name == "img":
            assert (attributes["src"] or "").startswith("data:image/")
        if name == "button":
            assert attributes["data-item"] == EVIL


def test_lists_show_marks_shares_and_where_each_item_stood() -> None:
    rows = [
        row(1, count=1, mark="", share=0.25, bar=0.5, retrieved=4),
        row(2, count=1200, mark="warm", share=0.5, bar=1.0, retrieved=2),
        row(3, before=0, retrieved=9), row(4, before=1), row(5, before=5), row(6),
    ]  # fmt: skip
    columns = [{"title": "Both", "note": "", "rows": rows, "error": ""}]
    seen = Seen(demo_html.answer(view(columns=columns, steps=[], history=[], preference=None)))
    text = [t for t in seen.text if t.strip() and EVIL not in t]
    told = [t for t in text if t[0] in "▲▼=n"]
    assert told == ["▲ retrieved 4", "= retrieved 2", "new", "▼ was 1", "= was 5"]
    assert [t for t in text if "event" in t][:3] == [
        "1 event",
        "warm · 1,200 events",
        "cold · 3 events",
    ]
    widths = [a["style"] for name, a in seen.tags if name == "i"]
    assert widths == ["width:50.0%", "width:100.0%"]
    assert {"0.250", "0.500", "1.250", "score 1.250"} <= set(text)


def test_without_pictures_cards_are_words_and_with_some_each_has_a_place() -> None:
    assert not Seen(demo_html.found([card()], "x")).of("picture")
    shown = Seen(demo_html.found([card(), card(picture="data:image/jpeg;base64,AA")], "x"))
    assert len(shown.of("picture")) == 2
    assert shown.text.count("no picture") == 1
    assert "No title is like that." in Seen(demo_html.found([], "x")).text
    assert "No title is like that." not in Seen(demo_html.found([], " ")).text


def test_shares_are_arithmetic() -> None:
    assert softmax([0.0, 0.0]) == [0.5, 0.5]
    assert softmax([1000.0, 1000.0 + 1e-9])[0] == pytest.approx(0.5)
    assert softmax([2.0, 1.0])[0] == pytest.approx(0.731058578630005)
    assert yes([0.0, 2.0, -800.0]) == pytest.approx([0.5, 0.880797077977882, 0.0])


# Two processes ---------------------------------------------------------------------------------------------


@pytest.fixture
def link() -> Iterator[Link]:
    """A page's side of a model's process that is a thread."""
    ours, theirs = socket.socketpair()

    def refuse(words: str) -> None:
        raise UserError(words)

    def slow(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    calls = {"echo": lambda value: value, "slow": slow, "refuse": refuse, "fail": lambda: 1 / 0}
    thread = threading.Thread(target=serve, args=(ours, calls, (UserError,)))
    thread.start()
    yield Link(theirs)
    theirs.shutdown(socket.SHUT_RDWR)
    thread.join(5)
    assert not thread.is_alive()
    ours.close()
    theirs.close()


def test_each_call_gets_its_own_answer(link: Link) -> None:
    with ThreadPoolExecutor(8) as pool:
        slow = pool.submit(link, "slow", seconds=0.3)
        values = list(pool.map(lambda i: link("echo", value={"é\n": [i, EVIL]}), range(100)))
        assert not slow.done()  # one that takes long holds up no others
        assert slow.result() == 0.3
    assert values == [{"é\n": [i, EVIL]} for i in range(100)]


def test_what_is_refused_is_told_and_what_fails_is_not(
    link: Link, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RefusedError, match=r"^no user 'x'$"):
        link("refuse", words="no user 'x'")
    for call, arguments in (("fail", {}), ("nothing", {}), ("echo", {"other": 1})):
        with pytest.raises(RefusedError, match="this failed; the terminal says why"):
            link(call, **arguments)
    assert "ZeroDivisionError" in capfd.readouterr().err
    with pytest.raises(RefusedError, match="too long"):
        link("echo", value="x" * LONGEST)
    assert link("echo", value=1) == 1


def test_who_waits_for_somebody_who_has_gone_is_told() -> None:
    ours, theirs = socket.socketpair()
    ended = threading.Event()
    link = Link(theirs, ended.set)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(link, "echo", value=1)
        ours.recv(10)
        ours.close()
        with pytest.raises(RefusedError, match="has ended"):
            asked.result(5)
    assert ended.wait(5)
    with pytest.raises(RefusedError, match="has ended"):
        link("echo", value=1)
    theirs.close()


def test_the_page_needs_gradio_and_nothing_else_of_ours() -> None:
    """Its environment has no Polars and no torch."""
    found, left = set(), ["experiments.demo_page"]
    while left:
        name = left.pop()
        file = REPO / (name.replace(".", "/") + ".py")
        for node in ast.walk(ast.parse(file.read_text())):
            named = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.module
                within = node.module == "experiments"
                named = [f"experiments.{a.name}" for a in node.names] if within else [node.module]
            left += [n for n in named if n.startswith("experiments.") and n not in found]
            found.update(named)
    others = {n.partition(".")[0] for n in found} - set(sys.stdlib_module_names)
    assert others == {"experiments", "gradio", "starlette"}


# The command -----------------------------------------------------------------------------------------------


def test_a_page_is_for_this_machine_unless_it_is_told_otherwise(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.touch()
    place = Place.of({"LLMREC_DEMO_PYTHON": str(python)})
    assert (place.host, place.port, place.shown) == ("127.0.0.1", 7860, "127.0.0.1")
    told = Place.of({"LLMREC_DEMO_PYTHON": str(python), "LLMREC_HOST": "::", "PORT": "81"})
    assert (told.host, told.port, told.shown) == ("::", 81, "127.0.0.1")
    with pytest.raises(UserError, match="PORT='x'"):
        Place.of({"LLMREC_DEMO_PYTHON": str(python), "PORT": "x"})
    with pytest.raises(UserError, match=r"there is no .*nowhere: make demo NAME=\.\.\. makes it"):
        Place.of({"LLMREC_DEMO_PYTHON": str(tmp_path / "nowhere")})


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"PORT={port} cannot be served .*PORT={port + 1}, say"
        ):
            Place("127.0.0.1", port, "python").require_free()
    Place("127.0.0.1", port, "python").require_free()
    with pytest.raises(UserError, match=r"HOST=no\.such\.host\.invalid PORT"):
        Place("no.such.host.invalid", port, "python").require_free()
