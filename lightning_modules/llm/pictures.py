"""Pictures in prompts: where they stand, how many tokens they are, and what a model reads of them.

A prompt is a text in which ``PICTURE`` stands for each picture. ``PictureReader`` puts the model's own image
tokens in its place, so that lengths are known before anything is batched, and makes inputs of rows.

Legend: B rows, L tokens, V vocabulary, N pictures of all rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_modules.errors import ModelError
from lightning_modules.llm.backbones import load_image_processor, load_tokenizer
from lightning_modules.llm.label_scoring import last_columns, pad_left
from lightning_modules.llm.layouts import lay_out
from lightning_modules.llm.picture_processors import PictureProcessor
from lightning_modules.llm.specs import VisionSpec

if TYPE_CHECKING:
    from PIL.Image import Image

# Stands in a prompt's text for a picture; ``wording.as_data`` takes it out of texts of others.
PICTURE = "\ue0f0"

Size = tuple[int, int]  # width and height in pixels, as PIL's ``Image.size``
Row = tuple[Sequence[int], Sequence["Image"]]  # token ids, and the pictures that they show in order


class PictureReader:
    """The one place that knows a model's image sizes, image tokens and inputs.

    Args:
        spec: of the vision-language model; only its tokenizer and its settings are loaded.
        tokenizer: its tokenizer, where that is loaded already.

    Raises:
        DataSourceError: the model's files cannot be had.
        ModelError: ``spec`` describes no vision-language model, or one of an architecture that is not known.
    """

    def __init__(self, spec: VisionSpec, tokenizer: Any = None) -> None:
        if not isinstance(spec, VisionSpec):
            raise ModelError(
                f"{type(spec).__name__} reads no pictures: take llm=smolvision, or any other VisionSpec"
            )
        self.spec = spec
        self.tokenizer = tokenizer if tokenizer is not None else load_tokenizer(spec)
        self._texts: dict[Size, str] = {}

    @cached_property
    def processor(self) -> PictureProcessor:
        """Of the model's architecture."""
        config, image_processor = load_image_processor(self.spec)
        return PictureProcessor(config, image_processor, self.tokenizer)

    # Texts and tokens ----------------------------------------------------------------------------------

    def lay_out(self, instruction: str, input_text: str = "") -> str:
        """A prompt up to where the answer begins, in the model's chat template or Alpaca's; marks stay."""
        return lay_out(self.tokenizer, self.spec.chat_template, instruction, input_text)

    def expand(self, text: str, sizes: Sequence[Size]) -> str:
        """The text with image tokens in place of its marks, for pictures of these sizes, in order.

        Raises:
            ModelError: there are more or fewer pictures than marks.
        """
        parts = text.split(PICTURE)
        if len(parts) - 1 != len(sizes):
            raise ModelError(
                f"the prompt shows {len(parts) - 1} pictures, but {len(sizes)} were given: one PICTURE each"
            )
        marks = [self._mark(size) for size in sizes]
        return parts[0] + "".join(m + p for m, p in zip(marks, parts[1:], strict=True))

    def tokens(self, text: str, sizes: Sequence[Size] = ()) -> list[int]:
        """Token ids of a laid out text with marks."""
        special = not self.spec.chat_template
        expanded = self.expand(text, sizes)
        ids: list[int] = self.tokenizer(expanded, add_special_tokens=special)["input_ids"]
        return ids

    def lengths(self, texts: Sequence[str], sizes: Sequence[Sequence[Size]]) -> list[int]:
        """Tokens of each text (B,), those of its pictures included."""
        pairs = zip(texts, sizes, strict=True)
        return [len(self.tokens(text, shown)) for text, shown in pairs]

    def one_token_each(self, ids: Sequence[int], sizes: Sequence[Size]) -> list[int]:
        """Token ids of ``tokens`` with one image token in place of all that a picture is.

        Raises:
            ModelError: the ids do not show pictures of these sizes, in this order.
        """
        shown, found, at = list(ids), list[int](), 0
        processor = self.processor
        one = self._ids(processor.before + processor.image + processor.behind)
        for size in sizes:
            mark = self._ids(self._mark(size))
            starts = range(at, len(shown) - len(mark) + 1)
            start = next((i for i in starts if shown[i : i + len(mark)] == mark), None)
            if start is None:
                raise ModelError(
                    f"a picture of {size[0]} x {size[1]} pixels is not in its prompt as its tokens: the "
                    "tokenizer joins them with the words beside them, so take another llm"
                )
            found += [*shown[at:start], *one]
            at = start + len(mark)
        return found + shown[at:]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _mark(self, size: Size) -> str:
        """What stands for a picture of a size: nothing else of it counts."""
        if size not in self._texts:
            from PIL import Image

            self._texts[size] = self.processor.pixels(Image.new("RGB", size))[1]
        return self._texts[size]

    # Inputs --------------------------------------------------------------------------------------------

    def pictures(self, pictures: Sequence[Image]) -> dict[str, Tensor]:
        """What a model reads of pictures (N,), in the order of their tokens; nothing where there are none.

        ``pixel_values``, and what the architecture wants besides (``image_sizes``, ``image_grid_thw``, ...).
        A picture that is there several times is prepared once.
        """
        made = {id(picture): picture for picture in pictures}
        ready = {key: self.processor.pixels(picture)[0] for key, picture in made.items()}
        each = [ready[id(picture)] for picture in pictures]
        return {name: torch.cat([one[name] for one in each]) for name in each[0]} if each else {}

    def inputs(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """What a model reads of rows (B,), padded on the left; rows may be without pictures.

        ``input_ids`` and ``attention_mask`` (B, L), ``pictures``, and for some the kinds of the tokens.
        """
        tokens, mask = pad_left([ids for ids, _ in rows], self.tokenizer.pad_token_id)
        shown = [picture for _, pictures in rows for picture in pictures]
        found = {"input_ids": tokens, "attention_mask": mask, **self.pictures(shown)}
        if "image_grid_thw" in found:
            found["mm_token_type_ids"] = (tokens == self.processor.config.image_token_id).int()
        return found


def beside(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of ``PictureReader.inputs`` is neither token ids nor mask: what ``generate`` takes as pictures."""
    return {n: t for n, t in inputs.items() if n not in ("input_ids", "attention_mask")}


def positions_of(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """(B, L) places counted from each row's first token, or (3, B, L) where pictures have three dimensions.

    Args:
        model: of transformers, with or without an adapter.
        inputs: from ``PictureReader.inputs``.
    """
    mask = inputs["attention_mask"]
    if "image_grid_thw" in inputs:
        owner = next(part for part in model.modules() if hasattr(part, "get_rope_index"))
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        places: Tensor = owner.get_rope_index(**{name: inputs[name] for name in names})[0]
        return places
    return (mask.cumsum(-1) - 1).clamp(min=0)


def read_last_logits(model: Any, inputs: Mapping[str, Tensor], keep: int = 1) -> Tensor:
    """Logits (B, keep, V) float32 at the last ``keep`` positions; the head runs on no other.

    Args:
        model: a vision-language model of transformers, with or without an adapter of its weights.
        inputs: from ``PictureReader.inputs``, on any device.
        keep: positions from the end.

    Raises:
        ModelError: the adapter puts vectors before the text, where pictures would be miscounted.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ModelError(
            "adapters prompt and prefix put vectors before the text, which no rows with pictures know of: "
            "take lora"
        )
    given = on_device(inputs, model.device)
    out = model(
        **given,
        position_ids=positions_of(model, given),
        logits_to_keep=last_columns(given["input_ids"], keep),
        use_cache=False,
    )
    logits: Tensor = out.logits.float()
    return logits


def on_device(inputs: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """The same on another device."""
    return {name: tensor.to(device) for name, tensor in inputs.items()}
