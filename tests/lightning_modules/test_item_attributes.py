"""Questions about pictures: which answers count, what is asked again, and what an invalid answer leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules.item_attributes import ItemAttributesModule
from lightning_modules.item_attributes.answers import parsed, short_answer, told
from lightning_modules.llm.random_vision import RandomVisionModel
from lightning_modules.llm.specs import VisionSpec
from tests.lightning_modules.test_item_pictures import WORDS, Pictures

NAMES = ("colour", "use")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ('{"colour": "red", "use": "play"}', {"colour": "red", "use": "play"}),
        ('Sure! {"Use": ["play", "gift"], "COLOUR": null} Done.', {"colour": "unknown", "use": "play, gift"}),
        ('{"colour": " - ", "use": 3}', {"colour": "unknown", "use": "3"}),
        ('{"colour": "Unknown", "use": "\\"unknown\\"."}', {"colour": "unknown", "use": "unknown"}),
        ('{"colour": "red."}', None),
        ('{"colour": "red", "use": "play", "size": "big"}', None),
        ('{"colour": {"main": "red"}, "use": "play"}', None),
        ('{"colour": true, "use": "play"}', None),
        ('{"colour": "red", "use": "' + "long " * 20 + '"}', None),
        ('{"colour": "red", "colour ": "blue", "use": "x"}', None),
        ('{"colour": "red", "use": }', None),
        ("red, for play", None),
        ("", None),
    ],
)  # fmt: skip
def test_an_answer_is_an_object_of_the_fields(text: str, values: dict[str, str] | None) -> None:
    assert parsed(text, NAMES) == values


@given(st.text())
def test_no_text_is_too_odd_to_be_read(text: str) -> None:
    found = parsed(text, NAMES)
    assert found is None or set(found) == set(NAMES)


@given(
    st.dictionaries(st.sampled_from(NAMES), st.text("abc é'-", min_size=1, max_size=20), min_size=2)
)
def test_what_was_said_comes_back(values: dict[str, str]) -> None:
    found = parsed(f"Here it is:\n{json.dumps(values)}", NAMES)
    assert found == {name: short_answer(value) for name, value in values.items()}


def test_what_is_unknown_is_not_told() -> None:
    assert told({"colour": "red", "brand": "unknown", "use": "play"}) == "colour: red; use: play"
    assert told({"colour": "unknown"}) == ""


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, data_cache: Path) -> None:
    monkeypatch.setenv("LLMREC_CACHE", str(data_cache))


def asker(*seeds: int | None, **options: Any) -> Any:
    spec = VisionSpec(RandomVisionModel("llava_lite"), dtype="float32", max_length=2048)
    attributes = {"colour": "its colours", "use": "what this {item} is for"}
    made = ItemAttributesModule(WORDS, Pictures(*seeds), spec, attributes, **options)
    made._load(spec, torch.device("cpu"), None, seed=0)
    return made


def saying(made: Any, monkeypatch: pytest.MonkeyPatch, says: Any) -> list[str]:
    """Prompts as they are asked; ``says`` answers one, given its text and the number of its picture."""
    asked: list[str] = []

    def generate(model: Any, tokenizer: Any, prompts: Any, *_: Any, pictures: Any) -> Any:
        assert len(pictures["pixel_values"]) == len(prompts)
        texts = [tokenizer.decode(prompt) for prompt in prompts]
        asked.extend(texts)
        return [tokenizer(says(text))["input_ids"] for text in texts]

    monkeypatch.setattr("lightning_modules.llm.writing.generate", generate)
    return asked


def test_an_invalid_answer_is_asked_for_once_more_and_then_flagged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = asker(1, None)
    asked = saying(right, monkeypatch, lambda text: (
        '{"use": "play", "colour": "red"}' if "It must look like this" in text else "A red toy."
    ))  # fmt: skip
    right.predict_step(torch.tensor([0, 1]))
    table = right.table()
    assert len(asked) == 2
    assert '"use": what this toy is for' in asked[0]
    assert '"use": "..."' in asked[1]
    assert table["text"].to_list() == ["colour: red; use: play", None]
    assert table["attributes"].to_list() == ['{"colour": "red", "use": "play"}', None]
    assert table["valid"].to_list() == [True, False]
    wrong = asker(1)
    asked = saying(wrong, monkeypatch, lambda text: "A red toy.")
    table = wrong.table()
    assert len(asked) == 2
    assert table["text"].to_list() == [None]
    assert json.loads(table["attributes"][0]) == {"colour": "unknown", "use": "unknown"}
    assert table["valid"].to_list() == [False]
    assert "1 of 1 items have a picture, 1 of them without a valid answer" in wrong.remarks()


def test_a_question_for_each_attribute(monkeypatch: pytest.MonkeyPatch) -> None:
    made = asker(1, asks="apart")
    asked = saying(made, monkeypatch, lambda text: "Red." if "colours" in text else "unknown")
    table = made.table()
    assert len(asked) == 2
    assert "and say what this toy is for, in a few words" in asked[1]
    assert table["text"].to_list() == ["colour: Red"]
    assert table["valid"].to_list() == [True]
    assert any("colour 0%, use 100%" in line for line in made.remarks())


def test_a_question_of_ones_own_is_asked_of_each_attribute(monkeypatch: pytest.MonkeyPatch) -> None:
    made = asker(1, asks="apart", question="Tell {asked}.")
    asked = saying(made, monkeypatch, lambda text: "red" if "colours" in text else "x" * 61)
    assert made.table()["text"].to_list() == ["colour: red"]
    again = "Tell what this toy is for. Answer in three words at most."
    for text, said in zip(
        asked, ["Tell its colours.", "Tell what this toy is for.", again], strict=True
    ):
        assert f">{said}\n" in text


def test_an_attribute_without_a_short_answer_is_asked_once_more_and_takes_no_other_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    long = "Red, " * 20
    made = asker(1, asks="apart")
    asked = saying(made, monkeypatch, lambda text: (
        ("red" if "three words at most" in text else long) if "colours" in text else "play"
    ))  # fmt: skip
    table = made.table()
    assert ["three words at most" in text for text in asked] == [False, True, False]
    assert table["text"].to_list() == ["colour: red; use: play"]
    assert table["valid"].to_list() == [True]
    made = asker(1, asks="apart")
    saying(made, monkeypatch, lambda text: long if "colours" in text else "play")
    table = made.table()
    assert table["text"].to_list() == ["use: play"]
    assert json.loads(table["attributes"][0]) == {"colour": "unknown", "use": "play"}
    assert table["valid"].to_list() == [False]
    assert "1 of 1 items have a picture, 1 of them without a valid answer" in made.remarks()


def test_impossible_settings() -> None:
    spec = VisionSpec(RandomVisionModel("llava_lite"))
    with pytest.raises(ValueError, match="asks is 'often', expected one of together, apart"):
        ItemAttributesModule(WORDS, Pictures(1), spec, asks="often")  # type: ignore[arg-type]
    for asks, question, match in (
        ("together", "Tell {asked}.", "take asks=apart"), ("apart", "Tell.", "the same for all of"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            ItemAttributesModule(WORDS, Pictures(1), spec, asks=asks, question=question)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="attributes is empty"):
        ItemAttributesModule(WORDS, Pictures(1), spec, {})
