"""Item texts as vectors that can be trained: tokens made once, distinct texts encoded once a batch.

Legend: I items, D distinct items of a batch, L tokens, t width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_modules.llm.backbones import decoder_layers, load_sentence_encoder
from lightning_modules.llm.sentence_embeddings import encode_texts, pool
from lightning_modules.llm.specs import SentenceEncoderSpec
from lightning_modules.llm.wording import token_ids

Trained = Literal["all", "last_layer", "none"]


class ItemTextEncoder(nn.Module):
    """A sentence encoder over the catalogue's texts, trained or frozen.

    Frozen, it is a table of vectors that are computed once, ever (``encode_texts``). Trained, the distinct
    items of a batch are encoded, like lengths together and ``chunk_size`` at a time; activations of more than
    one chunk are recomputed in the backward pass, so that memory does not grow with the number of items.

    Args:
        spec: the encoder.
        texts: (I,) of items 1..I; a blank one has the zero vector and no gradient.
        trained: ``all`` layers, the ``last_layer`` alone, or ``none``.
        chunk_size: texts encoded at a time.

    Raises:
        ValueError: an unknown ``trained``, or no chunk.
    """

    table: Tensor  # (I + 1, t) of a frozen encoder
    told: Tensor  # (I + 1,) bool, whether an item has a text

    def __init__(
        self,
        spec: SentenceEncoderSpec,
        texts: Sequence[str],
        trained: Trained = "all",
        chunk_size: int = 64,
    ) -> None:
        super().__init__()
        if trained not in get_args(Trained):
            known = ", ".join(get_args(Trained))
            raise ValueError(
                f"what of the text encoder is trained is {trained!r}, not one of {known}"
            )
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        self.spec, self.texts, self.trained, self.chunk_size = (
            spec,
            list(texts),
            trained,
            chunk_size,
        )
        told = torch.tensor([False, *(bool(text.strip()) for text in texts)])
        self.register_buffer("told", told, persistent=False)  # (I + 1,)
        self.model: Any = None
        self._tokens: list[Tensor] = []  # (I + 1) of (L,) ids
        self._pad = 0

    def load(self, device: torch.device) -> int:
        """Make vectors or weights be there; returns t.

        Raises:
            DataSourceError: the encoder cannot be had or loaded.
        """
        if self.trained == "none":
            found = torch.from_numpy(encode_texts(self.spec, self.texts, device))  # (I, t)
            self.register_buffer("table", F.pad(found, (0, 0, 1, 0)).to(device), persistent=False)
            return found.shape[1]
        if self.model is None:
            tokenizer, model = load_sentence_encoder(self.spec)
            model.to(device)
            part = model if self.trained == "all" else decoder_layers(model)[-1]
            part.requires_grad_(True)
            # It sits on top of the states that are read, so that no gradient reaches it.
            if getattr(model, "pooler", None) is not None:
                model.pooler.requires_grad_(False)
            self.model = model
            made = token_ids(
                tokenizer, self.texts, add_special_tokens=True, truncation=True,
                max_length=self.spec.max_length,
            )  # fmt: skip
            self._tokens = [torch.empty(0, dtype=torch.long)]
            self._tokens += [torch.tensor(ids, dtype=torch.long) for ids in made]
            self._pad = int(tokenizer.pad_token_id)
        return int(self.model.config.hidden_size)

    def forward(self, items: Tensor) -> Tensor:
        """Vectors (D, t) of distinct items (D,)."""
        if self.trained == "none":
            return self.table[items]
        rows = [self._tokens[i] for i in items.tolist()]
        places = self.told[items].nonzero()[:, 0].tolist()
        places.sort(key=lambda place: len(rows[place]))
        found = []
        starts = range(0, len(places), self.chunk_size)
        chunks = [[rows[p] for p in places[at : at + self.chunk_size]] for at in starts]
        for chunk in chunks:
            tokens, mask = (x.to(items.device) for x in self._padded(chunk))
            if torch.is_grad_enabled() and len(chunks) > 1:
                found.append(checkpoint(self._encode, tokens, mask, use_reentrant=False))
            else:
                found.append(self._encode(tokens, mask))
        made = torch.cat(found) if found else torch.zeros(0, self.model.config.hidden_size)
        made = made.to(items.device, torch.promote_types(made.dtype, torch.float32))
        where = torch.tensor(places, device=items.device, dtype=torch.long)
        return made.new_zeros(len(items), made.shape[1]).index_put((where,), made)

    def _padded(self, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Tokens (D, L) of rows padded on the right, and their mask."""
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self._pad)
        length = torch.tensor([len(row) for row in rows])
        return tokens, (torch.arange(tokens.shape[1]) < length[:, None]).long()

    def _encode(self, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state  # (D, L, t)
        pooled = pool(hidden, mask, self.spec.pooling)
        return F.normalize(pooled) if self.spec.normalise else pooled

    @torch.no_grad()
    def all_vectors(self) -> Tensor:
        """(I + 1, t) of the whole catalogue as the encoder is now, without dropout; row 0 is padding."""
        if self.trained == "none":
            return self.table
        training = self.model.training
        self.model.eval()
        try:
            items = torch.arange(1, len(self.texts) + 1, device=self.told.device)
            return F.pad(self(items), (0, 0, 1, 0))
        finally:
            self.model.train(training)
