"""Written answers: what names a title, and what is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_modules.a_llmrec.written import RATES, WrittenStage2Module, named_titles
from lightning_modules.llm import BackboneSpec
from lightning_modules.llm.generation import generate
from tests.lightning_modules.a_llmrec_data import CATALOG, WORDS, Parts, World, attach, histories

TITLES = ["It", "It Follows", "Heat (1995)", ""]


@pytest.mark.parametrize(
    ("text", "strict", "within"),
    [
        ('"It Follows"', [1], [0, 1]),
        ("it follows", [1], [0, 1]),
        ('"It"', [0], [0]),
        ('I would say "Heat (1995)".', [], [2]),
        ('"Heat (1995)" or "It"', [], [0, 2]),
        ("Heat (1995)", [2], [2]),
        ("", [], []),
        ("nothing", [], []),
        ("bitter", [], [0]),
    ],
)
def test_what_a_text_names(text: str, strict: list[int], within: list[int]) -> None:
    found = named_titles(text, TITLES)
    assert [i for i, named in enumerate(found[0]) if named] == strict
    assert [i for i, named in enumerate(found[1]) if named] == within


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return Parts(tmp_path_factory.mktemp("parts"))


def written(parts: Parts, match: Any = "strict") -> tuple[WrittenStage2Module, World]:
    llm = BackboneSpec(parts.llm, dtype="float32", max_length=512)
    module = WrittenStage2Module(
        match, catalog=CATALOG, item_words=WORDS, llm=llm, alignment=parts.alignment(), num_candidates=4
    )  # fmt: skip
    world: Any = World(module, histories())
    world.group_names, world.labelled = ("all",), lambda code: False
    world.sampled_candidates, world.test_code = lambda code: True, 2
    attach(module, world)
    return module, world


@torch.no_grad()
def test_a_text_is_what_the_model_writes_behind_its_vectors(parts: Parts) -> None:
    module, world = written(parts)
    module._split = "test"
    batch = world.batch("test")
    texts = module.written(batch)
    for row, text in enumerate(texts):
        real = batch.token_mask[row].bool()
        tokens = batch.tokens[row][real].tolist()
        one = type(batch)(
            row=batch.row[row : row + 1], user=batch.user[:1], history=batch.history[:1],
            length=batch.length[:1], slots=batch.slots[row : row + 1, real],
        )  # fmt: skip
        with module.soft(one, "test"):
            (ids,) = generate(module.model, module.tokenizer, [tokens], module.title_tokens + 1)
        assert text == module.tokenizer.decode(ids, skip_special_tokens=True)


@torch.no_grad()
def test_answers_are_kept_by_row(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    module, world = written(parts)
    module._split = "test"
    batch = world.batch("test")
    batch.tokens[1], batch.token_mask[1], batch.slots[1] = (
        x[0].clone() for x in (batch.tokens, batch.token_mask, batch.slots)
    )  # the same words about two users
    texts = module.written(batch)
    kept = module.generations.take_fresh()
    assert len({line.key for line in kept}) == len(batch)
    del module.generations.known[kept[1].key]
    assert module.written(batch) == texts
    assert [line.key for line in module.generations.take_fresh()] == [kept[1].key]
    monkeypatch.setattr("lightning_modules.llm.writing.generate", None)  # nothing is written again
    assert module.written(batch) == texts


@pytest.mark.parametrize("match", ["strict", "substring"])
@torch.no_grad()
def test_hits_and_rates(parts: Parts, match: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, world = written(parts, match)
    batch = world.batch("test")
    assert batch.target.tolist() == [6, 8, 11]  # "Up", "Psycho", "M"
    other = next(i for i in batch.candidates[1].tolist() if i not in (0, 8))
    texts = ['"Up"', f'"{module.shown(other)}"', 'One is "M", of course']
    monkeypatch.setattr(module, "written", lambda _: texts)
    module._reset("test")
    scores = module.score(module.encode(batch), batch.candidates)
    for row, wanted in ((0, [6]), (1, [other]), (2, [11] if match == "substring" else [])):
        listed = batch.candidates[row].tolist()
        assert [listed[i] for i in scores[row].nonzero().flatten()] == wanted
    found = {name: module.rates[f"all/{name}"].compute().item() for name in RATES}
    assert found == pytest.approx(
        {"strict_hit": 1 / 3, "substring_hit": 2 / 3, "agreement": 2 / 3, "valid_rate": 2 / 3}
    )


def test_an_unknown_match(parts: Parts) -> None:
    with pytest.raises(ValueError, match="strict, substring"):
        written(parts, "loose")
