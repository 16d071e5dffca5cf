"""A-LLMRec asked for a letter: every candidate has one, and a pass scores them all by one token each.

Legend: B rows, T history length, C candidates, L tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.types import Batch
from lightning_modules.a_llmrec.stage2 import Stage2Module
from lightning_modules.llm.candidate_scoring import Listed
from lightning_modules.llm.label_scoring import last_logits, pad_left


class LetteredStage2Module(Stage2Module):
    """The second stage as a multiple-choice question. For tests alone.

    Language models prefer some letters and places whatever stands there (Zheng et al., ICLR 2024, arXiv
    2309.03882). So the candidates are rotated, and a candidate's score is the mean of its letters'
    log-probabilities among all letters, over ``orders`` rotations that are spread evenly: with as many as
    there are candidates each has had each letter.

    Args:
        orders: rotations of the candidates; each is a pass of its own.
        options: see ``Stage2Module``.

    Raises:
        ValueError: no order, or more candidates than letters.
    """

    lettered = True

    def __init__(self, orders: int = 4, **options: Any) -> None:
        super().__init__(**options)
        if orders < 1:
            raise ValueError(f"orders is {orders}, expected at least 1")
        self.orders = orders

    def encode(self, batch: Batch) -> Listed:
        """Mean log-probabilities of the candidates' letters."""
        assert batch.candidates is not None
        count = batch.candidates.shape[1]
        histories = self._histories(batch)
        shifts = sorted({order * count // self.orders for order in range(self.orders)})
        each = [self._rotated(batch, histories, shift) for shift in shifts]  # (B, C) each
        return Listed(batch.candidates, torch.stack(each).mean(0))

    def _histories(self, batch: Batch) -> list[np.ndarray]:
        """(B) the items that each prompt shows, the oldest first: as many fit in any order of candidates."""
        assert batch.candidates is not None
        items = [
            row[:length].cpu().numpy()
            for row, length in zip(batch.history, batch.length.tolist(), strict=True)
        ]
        newest = np.zeros(batch.history.shape, np.int64)  # (B, T)
        for row, own in enumerate(items):
            newest[row, : len(own)] = own[::-1]
        _, shown = self.table.fitting(newest, batch.candidates.cpu().numpy())
        return [own[len(own) - count :] for own, count in zip(items, shown, strict=True)]

    def _rotated(self, batch: Batch, histories: list[np.ndarray], shift: int) -> Tensor:
        """(B, C) log-probabilities with the candidates moved up by ``shift`` lines, the first ones last."""
        assert batch.candidates is not None
        candidates = batch.candidates.roll(-shift, dims=1)
        listed = zip(histories, candidates.cpu().numpy(), strict=True)
        made = [self.table.prompt(history, items) for history, items in listed]
        tokens, mask = pad_left([ids.tolist() for ids, _ in made], self.tokenizer.pad_token_id)
        slots, _ = pad_left([marks.tolist() for _, marks in made], 0)
        tokens, mask, slots = (x.to(candidates.device) for x in (tokens, mask, slots))
        asked = replace(batch, tokens=tokens, token_mask=mask, slots=slots)
        with self.soft(asked, self._split), torch.no_grad():
            logits = last_logits(self.model, tokens, mask)[:, -1]  # (B, V)
        letters = torch.from_numpy(self.table.letters[: candidates.shape[1]]).to(logits.device)
        chosen = logits[:, letters].masked_fill(candidates == 0, -torch.inf)
        return chosen.log_softmax(-1).roll(shift, dims=1)
