"""Pictures in prompts: tokens that stand for them, inputs of many architectures, padding, loading."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from datamodules.sources import DataSourceError
from lightning_modules.errors import ModelError
from lightning_modules.llm.adapters import attach_adapter
from lightning_modules.llm.backbones import load_causal_lm, load_image_processor, load_tokenizer
from lightning_modules.llm.generation import generate
from lightning_modules.llm.label_scoring import SharedPrefix, last_logits, pad_left
from lightning_modules.llm.model_files import model_folder
from lightning_modules.llm.pictures import (
    PICTURE,
    PictureReader,
    beside,
    positions_of,
    read_last_logits,
)
from lightning_modules.llm.precision import QLoRAPrecision, is_quantized
from lightning_modules.llm.random_vision import Architecture, RandomVisionModel
from lightning_modules.llm.specs import AdapterSpec, BackboneSpec, VisionSpec
from lightning_modules.llm.targets import linear_paths
from lightning_modules.llm.vision_parts import language_model_path, projector_of
from lightning_modules.llm.wording import as_data

ARCHITECTURES = get_args(Architecture)
LANGUAGE_MODEL = dict.fromkeys(ARCHITECTURES, "model.language_model") | {
    "idefics3": "model.text_model"
}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def described(architecture: Any, **settings: Any) -> VisionSpec:
    given: dict[str, Any] = {"dtype": "float32", "max_length": 512, **settings}
    return VisionSpec(RandomVisionModel(architecture), **given)


def noise(seed: int, width: int = 100, height: int = 80) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


PICTURES = [noise(0), noise(1, 160, 80), noise(2, 64, 150)]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def both(request: pytest.FixtureRequest, data_cache: Path) -> Iterator[tuple[PictureReader, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMREC_CACHE", str(data_cache))
        spec = described(request.param)
        yield PictureReader(spec), load_causal_lm(spec, "cpu")


def rows_of(reader: PictureReader) -> list[tuple[list[int], list[Image.Image]]]:
    """One picture, none, and two."""
    asked = [
        (f"What is this? {PICTURE} Say it.", PICTURES[:1]),
        ("Nothing is shown here.", []),
        (f"First: {PICTURE}\nthen: {PICTURE}\nWhich of them is it, would somebody say?", PICTURES[1:]),
    ]  # fmt: skip
    return [
        (reader.tokens(reader.lay_out(text), [p.size for p in shown]), shown)
        for text, shown in asked
    ]


# ---------------------------------------------------------------- tokens


def test_a_mark_becomes_as_many_tokens_as_the_model_has_states(both: Any) -> None:
    reader, model = both
    image = model.config.image_token_id
    for picture in PICTURES:
        ids = reader.tokens(f"It is {PICTURE}.", [picture.size])
        states = model.get_image_features(**reader.pictures([picture])).pooler_output
        assert ids.count(image) == sum(len(s.reshape(-1, s.shape[-1])) for s in states)


def test_lengths_are_known_before_anything_is_batched(both: Any) -> None:
    reader, _ = both
    texts = [f"a {PICTURE}", "b", f"{PICTURE}{PICTURE}"]
    sizes = [[PICTURES[0].size], [], [p.size for p in PICTURES[1:]]]
    rows = [
        (reader.tokens(text, shown), [Image.new("RGB", size) for size in shown])
        for text, shown in zip(texts, sizes, strict=True)
    ]
    assert reader.lengths(texts, sizes) == [len(ids) for ids, _ in rows]
    assert reader.inputs(rows)["attention_mask"].sum(1).tolist() == [len(ids) for ids, _ in rows]


@pytest.mark.parametrize("architecture", ["llava", "llava_next", "idefics3"])
def test_the_tokens_are_those_of_the_architectures_own_processor(architecture: Any) -> None:
    import transformers

    reader = PictureReader(described(architecture))
    _, image_processor = load_image_processor(reader.spec)
    own: dict[str, Any] = {
        "patch_size": 14, "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }  # fmt: skip
    if architecture == "idefics3":
        own = {"image_seq_len": 4}
    names = {"llava": "Llava", "llava_next": "LlavaNext", "idefics3": "Idefics3"}
    kind = getattr(transformers, f"{names[architecture]}Processor")
    theirs = kind(image_processor=image_processor, tokenizer=load_tokenizer(reader.spec), **own)
    for picture in PICTURES:
        made = theirs(text=["A <image> of it."], images=[[picture]], return_tensors="pt")
        ids = reader.tokens(f"A {PICTURE} of it.", [picture.size])
        assert made["input_ids"][0].tolist() == ids
        mine = reader.pictures([picture])["pixel_values"]
        assert torch.equal(
            mine.flatten(0, 1), made["pixel_values"].reshape(mine.flatten(0, 1).shape)
        )


@pytest.mark.parametrize("size", [(100, 80), (300, 40), (56, 56), (40, 500)])
@pytest.mark.parametrize("architecture", ["llava_next", "llava_onevision", "idefics3"])
def test_tiles_of_pictures_of_any_shape_are_counted(architecture: Any, size: Any) -> None:
    split: dict[str, Any] = {"size": {"longest_edge": 160}, "do_image_splitting": True}
    spec = described(architecture, pictures=split if architecture == "idefics3" else {})
    reader, model = PictureReader(spec), load_causal_lm(spec, "cpu")
    picture = noise(0, *size)
    ids = reader.tokens(PICTURE, [size])
    states = model.get_image_features(**reader.pictures([picture])).pooler_output
    told = sum(len(s.reshape(-1, s.shape[-1])) for s in states)
    assert ids.count(model.config.image_token_id) == told
    with torch.no_grad():
        assert torch.isfinite(read_last_logits(model, reader.inputs([(ids, [picture])]))).all()


def test_marks_and_pictures_must_be_as_many() -> None:
    reader = PictureReader(described("llava"))
    with pytest.raises(ModelError, match="shows 1 pictures, but 2 were given"):
        reader.tokens(f"a {PICTURE}", [(10, 10), (10, 10)])
    with pytest.raises(ModelError, match="shows 1 pictures, but 0"):
        reader.tokens(f"a {PICTURE}")


def test_texts_of_others_cannot_show_a_picture(both: Any) -> None:
    reader, model = both
    image = model.config.image_token_id
    name = reader.tokenizer.convert_ids_to_tokens(image)
    (kept,) = as_data([f"A {name} and {PICTURE} film"], reader.tokenizer)
    assert kept == "A and film"
    assert image not in reader.tokens(kept)


def test_a_template_is_given_texts_as_it_takes_them(both: Any) -> None:
    reader, _ = both
    assert reader.lay_out("Say", "it") == "<|user|>Say\n\nit</s><|assistant|>"
    plain = PictureReader(replace(reader.spec, chat_template=False), reader.tokenizer)
    assert plain.lay_out("Say", "it").endswith("### Input:\nit\n\n### Response:\n")


# ---------------------------------------------------------------- scores


def test_a_row_alone_scores_as_among_others(both: Any) -> None:
    reader, model = both
    rows = rows_of(reader)
    with torch.no_grad():
        together = read_last_logits(model, reader.inputs(rows), keep=3)
        alone = [read_last_logits(model, reader.inputs([row]), keep=3) for row in rows]
    assert together.shape == (3, 3, len(reader.tokenizer))
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)


def test_the_scores_are_those_of_the_whole_model(both: Any) -> None:
    reader, model = both
    row = rows_of(reader)[2]
    given = reader.inputs([row])
    with torch.no_grad():
        whole = model(**given, use_cache=False).logits[:, -2:]
        torch.testing.assert_close(read_last_logits(model, given, 2), whole, atol=1e-4, rtol=0)


def test_scores_depend_on_the_picture_and_on_which_comes_first(both: Any) -> None:
    reader, model = both
    ids, (first, second) = rows_of(reader)[2]
    same = [first, first.rotate(180)]  # of one size, so that the tokens are the same
    text = reader.lay_out(f"First: {PICTURE}\nthen: {PICTURE}\nWhich?")
    ids = reader.tokens(text, [p.size for p in same])
    with torch.no_grad():
        scores = [
            read_last_logits(model, reader.inputs([(ids, shown)]))
            for shown in (same, same[::-1], [second.resize(first.size), first])
        ]
    assert (scores[0] - scores[1]).abs().max() > 1e-3
    assert (scores[0] - scores[2]).abs().max() > 1e-3


def test_rows_without_pictures_score_as_in_a_language_model(both: Any) -> None:
    reader, model = both
    ids = reader.tokens(reader.lay_out("Nothing is shown."))
    tokens, mask = pad_left([ids], 3)
    with torch.no_grad():
        expected = last_logits(model, tokens, mask)
        torch.testing.assert_close(read_last_logits(model, reader.inputs([(ids, [])])), expected)


def test_writing_continues_as_the_scores_say_and_padding_does_not_matter(both: Any) -> None:
    reader, model = both
    rows = rows_of(reader)
    given = reader.inputs(rows)
    written = generate(model, reader.tokenizer, [ids for ids, _ in rows], 5, pictures=beside(given))
    for (ids, shown), answer in zip(rows, written, strict=True):
        alone = reader.inputs([(ids, shown)])
        assert generate(model, reader.tokenizer, [ids], 5, pictures=beside(alone)) == [answer]
        # Word by word, without a cache.
        said: list[int] = []
        while len(said) < 5:
            with torch.no_grad():
                best = int(
                    read_last_logits(model, reader.inputs([(ids + said, shown)]))[0, 0].argmax()
                )
            if best == reader.tokenizer.eos_token_id:
                break
            said.append(best)
        assert answer == said


@pytest.mark.parametrize("architecture", ["llava", "llava_lite", "idefics3"])
def test_a_prefix_of_text_is_shared_by_rows_with_pictures(architecture: Any) -> None:
    reader = PictureReader(described(architecture))
    model = load_causal_lm(reader.spec, "cpu")
    texts = [f"The user likes red. Now: {PICTURE}", f"The user likes red. Now: {PICTURE} or not?"]
    rows = [(reader.tokens(t, [p.size]), [p]) for t, p in zip(texts, PICTURES, strict=False)]
    given = reader.inputs(rows)
    with torch.no_grad():
        prefix = SharedPrefix(model, rows[0][0][:8])
        shared = prefix.last_logits(given["input_ids"], given["attention_mask"], 1, **beside(given))
        torch.testing.assert_close(shared, read_last_logits(model, given), atol=1e-4, rtol=0)


def test_places_are_counted_from_the_first_token(both: Any) -> None:
    reader, model = both
    rows = rows_of(reader)
    places = positions_of(model, reader.inputs(rows))
    alone = positions_of(model, reader.inputs(rows[:1]))
    length = len(rows[0][0])
    assert torch.equal(places[..., 0, -length:], alone[..., 0, :])
    assert alone[..., 0, 0].max() == 0


# ---------------------------------------------------------------- loading


def test_the_model_is_frozen_without_dropout_and_knows_its_parts(both: Any) -> None:
    reader, model = both
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(isinstance(m, nn.Dropout) and m.p for m in model.modules())
    architecture: Any = reader.spec.source
    assert language_model_path(model) == LANGUAGE_MODEL[architecture.architecture]


def test_lora_adapts_the_language_model_alone(both: Any) -> None:
    reader, _ = both
    source: Any = reader.spec.source
    model = load_causal_lm(reader.spec, "cpu")
    inside = LANGUAGE_MODEL[source.architecture]
    layers = [f"{inside}.layers.{i}" for i in range(2)]
    expected = {
        f"{layer}.{'self_attn' if n[0] in 'qkvo' else 'mlp'}.{n}"
        for layer in layers
        for n in LINEAR
    }
    assert set(linear_paths(model)) == expected
    assert len(linear_paths(model, ("q_proj",))) == 2  # the towers have a q_proj, too
    adapted = attach_adapter(model, AdapterSpec(), seed=0)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(expected)
    assert all(inside in name and "lora_" in name for name in trained)
    rows = rows_of(reader)
    loss = read_last_logits(adapted, reader.inputs(rows)).square().mean()
    loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


def test_only_the_language_model_is_quantized(both: Any) -> None:
    reader, plain = both
    source: Any = reader.spec.source
    spec = replace(reader.spec, quantization="nf4-dq")
    plugin = QLoRAPrecision.for_spec(spec)
    model = load_causal_lm(spec, "cpu", plugin.quantization_config("cpu"))
    quantized = {name for name, layer in model.named_modules() if is_quantized(layer)}
    assert quantized == set(linear_paths(plain))
    assert all(name.startswith(LANGUAGE_MODEL[source.architecture]) for name in quantized)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight.data_ptr() == embedding.weight.data_ptr()  # still tied
    with torch.no_grad():
        scores = read_last_logits(model, reader.inputs(rows_of(reader)))
    assert torch.isfinite(scores).all()


def test_a_digest_names_the_pictures_sizes_and_the_projectors_content(tmp_path: Path) -> None:
    spec = described("llava")
    smaller = replace(spec, pictures={"size": {"height": 28, "width": 28}})
    files = [tmp_path / name for name in ("a", "b", "c")]
    for file, content in zip(files, (b"one", b"one", b"two"), strict=True):
        file.write_bytes(content)
    one, same, two = (replace(spec, projector=str(file)).digest() for file in files)
    assert len({spec.digest(), smaller.digest(), one, two}) == 4
    assert one == same
    assert spec.digest() != described("llava_next").digest()


def test_limits_of_pictures_change_their_tokens() -> None:
    spec = described("qwen2_5_vl", pictures={"size": {"shortest_edge": 784, "longest_edge": 3136}})
    few = PictureReader(spec).tokens(PICTURE, [(160, 80)])
    many = PictureReader(described("qwen2_5_vl")).tokens(PICTURE, [(160, 80)])
    assert len(few) < len(many)
    with pytest.raises(ModelError, match="no setting longest"):
        load_image_processor(described("llava", pictures={"longest": 3}))


def test_vectors_before_the_text_are_refused() -> None:
    reader = PictureReader(described("llava"))
    model = attach_adapter(load_causal_lm(reader.spec, "cpu"), AdapterSpec("prompt"), seed=0)
    with pytest.raises(ModelError, match="take lora"):
        read_last_logits(model, reader.inputs([(reader.tokens("Say"), [])]))


def test_a_language_model_reads_no_pictures(tmp_path: Path) -> None:
    from tests.lightning_modules.tiny_llm import write_tiny_llm

    spec = VisionSpec(str(write_tiny_llm(tmp_path)), max_length=64)
    with pytest.raises(ModelError, match="holds no vision-language model"):
        PictureReader(spec).tokens(PICTURE, [(10, 10)])
    with pytest.raises(DataSourceError, match="cannot be loaded"):
        load_causal_lm(spec, "cpu")
    with pytest.raises(ModelError, match="BackboneSpec reads no pictures"):
        PictureReader(BackboneSpec())  # type: ignore[arg-type]


def test_a_projector_takes_the_place_of_the_models_own(tmp_path: Path) -> None:
    spec = described("llava")
    model = load_causal_lm(spec, "cpu")
    own = projector_of(model).state_dict()
    names = {f"model.model.multi_modal_projector.{n}": w + 1 for n, w in own.items()}
    torch.save({"state_dict": names}, tmp_path / "best.ckpt")
    again = load_causal_lm(replace(spec, projector=str(tmp_path / "best.ckpt")), "cpu")
    for name, weight in projector_of(again).state_dict().items():
        assert torch.equal(weight, own[name] + 1)
    with pytest.raises(ModelError, match="holds no projector of this model"):
        load_causal_lm(described("llava_lite", projector=str(tmp_path / "best.ckpt")), "cpu")
    with pytest.raises(ModelError, match="no projector that could be trained apart"):
        load_causal_lm(described("idefics3", projector=str(tmp_path / "best.ckpt")), "cpu")


def test_older_models_keep_their_chat_template_in_a_file_of_its_own(tmp_path: Path) -> None:
    import json
    import shutil

    folder = model_folder(RandomVisionModel("llava_next"))
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    template = "{% for m in messages %}[{{ m['content'][0]['text'] }}]{% endfor %}"
    text = json.dumps({"chat_template": template})
    (tmp_path / "model" / "chat_template.json").write_text(text)
    reader = PictureReader(VisionSpec(str(tmp_path / "model"), max_length=64))
    assert reader.lay_out("Say") == "[Say]"


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"architecture": "clip"}, "architecture is 'clip'"), ({"width": 40}, "width is 40")],
)
def test_an_impossible_random_model_is_refused(settings: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        RandomVisionModel(**settings)


def test_a_vision_spec_is_checked_as_others_are() -> None:
    with pytest.raises(ValueError, match="full commit hash"):
        VisionSpec("a/b", revision="main")
    assert isinstance(VisionSpec(), BackboneSpec)
