"""The projector learns captions, alone; attributes are found in captions; a later stage takes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.build import build_on, problems
from lightning_modules.align_vision import AlignVisionModule
from lightning_modules.align_vision.collate import (
    NOWHERE,
    CaptionBatch,
    CaptionCollator,
    CaptionTokens,
)
from lightning_modules.align_vision.module import slot_credit
from lightning_modules.align_vision.prompts import ASKED, captioned
from lightning_modules.errors import ModelError
from lightning_modules.llm.backbones import load_causal_lm
from lightning_modules.llm.kept_states import KeptStates
from lightning_modules.llm.label_scoring import NO_LOSS
from lightning_modules.llm.pictures import PictureReader, read_last_logits
from lightning_modules.llm.random_vision import RandomVisionModel
from lightning_modules.llm.specs import BackboneSpec, VisionSpec
from tests.lightning_modules.drawn_pictures import DrawnPictures, Row, Rows

LONG = "{% for m in messages %}You see pictures, and you say what is in them. " + (
    "{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPEC = VisionSpec(RandomVisionModel("llava_lite"), dtype="float32", max_length=256)


def module(spec: VisionSpec = SPEC, **settings: Any) -> AlignVisionModule:
    given: dict[str, Any] = {"learning_rate": 3e-2, "warmup_steps": 0, "schedule": "constant"}
    return AlignVisionModule(spec, **{**given, **settings})


def fit(made: AlignVisionModule, data: DrawnPictures, **settings: Any) -> pl.Trainer:
    given: dict[str, Any] = {"max_epochs": 2, "num_sanity_val_steps": 0}
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, **{**given, **settings},
    )  # fmt: skip
    trainer.fit(made, datamodule=data)
    return trainer


@pytest.fixture
def data() -> DrawnPictures:
    return DrawnPictures(16, 6, batch_size=4, side=56)


def batch_of(made: AlignVisionModule, rows: list[Row], training: bool = True) -> CaptionBatch:
    return made.collator(training)(Rows(rows, None, 1.0))


# ---------------------------------------------------------------- what is trained


def test_the_projector_alone_learns_and_alone_is_kept(data: DrawnPictures, tmp_path: Path) -> None:
    made = module()
    before = {n: p.clone() for n, p in load_causal_lm(SPEC, "cpu").named_parameters()}
    losses: list[Tensor] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, *given: Any) -> None:
            losses.append(given[2]["loss"])

    trainer = fit(made, data, callbacks=[Watch()], max_epochs=4)
    after = dict(made.model.named_parameters())
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    parts = [f"linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")]
    assert moved == {f"model.multi_modal_projector.{part}" for part in parts}
    assert torch.stack(losses[-4:]).mean() < torch.stack(losses[:4]).mean()
    told = {name for name in trainer.callback_metrics if name.startswith("val/")}
    names = ("colour", "shape", "background", "all")
    assert told == {"val/loss"} | {f"val/{name}/accuracy" for name in names}
    trainer.save_checkpoint(tmp_path / "best.ckpt")
    kept = torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"]
    assert set(kept) == {f"model.model.multi_modal_projector.{part}" for part in parts}
    assert "shape 0.250" in made.remarks()[-1]


def test_micro_batches_change_nothing(data: DrawnPictures) -> None:
    whole, parts = module(), module()
    fit(whole, data, max_epochs=1)
    fit(parts, data, max_epochs=1, accumulate_grad_batches=2)
    for one, other in zip(whole.projector.parameters(), parts.projector.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_the_loss_is_that_of_the_captions_tokens(data: DrawnPictures) -> None:
    made = module()
    fit(made, data, max_epochs=1)
    rows = data.train[:3]
    batch = batch_of(made, rows)
    total, count = torch.zeros(()), 0
    reader = made.caption_tokens.reader
    with torch.no_grad():
        mine = made.summed_loss(made.last_logits(batch), batch)
        for row in rows:
            prompt, answer = captioned(reader.tokenizer, True, row.caption)
            shown = reader.tokens(prompt, [row.picture.size])
            ids = reader.tokens(prompt + answer, [row.picture.size])
            given = reader.inputs([(ids, [row.picture])])
            labels = torch.tensor([[NO_LOSS] * len(shown) + ids[len(shown) :]])
            told = len(ids) - len(shown)
            total += made.model(**given, labels=labels).loss * told
            count += told
    torch.testing.assert_close(mine, total)
    assert count == int((batch.answers != NO_LOSS).sum())
    assert made.target_counts(Rows(rows)).sum() == count
    assert answer == f"{rows[-1].caption}</s>"


def test_a_row_that_keeps_ranks_in_step_carries_no_loss(data: DrawnPictures) -> None:
    made = module()
    fit(made, data, max_epochs=1)
    given = Rows(data.train[:2], np.array([False, True]), 1.0)
    batch = made.collator(True)(given)
    assert (batch.answers[1] == NO_LOSS).all()
    assert (batch.answers[0] != NO_LOSS).any()


def test_the_tower_sees_each_picture_once(data: DrawnPictures) -> None:
    made = module()
    seen: list[int] = []

    class Count(pl.Callback):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            tower = pl_module.model.model.vision_tower
            tower.register_forward_hook(lambda _, read, __: seen.append(len(read[0])))

    data.train[3] = Row(data.train[0].picture.copy(), "something else", {})
    fit(made, data, callbacks=[Count()], max_epochs=3)
    assert sum(seen) == 16 - 1 + 6


def test_states_that_are_too_many_are_made_again(data: DrawnPictures) -> None:
    made, capped = module(), module()
    capped._seen_states = KeptStates(most_bytes=1)
    fit(made, data, max_epochs=2)
    fit(capped, data, max_epochs=2)
    assert len(capped._seen_states) == 1
    assert len(made._seen_states) == 16 + 6
    for (name, one), other in zip(
        made.projector.named_parameters(), capped.projector.parameters(), strict=True
    ):
        assert torch.equal(one, other), name


def test_kept_states_have_a_cap_and_can_be_trained_with() -> None:
    kept = KeptStates(most_bytes=100)
    with torch.inference_mode():
        made = torch.ones(3, 5)
        kept.update({"a": made[0], "b": made[1]})
    assert kept.bytes == 40  # of each its own, not what it was cut from
    weight = torch.ones(5, requires_grad=True)
    (kept["a"] * weight).sum().backward()
    kept.update({"a": torch.zeros(10)})
    assert kept.bytes == 60
    kept.update({"c": torch.zeros(15)})
    assert (list(kept), kept.bytes) == (["b", "c"], 80)  # the oldest went
    kept.update({"d": torch.zeros(1000)})
    assert list(kept) == ["d"]


def test_what_all_prompts_begin_with_is_read_once(data: DrawnPictures) -> None:
    plain, shared = module(), module()
    for each in (plain, shared):
        each.tokenizer.chat_template = LONG
    plain.recomputes = True  # then nothing is shared
    fit(plain, data, max_epochs=1)
    fit(shared, data, max_epochs=1)
    assert plain._prefix is None
    assert shared._prefix is not None
    opening = plain.tokenizer("You see pictures, and you say what is in them. ")["input_ids"]
    assert len(opening) - 1 <= shared._prefix.length <= len(opening)
    for one, other in zip(plain.projector.parameters(), shared.projector.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


# ---------------------------------------------------------------- attributes in captions


def tokens(values: dict[str, list[str]]) -> CaptionTokens:
    return CaptionTokens(PictureReader(SPEC), values, 256)


def test_an_attributes_place_is_where_its_value_begins() -> None:
    values = {"colour": ["red", "blue"], "shape": ["square", "star"], "size": ["big"]}
    made = tokens(values)
    caption = "a red square"
    (colour, first, right), (shape, kinds, star), nowhere = made.slots(
        caption, {"colour": "red", "shape": "square", "size": "huge"}
    )
    ids, prompt = made.of(caption)
    decode = made.reader.tokenizer.decode
    assert decode(ids[prompt:colour]) == "a"
    assert decode(ids[colour:]).startswith(" red square")
    assert decode(ids[prompt:shape]) == "a red"
    assert first[right] == ids[colour]
    assert right == 0
    assert " blue".startswith(decode(first[1]))
    assert decode(first[1]).strip()
    assert kinds[star] == ids[shape]
    assert nowhere == (NOWHERE, [], 0)


def test_equal_values_are_named_in_their_order_and_words_are_whole() -> None:
    made = tokens({"first": ["red", "blue"], "second": ["red", "blue"]})
    one, two = made.slots("a reddish red on red", {"first": "red", "second": "red"})
    ids, prompt = made.of("a reddish red on red")
    decode = made.reader.tokenizer.decode
    assert decode(ids[prompt : one[0]]) == "a reddish"
    assert decode(ids[prompt : two[0]]) == "a reddish red on"


def test_credit_goes_to_the_likeliest_value_and_ties_share_it() -> None:
    logits = torch.zeros(2, 3, 6)
    logits[0, 1, 2], logits[0, 1, 4] = 1.0, 3.0  # row 0, column 1: token 4 before token 2
    logits[1, 2, 5] = 2.0
    empty = torch.zeros(0)
    batch = CaptionBatch(
        tokens=empty, token_mask=empty, answers=empty, keys=["", ""], pixels={}, normaliser=empty,
        column=torch.tensor([[1, 1], [2, NOWHERE]]),
        choices=torch.tensor([[[2, 4, -1], [2, 4, 4]], [[5, 0, 1], [-1, -1, -1]]]),
        truth=torch.tensor([[0, 1], [0, 0]]),
    )  # fmt: skip
    expected = torch.tensor([[0.0, 0.5], [1.0, 0.0]])
    assert torch.equal(slot_credit(logits, batch), expected)


def test_places_are_columns_of_what_is_read(data: DrawnPictures) -> None:
    made = tokens(DrawnPictures.attribute_values)
    batch = CaptionCollator(made, slots=True)(Rows(data.valid[:3]))
    for i, row in enumerate(data.valid[:3]):
        for j, name in enumerate(DrawnPictures.attribute_values):
            said = batch.answers[i, batch.column[i, j]]
            assert made.reader.tokenizer.decode(said).strip()[:1] == row.attributes[name][0]
            assert said == batch.choices[i, j, batch.truth[i, j]]


def test_perfect_foresight_is_right_everywhere(data: DrawnPictures) -> None:
    made = tokens(DrawnPictures.attribute_values)
    batch = CaptionCollator(made, slots=True)(Rows(data.valid))
    told = batch.answers.clamp(min=0)
    logits = torch.nn.functional.one_hot(told, len(made.reader.tokenizer)).float()
    firsts = [len(set(row)) for row in batch.choices[0].tolist()]
    credit = slot_credit(logits, batch)
    assert (credit > 0).all()
    if firsts == [8, 4, 8]:  # no two values begin with the same token
        assert (credit == 1).all()


def test_captions_that_name_no_value_are_no_error(data: DrawnPictures) -> None:
    made = tokens(dict.fromkeys(DrawnPictures.attribute_values, ()))
    unnamed = [replace(row, attributes={}) for row in data.valid[:2]]
    batch = CaptionCollator(made, slots=True)(Rows(unnamed))
    logits = torch.zeros(*batch.answers.shape, len(made.reader.tokenizer))
    assert slot_credit(logits, batch).tolist() == [[0.0] * 3] * 2


def test_every_way_to_ask_shows_one_picture() -> None:
    made = tokens({})
    image = made.reader.processor.config.image_token_id
    assert all(made.prompt_tokens(asked).count(image) == 4 for asked in ASKED)


# ---------------------------------------------------------------- what comes after, and what is refused


def test_a_later_stage_takes_the_projector_as_an_input(data: DrawnPictures, tmp_path: Path) -> None:
    made = module()
    trainer = fit(made, data)
    trainer.save_checkpoint(tmp_path / "best.ckpt")
    node = {
        "_target_": "lightning_modules.align_vision.AlignVisionModule",
        "llm": {
            "_target_": "lightning_modules.llm.specs.VisionSpec", "dtype": "float32", "max_length": 256,
            "source": {
                "_target_": "lightning_modules.llm.random_vision.RandomVisionModel",
                "architecture": "llava_lite",
            },
        },
    }  # fmt: skip
    assert list(problems(node, "stages.later.module", ("llm.projector",))) == []
    later = build_on(node, None, **{"llm.projector": str(tmp_path / "best.ckpt")})
    assert later.llm.digest() != SPEC.digest()
    row = data.valid[0]
    reader = PictureReader(later.llm)
    ids, _ = made.caption_tokens.of(row.caption)
    given = reader.inputs([(ids, [row.picture])])
    with torch.no_grad():
        expected = read_last_logits(made.model, given)
        again = read_last_logits(load_causal_lm(later.llm, "cpu"), given)
        untrained = read_last_logits(load_causal_lm(SPEC, "cpu"), given)
    assert torch.equal(again, expected)
    assert not torch.allclose(untrained, expected, atol=1e-3)


def test_models_without_such_a_projector_are_refused(data: DrawnPictures) -> None:
    with pytest.raises(ValueError, match="llm is a BackboneSpec, which reads no pictures"):
        AlignVisionModule(BackboneSpec())  # type: ignore[arg-type]
    tiles = VisionSpec(RandomVisionModel("llava_next"), dtype="float32", max_length=256)
    with pytest.raises(ModelError, match="llava_next models lay pictures out in tiles"):
        fit(module(tiles), data)
    with pytest.raises(ModelError, match="no projector that could be trained apart"):
        fit(
            module(VisionSpec(RandomVisionModel("idefics3"), dtype="float32", max_length=256)), data
        )


def test_a_caption_that_does_not_fit_is_told(data: DrawnPictures) -> None:
    with pytest.raises(ModelError, match=r"more than llm.max_length=16: raise it"):
        fit(
            module(VisionSpec(RandomVisionModel("llava_lite"), dtype="float32", max_length=16)),
            data,
        )
