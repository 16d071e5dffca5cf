"""What RECFORMER's stages share: items and histories as tokens, and cosines as scores.

Legend: B rows, T history length, I items, N positions with a loss, L tokens, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl
import torch
from torch import Tensor

from datamodules.types import Batch, Collator, Histories
from lightning_modules.id_batches import OneTargetCollator
from lightning_modules.item_texts import Field, catalogue_texts, without_texts
from lightning_modules.llm.backbones import load_sentence_encoder
from lightning_modules.llm.specs import SentenceEncoderSpec
from lightning_modules.next_item import NextItemModule
from lightning_modules.recformer.model import Recformer
from lightning_modules.recformer.tokens import ItemTokens, Tokens
from lightning_modules.stage_module import mix_seeds

MOST_ATTRIBUTES = 3
_NEW_WEIGHTS = 502  # stream of random numbers


class RecformerBase(NextItemModule):
    """A history is one sequence of tokens, newest item first, and so is an item (Li et al., KDD 2023).

    A score is the cosine between the two [CLS] states over ``temperature``. A sequence that is longer than
    ``encoder.max_length`` loses the tokens of its oldest items, which is counted and told. An item without
    any of ``fields`` is a [CLS] alone: all such items tie. An empty history ties all items.

    Args:
        num_items, catalog: given by the runner from the data.
        encoder: which encoder of texts, and how many tokens of a history it reads. Its ``pooling`` and
            ``normalise`` are not asked: [CLS] it is, and length 1.
        fields: an item's attributes, in this order, 3 at most.
        attribute_tokens: of an attribute, its key included, at most.
        temperature: of the cosines (paper: 0.05).
        window: see ``Recformer``.
        every_position: learn each user's events in turn, one an epoch, drawn at random; False: the newest
            alone, in every epoch.
        chunk_size: sequences encoded at a time, those of like lengths together.
        max_length: newest items of a history (paper: 50).
        options: of the training and the evaluation, see ``NextItemModule``.

    Raises:
        ValueError: a setting that cannot work.
    """

    newest_target = True
    causal = False

    def __init__(
        self,
        num_items: int,
        catalog: pl.DataFrame,
        encoder: SentenceEncoderSpec | None = None,
        fields: Sequence[Field] = ("title", "categories", "brand"),
        attribute_tokens: int = 32,
        temperature: float = 0.05,
        window: int = 64,
        every_position: bool = True,
        chunk_size: int = 16,
        max_length: int = 50,
        learning_rate: float = 5e-5,
        **options: Any,
    ) -> None:
        super().__init__(num_items, max_length, learning_rate=learning_rate, **options)
        _refuse(fields, attribute_tokens, temperature, window, chunk_size)
        if self.all_windows or self.table_optimizer != "adamw":
            raise ValueError(
                "RECFORMER has one state a history and no table: windows=newest, table_optimizer=adamw"
            )
        self.catalog, self.fields = catalog, tuple(fields)
        self.told = any(catalogue_texts(catalog, fields, num_items))
        self.encoder = encoder or SentenceEncoderSpec()
        self.attribute_tokens, self.temperature, self.window = attribute_tokens, temperature, window
        self.every_position, self.chunk_size = every_position, chunk_size
        self.network: Recformer | None = None
        self.item_tokens: ItemTokens | None = None
        self.tokenizer: Any = None
        self._read: Tensor | None = None  # (2,) histories, and those of them that were cut
        self._frozen = False

    # Life ----------------------------------------------------------------------------------------------

    def impossible(self, histories: Histories) -> str | None:
        """Text is needed."""
        return without_texts(self.told, self.fields)

    def setup(self, stage: str) -> None:
        """Load the encoder and make the items' tokens.

        Raises:
            DataSourceError: the encoder cannot be had or loaded.
        """
        if self.network is not None:
            return
        trainer: Any = self.trainer
        device = trainer.strategy.root_device
        self.tokenizer, model = load_sentence_encoder(self.encoder)
        self.item_tokens = ItemTokens(
            self.catalog, self.fields, self.tokenizer, self.attribute_tokens
        ).to(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix_seeds(trainer.datamodule.seed, _NEW_WEIGHTS))
            self.network = Recformer(model, self.max_length, self.window)
            self.draw_more(model.config.hidden_size, model.config.vocab_size)
        self.to(device)
        self.train(self.training)
        if self._frozen:
            self.requires_grad_(False)
        self.take_weights()

    def draw_more(self, width: int, vocabulary: int) -> None:
        """Make what a stage has besides the network, of these sizes."""

    @property
    def has_parts(self) -> bool:
        """The encoder."""
        return self.network is not None

    def requires_grad_(self, requires_grad: bool = True) -> RecformerBase:
        """Also of what ``setup`` will make: whoever holds this model as a frozen part does so before it."""
        self._frozen = not requires_grad
        super().requires_grad_(requires_grad)
        return self

    def remarks(self) -> list[str]:
        """What was cut."""
        rows, cut = (0, 0) if self._read is None else map(int, self._read)
        if not cut:
            return []
        limit = self.encoder.max_length
        return [f"{cut} of {rows} histories lost their oldest tokens: the encoder reads {limit}"]

    # Sequences -----------------------------------------------------------------------------------------

    def collator(self, training: bool) -> Collator:
        """One event of each user."""
        if not training:
            return super().collator(training=False)
        return OneTargetCollator(self.max_length, self.every_position)

    def tokens(self, items: Tensor) -> Tokens:
        """Of sequences of items (B, T), the newest first."""
        assert self.item_tokens is not None
        found: Tokens = self.item_tokens(items, self.encoder.max_length)
        return found

    def history_tokens(self, batch: Batch) -> Tokens:
        """Of each row's history, the newest item first."""
        width = batch.history.shape[1]
        place = batch.length[:, None] - 1 - torch.arange(width, device=batch.history.device)
        newest_first = batch.history.gather(1, place.clamp(min=0)).masked_fill(place < 0, 0)
        tokens = self.tokens(newest_first)
        read = torch.stack([torch.ones_like(tokens.cut), tokens.cut]).sum(1)  # (2,)
        self._read = read if self._read is None else self._read + read
        return tokens

    def _vectors(self, tokens: Tokens) -> Tensor:
        """(B, d) of length 1; rows of like lengths are encoded together."""
        assert self.network is not None
        length = tokens.mask.sum(1)  # (B,)
        order = length.argsort(stable=True)
        found = []
        for rows in order.split(self.chunk_size):
            width = int(length[rows].max())
            found.append(self.network(tokens.part(rows, width)))
        return torch.cat(found)[order.argsort()]

    # The model -----------------------------------------------------------------------------------------

    def states(self, batch: Batch, where: Tensor) -> Tensor:
        """(N, d), of rows with a target, which are those after their newest item."""
        return self.user_vectors(batch)[where.any(1)]

    def user_vectors(self, batch: Batch) -> Tensor:
        """(B, d) of length 1 / temperature; zeros for an empty history."""
        vectors = self._vectors(self.history_tokens(batch)) / self.temperature
        return vectors.masked_fill((batch.length == 0)[:, None], 0)

    def encoded_items(self, items: Tensor) -> Tensor:
        """(D, d) of length 1, of the ids ``items`` (D,): each is a sequence of one."""
        return self._vectors(self.tokens(items[:, None]))

    @torch.no_grad()
    def item_vectors(self) -> Tensor:
        """(I + 1, d) of length 1, as the encoder is now, without dropout; row 0 is padding and zero."""
        assert self.network is not None
        training = self.network.training
        self.network.eval()
        try:
            items = torch.arange(1, self.num_items + 1, device=self.device)
            found = torch.cat([self.encoded_items(part) for part in items.split(self.block_size)])
            return torch.nn.functional.pad(found, (0, 0, 1, 0))
        finally:
            self.network.train(training)


def _refuse(
    fields: Sequence[str], attribute_tokens: int, temperature: float, window: int, chunk_size: int
) -> None:
    """Raise one ValueError that tells all problems."""
    wrong = []
    if not 1 <= len(set(fields)) == len(fields) <= MOST_ATTRIBUTES:
        wrong.append(f"fields must be 1 to {MOST_ATTRIBUTES} different ones, got {list(fields)}")
    if attribute_tokens < 2 or chunk_size < 1:
        wrong.append(
            f"attribute_tokens must be at least 2 and chunk_size at least 1, got {attribute_tokens} and "
            f"{chunk_size}"
        )
    if not temperature > 0:
        wrong.append(f"temperature must be above 0, got {temperature}")
    if window < 2 or window % 2:
        wrong.append(f"window must be even and at least 2, got {window}")
    if wrong:
        raise ValueError("; ".join(wrong))
