"""Texts that runs share: found again, whole after a kill, a garble or two writers at once."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from callbacks.generation_store import GenerationStore, line_of
from callbacks.generations import GenerationsLog
from lightning_modules.generations import Generations
from tests.conftest import REPO

WRITE = """
import sys, time
from pathlib import Path
from callbacks.generation_store import GenerationStore, line_of
who, file, begin = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
store = GenerationStore(file)
time.sleep(max(0.0, begin - time.time()))
for i in range(150):
    store.add([line_of(f"{who}{i}.{k}", list(range(i % 40)), "word " * i) for k in range(3)])
"""


def lines(*keys: str) -> list[dict[str, Any]]:
    return [line_of(key, [ord(c) for c in key], f"text of {key}") for key in keys]


def test_what_one_adds_another_finds(tmp_path: Path) -> None:
    file = tmp_path / "new" / "w.jsonl"
    one, two = GenerationStore(file), GenerationStore(file)
    assert one.get("ab") is None
    one.add(lines("ab", "c"))
    one.add(lines("d"))
    assert two.get("c") is None  # as it was when it looked
    two.look()
    two.add(lines("e"))
    assert GenerationStore(file).get("e") == [101]
    assert [two.get(key) for key in ("ab", "c", "d")] == [[97, 98], [99], [100]]
    assert [json.loads(line)["key"] for line in file.read_text().splitlines()] == [
        "ab",
        "c",
        "d",
        "e",
    ]
    # The first text of a key is its text.
    two.add([line_of("c", [1], "other")])
    assert GenerationStore(file).get("c") == [99]


def test_two_processes_at_once_leave_a_whole_file(tmp_path: Path) -> None:
    import time

    file, begin = tmp_path / "w.jsonl", str(time.time() + 2)
    running = [
        subprocess.Popen([sys.executable, "-c", WRITE, who, str(file), begin], cwd=REPO)
        for who in "ab"
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    found = [json.loads(line)["key"] for line in file.read_bytes().splitlines()]
    assert sorted(found) == sorted(
        f"{w}{i}.{k}" for w in "ab" for i in range(150) for k in range(3)
    )
    assert len({key[0] for key in found[:225]} | {key[0] for key in found[225:]}) == 2
    store = GenerationStore(file)
    assert all(store.get(key) == list(range(int(key[1:].split(".")[0]) % 40)) for key in found)


@settings(max_examples=80, deadline=None)
@given(cut=st.integers(0, 10_000))
def test_a_truncated_file_loses_the_truncated_text_alone(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("cut") / "w.jsonl"
    keys = ["alpha", "b", "gamma"]
    GenerationStore(file).add(lines(*keys))
    content = file.read_bytes()
    kept = content[: cut % (len(content) + 1)]
    file.write_bytes(kept)
    whole = kept.count(b"\n")
    store = GenerationStore(file)
    assert [store.get(key) is not None for key in keys] == [i < whole for i in range(3)]
    store.add(lines(*keys[whole:]))  # as whoever needs them does
    again = GenerationStore(file)
    assert [again.get(key) for key in keys] == [[ord(c) for c in key] for key in keys]
    assert file.read_bytes() == content


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_a_garbled_byte_never_gives_another_text(
    place: int, byte: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("garbled") / "w.jsonl"
    keys = ["alpha", "b", "gamma"]
    GenerationStore(file).add(lines(*keys))
    content = bytearray(file.read_bytes())
    content[place % len(content)] = byte
    file.write_bytes(content)
    store = GenerationStore(file)
    found = [store.get(key) for key in keys]
    right = [[ord(c) for c in key] for key in keys]
    assert all(text in (None, expected) for text, expected in zip(found, right, strict=True))
    assert sum(text is None for text in found) <= 2  # a line break that is gone joins two lines


def test_a_line_that_is_no_text_is_told_and_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "w.jsonl"
    GenerationStore(file).add(lines("ab", "c"))
    file.write_bytes(file.read_bytes().replace(b"[97, 98]", b"[97, 99]"))
    with caplog.at_level(logging.WARNING):
        store = GenerationStore(file)
    assert "1 unreadable lines left out" in caplog.text
    assert (store.get("ab"), store.get("c")) == (None, [99])
    store.add(lines("ab"))
    assert GenerationStore(file).get("ab") == [97, 98]


def test_a_text_whose_file_has_changed_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "w.jsonl"
    store = GenerationStore(file)
    store.add(lines("ab", "c"))
    store.look()
    file.write_bytes(file.read_bytes()[3:])
    assert store.get("ab") is None
    file.unlink()
    assert store.get("c") is None


def module(writer: str = "m") -> Any:
    """A writer that answers a prompt with its reverse, and counts what it was asked."""
    made: Any = SimpleNamespace(generations=Generations(), writer=writer, asked=0)
    made.tokenizer = SimpleNamespace(batch_decode=lambda rows: [str(row) for row in rows])

    def write(prompts: Any) -> list[list[int]]:
        made.asked += len(prompts)
        return [list(reversed(p)) for p in prompts]

    made.answers = lambda *prompts: made.generations.answers(prompts, writer, write)
    return made


def run(folder: Path, made: Any, *prompts: list[int]) -> list[list[int]]:
    """A stage in ``folder`` that shares texts."""
    folder.mkdir(exist_ok=True)
    trainer: Any = SimpleNamespace(global_rank=0, strategy=SimpleNamespace(barrier=lambda: None))
    log = GenerationsLog(folder, "x", folder.parent / "shared")
    log.on_predict_start(trainer, made)
    answers: list[list[int]] = made.answers(*prompts)
    log.on_predict_batch_end(trainer, made)
    log.on_predict_end(trainer, made)
    return answers


def test_stages_share_texts_and_each_keeps_all_of_its_own(tmp_path: Path) -> None:
    first, second, other = module(), module(), module("n")
    assert run(tmp_path / "a", first, [1, 2], [3]) == [[2, 1], [3]]
    assert run(tmp_path / "b", second, [4, 5], [1, 2]) == [[5, 4], [2, 1]]
    assert (first.asked, second.asked) == (2, 1)
    assert run(tmp_path / "c", other, [1, 2]) == [[2, 1]]
    assert other.asked == 1  # another model's texts are in another file
    files = sorted((tmp_path / "shared").glob("*.jsonl"))
    assert [(f.name, f.read_text().count("\n")) for f in files] == [("m.jsonl", 3), ("n.jsonl", 1)]
    # Without the shared texts a run's folder still has all of its own.
    files[0].unlink()
    again = module()
    run(tmp_path / "b", again, [1, 2], [4, 5])
    assert again.asked == 0
