"""Pictures of items beside a model's tokens, as a frozen tower sees them: each is looked at once.

Legend: B rows, L tokens, V vocabulary, K image tokens of a picture, d width of the language model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_modules.llm.kept_states import MOST_BYTES, KeptStates
from lightning_modules.llm.label_scoring import last_columns
from lightning_modules.llm.pictures import PictureReader, on_device, positions_of

if TYPE_CHECKING:
    from PIL.Image import Image

_LISTED = ("llava", "llava_next", "llava_onevision")  # take one tensor (K, d) a picture
_STACKED = ("idefics3", "smolvlm")  # take all tiles in one tensor


class SeenPictures:
    """What a model is given of pictures besides their tokens.

    The tower and what projects its states are frozen: what they make of a picture is kept, and is made as in
    evaluation, whatever is trained behind it. Qwen's models see pictures anew in each pass.

    Args:
        model: a vision-language model of transformers, with or without an adapter of its language model.
        reader: of the same model.
        picture: the picture of an item.
        most_bytes: of features that are kept, at most.
    """

    def __init__(
        self,
        model: Any,
        reader: PictureReader,
        picture: Callable[[int], Image],
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self.model, self.reader, self.picture = model, reader, picture
        self.kind = str(model.config.model_type)
        self._kept = KeptStates(most_bytes)  # by item

    @property
    def in_line(self) -> bool:
        """Whether image tokens are counted like others; in Qwen's models they have three places."""
        return self.kind in (*_LISTED, *_STACKED)

    def beside(self, items: Sequence[int]) -> dict[str, Any]:
        """Arguments of a pass whose tokens show the pictures of these items, row after row, in order."""
        if not items:
            return {}
        if not self.in_line:
            made = self.reader.pictures([self.picture(item) for item in items])
            return on_device(made, self.model.device)
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        seen = [self._features(item).to(self.model.device) for item in items]
        given: Any = seen if self.kind in _LISTED else torch.cat(seen)
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=given)}}

    def last_logits(
        self, tokens: Tensor, mask: Tensor, items: Sequence[int], keep: int = 1
    ) -> Tensor:
        """Logits (B, keep, V) float32 at the last positions of rows (B, L), padded on the left."""
        beside = self.beside(items)
        if "image_grid_thw" in beside:
            image = self.reader.processor.config.image_token_id
            beside["mm_token_type_ids"] = (tokens == image).int()
        inputs = {"input_ids": tokens, "attention_mask": mask, **beside}
        logits: Tensor = self.model(
            **inputs,
            position_ids=positions_of(self.model, inputs),
            logits_to_keep=last_columns(tokens, keep),
            use_cache=False,
        ).logits
        return logits.float()

    @torch.inference_mode(False)  # made in a validation, they may still be trained with
    @torch.no_grad()
    def _features(self, item: int) -> Tensor:
        """(K, d), or of all tiles (tiles, K, d)."""
        if item not in self._kept:
            pixels = on_device(self.reader.pictures([self.picture(item)]), self.model.device)
            training = self.model.training
            self.model.eval()  # a tower's batch norms would learn from what they see
            found = self.model.get_image_features(**pixels).pooler_output
            self.model.train(training)
            seen = found if isinstance(found, Tensor) else torch.cat(tuple(found))
            self._kept.update({item: seen})
        return self._kept[item]
