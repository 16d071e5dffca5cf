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
        shifts = sorted({order * count // self.orders for order in range(self.orders)})
        each = [self._rotated(batch, shift) for shift in shifts]  # (B, C) each
        return Listed(batch.candidates, torch.stack(each).mean(0))

    def _rotated(self, batch: Batch, shift: int) -> Tensor:
        """(B, C) log-probabilities with the candidates moved up by ``shift`` lines, the first ones last."""
        assert batch.candidates is not None
        candidates = batch.candidates.roll(-shift, dims=1)
        tokens, mask, slots = self._prompts(batch, candidates)
        asked = replace(batch, tokens=tokens, token_mask=mask, slots=slots)
        with self.soft(asked, self._split), torch.no_grad():
            logits = last_logits(self.model, tokens, mask)[:, -1]  # (B, V)
        letters = torch.from_numpy(self.table.letters[: candidates.shape[1]]).to(logits.device)
        chosen = logits[:, letters].masked_fill(candidates == 0, -torch.inf)
        return chosen.log_softmax(-1).roll(shift, dims=1)

    def _prompts(self, batch: Batch, candidates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, mask and slots (B, L) that show each row as many items as its batch does."""
        assert batch.slots is not None
        shown = self._shown(batch)
        made = []
        for row, length in enumerate(batch.length.tolist()):
            history = batch.history[row, length - shown[row] : length].cpu().numpy()
            made.append(self.table.prompt(history, candidates[row].cpu().numpy()))
        device = candidates.device
        pad = self.tokenizer.pad_token_id
        tokens, mask = pad_left([ids.tolist() for ids, _ in made], pad)
        slots, _ = pad_left([marks.tolist() for _, marks in made], 0)
        return tokens.to(device), mask.to(device), slots.to(device)

    def _shown(self, batch: Batch) -> list[int]:
        """(B,) newest items that fit, whatever the order of the candidates is."""
        assert batch.candidates is not None
        found = []
        for length, history, candidates in zip(
            batch.length.tolist(),
            batch.history.cpu().numpy(),
            batch.candidates.cpu().numpy(),
            strict=True,
        ):
            count = min(length, self.table.max_length)
            while (
                count
                and self._size(history[length - count : length], candidates) > self.table.limit
            ):
                count -= 1
            found.append(count)
        return found

    def _size(self, history: np.ndarray, candidates: np.ndarray) -> int:
        return len(self.table.prompt(history, candidates)[0])
