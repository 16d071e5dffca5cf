"""``AlignVisionModule``: a projector learns to tell a frozen language model what a frozen tower sees.

Legend: B rows, L tokens, A positions that are read, S attributes, W values of an attribute, V vocabulary,
K image tokens of a picture, d width of the tower's states.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.align_vision.collate import (
    NOWHERE,
    CaptionBatch,
    CaptionCollator,
    CaptionTokens,
)
from lightning_modules.align_vision.prompts import ASKED
from lightning_modules.errors import ModelError
from lightning_modules.llm.kept_states import KeptStates
from lightning_modules.llm.label_scoring import (
    NO_LOSS,
    SharedPrefix,
    last_columns,
)
from lightning_modules.llm.masks import layer_windows
from lightning_modules.llm.pictures import PictureReader
from lightning_modules.llm.sharding import ShardedStrategy
from lightning_modules.llm.specs import AdapterSpec, VisionSpec
from lightning_modules.llm.tuning import LanguageModelModule
from lightning_modules.llm.vision_parts import projector_of
from lightning_modules.llm.yes_no import WORTH_SHARING
from lightning_modules.schedules import Schedule


class AlignVisionModule(LanguageModelModule):
    """LLaVA's first stage (Liu et al., NeurIPS 2023, arXiv 2304.08485): the projector alone learns captions.

    ``max_W sum_t log P(y_t | x, W v, y_<t)`` of captions y behind prompts x with a picture's states v; summed
    over the tokens of the whole global batch, over their number. The tower's states of a picture are computed
    once and kept by the picture's content, as many as fit into ``KeptStates``. Checkpoints hold the
    projector; a later stage takes it as the input ``llm.projector``.

    A validation tells how often the likeliest of an attribute's values, at its place in the caption and
    behind what is true before it, is right (``val/NAME/accuracy``, and over all attributes
    ``val/all/accuracy``); values with the same first token tie, and share the credit.

    Args:
        llm: a vision-language model of LLaVA's kind, with any projector.
        learning_rate, weight_decay, warmup_steps, schedule: of the training, see ``LanguageModelModule``.

    Raises:
        ValueError: ``llm`` describes no vision-language model.
    """

    validated = ("val/loss", "val/all/accuracy")

    def __init__(
        self,
        llm: VisionSpec,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.0,
        warmup_steps: int = 20,
        schedule: Schedule = "cosine",
    ) -> None:
        if not isinstance(llm, VisionSpec):
            raise ValueError(
                f"llm is a {type(llm).__name__}, which reads no pictures: take llm=smolvision, or any other "
                "VisionSpec"
            )
        super().__init__(
            llm, AdapterSpec(method="none"), learning_rate=learning_rate,
            weight_decay=weight_decay, warmup_steps=warmup_steps, schedule=schedule,
        )  # fmt: skip
        self._seen_states = KeptStates()  # (K, d) of pictures, by digest
        # What all prompts begin with; its weights are frozen.
        self._prefix: SharedPrefix | None = None
        self._sums = torch.zeros(0)

    def sharded_strategy(self, devices: int) -> ShardedStrategy:
        """None: the projector is small, and fits on every device.

        Raises:
            ValueError: always.
        """
        raise ValueError("align_vision trains a small projector: take launch.strategy=ddp")

    # What is trained -----------------------------------------------------------------------------------

    def add_parts(self, device: torch.device, seed: int) -> None:
        """The projector, trained in float32.

        Raises:
            ModelError: the model has none, or its pictures become tokens in a way that is not known here.
        """
        self.projector.float().requires_grad_(True)
        if self.model.config.model_type != "llava":
            raise ModelError(
                f"{self.model.config.model_type} models lay pictures out in tiles, and come with a trained "
                "projector: leave the stage out, or take llm=smolvision"
            )

    @property
    def projector(self) -> Any:
        """From (.., d) to (.., the language model's width)."""
        return projector_of(self.model)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the projector alone; the tower's buffers are rebuilt with it."""
        super().on_save_checkpoint(checkpoint)
        trained = {n for n, p in self.named_parameters() if p.requires_grad}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: state[name] for name in sorted(trained)}

    # Rows ----------------------------------------------------------------------------------------------

    @cached_property
    def caption_tokens(self) -> CaptionTokens:
        """Of the trainer's data, which says what each attribute may be."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        spec: Any = self.llm
        reader = PictureReader(spec, self.tokenizer)
        return CaptionTokens(reader, dict(data.attribute_values), spec.max_length)

    def row_lengths(self, rows: Any) -> np.ndarray:
        """(R,) tokens of prompt, picture and caption."""
        return np.array([len(ids) for ids, _ in self._tokenised(rows)])

    def target_counts(self, rows: Any) -> np.ndarray:
        """(R,) tokens of each caption, the one that ends it included."""
        return np.array([len(ids) - prompt for ids, prompt in self._tokenised(rows)])

    def _tokenised(self, rows: Any) -> list[tuple[list[int], int]]:
        return [self.caption_tokens.of(row.caption) for row in rows.rows]

    def collator(self, training: bool) -> CaptionCollator:
        """Validation asks for attributes, too."""
        return CaptionCollator(self.caption_tokens, slots=not training)

    # What is computed ----------------------------------------------------------------------------------

    def states(self, batch: CaptionBatch) -> Tensor:
        """(B, K, d) of the tower; each picture's are computed once, as long as there is room for them."""
        found = {key: self._seen_states[key] for key in batch.keys if key in self._seen_states}
        new = {key: row for row, key in enumerate(batch.keys) if key not in found}
        if new:
            rows = torch.tensor(list(new.values()), device=self.device)
            with torch.no_grad():
                seen = self._seen({name: t[rows] for name, t in batch.pixels.items()})
            made = dict(zip(new, seen.cpu(), strict=True))
            self._seen_states.update(made)
            found |= made
        return torch.stack([found[key] for key in batch.keys]).to(self.device)

    def _seen(self, pixels: dict[str, Tensor]) -> Tensor:
        """(B, K, d) as LLaVA's projector is given them."""
        given: list[Tensor] = []
        hook = self.projector.register_forward_pre_hook(lambda _, read: given.append(read[0]))
        try:
            self.model.get_image_features(**pixels)
        finally:
            hook.remove()
        return given[0]

    def last_logits(self, batch: CaptionBatch) -> Tensor:
        """(B, A, V) float32."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        projected = self.projector(self.states(batch))  # (B, K, the language model's width)
        pictures: Any = list(projected)  # one each, as the model makes them itself
        seen = {"image": BaseModelOutputWithPooling(pooler_output=pictures)}
        keep = batch.answers.shape[1]
        if self._prefix is not None:
            return self._prefix.last_logits(
                batch.tokens, batch.token_mask, keep, mm_encoder_outputs=seen
            )
        logits: Tensor = self.model(
            input_ids=batch.tokens,
            attention_mask=batch.token_mask,
            position_ids=(batch.token_mask.cumsum(-1) - 1).clamp(min=0),
            logits_to_keep=last_columns(batch.tokens, keep),
            mm_encoder_outputs=seen,
            use_cache=False,
        ).logits
        return logits.float()

    def summed_loss(self, logits: Tensor, batch: CaptionBatch) -> Tensor:
        """() cross-entropy summed over all tokens of captions."""
        return F.cross_entropy(
            logits.flatten(0, 1), batch.answers.flatten(), reduction="sum", ignore_index=NO_LOSS
        )

    def on_train_start(self) -> None:
        """Read what all prompts begin with, once: neither it nor what it depends on is trained."""
        if self.recomputes or layer_windows(self.model) is None:
            return
        shared = self._opening()
        if len(shared) >= WORTH_SHARING:
            with torch.no_grad(), self.trainer.precision_plugin.forward_context():
                self._prefix = SharedPrefix(self.model, shared)

    def _opening(self) -> list[int]:
        """Tokens that every prompt begins with, up to the first image token."""
        made = self.caption_tokens
        starts = [made.prompt_tokens(asked) for asked in ASKED]
        image = self.model.config.image_token_id
        same = 0
        while all(ids[same] == starts[0][same] != image for ids in starts):
            same += 1
        return starts[0][:same]

    # Training and validation ---------------------------------------------------------------------------

    def training_step(self, batch: CaptionBatch, batch_index: int) -> Tensor:
        """Summed over the captions' tokens, over those of the whole global batch."""
        loss = self.summed_loss(self.last_logits(batch), batch) / batch.normaliser
        self.log_train_loss(loss)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Fresh sums: of losses, of tokens, and of each attribute's credit and rows."""
        count = len(self.caption_tokens.values)
        self._sums = torch.zeros(2 + 2 * count, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: CaptionBatch, batch_index: int) -> None:
        """Add up."""
        logits = self.last_logits(batch)
        credit = slot_credit(logits, batch)  # (B, S)
        counted = (batch.column != NOWHERE).double().sum(0)  # (S,)
        told = (batch.answers != NO_LOSS).sum().double()
        ends = torch.stack([self.summed_loss(logits, batch).double(), told])
        self._sums += torch.cat([ends, credit.double().sum(0), counted])

    def on_validation_epoch_end(self) -> None:
        """Log ``val/loss``, the mean over all held-out tokens, and accuracies, over all ranks."""
        sums = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
        names = list(self.caption_tokens.values)
        right, counted = sums[2:].view(2, len(names))
        found = {"val/loss": sums[0] / sums[1]}
        for name, credit, rows in zip(names, right, counted, strict=True):
            found[f"val/{name}/accuracy"] = credit / rows
        found["val/all/accuracy"] = right.sum() / counted.sum()
        for name, value in found.items():
            self.log(name, value.float(), rank_zero_only=False, sync_dist=False)

    def remarks(self) -> list[str]:
        """What guessing would reach."""
        values: dict[str, Sequence[str]] = dict(self.caption_tokens.values)
        chance = ", ".join(f"{name} {1 / len(v):.3f}" for name, v in values.items() if v)
        return [*super().remarks(), f"attribute accuracy by chance: {chance}"]


def slot_credit(logits: Tensor, batch: CaptionBatch) -> Tensor:
    """(B, S) share of the likeliest values of an attribute that is right: 1 or 0, or less than 1 in a tie.

    Args:
        logits: (B, A, V) at the last A positions.
        batch: its ``column``, ``choices`` and ``truth``; 0 where the caption does not name the attribute.
    """
    if not batch.choices.shape[-1]:  # no caption names any value
        return torch.zeros_like(batch.column, dtype=logits.dtype)
    column = batch.column.clamp(min=0)  # (B, S)
    there = logits.gather(1, column[..., None].expand(-1, -1, logits.shape[-1]))  # (B, S, V)
    scores = there.gather(2, batch.choices.clamp(min=0))  # (B, S, W)
    scores = scores.masked_fill(batch.choices == NOWHERE, -torch.inf)
    best = scores == scores.amax(-1, keepdim=True)
    right = best.gather(-1, batch.truth[..., None])[..., 0]
    return torch.where(batch.column != NOWHERE, right / best.sum(-1), 0.0)
