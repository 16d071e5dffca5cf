"""A-LLMRec's first stage: a frozen collaborative model and a sentence encoder meet in one latent space.

Legend: B rows, T history length, N pairs with a loss, I items; widths: d of collaborative vectors, t of
texts, l of what they share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import polars
import torch
from torch import Tensor
from torch.optim import AdamW

from datamodules.types import Batch, Collator, Histories, Rows
from lightning_modules.a_llmrec.model import AutoEncoder, Scores, alignment_losses
from lightning_modules.base import RankingModule
from lightning_modules.item_texts import Field, item_texts
from lightning_modules.llm.specs import SentenceEncoderSpec
from lightning_modules.llm.text_encoder import ItemTextEncoder, Trained
from lightning_modules.next_item import NextItemModule, dot_products
from lightning_modules.stage_module import mix_seeds

Where = Literal["last", "all"]
Joint = Literal["item", "text"]
_CODERS = 401  # stream of random numbers


@dataclass(frozen=True)
class NewestCollator:
    """What stands before a user's newest training event, which alone is learned from.

    The backbone's own evaluation batches are asked for that history: any kind of backbone can be used.
    """

    history: Collator

    def __call__(self, rows: Rows) -> Batch:
        """Rows whose ``stop`` is one past their newest training event."""
        newest = rows.stop - 1
        batch = self.history(replace(rows, stop=newest))
        item = torch.from_numpy(rows.histories.items[newest].astype("int64"))  # (B,)
        if rows.filler is not None:
            item = item.masked_fill(torch.from_numpy(rows.filler), 0)
        targets = torch.zeros_like(batch.history)  # (B, T)
        targets[torch.arange(len(item)), (batch.length - 1).clamp(min=0)] = item
        normaliser = torch.tensor(rows.normaliser, dtype=torch.float32)
        return replace(batch, targets=targets, normaliser=normaliser)


class Stage1Module(RankingModule):
    """Alignment of collaborative and textual knowledge (Kim et al., KDD 2024, arXiv 2404.11343, section 4.1).

    Tested by itself it ranks by the product of a user's state with the reconstruction of an item, from its
    collaborative vector or from its text: the latter can rank items that nobody has met.

    Args:
        catalog: the items' texts, given by the runner from the data.
        backbone: a collaborative model whose scores come from user and item vectors; frozen.
        backbone_weights: its checkpoint.
        encoder: of the items' texts.
        fields: what is read of an item.
        latent_size: l.
        encoder_trained: of the sentence encoder, ``all`` (the paper), the ``last_layer``, or ``none``, whose
            vectors are computed once and kept.
        positions: learn from each user's ``last`` training event (the paper) or from ``all`` (its table 10).
        matching, item_reconstruction, text_reconstruction, recommendation: weights of the loss's parts; the
            paper calls the second alpha and the third beta. 0 leaves one out.
        scores: of the recommendation loss, see ``alignment_losses``.
        joint: what an item's vector is made of in evaluation, its collaborative vector or its text.
        learning_rate, betas, weight_decay: of AdamW.
        chunk_size: texts encoded at a time.
        block_size: items scored at a time when the whole catalogue is ranked.

    Raises:
        ValueError: an unknown choice, a negative weight, weights that are all 0, or a backbone that cannot be
            used.
    """

    def __init__(
        self,
        catalog: polars.DataFrame,
        backbone: NextItemModule,
        backbone_weights: str,
        encoder: SentenceEncoderSpec | None = None,
        fields: Sequence[Field] = ("title", "description"),
        latent_size: int = 128,
        encoder_trained: Trained = "all",
        positions: Where = "last",
        matching: float = 1.0,
        item_reconstruction: float = 0.5,
        text_reconstruction: float = 0.5,
        recommendation: float = 1.0,
        scores: Scores = "dot",
        joint: Joint = "item",
        learning_rate: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.0,
        chunk_size: int = 64,
        block_size: int = 16_384,
    ) -> None:
        _require_backbone(backbone, positions)
        super().__init__(backbone.max_length, block_size)
        for name, value, known in (
            ("positions", positions, get_args(Where)),
            ("scores", scores, get_args(Scores)),
            ("joint", joint, get_args(Joint)),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
        self.weights = {
            "matching": matching, "item": item_reconstruction, "text": text_reconstruction,
            "recommendation": recommendation,
        }  # fmt: skip
        if min(self.weights.values()) < 0 or not any(self.weights.values()):
            raise ValueError(
                f"weights of losses are 0 or more, and not all of them 0: {self.weights}"
            )
        self.backbone = backbone
        backbone.load_weights(backbone_weights)
        backbone.requires_grad_(False).eval()
        texts = item_texts(catalog, fields)  # (I,)
        self.encoder = ItemTextEncoder(
            encoder or SentenceEncoderSpec(), texts, encoder_trained, chunk_size
        )
        self.latent_size, self.positions, self.scores = latent_size, positions, scores
        self.joint = joint
        self.learning_rate, self.betas, self.weight_decay = learning_rate, betas, weight_decay
        self.newest_target = positions == "last"
        self.all_windows = positions == "all"
        self.num_negatives = 1
        # As wide as the backbone and the encoder turn out to be when they have met the data.
        self.item_coder: AutoEncoder | None = None
        self.text_coder: AutoEncoder | None = None
        self._items: Tensor | None = None  # (I + 1, d) of the frozen backbone
        self._rebuilt: Tensor | None = None  # (I + 1, d) while an evaluation runs

    # Life ----------------------------------------------------------------------------------------------

    def impossible(self, histories: Histories) -> str | None:
        """What the backbone cannot read, and texts that are missing everywhere."""
        if not bool(self.encoder.told.any()):
            return "no item has any of the texts that the first stage aligns with"
        return self.backbone.impossible(histories)

    def setup(self, stage: str) -> None:
        """The backbone learns what it needs of the data."""
        self.backbone.setup(stage)

    def configure_model(self) -> None:
        """Load the sentence encoder, or the vectors that it has made, onto this rank's own device."""
        if self.text_coder is not None:
            return
        strategy: Any = self.trainer.strategy
        seed: int = self.trainer.datamodule.seed  # type: ignore[attr-defined]
        device = strategy.root_device
        width = self.encoder.load(device)
        # Whether vectors were kept must not change what is drawn.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix_seeds(seed, _CODERS))
            self.item_coder = AutoEncoder(self.frozen_items().shape[1], self.latent_size).to(device)
            self.text_coder = AutoEncoder(width, self.latent_size).to(device)
        self.take_weights()

    @property
    def has_parts(self) -> bool:
        """The sentence encoder, and the autoencoders that are as wide."""
        return self.text_coder is not None

    @property
    def has_weights(self) -> bool:
        """Whether a checkpoint was given: what is not trained aligns nothing."""
        return self._weights is not None

    def train(self, mode: bool = True) -> Stage1Module:
        """The backbone stays as it is in evaluation: it is frozen, and its dropout is not wanted."""
        super().train(mode)
        self.backbone.eval()
        return self

    # Training ------------------------------------------------------------------------------------------

    def collator(self, training: bool) -> Collator:
        """Histories as the backbone reads them."""
        if not training:
            return self.backbone.collator(training=False)
        if self.positions == "all":
            return self.backbone.collator(training=True)
        return NewestCollator(self.backbone.collator(training=False))

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """The weighted losses of targets and their negatives, over the targets of the whole global batch."""
        assert batch.targets is not None
        assert batch.negatives is not None
        assert batch.normaliser is not None
        assert self.item_coder is not None
        assert self.text_coder is not None
        where = batch.targets > 0  # (B, T)
        with torch.no_grad():
            if self.positions == "last":
                user = self.backbone.user_vectors(batch)[where.any(1)]  # (N, d)
            else:
                user = self.backbone.states(batch, where)  # (N, d)
        positive, negative = batch.targets[where], batch.negatives[where][:, 0]  # (N,)
        items = torch.cat([positive, negative])  # (2 N,)
        distinct, place = items.unique(return_inverse=True)
        told = self.encoder.told[items]
        text = self.encoder(distinct)[place]  # (2 N, t)
        label = (torch.arange(len(items), device=items.device) < len(positive)).float()
        parts = alignment_losses(
            self.item_coder, self.text_coder, user.repeat(2, 1), self.frozen_items()[items], text,
            told, label, self.scores,
        )  # fmt: skip
        total = sum(weight * getattr(parts, name) for name, weight in self.weights.items())
        loss: Tensor = total / batch.normaliser
        for name in self.weights:
            value = getattr(parts, name).detach() / batch.normaliser
            self.log(
                f"train/{name}", value, on_step=False, on_epoch=True, batch_size=1, sync_dist=True
            )
        self.log_train_loss(loss)
        return loss

    @torch.no_grad()
    def frozen_items(self) -> Tensor:
        """(I + 1, d) vectors of the backbone; computed once."""
        if self._items is None:
            self._items = self.backbone.item_vectors().detach()
        return self._items.to(self.device)

    def configure_optimizers(self) -> Any:
        """AdamW on what is trained."""
        trained = [p for p in self.parameters() if p.requires_grad]
        return AdamW(
            trained, lr=self.learning_rate, betas=self.betas, weight_decay=self.weight_decay
        )

    # Evaluation ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def joint_vectors(self, joint: Joint | None = None) -> Tensor:
        """(I + 1, l) latent vectors of items; row 0, and texts that are missing, are zero.

        Args:
            joint: of collaborative vectors or of texts; None as the module was told.
        """
        assert self.item_coder is not None
        assert self.text_coder is not None
        if (joint or self.joint) == "item":
            vectors = self.item_coder.encode(self.frozen_items())
            vectors[0] = 0
            return vectors
        vectors = self.text_coder.encode(self.encoder.all_vectors())
        return vectors * self.encoder.told[:, None]

    def encode(self, batch: Batch) -> Tensor:
        """The backbone's user vectors (B, d)."""
        return self.backbone.user_vectors(batch)

    def score(self, state: Tensor, items: Tensor) -> Tensor:
        """Products (B, C) with the items' reconstructions."""
        rebuilt = self.rebuilt_items() if self._rebuilt is None else self._rebuilt
        with torch.autocast(state.device.type, enabled=False):
            return dot_products(state.float(), rebuilt[items].float())

    @torch.no_grad()
    def rebuilt_items(self, joint: Joint | None = None) -> Tensor:
        """(I + 1, d) what the item autoencoder makes of the joint vectors; see ``joint_vectors``."""
        assert self.item_coder is not None
        return self.item_coder.decode(self.joint_vectors(joint))

    def _reset(self, split: str) -> None:
        """Fresh sums, and the items are rebuilt once for all batches."""
        super()._reset(split)
        self._rebuilt = self.rebuilt_items()

    def _log(self, split: str) -> dict[str, Tensor]:
        """Log, and forget the items: the weights will move."""
        self._rebuilt = None
        return super()._log(split)


def _require_backbone(backbone: Any, positions: Where) -> None:
    """Raise ValueError where a model has no vectors, or no state at each position."""
    name = type(backbone).__name__
    if not isinstance(backbone, NextItemModule):
        raise ValueError(
            f"backbone is {name}, which has no user and item vectors: take a model such as SASRec, GRU4Rec, "
            "NextItNet, BERT4Rec, LightGCN or HSTU"
        )
    if positions == "all" and not backbone.causal:
        raise ValueError(
            f"backbone {name} has no state before each event of a history, only before the newest one: "
            "positions must be last"
        )
