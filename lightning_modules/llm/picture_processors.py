"""What a picture becomes in each architecture: pixels, and the tokens that stand for it in a text.

transformers' own processors of some architectures insist on one for videos, which needs torchvision; what
they know of pictures does not, and is used here without the rest.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from lightning_modules.errors import ModelError

_KINDS = {
    "llava": "LlavaProcessor",
    "llava_next": "LlavaNextProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
    "idefics3": "Idefics3Processor",
    "smolvlm": "SmolVLMProcessor",
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
}


class PictureProcessor:
    """One picture at a time, for a model of any of the known architectures.

    Args:
        config: the model's.
        image_processor: from ``backbones.load_image_processor``.
        tokenizer: tells how the model's special tokens are written.

    Raises:
        ModelError: an architecture that is not known here.
    """

    def __init__(self, config: Any, image_processor: Any, tokenizer: Any) -> None:
        if config.model_type not in _KINDS:
            raise ModelError(
                f"{config.model_type} models are not known to read pictures here: take one of "
                f"{', '.join(_KINDS)}"
            )
        self.config, self.image_processor = config, image_processor
        self.image = _written(tokenizer, config.image_token_id)
        self._theirs = _without_videos(config, image_processor, self.image)
        self.before = self.behind = ""  # what surrounds a picture's tokens in the model's training
        if config.model_type.startswith("qwen"):
            self.before = _written(tokenizer, config.vision_start_token_id)
            self.behind = _written(tokenizer, config.vision_end_token_id)

    def pixels(self, picture: Any) -> tuple[dict[str, Any], str]:
        """What the model reads of a PIL image, one line of each tensor a tile, and its tokens' text."""
        options = {"return_row_col_info": True} if self._splits else {}
        made = self.image_processor(images=[picture.convert("RGB")], return_tensors="pt", **options)
        text = self._theirs.replace_image_token(made, 0)
        tensors = {n: t for n, t in made.items() if n not in ("rows", "cols", "batch_num_images")}
        if self.config.model_type in ("llava_next", "llava_onevision", "idefics3", "smolvlm"):
            for name in ("pixel_values", "pixel_attention_mask"):
                if name in tensors:  # (1, tiles, ...): the first picture's
                    tensors[name] = tensors[name][0]
        if self._splits:  # these count tiles as pictures of a row; (tiles, 1, ...) is as many rows
            for name in ("pixel_values", "pixel_attention_mask"):
                if name in tensors:
                    tensors[name] = tensors[name][:, None]
        return tensors, self.before + text + self.behind

    @property
    def _splits(self) -> bool:
        return self.config.model_type in ("idefics3", "smolvlm")


def _written(tokenizer: Any, token: int) -> str:
    text: str = tokenizer.convert_ids_to_tokens(token)
    return text


def _without_videos(config: Any, image_processor: Any, image: str) -> Any:
    """The architecture's own processor as far as pictures go, with what its constructor would have set."""
    kind = _KINDS[config.model_type]
    module = f"transformers.models.{config.model_type}.processing_{config.model_type}"
    made: Any = object.__new__(getattr(import_module(module), kind))
    vision = config.vision_config
    side, patch = getattr(vision, "image_size", 0), getattr(vision, "patch_size", 1)
    settings = {
        "image_processor": image_processor,
        "image_token": image,
        "patch_size": patch,
        "vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", None),
        # CLIP's towers have a class token before the patches.
        "num_additional_image_tokens": int(vision.model_type == "clip_vision_model"),
        "num_image_tokens": (side // patch) ** 2,
        "vision_aspect_ratio": getattr(config, "vision_aspect_ratio", None),
        "image_seq_len": (side // patch) ** 2 // getattr(config, "scale_factor", 1) ** 2,
        "fake_image_token": "<fake_token_around_image>",
        "global_image_tag": "<global-img>",
        "global_image_token": "<global-img>",
    }
    for name, value in settings.items():
        setattr(made, name, value)
    return made
