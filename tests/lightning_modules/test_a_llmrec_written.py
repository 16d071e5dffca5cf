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


def written(
    parts: Parts, match: Any = "strict", constrained: bool = False
) -> tuple[WrittenStage2Module, World]:
    llm = BackboneSpec(parts.llm, dtype="float32", max_length=512)
    module = WrittenStage2Module(
        match, constrained, catalog=CATALOG, item_words=WORDS, llm=llm, alignment=parts.alignment(),
        num_candidates=4,
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


@torch.no_grad()
def test_a_held_text_is_a_candidate_that_begins_best(parts: Parts) -> None:
    """By hand: at each place the likeliest token among those that go on with a title of the row's."""
    module, world = written(parts, constrained=True)
    module._reset("test")
    batch = world.batch("test")
    texts = module.written(batch)
    real = batch.token_mask.bool()
    for row, text in enumerate(texts):
        left = [
            [*module.table.title(i), module.tokenizer.eos_token_id]
            for i in batch.candidates[row].tolist() if i
        ]  # fmt: skip
        said: list[int] = []
        while len(left) > 1:
            tokens = torch.cat([batch.tokens[row][real[row]], torch.tensor(said, dtype=torch.long)])
            slots = torch.cat(
                [batch.slots[row][real[row]], torch.zeros(len(said), dtype=torch.long)]
            )
            one = type(batch)(
                row=batch.row[row : row + 1], user=batch.user[:1], history=batch.history[:1],
                length=batch.length[:1], slots=slots[None],
            )  # fmt: skip
            with module.soft(one, "test"):
                logits = module.model(tokens[None]).logits[0, -1]
            said.append(max({ids[len(said)] for ids in left}, key=lambda t: logits[t].item()))
            left = [ids for ids in left if ids[: len(said)] == said]
        assert text == module.said(left[0])
    scores = module.score(module.encode(batch), batch.candidates)
    assert scores.sum(1).tolist() == [1.0] * len(batch)
    assert module.rates["all/valid_rate"].compute() == 1


@torch.no_grad()
def test_held_and_free_answers_are_kept_apart(parts: Parts) -> None:
    """Also those to the same prompt that are held to other titles."""
    free, world = written(parts)
    held, _ = written(parts, constrained=True)
    free._split = held._split = "test"
    batch = world.batch("test")
    shown = [[held.shown(i) for i in row if i] for row in batch.candidates.tolist()]
    said = free.written(batch)
    assert not any(text.strip('"') in row for text, row in zip(said, shown, strict=True))
    held.generations = free.generations
    chosen = held.written(batch)
    assert all(text.strip('"') in row for text, row in zip(chosen, shown, strict=True))
    assert len({line.key for line in free.generations.take_fresh()}) == 2 * len(batch)
    assert (free.written(batch), held.written(batch)) == (said, chosen)
    assert free.generations.take_fresh() == []
    batch.candidates[0] = batch.candidates[0].roll(1)
    batch.candidates[0][0] = 0
    held.written(batch)
    assert len(free.generations.take_fresh()) == 1


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
