"""What is kept of a stage for people to read."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace as Some
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from callbacks import samples
from callbacks.samples import LETTERS, Samples, best, learned, read, small
from lightning_modules.generations import SAMPLES, Generations


class Words:
    """A tokenizer of whole words."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert not skip_special_tokens
        return " ".join(f"w{i}" for i in ids)


class Images:
    mask = np.array([False, True, False, True, True])

    def picture(self, item: int) -> Image.Image:
        return Image.new("RGB", (400, 200), (item, 0, 0))


def trainer(batches: int = 1) -> Any:
    data = Some(
        catalog=pl.DataFrame({"title": ["One", "Two", None, "Four"]}), item_images=Images(),
        raw_users=lambda users: pl.Series([f"u{i}" for i in users]),
    )  # fmt: skip
    return Some(is_global_zero=True, num_test_batches=[batches], datamodule=data)


def ranked(rows: int = 1) -> Any:
    """Four candidates; the target, item 1, is the last of them."""
    batch = Some(
        row=torch.arange(rows), user=torch.arange(1, rows + 1), target=torch.ones(rows).long(), label=None,
        history=torch.tensor([[2, 3, 0]] * rows), length=torch.tensor([2] * rows),
        candidates=torch.tensor([[4, 3, 2, 1]] * rows),
        tokens=torch.tensor([[0, 7, 8]] * rows), token_mask=torch.tensor([[0, 1, 1]] * rows),
    )  # fmt: skip
    batch.__len__ = lambda: rows
    held = type("Held", (Some,), {"__len__": lambda self: rows})(**vars(batch))
    counts = Some(above=torch.tensor([3] * rows), target_score=torch.tensor([-1.0] * rows))
    return Some(batch=held, counts=counts, scores=torch.tensor([[0.5, 2.0, 1.0, -1.0]] * rows))


def test_a_scored_row_is_told_with_titles_pictures_and_the_targets_place(tmp_path: Path) -> None:
    keeper = Samples(tmp_path, "evaluate", pictures=True)
    keeper.on_test_batch_end(trainer(), Some(llm=1, tokenizer=Words()), ranked(), None, 0)
    (record,) = json.loads((tmp_path / "samples.evaluate.json").read_text())
    pictures = [item.pop("picture", None) for item in record["items"]]
    assert record == {
        "kind": "score", "row": 0, "user": "u1", "prompt": "w7 w8", "history": ["Two", "(no title)"],
        "items": [
            {"title": "(no title)", "score": 2.0, "target": False},
            {"title": "Two", "score": 1.0, "target": False},
            {"title": "Four", "score": 0.5, "target": False},
            {"title": "One", "score": -1.0, "target": True},
        ],
        "place": 4,
    }  # fmt: skip
    assert [p is not None for p in pictures] == [True, False, True, True]


def test_the_target_is_shown_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "ITEMS", 2)
    assert best(ranked(), 0) == ([3, 1], [2.0, -1.0])


def test_rows_are_taken_evenly_over_a_pass_and_never_more_than_asked(tmp_path: Path) -> None:
    keeper = Samples(tmp_path, "evaluate", most=3)
    for batch in range(9):
        keeper.on_test_batch_end(trainer(9), Some(), ranked(4), None, batch)
    assert len(keeper.records) == 3
    assert all("prompt" not in r for r in keeper.records)  # the method has no language model
    seen = []
    keeper = Samples(tmp_path, "evaluate", most=3)
    for batch in range(9):
        keeper.on_test_batch_end(trainer(9), Some(), ranked(4), None, batch)
        seen.append(len(keeper.records))
    assert seen == [1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_a_training_row_has_its_answer_without_what_carries_no_loss() -> None:
    batch = Some(
        tokens=torch.tensor([[0, 5, 6]]), token_mask=torch.tensor([[0, 1, 1]]),
        answers=torch.tensor([[-100, 9]]),
    )  # fmt: skip
    assert learned(Words(), batch, 0) == {"prompt": "w5 w6", "answer": "w9"}
    assert learned(Words(), Some(history=1), 0) == {}


def test_written_texts_come_with_their_prompts(tmp_path: Path) -> None:
    held = Generations()
    held.note([[1, 2]] * (SAMPLES + 5), [[3]] * (SAMPLES + 5), [[1]] * (SAMPLES + 5))
    module = Some(llm=1, tokenizer=Words(), generations=held)
    keeper = Samples(tmp_path, "texts", most=2)
    keeper.on_predict_batch_end(trainer(), module)
    expected = {"kind": "text", "prompt": "w1 w2", "answer": "w3", "items": [{"title": "One"}]}
    assert json.loads((tmp_path / "samples.texts.json").read_text()) == [expected] * 2
    assert held.samples == []


def test_long_prompts_are_cut_and_repeated_marks_counted() -> None:
    class Says:
        def __init__(self, text: str) -> None:
            self.text = text

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return self.text

    assert (
        read(Says("a" + "<image>" * 64 + "b <b> <b> <c><c>"), []) == "a<image> ×64 b <b> <b> <c><c>"
    )
    assert len(read(Says("x" * 10 * LETTERS), [])) == LETTERS + 2


def test_pictures_are_small() -> None:
    address = small(Image.effect_noise((2000, 1000), 100))
    assert address.startswith("data:image/jpeg;base64,")
    assert len(address) < 12_000
