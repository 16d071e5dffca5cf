"""RECFORMER's network: an encoder of texts that reads a history as one sequence of tokens.

Legend: B rows, L tokens, M hidden tokens, d width, V tokens of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.recformer.tokens import Tokens

_STD = 0.02  # of what is new, as BERT draws its own


class Recformer(nn.Module):
    """Token states of a history (Li et al., KDD 2023, arXiv 2305.13731).

    What an encoder reads is the sum of a token, its place, its type (``tokens.CLS``, ``KEY``, ``VALUE``) and
    its item's place in the history; the sum is normalised by the encoder's own LayerNorm. Longformer, the
    paper's encoder, attends globally at [CLS] and within ``window`` tokens elsewhere.

    Args:
        encoder: of transformers, with ``inputs_embeds``.
        max_items: items of a history.
        window: of Longformer's local attention (paper: 64); others have none.
    """

    def __init__(self, encoder: Any, max_items: int, window: int) -> None:
        super().__init__()
        width = encoder.config.hidden_size
        self.encoder = encoder
        self.item_positions = nn.Embedding(max_items + 1, width)
        self.token_types = nn.Embedding(3, width)
        for table in (self.item_positions, self.token_types):
            nn.init.normal_(table.weight, std=_STD)
        encoder.requires_grad_(True)
        # It sits on top of the states that are read, so that no gradient reaches it.
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler.requires_grad_(False)
        self.longformer = encoder.config.model_type == "longformer"
        if self.longformer:
            encoder.config.attention_window = [window] * encoder.config.num_hidden_layers
            for layer in encoder.encoder.layer:
                layer.attention.self.one_sided_attn_window_size = window // 2

    def states(self, tokens: Tokens, ids: Tensor | None = None) -> Tensor:
        """(B, L, d); ``ids`` (B, L) in place of the tokens' own, where some are hidden."""
        ids = tokens.ids if ids is None else ids
        x = self.encoder.get_input_embeddings()(ids)  # (B, L, d)
        x = x + self.token_types(tokens.types) + self.item_positions(tokens.items)
        more = {}
        if self.longformer:
            more["global_attention_mask"] = torch.zeros_like(ids).index_fill_(
                1, ids.new_zeros(1), 1
            )
        mask = tokens.mask.long()
        states: Tensor = self.encoder(
            inputs_embeds=x, attention_mask=mask, **more
        ).last_hidden_state
        return states

    def forward(self, tokens: Tokens) -> Tensor:
        """[CLS]'s state, scaled to length 1: (B, d)."""
        first = self.states(tokens)[:, 0]
        return F.normalize(first.to(torch.promote_types(first.dtype, torch.float32)))


class TokenHead(nn.Module):
    """Which token is hidden: a layer, and the encoder's own token vectors (tied), with a bias each.

    Args:
        width: d.
        vocabulary: V.
    """

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        nn.init.normal_(self.dense.weight, std=_STD)
        nn.init.zeros_(self.dense.bias)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, states: Tensor, table: Tensor) -> Tensor:
        """Logits (M, V) of states (M, d); ``table`` (V, d) of tokens."""
        return F.linear(self.norm(F.gelu(self.dense(states))), table, self.bias)
