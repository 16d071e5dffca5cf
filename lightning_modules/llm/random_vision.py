"""Small vision-language models of random weights: whole chains with pictures, in seconds.

Their architectures are real ones, their tokenizer knows bytes, and what they answer means nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_modules.llm.random_models import require_sizes, write_tokenizer
from lightning_modules.llm.saving import save_model

Architecture = Literal[
    "llava", "llava_lite", "llava_next", "llava_onevision", "idefics3", "qwen2_5_vl", "qwen3_vl"
]  # fmt: skip
_ENGLISH = (
    "Here is a picture of an item. Say what it shows, which shape and colour it has.",
    "Will the user like the item in the picture? Answer yes or no, and nothing else.",
    "a red circle on a blue background, a green square on a white background",
)
# Content in parts, as the templates of most vision-language models take it.
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SIDE, _PATCH = 56, 14  # of the towers' pictures, in pixels
_TOWER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.2}


@dataclass(frozen=True)
class RandomVisionModel:
    """A vision-language model of random weights, made in the cache when it is first needed.

    Args:
        architecture: ``llava`` (a CLIP tower), ``llava_lite`` (an EfficientNet-Lite tower), ``llava_next``,
            ``llava_onevision``, ``idefics3``, ``qwen2_5_vl`` or ``qwen3_vl``.
        seed: of the weights.
        width: of the embeddings, a multiple of 32.
        layers: of the language model.
        longest: tokens that it can read.

    Raises:
        ValueError: no such architecture, or a size that no such model has.
    """

    architecture: Architecture = "llava"
    seed: int = 0
    width: int = 64
    layers: int = 2
    longest: int = 4096

    def __post_init__(self) -> None:
        if self.architecture not in get_args(Architecture):
            known = ", ".join(get_args(Architecture))
            raise ValueError(f"architecture is {self.architecture!r}, expected one of {known}")
        require_sizes(self.width, self.layers, self.longest)

    @property
    def name(self) -> str:
        """Its architecture and sizes."""
        return f"random-{self.architecture}-{self.layers}x{self.width}"

    def write(self, folder: Path) -> None:
        """Fill ``folder`` as ``save_pretrained`` does."""
        import torch
        import transformers

        tokenizer = write_tokenizer(folder, _ENGLISH, self.longest)
        qwen = self.architecture.startswith("qwen")
        tokenizer.add_special_tokens({"additional_special_tokens": _QWEN if qwen else _OTHERS})
        if self.architecture not in ("llava", "llava_lite"):
            tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder)
        text = {
            "vocab_size": len(tokenizer), "hidden_size": self.width,
            "intermediate_size": 2 * self.width, "num_hidden_layers": self.layers,
            "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
            "max_position_embeddings": self.longest, "initializer_range": 0.2,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
        }  # fmt: skip
        image = tokenizer.convert_tokens_to_ids(_QWEN[0] if qwen else _OTHERS[0])
        ids = tokenizer.convert_tokens_to_ids
        kind, config, pictures = _PARTS[self.architecture](text, image, ids)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            save_model(getattr(transformers, kind)(config), folder)
        file = folder / "preprocessor_config.json"
        file.write_text(json.dumps(pictures, indent=2), encoding="utf-8")


_OTHERS = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
_QWEN = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
_Made = tuple[str, Any, dict[str, Any]]  # class, configuration, image processor


def _clip() -> Any:
    from transformers import CLIPVisionConfig

    heads: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4}
    return CLIPVisionConfig(image_size=_SIDE, patch_size=_PATCH, **heads, **_TOWER)


def _llava(text: dict[str, Any], image: int, ids: Any) -> _Made:
    from transformers import LlamaConfig, LlavaConfig

    config = LlavaConfig(
        vision_config=_clip(), text_config=LlamaConfig(**text), image_token_index=image,
        image_seq_length=(_SIDE // _PATCH) ** 2, tie_word_embeddings=True,
    )  # fmt: skip
    size = {"height": _SIDE, "width": _SIDE}
    pictures = {"image_processor_type": "LlavaImageProcessor", "size": size, "crop_size": size}
    return "LlavaForConditionalGeneration", config, pictures


def _llava_lite(text: dict[str, Any], image: int, ids: Any) -> _Made:
    from transformers import LlamaConfig, LlavaConfig

    from lightning_modules.llm.efficientnet_lite import EfficientNetLiteConfig

    tower = EfficientNetLiteConfig(
        image_size=_SIDE, grid=2, stem=8, head=32, told=(1,),
        stages=((1, 3, 1, 1, 8), (2, 3, 2, 6, 12), (1, 5, 2, 6, 16)),
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=tower, text_config=LlamaConfig(**text), image_token_index=image,
        image_seq_length=4, vision_feature_layer=-1, vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )  # fmt: skip
    size = {"height": _SIDE, "width": _SIDE}
    pictures = {
        "image_processor_type": "LlavaImageProcessor", "size": size, "do_center_crop": False,
    }  # fmt: skip
    return "LlavaForConditionalGeneration", config, pictures


def _llava_next(text: dict[str, Any], image: int, ids: Any) -> _Made:
    from transformers import LlamaConfig, LlavaNextConfig

    grids = [[_SIDE, 2 * _SIDE], [2 * _SIDE, _SIDE], [2 * _SIDE, 2 * _SIDE]]
    config = LlavaNextConfig(
        vision_config=_clip(), text_config=LlamaConfig(**text), image_token_index=image,
        image_grid_pinpoints=grids, tie_word_embeddings=True,
    )  # fmt: skip
    pictures = {
        "image_processor_type": "LlavaNextImageProcessor", "size": {"shortest_edge": _SIDE},
        "crop_size": {"height": _SIDE, "width": _SIDE}, "image_grid_pinpoints": grids,
    }  # fmt: skip
    return "LlavaNextForConditionalGeneration", config, pictures


def _llava_onevision(text: dict[str, Any], image: int, ids: Any) -> _Made:
    from transformers import LlamaConfig, LlavaOnevisionConfig, SiglipVisionConfig

    heads: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4}
    tower = SiglipVisionConfig(
        image_size=_SIDE, patch_size=_PATCH, vision_use_head=False,
        hidden_size=_TOWER["hidden_size"], intermediate_size=_TOWER["intermediate_size"], **heads,
    )  # fmt: skip
    grids = [[_SIDE * i, _SIDE * j] for i in range(1, 7) for j in range(1, 7)]
    config = LlavaOnevisionConfig(
        vision_config=tower, text_config=LlamaConfig(**text), image_token_index=image,
        image_grid_pinpoints=grids, tie_word_embeddings=True,
    )  # fmt: skip
    pictures = {
        "image_processor_type": "LlavaOnevisionImageProcessor", "image_grid_pinpoints": grids,
        "size": {"height": _SIDE, "width": _SIDE},
    }  # fmt: skip
    return "LlavaOnevisionForConditionalGeneration", config, pictures


def _idefics3(text: dict[str, Any], image: int, ids: Any) -> _Made:
    from transformers import Idefics3Config, LlamaConfig

    tower = {
        "image_size": _SIDE, "patch_size": _PATCH, "num_hidden_layers": 2,
        "num_attention_heads": 4, **_TOWER,
    }  # fmt: skip
    padding: dict[str, Any] = {"pad_token_id": text["pad_token_id"]}
    config = Idefics3Config(
        vision_config=tower, text_config=LlamaConfig(**text), image_token_id=image,
        scale_factor=2, tie_word_embeddings=True, **padding,
    )  # fmt: skip
    pictures = {
        "image_processor_type": "Idefics3ImageProcessor", "size": {"longest_edge": _SIDE},
        "max_image_size": {"longest_edge": _SIDE}, "do_image_splitting": False,
    }  # fmt: skip
    return "Idefics3ForConditionalGeneration", config, pictures


def _qwen(ids: Any) -> dict[str, Any]:
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {name: ids(token) for name, token in zip(names, _QWEN, strict=True)}


def _qwen2_5_vl(text: dict[str, Any], image: int, ids: Any) -> _Made:
    from transformers import Qwen2_5_VLConfig

    tower = {
        "depth": 2, "num_heads": 4, "out_hidden_size": text["hidden_size"], "patch_size": _PATCH,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": _SIDE,
        "fullatt_block_indexes": [1], **_TOWER,
    }  # fmt: skip
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    parts = [half - 2 * (half // 3), half // 3, half // 3]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": parts}
    config = Qwen2_5_VLConfig(
        vision_config=tower, text_config={**text, "rope_parameters": rope}, **_qwen(ids),
        tie_word_embeddings=True,
    )  # fmt: skip
    return "Qwen2_5_VLForConditionalGeneration", config, _qwen_pictures(_PATCH)


def _qwen3_vl(text: dict[str, Any], image: int, ids: Any) -> _Made:
    from transformers import Qwen3VLConfig

    tower = {
        "depth": 3, "num_heads": 4, "out_hidden_size": text["hidden_size"], "patch_size": 16,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 64,
        "deepstack_visual_indexes": [1], **_TOWER,
    }  # fmt: skip
    wide = text["hidden_size"] // text["num_attention_heads"]
    parts = [wide // 2 - 2 * (wide // 6), wide // 6, wide // 6]
    rope = {
        "rope_type": "default", "rope_theta": 1e6, "mrope_section": parts,
        "mrope_interleaved": True,
    }  # fmt: skip
    config = Qwen3VLConfig(
        vision_config=tower, text_config={**text, "head_dim": wide, "rope_parameters": rope},
        **_qwen(ids), tie_word_embeddings=True,
    )  # fmt: skip
    return "Qwen3VLForConditionalGeneration", config, _qwen_pictures(16)


def _qwen_pictures(patch: int) -> dict[str, Any]:
    return {
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": patch, "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": (4 * patch) ** 2, "longest_edge": (8 * patch) ** 2},
    }  # fmt: skip


_PARTS = {
    "llava": _llava, "llava_lite": _llava_lite, "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "idefics3": _idefics3, "qwen2_5_vl": _qwen2_5_vl, "qwen3_vl": _qwen3_vl,
}  # fmt: skip
