"""A language model that is asked whether somebody would like an item, and answers with one margin.

Legend: B rows, L tokens, A answer tokens, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch import Tensor
from torch.nn import functional as F
from torch.optim import AdamW
from torchmetrics import Metric

from datamodules.types import Batch, Collator, Rows
from lightning_modules.base import RankingModule
from lightning_modules.calibration import Calibration
from lightning_modules.id_batches import HistoryCollator
from lightning_modules.llm.adapters import adapter_is_untrained, attach_adapter
from lightning_modules.llm.backbones import (
    load_causal_lm,
    load_tokenizer,
    recompute_activations,
    resolve_dtype,
)
from lightning_modules.llm.export import export_model
from lightning_modules.llm.label_scoring import (
    LabelTokens,
    SharedPrefix,
    label_tokens,
    last_logits,
    margin,
    pad_left,
)
from lightning_modules.llm.precision import QLoRAPrecision, refuse_sharding
from lightning_modules.llm.prompt_tokens import PromptTable
from lightning_modules.llm.specs import AdapterSpec, BackboneSpec
from lightning_modules.schedules import Schedule, learning_rate_share, scheduled

Loss = Literal["margin", "answer", "prompt"]
NO_LOSS = -100
WORTH_SHARING = 8  # tokens that all prompts begin with


@dataclass(frozen=True)
class YesNoCollator:
    """Id batches with the tokens of their prompts.

    In training by ``answer`` or ``prompt`` the right label's tokens stand behind the prompt, and ``answers``
    (B, A) holds what each of the last A positions should say next.
    """

    history: HistoryCollator
    table: PromptTable
    labels: LabelTokens
    loss: Loss | None  # None: evaluation
    pad: int

    def __call__(self, rows: Rows) -> Batch:
        """Rows whose ``target`` is the item asked about."""
        prompts = [ids.tolist() for ids in self.table.of(rows)]
        answers = None
        if self.loss in (None, "margin"):
            tokens, mask = pad_left([ids + list(self.labels.shared) for ids in prompts], self.pad)
        else:
            assert rows.label is not None
            ends = [list(self.labels.full[0 if liked else 1]) for liked in rows.label]
            read = [ids + end[:-1] for ids, end in zip(prompts, ends, strict=True)]
            tokens, mask = pad_left(read, self.pad)
            said = ends
            if self.loss == "prompt":  # every token but the first is foretold, as in TALLRec's code
                said = [ids[1:] + end for ids, end in zip(prompts, ends, strict=True)]
            answers, _ = pad_left(said, NO_LOSS)
        carries = np.ones(len(rows.row)) if rows.filler is None else ~rows.filler
        return replace(
            self.history(rows),
            tokens=tokens,
            token_mask=mask,
            answers=answers,
            weight=torch.from_numpy(carries.astype(np.float64)),
        )


class YesNoModule(RankingModule):
    """Base of the methods that ask a language model for a yes or a no.

    Args:
        llm: the frozen language model.
        adapter: what of it is trained.
        max_length: newest events that a prompt shows.
        loss: ``margin``, the binary cross-entropy of logit(yes) - logit(no); ``answer``, the language model's
            loss on the label's tokens; ``prompt``, on every token of prompt and label (TALLRec's code).
        learning_rate: peak of AdamW.
        weight_decay: decoupled, on the trained matrices.
        betas: of AdamW.
        warmup_steps: steps of linear warm-up.
        schedule: what follows.

    Raises:
        ValueError: an unknown loss.
    """

    labelled = True
    labels: tuple[str, str] = ("Yes.", "No.")

    def __init__(
        self,
        llm: BackboneSpec,
        adapter: AdapterSpec,
        max_length: int = 10,
        loss: Loss = "margin",
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup_steps: int = 20,
        schedule: Schedule = "linear",
    ) -> None:
        super().__init__(max_length)
        if loss not in get_args(Loss):
            raise ValueError(f"loss is {loss!r}, expected one of {', '.join(get_args(Loss))}")
        self.llm, self.adapter, self.loss = llm, adapter, loss
        self.learning_rate, self.weight_decay, self.betas = learning_rate, weight_decay, betas
        self.warmup_steps, self.schedule = warmup_steps, schedule
        self.model: Any = None
        self._weights: Path | None = None
        self._prefix: SharedPrefix | None = None  # while an evaluation or a training step runs
        self._opening: list[int] = []  # what all prompts begin with, where training shares it
        self._checkpointed = False

    # What a method gives --------------------------------------------------------------------------

    @abstractmethod
    def texts(self, rows: Rows, skip: np.ndarray) -> list[str]:
        """Prompts (B,) of rows without their ``skip`` (B,) oldest events, up to where the answer begins."""

    @abstractmethod
    def wording(self) -> str:
        """A digest of what prompts depend on besides rows and tokenizer: it names their tokens on disk."""

    # Tokens ------------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> Any:
        """Of the language model."""
        return load_tokenizer(self.llm)

    @cached_property
    def table(self) -> PromptTable:
        """The tokens of all prompts."""
        limit = self.llm.max_length - self.answer_room()
        data = str(self.trainer.datamodule.prepared.digest)  # type: ignore[attr-defined]
        name = f"{self.wording()} {self.llm.digest()} {data}"
        special = not self.llm.chat_template
        return PromptTable(self.tokenizer, self.texts, limit, name, special)

    @cached_property
    def answer_tokens(self) -> LabelTokens:
        """The two labels behind a prompt of this method."""
        special = not self.llm.chat_template
        return label_tokens(self.tokenizer, self.example_prompt(), self.labels, special)

    def answer_room(self) -> int:
        """Tokens that may stand behind a prompt: those of the longer label."""
        return max(len(full) for full in self.answer_tokens.full)

    @abstractmethod
    def example_prompt(self) -> str:
        """Any prompt as ``texts`` makes them."""

    def row_lengths(self, rows: Rows) -> np.ndarray:
        """(R,) tokens of each prompt; tokenises them all."""
        return self.table.add(rows)

    def collator(self, training: bool) -> Collator:
        """Id batches with tokens."""
        return YesNoCollator(
            HistoryCollator(self.max_length),
            self.table,
            self.answer_tokens,
            self.loss if training else None,
            self.tokenizer.pad_token_id,
        )

    # The model -----------------------------------------------------------------------------------------

    def precision_plugin(self, device: str, strategy: str) -> Precision | None:
        """4-bit where the language model is quantized, else what its dtype asks for."""
        if self.llm.quantization:
            refuse_sharding(strategy)
            return QLoRAPrecision.for_spec(self.llm)
        dtype = resolve_dtype(self.llm, device)
        if dtype == torch.float32:
            return None
        return MixedPrecision("bf16-mixed" if dtype == torch.bfloat16 else "16-mixed", device)

    def configure_model(self) -> None:
        """Load the language model onto this rank's own device and attach the adapter, once."""
        if self.model is not None:
            return
        device = self.trainer.strategy.root_device
        plugin = self.trainer.precision_plugin
        config = None
        if isinstance(plugin, QLoRAPrecision):
            config = plugin.quantization_config(device)
        self._load(device, config, self.trainer.datamodule.seed)  # type: ignore[attr-defined]

    def _load(self, device: torch.device, quantization_config: Any, seed: int) -> None:
        base = load_causal_lm(self.llm, device, quantization_config)
        self.model = attach_adapter(base, self.adapter, seed)
        if self._checkpointed:
            recompute_activations(self.model)
        if self._weights is not None:
            super().load_weights(self._weights)

    def export(self, folder: Path, device: torch.device) -> dict[str, Path]:
        """Write the model with the weights of ``load_weights``, see ``export_model``; needs no trainer."""
        quantized = self.llm.quantization is not None
        plugin = QLoRAPrecision.for_spec(self.llm) if quantized else None
        self._load(device, plugin.quantization_config(device) if plugin else None, seed=0)
        return export_model(self.model, self.tokenizer, self.adapter, folder)

    def checkpoint_activations(self) -> None:
        """Recompute each layer in the backward pass, once the model is loaded."""
        self._checkpointed = True

    def load_weights(self, path: str | Path) -> None:
        """Take a checkpoint's trained weights when the model is there."""
        self._weights = Path(path)
        if self.model is not None:
            super().load_weights(path)

    def margins(self, batch: Batch) -> Tensor:
        """logit(yes) - logit(no) (B,)."""
        return margin(self._last_logits(batch, 1)[:, 0], self.answer_tokens)

    def _last_logits(self, batch: Batch, keep: int) -> Tensor:
        """(B, keep, V)."""
        assert batch.tokens is not None
        assert batch.token_mask is not None
        if self._prefix is not None:
            return self._prefix.last_logits(batch.tokens, batch.token_mask, keep)
        return last_logits(self.model, batch.tokens, batch.token_mask, keep)

    # Training ------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """The chosen loss summed over rows, over the rows of the whole global batch."""
        assert batch.normaliser is not None
        assert batch.weight is not None  # 0 at rows that only keep ranks in step
        # The loss on the prompt needs what each position of its beginning says next.
        if self._opening and self.loss != "prompt":
            self._prefix = SharedPrefix(self.model, self._opening)
        try:
            each = self._row_losses(batch)
        finally:
            self._prefix = None
        loss: Tensor = (each * batch.weight).sum() / batch.normaliser
        self.log_train_loss(loss)
        return loss

    def _row_losses(self, batch: Batch) -> Tensor:
        """(B,); of ``answer`` and ``prompt`` the mean over a row's tokens."""
        assert batch.label is not None
        if self.loss == "margin":
            return F.binary_cross_entropy_with_logits(
                self.margins(batch), batch.label.float(), reduction="none"
            )
        assert batch.answers is not None
        logits = self._last_logits(batch, batch.answers.shape[1])
        each = F.cross_entropy(
            logits.transpose(1, 2), batch.answers, reduction="none", ignore_index=NO_LOSS
        )  # (B, A)
        return each.sum(1) / (batch.answers != NO_LOSS).sum(1)

    def configure_optimizers(self) -> Any:
        """AdamW on what is trained, with the schedule by step."""
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = AdamW(
            trained, lr=self.learning_rate, betas=self.betas, weight_decay=self.weight_decay
        )
        steps = int(self.trainer.estimated_stepping_batches)
        share = partial(
            learning_rate_share, steps=steps, rise=self.warmup_steps, schedule=self.schedule
        )
        return scheduled(optimizer, share)

    def on_train_start(self) -> None:
        """Find what all prompts begin with; recomputed activations cannot be shared."""
        self._opening = [] if self._checkpointed else self._shared_opening()

    def on_train_end(self) -> None:
        """Sound the alarm when a fit has trained nothing.

        Raises:
            ValueError: the adapter is as it was made.
        """
        # Vectors before the text have no start that tells whether they were trained.
        told = self.adapter.method not in ("none", "full") and not self.adapter.adds_tokens
        if told and adapter_is_untrained(self.model):
            raise ValueError(
                f"the {self.adapter.method} adapter has not moved in {self.trainer.global_step} steps: its "
                "scores are those of the language model alone; look at the learning rate and the loss"
            )

    # Evaluation ----------------------------------------------------------------------------------------

    def _reset(self, split: str) -> None:
        """Fresh sums, and what all prompts begin with is read."""
        super()._reset(split)
        if shared := self._shared_opening():
            with self.trainer.precision_plugin.forward_context():
                self._prefix = SharedPrefix(self.model, shared)

    def _shared_opening(self) -> list[int]:
        """Tokens that all prompts known so far begin with, if sharing them is possible and worth it."""
        shared = [] if self.adapter.adds_tokens else self.table.common_prefix()
        # Layers that see a window keep no more of their past.
        window = getattr(self.model.config.get_text_config(), "sliding_window", None)
        shared = shared[: window - 1] if window else shared
        return shared if len(shared) >= WORTH_SHARING else []

    def _log(self, split: str) -> dict[str, Tensor]:
        """Log, and forget the prefix: the weights will move."""
        self._prefix = None
        return super()._log(split)

    def label_metric(self) -> Metric | None:
        """Margins are log-odds: as probabilities they can be right or wrong."""
        return Calibration()

    def encode(self, batch: Batch) -> Tensor:
        """The margins (B,): a prompt names its item, so that nothing is left to score."""
        return self.margins(batch)

    def score(self, state: Tensor, items: Tensor) -> Tensor:
        """(B, 1), of the item that the prompt asks about."""
        if items.shape != (len(state), 1):
            raise ValueError(
                f"{type(self).__name__} scores the item that a prompt asks about, got {tuple(items.shape)}: "
                "give data.examples a recipe"
            )
        return state[:, None]
