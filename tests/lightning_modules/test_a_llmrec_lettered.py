"""A-LLMRec asked for a letter: what the prompt says, and scores by definition, order by order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lightning_modules.a_llmrec import LetteredStage2Module
from tests.lightning_modules.a_llmrec_data import Parts, World


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return Parts(tmp_path_factory.mktemp("parts"))


def lettered(parts: Parts, **options: Any) -> tuple[Any, World]:
    module, world = parts.stage2(kind=LetteredStage2Module, **options)
    module._split = "test"
    return module, world


def test_each_candidate_has_a_letter(parts: Parts) -> None:
    module, world = lettered(parts)
    batch = world.batch("test")
    for row in range(len(batch)):
        ids = batch.tokens[row][batch.token_mask[row].bool()].tolist()
        text = module.tokenizer.decode(ids)
        titles = [
            module.tokenizer.decode(module.table.title(i)) for i in batch.candidates[row].tolist()
        ]
        places = [
            text.index(f"{letter}:{title}") for letter, title in zip("ABCD", titles, strict=True)
        ]
        assert places == sorted(places)
        assert "Answer with its letter and nothing else." in text
        assert len(ids) == module.row_lengths(world.every_row("test"))[row]


@pytest.mark.parametrize("orders", [1, 2, 4])
def test_scores_are_mean_log_probabilities_of_letters(parts: Parts, orders: int) -> None:
    """Row by row, candidate by candidate, from all logits of a plain forward pass."""
    module, world = lettered(parts, orders=orders, user_token=False, item_tokens="none")
    batch = world.batch("test")
    scores = module.encode(batch).scores  # (B, C)
    tokens = [
        module.tokenizer(letter, add_special_tokens=False)["input_ids"][-1] for letter in "ABCD"
    ]
    for row in range(len(batch)):
        history = batch.history[row, : int(batch.length[row])].numpy()
        candidates = batch.candidates[row].tolist()
        expected = dict.fromkeys(candidates, 0.0)
        for order in range(orders):
            shift = order * 4 // orders
            turned = candidates[shift:] + candidates[:shift]
            ids, _ = module.table.prompt(history, np.array(turned))
            logits = module.model(torch.from_numpy(ids)[None]).logits[0, -1]
            log_p = logits[tokens].log_softmax(-1)
            for place, item in enumerate(turned):
                expected[item] += float(log_p[place]) / orders
        found = dict(zip(candidates, scores[row].tolist(), strict=True))
        assert found == pytest.approx(expected, abs=1e-5)


def test_soft_tokens_are_read_there_too(parts: Parts) -> None:
    module, world = lettered(parts, orders=2)
    batch = world.batch("test")
    before = module.encode(batch).scores
    with torch.no_grad():
        module.item_projector.layers[3].weight.mul_(-1)
    assert not torch.allclose(module.encode(batch).scores, before)


def test_all_orders_make_the_places_even(parts: Parts) -> None:
    """With as many orders as candidates the candidates' own order says nothing."""
    module, world = lettered(parts, orders=4, user_token=False, item_tokens="none")
    batch = world.batch("test")
    scores = module.encode(batch).scores
    batch.candidates = batch.candidates.roll(1, dims=1)
    torch.testing.assert_close(module.encode(batch).scores, scores.roll(1, dims=1))


def test_padding_is_no_choice(parts: Parts) -> None:
    module, world = lettered(parts, orders=3)
    batch = world.batch("test")
    batch.candidates[0, -1] = 0
    scores = module.encode(batch).scores
    assert scores[0, -1] == -torch.inf
    assert torch.isfinite(scores[0, :-1]).all()
    assert torch.isfinite(scores[1:]).all()


def test_settings_that_cannot_be(parts: Parts) -> None:
    with pytest.raises(ValueError, match="orders is 0"):
        lettered(parts, orders=0)
    module, world = lettered(parts)
    rows = world.every_row("test")
    wide = np.tile(np.arange(1, 10, dtype=np.int32), (len(rows.row), 3))
    with pytest.raises(ValueError, match="27 candidates are more than there are letters"):
        module.table._letter_lengths(wide)
