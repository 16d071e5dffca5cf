"""Prompts are tokenised once, lose their oldest events when they are too long, and are kept on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.types import TRAIN, Histories, Rows
from lightning_modules.errors import ModelError
from lightning_modules.llm import prompt_tokens
from lightning_modules.llm.prompt_tokens import PromptTable, some_rows, tokenise

HISTORIES = Histories(
    offsets=np.array([0, 0, 6]),
    items=np.array([1, 2, 3, 4, 5, 6], np.int32),
    split=np.full(6, TRAIN, np.int8),
    timestamps=np.arange(6),
    num_items=9,
)


def rows_of(*spans: tuple[int, int, int]) -> Rows:
    """Rows (start, stop, target) of the one user."""
    start, stop, target = (np.array(c) for c in zip(*spans, strict=True))
    return Rows(
        HISTORIES, np.arange(len(start)), np.ones_like(start), start, stop, 0, 0, target=target
    )


def texts(rows: Rows, skip: np.ndarray) -> list[str]:
    """``a1 a2 q9``: the events and the item asked about."""
    assert rows.target is not None
    found = []
    for start, stop, less, target in zip(rows.start, rows.stop, skip, rows.target, strict=True):
        items = HISTORIES.items[start + less : stop]
        found.append(" ".join([*(f"a{i}" for i in items), f"q{target}"]))
    return found


class Words:
    """A tokenizer of words that counts what it is asked; ``<s>`` is its special token."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.ids: dict[str, int] = {"<s>": 0}

    def __call__(self, text: list[str], add_special_tokens: bool) -> dict[str, Any]:
        self.asked += text
        start = [0] if add_special_tokens else []
        made = [[self.ids.setdefault(w, len(self.ids)) for w in t.split()] for t in text]
        return {"input_ids": [start + ids for ids in made]}

    def words(self, ids: Any) -> str:
        names = {i: w for w, i in self.ids.items()}
        return " ".join(names[int(i)] for i in ids)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path))
    return tmp_path


def test_the_oldest_events_go_and_the_question_stays() -> None:
    words = Words()
    rows = rows_of((0, 6, 9), (0, 2, 8), (0, 0, 7))
    made, cut = tokenise(words, texts, rows, limit=4)
    assert [words.words(ids) for ids in made] == ["<s> a5 a6 q9", "<s> a1 a2 q8", "<s> q7"]
    assert cut == 4
    made, cut = tokenise(words, texts, rows, limit=3, special_tokens=False)
    assert [words.words(ids) for ids in made] == ["a5 a6 q9", "a1 a2 q8", "q7"]


def test_a_limit_that_no_prompt_can_keep_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"without any history has 2 tokens, but 1 are allowed"):
        tokenise(Words(), texts, rows_of((0, 3, 9)), limit=1)


def test_each_row_is_tokenised_once_and_kept_for_the_next_run(cache: Path) -> None:
    words = Words()
    table = PromptTable(words, texts, limit=5, name="one")
    rows = rows_of((0, 6, 9), (1, 3, 8))
    assert table.add(rows).tolist() == [5, 4]
    assert table.cut_events == 3
    asked = len(words.asked)
    picked = some_rows(rows, np.array([1, 0, 1]))
    assert [words.words(ids) for ids in table.of(picked)] == [
        "<s> a2 a3 q8", "<s> a4 a5 a6 q9", "<s> a2 a3 q8"
    ]  # fmt: skip
    assert table.add(rows).tolist() == [5, 4]
    assert len(words.asked) == asked

    again = PromptTable(Words(), texts, limit=5, name="one")
    assert again.add(rows).tolist() == [5, 4]
    assert again.tokenizer.asked == []  # read from the first one's file
    assert again.cut_events == 3
    for other in ({"limit": 4, "name": "one"}, {"limit": 5, "name": "two"}):
        fresh = PromptTable(Words(), texts, **other)
        fresh.add(rows)
        assert fresh.tokenizer.asked


@pytest.mark.parametrize("left", [0, 5, 0.5, 0.99])
def test_a_file_that_was_cut_is_made_again(
    cache: Path, caplog: pytest.LogCaptureFixture, left: float
) -> None:
    rows = rows_of((0, 6, 9), (1, 3, 8))
    first = PromptTable(Words(), texts, limit=5, name="one")
    first.add(rows)
    (file,) = (cache / "tokens").glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(left * len(whole)) if left < 1 else int(left)])
    words = Words()
    again = PromptTable(words, texts, limit=5, name="one")
    assert again.add(rows).tolist() == [5, 4]
    assert words.asked == first.tokenizer.asked
    assert "is damaged" in caplog.text
    assert file.read_bytes() == whole


def test_prompts_that_are_written_otherwise_are_tokenised_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Though nobody has named them otherwise: by what rows say, and by who cuts them into tokens."""
    rows = rows_of(*((0, stop, target) for stop in (5, 6) for target in range(30)))

    def asked(written: Any) -> list[str]:
        table = PromptTable(Words(), written, limit=9, name="one")
        table.add(rows)
        return list(table.tokenizer.asked)

    def joined_otherwise(given: Rows, skip: np.ndarray) -> list[str]:
        return [text.replace("a1 ", "a1, ") for text in texts(given, skip)]

    assert len(asked(texts)) == 60
    assert asked(texts) == []
    assert all("a1," in text for text in asked(joined_otherwise))
    assert asked(joined_otherwise) == []
    for package in ("tokenizers", "transformers"):
        known = prompt_tokens.version
        with monkeypatch.context() as later:
            later.setattr(
                prompt_tokens, "version", lambda n, p=package, k=known: "9" if n == p else k(n)
            )
            assert len(asked(texts)) == 60
            assert asked(texts) == []


def test_rows_of_one_question_are_never_those_of_another(cache: Path) -> None:
    """Made-up histories have the same places; what is in them is nobody else's, and stays off the disk."""
    table = PromptTable(Words(), texts_as_given, limit=9, name="q")
    data = rows_of((0, 2, 9))
    assert table.tokenizer.words(table.of(data)[0]) == "<s> a1 a2 q9"
    files = sorted(cache.rglob("*"))
    for items in ([3, 4], [5, 6]):
        own = replace(HISTORIES, items=np.array(items, np.int32), kept=False)
        asked = replace(data, histories=own)
        assert table.add(asked).tolist() == [4]
        assert table.tokenizer.words(table.of(asked)[0]) == f"<s> a{items[0]} a{items[1]} q9"
        assert table.common_prefix() == table.of(asked)[0][:-1].tolist()
    assert sorted(cache.rglob("*")) == files
    assert table.tokenizer.words(table.of(data)[0]) == "<s> a1 a2 q9"


def texts_as_given(rows: Rows, skip: np.ndarray) -> list[str]:
    """``texts`` of the rows' own histories."""
    assert rows.target is not None
    spans = zip(rows.start + skip, rows.stop, rows.target, strict=True)
    return [
        " ".join([*(f"a{i}" for i in rows.histories.items[a:b]), f"q{target}"])
        for a, b, target in spans
    ]


def test_what_all_rows_begin_with_leaves_each_a_token_of_its_own() -> None:
    words = Words()
    table = PromptTable(words, texts, limit=9, name="y")
    assert table.common_prefix() == []
    table.add(rows_of((0, 3, 9), (0, 4, 8), (0, 2, 7)))
    assert words.words(table.common_prefix()) == "<s> a1 a2"
    table.add(rows_of((0, 1, 7)))
    assert words.words(table.common_prefix()) == "<s> a1"
    table.add(rows_of((3, 4, 7)))
    assert words.words(table.common_prefix()) == "<s>"
    alone = PromptTable(words, texts, limit=9, name="z")
    alone.add(rows_of((0, 2, 9)))
    assert words.words(alone.common_prefix()) == "<s> a1 a2"


def test_rows_that_nobody_announced_are_tokenised_when_they_come() -> None:
    words = Words()
    table = PromptTable(words, texts, limit=9, name="x")
    (ids,) = table.of(rows_of((2, 4, 1)))
    assert words.words(ids) == "<s> a3 a4 q1"


def test_rows_by_number_keep_what_all_rows_share() -> None:
    rows = rows_of((0, 6, 9), (1, 3, 8))
    part = some_rows(rows, np.array([1]))
    assert part.histories is rows.histories
    assert (part.start.tolist(), part.stop.tolist()) == ([1], [3])
    assert part.target is not None
    assert part.target.tolist() == [8]
