"""Texts in a file: appended, read back, and whole after a kill at any byte."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from callbacks.generation_store import cut_half_line, line_of, read_lines
from callbacks.generations import GenerationsLog
from lightning_modules.generations import Generations


class Module:
    """A writer that answers a prompt with its reverse, and counts what it was asked."""

    def __init__(self) -> None:
        self.generations, self.asked = Generations(), 0
        self.tokenizer = SimpleNamespace(
            batch_decode=lambda rows: [" ".join(map(str, row)) for row in rows]
        )

    def write(self, prompts: Any) -> list[list[int]]:
        self.asked += len(prompts)
        return [list(reversed(p)) for p in prompts]

    def answers(self, *prompts: list[int], how: str = "") -> list[list[int]]:
        return self.generations.answers(prompts, how, self.write)


def trainer(rank: int = 0) -> Any:
    return SimpleNamespace(global_rank=rank, strategy=SimpleNamespace(barrier=lambda: None))


def test_a_text_is_written_once_and_only_for_the_same_content() -> None:
    module = Module()
    assert module.answers([1, 2], [3], [1, 2]) == [[2, 1], [3], [2, 1]]
    assert module.asked == 2
    assert module.answers([3], [4]) == [[3], [4]]
    assert module.asked == 3
    module.answers([3], how="longer")
    module.answers([1], [2])
    assert module.asked == 6  # another way of writing, and [1, 2] is neither [1] nor [2]


def test_what_ranks_have_written_is_known_to_the_next_attempt(tmp_path: Path) -> None:
    for rank, prompt in enumerate(([1, 2], [3, 4])):
        module, log = Module(), GenerationsLog(tmp_path, "evaluate")
        log.on_test_start(trainer(rank), module)
        module.answers(prompt)
        log.on_test_batch_end(trainer(rank), module)
        log.on_test_batch_end(trainer(rank), module)  # nothing is new
    files = sorted(tmp_path.glob("*.jsonl"))
    assert [f.name for f in files] == [f"generations.evaluate.000{r}.jsonl" for r in (0, 1)]
    assert [json.loads(f.read_text())["text"] for f in files] == ["2 1", "4 3"]
    again, log = Module(), GenerationsLog(tmp_path, "evaluate")
    log.on_test_start(trainer(), again)
    assert again.answers([1, 2], [3, 4]) == [[2, 1], [4, 3]]
    assert again.asked == 0
    log.on_test_batch_end(trainer(), again)
    assert len(read_lines(files[0])) == 1
    other, log = Module(), GenerationsLog(tmp_path, "written")
    log.on_test_start(trainer(), other)
    assert other.generations.known == {}


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 10_000))
def test_a_kill_at_any_byte_loses_half_a_line_at_most(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    module, log = Module(), GenerationsLog(folder, "x")
    log.on_test_start(trainer(), module)
    prompts = [[i, i + 1] for i in range(5)]
    module.answers(*prompts)
    log.on_test_batch_end(trainer(), module)
    content = log.file.read_bytes()
    kept = content[: cut % (len(content) + 1)]
    log.file.write_bytes(kept)
    again, log = Module(), GenerationsLog(folder, "x")
    log.on_test_start(trainer(), again)
    assert len(again.generations.known) == kept.count(b"\n")
    again.answers(*prompts)
    assert again.asked == 5 - kept.count(b"\n")
    log.on_test_batch_end(trainer(), again)
    assert len(read_lines(log.file)) == 5
    assert sorted(log.file.read_bytes().splitlines()) == sorted(content.splitlines())


def test_lines_that_are_no_texts_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "generations.x.0000.jsonl"
    good = json.dumps(line_of("a", [1], ""))
    bad = [
        "[]",
        "7",
        "{",
        '{"key": "b"}',
        '{"key": "b", "tokens": ["1"]}',
        '{"key": 1, "tokens": []}',
        '{"key": "b", "tokens": [1], "text": ""}',
        good.replace("[1]", "[2]"),
        good.replace('"a"', '"b"'),
    ]
    file.write_text("\n".join([*bad, good, good[:9]]))
    cut_half_line(file)
    with caplog.at_level(logging.WARNING):
        assert [line["key"] for line in read_lines(file)] == ["a"]
    assert "9 unreadable lines" in caplog.text
