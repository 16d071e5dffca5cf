"""What is shown of users: who is drawn, what is data and never markup, where things stand on the sheet."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import preference_page, preference_sheet, preferences, stories
from experiments.artifacts import PlannedStage
from experiments.canvas import Box, Canvas, Picture, Text, text_width
from experiments.errors import UserError
from experiments.shelf import LARGEST, Shelf
from experiments.stories import Answer, Event, Note, Story

EVIL = '</figcaption><script>alert("1")</script> & \'"><img src=x onerror=alert(2)>'
RED, BLUE = (200, 0, 0), (0, 0, 200)


class Images:
    """Items 1 and 2 have a picture, a red high one and a blue wide one; item 3 has none."""

    mask = np.array([False, True, True, False])

    def picture(self, item: int) -> Image.Image:
        return Image.new("RGB", (300, 600) if item == 1 else (600, 300), RED if item == 1 else BLUE)

    def digest(self, item: int) -> str:
        return str(item)


class Seen(HTMLParser):
    """Tags with their attributes, and all text, as a browser reads them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def shelf() -> Shelf:
    return Shelf(["", EVIL, "Up  (2009)\n", "Heat"], Images())


TOLD = Story(
    "<b>7</b>",
    [Note([Event(1), Event(3, disliked=True)], EVIL), Note([Event(2)], "")],
    [Answer(2, 0.75, False), Answer(1, 0.5, True), Answer(3, 0.25, False)],
)


# ---------------------------------------------------------------- who is drawn


def test_users_are_drawn_at_random_each_once_and_always_the_same() -> None:
    user = np.repeat(np.arange(100, 140), 3)  # 40 users of 3 rows
    rows = stories.drawn_rows(user, 10)
    assert rows == stories.drawn_rows(user, 10)
    assert len(set(user[rows])) == 10
    assert stories.drawn_rows(user, 4) == rows[:4]
    assert len(stories.drawn_rows(user, 99)) == 40
    assert sorted(rows) != rows  # not the first ones of the file


def test_a_story_knows_the_place_of_the_right_answer() -> None:
    assert TOLD.places == (2, 2)
    assert Story("7", [], [Answer(1, 0.1, False)]).places == (0, 0)
    scores = [(0.9, False), (0.5, True), (0.5, False), (0.5, False), (0.1, True)]
    tied = Story("7", [], [Answer(n, p, right) for n, (p, right) in enumerate(scores)])
    assert tied.places == (2, 4)
    assert preference_page.heading(tied).endswith("tied for the places 2 to 4 of 5")


@pytest.mark.parametrize("given", ["0", "101", "ten", "-1", "1.5"])
def test_only_a_number_of_users_can_be_asked_for(
    given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("USERS", given)
    assert preferences.main(["mllm_msr/toy_shop"]) == 2
    assert "expected a whole number from 1 to 100" in capsys.readouterr().err


def test_what_has_no_texts_of_users_or_is_unfinished_is_refused() -> None:
    def stage(name: str, target: str, inputs: dict[str, str]) -> PlannedStage:
        spec = {"run": "test", "modules": {name: {"_target_": target}}, "inputs": inputs}
        return PlannedStage(name, spec, None, None, "missing", "never run")

    sasrec = stage("evaluate", "lightning_modules.sasrec.SASRecModule", {"preferences": "x/y"})
    with pytest.raises(UserError, match="no test of this experiment asks for yes or no"):
        stories.stages_of([sasrec])
    yes_no = stage("asks", "lightning_modules.mllm_msr.MLLMMSRModule", {"preferences": "x/y"})
    with pytest.raises(UserError, match=r"asks is not finished \(never run\)"):
        stories.stages_of([sasrec, yes_no])


# ---------------------------------------------------------------- the page


def test_titles_and_texts_are_never_markup(shelf: Shelf) -> None:
    page = preference_page.html("a <i>run</i>", [TOLD], shelf)
    seen = Seen(page)
    names = [name for name, _ in seen.tags]
    assert "script" not in names
    assert not {"i", "b"} & {n for n, attrs in seen.tags if "style" not in attrs}
    assert seen.text.count(EVIL) == 3  # a text, an item of the history, a candidate
    assert "User <b>7</b>: the right one is number 2 of 3" in seen.text
    assert not any(name.startswith("on") for _, attrs in seen.tags for name in attrs)
    images = [attrs for name, attrs in seen.tags if name == "img"]
    assert len(images) == 4
    assert all(str(attrs["src"]).startswith("data:image/jpeg;base64,") for attrs in images)
    assert {attrs["alt"] for attrs in images} == {EVIL, "Up (2009)"}


def test_a_page_holds_everything_in_the_order_of_the_story(shelf: Shelf) -> None:
    page = preference_page.html("a run", [TOLD], shelf)
    seen = Seen(page)
    assert "http" not in page.replace("http-equiv", "")  # loads nothing
    wanted = [
        EVIL,
        "Heat (disliked)",
        EVIL,
        "Up (2009)",
        preference_page.NOTHING,
        "p 0.750",
        "p 0.500",
    ]
    at = 0
    for words in wanted:
        at = seen.text.index(words, at) + len(words)
    right = [n for n, (_, attrs) in enumerate(seen.tags) if attrs.get("class") == "right"]
    assert len(right) == 1
    assert "width:50.0%" in str(seen.tags[right[0] :][4][1]["style"])
    assert page.count("no picture") == 2


# ---------------------------------------------------------------- the sheet


def test_the_sheet_has_a_band_for_each_story_and_all_of_it_stands_on_it(shelf: Shelf) -> None:
    canvas = preference_sheet.drawn("a run", [TOLD, TOLD], shelf)
    texts = [s for s in canvas.shapes if isinstance(s, Text)]
    assert sum(t.words.startswith("User <b>7</b>") for t in texts) == 2
    assert [t.words for t in texts if t.words.startswith("p 0.")] == [
        "p 0.750",
        "p 0.500",
        "p 0.250",
    ] * 2
    pictures = [s for s in canvas.shapes if isinstance(s, Picture)]
    assert len(pictures) == 8
    for s in pictures:  # in their own proportions
        assert s.width / s.height == pytest.approx(s.image.width / s.image.height, rel=0.02)
    for s in (*pictures, *texts):
        assert 0 <= s.x <= canvas.width
        assert 0 <= s.y <= canvas.height
    frames = [s for s in canvas.shapes if isinstance(s, Box) and s.colour == preference_sheet.GREEN]
    assert len(frames) == 2 * 2  # each a frame and a bar


def test_the_right_candidate_is_shown_wherever_it_stands(shelf: Shelf) -> None:
    answers = [Answer(1, 1 - n / 200, n == 99) for n in range(100)]
    canvas = preference_sheet.drawn("a run", [Story("7", [], answers)], shelf)
    told = [s.words for s in canvas.shapes if isinstance(s, Text)]
    shown = [words for words in told if words.startswith(("p 0.", "p 1."))]
    assert len(shown) == preference_sheet.MOST
    assert shown[0] == "p 1.000"
    assert shown[-1] == "p 0.505"
    assert "79 more candidates are left out here" in told


def test_words_are_wrapped_and_clipped_to_their_room() -> None:
    words = "some short words and one that is muchtoolongforanylineofthiswidth indeed"
    lines = preference_sheet.wrapped(words, 13, 100)
    assert "".join(lines).replace(" ", "") == words.replace(" ", "")
    assert all(text_width(line, 13) <= 100 for line in lines)
    assert preference_sheet.wrapped("", 13, 100) == [""]
    clipped = preference_sheet.clipped(words, 13, 100)
    assert clipped.endswith("...")
    assert words.startswith(clipped[:-3])
    assert text_width(clipped, 13) <= 100 < text_width(words, 13)
    assert preference_sheet.clipped("short", 13, 100) == "short"


def test_a_picture_is_drawn_where_it_belongs(tmp_path: Path) -> None:
    canvas = Canvas(40, 30)
    canvas.add(Picture(10, 5, 20, 10, Image.new("RGB", (4, 4), RED)))
    for fine in (2, 4):
        image = canvas.png(fine)
        assert image.size == (80, 60)
        assert image.getpixel((40, 20)) == RED
        assert [image.getpixel(p) for p in ((18, 20), (62, 20), (40, 8), (40, 32))] == [
            (255,) * 3
        ] * 4
    found = ET.fromstring(canvas.svg()).find("{http://www.w3.org/2000/svg}image")
    assert found is not None
    assert (found.get("x"), found.get("width"), found.get("height")) == ("10.0", "20.0", "10.0")
    assert str(found.get("href")).startswith("data:image/jpeg;base64,")


def test_pictures_are_made_small_once(shelf: Shelf) -> None:
    first = shelf.picture(1)
    assert first is not None
    assert first is shelf.picture(1)
    assert first.size == (96, 192)
    assert max(LARGEST) == 192
    assert shelf.picture(3) is None
