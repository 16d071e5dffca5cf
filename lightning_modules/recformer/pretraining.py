"""RECFORMER's pre-training: which item comes next, and which tokens are hidden.

Legend: B rows, K shared negatives, L tokens, M hidden tokens, d width, V tokens of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.samplers import hashed_integers
from datamodules.types import Batch
from lightning_modules import losses
from lightning_modules.recformer.base import RecformerBase
from lightning_modules.recformer.model import TokenHead
from lightning_modules.recformer.tokens import Tokens

_HIDDEN, _REPLACED, _RANDOM = 503, 504, 505  # streams of random numbers
_UNIT = 2**53  # a draw below share * _UNIT happens with probability share


class RecformerPretrainingModule(RecformerBase):
    """Contrast of users and items, and masked tokens (Li et al., KDD 2023, arXiv 2305.13731).

    The paper contrasts a user's next item with those of the other rows of the batch. Here the negatives are
    ``negatives`` items, drawn with the chances that such items have, in proportion to training events:
    what a step learns does not depend on how its batch is spread over devices and micro batches. As in the
    paper, their frequency is not corrected for. Masked tokens are those of the histories and of the next
    items, in a pass of their own; each sequence weighs the same, however many of its tokens are hidden.

    Tested by itself it is the paper's zero-shot model.

    Args:
        negatives: K.
        mask_probability: of a token to be asked for; 80 % of those are hidden, 10 % replaced (paper: 0.15).
        mask_weight: of the loss of masked tokens (paper: 0.1); 0 leaves it out.
        options: see ``RecformerBase``.

    Raises:
        ValueError: a setting that cannot work.
    """

    def __init__(
        self,
        *args: Any,
        negatives: int = 15,
        mask_probability: float = 0.15,
        mask_weight: float = 0.1,
        **options: Any,
    ) -> None:
        if given := {"loss", "popularity", "shared_negatives"} & options.keys():
            raise ValueError(f"the pre-training has a loss of its own: leave out {sorted(given)}")
        super().__init__(
            *args, loss="sampled_ce", shared_negatives=True, popularity=1.0, negatives=negatives,
            **options,
        )  # fmt: skip
        if not 0 < mask_probability < 1 or not mask_weight >= 0:
            raise ValueError(
                "mask_probability must be within 0..1 and mask_weight at least 0, got "
                f"{mask_probability} and {mask_weight}"
            )
        self.mask_probability, self.mask_weight = mask_probability, mask_weight
        self.head: TokenHead | None = None

    def draw_more(self, width: int, vocabulary: int) -> None:
        """The head that names hidden tokens."""
        if self.mask_weight:
            self.head = TokenHead(width, vocabulary)

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """The contrast and the weighted masked tokens, over the rows of the whole global batch."""
        assert batch.targets is not None
        assert batch.normaliser is not None
        rows = (batch.targets > 0).any(1)  # (B,) not those that only keep ranks in step
        targets = batch.targets.sum(1)[rows]  # (R,)
        tokens = self.history_tokens(batch)
        users = (self._vectors(tokens) / self.temperature)[rows]  # (R, d)
        pool = self._negatives(batch, batch.targets > 0)  # (K,)
        assert pool is not None
        distinct, place = torch.cat([targets, pool]).unique(return_inverse=True)
        items = F.pad(self.encoded_items(distinct), (0, 0, 1, 0))  # (D + 1, d)
        target, drawn = (place + 1).split([len(targets), len(pool)])
        total = losses.sampled_softmax(users, items, target, drawn, None)
        if self.mask_weight:
            hidden = self._masked(tokens, batch.user, rows, 0)
            asked = torch.ones_like(targets, dtype=torch.bool)
            hidden = hidden + self._masked(
                self.tokens(targets[:, None]), batch.user[rows], asked, 1
            )
            total = total + self.mask_weight * hidden
            self.log(
                "train/masked_tokens", hidden.detach() / batch.normaliser, on_step=False, on_epoch=True,
                batch_size=1, sync_dist=True,
            )  # fmt: skip
        loss: Tensor = total / batch.normaliser
        self.log_train_loss(loss)
        return loss

    def _masked(self, tokens: Tokens, user: Tensor, rows: Tensor, side: int) -> Tensor:
        """Sum over rows of the mean loss of their hidden tokens; () scalar."""
        assert self.network is not None
        assert self.head is not None
        chosen, ids = self._hide(tokens, user, side)
        chosen &= rows[:, None]
        states = self.network.states(tokens, ids)[chosen]  # (M, d)
        table = self.network.encoder.get_input_embeddings().weight  # (V, d)
        each = F.cross_entropy(
            self.head(states, table).float(), tokens.ids[chosen], reduction="none"
        )
        return (each / chosen.sum(1, keepdim=True).expand_as(chosen)[chosen]).sum()

    def _hide(self, tokens: Tokens, user: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Which tokens (B, L) are asked for, at least one of a row that has any, and what stands there.

        A pure function of (seed, step, user, side, place in the sequence).
        """
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        who = (self.trainer.global_step, side, user.cpu().numpy()[:, None])
        columns = np.arange(tokens.ids.shape[1])

        def draws(high: int, stream: int) -> np.ndarray:
            return hashed_integers(high, stream, *who, columns, seed=data.seed)  # (B, L)

        told = (tokens.items > 0).cpu().numpy()  # (B, L) without [CLS] and padding
        order = np.where(told, draws(_UNIT, _HIDDEN), _UNIT)
        chosen = order < self.mask_probability * _UNIT
        chosen |= told & (columns == order.argmin(1)[:, None])
        how = draws(10, _REPLACED)
        ids = tokens.ids.cpu().numpy().copy()
        ids[chosen & (how < 8)] = self.tokenizer.mask_token_id
        swapped = chosen & (how == 8)
        ids[swapped] = draws(len(self.tokenizer), _RANDOM)[swapped]
        place = tokens.ids.device
        return torch.from_numpy(chosen).to(place), torch.from_numpy(ids).to(place)
