"""A-LLMRec's answers as texts, matched strictly or as its authors do: to compare with likelihoods.

Legend: B rows, C candidates.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from datamodules.types import Batch
from lightning_modules.a_llmrec.stage2 import Stage2Module
from lightning_modules.generations import Generations
from lightning_modules.llm.candidate_scoring import Listed
from lightning_modules.llm.generation import plain
from lightning_modules.llm.prompt_tokens import prompts_of
from lightning_modules.llm.writing import WritesTexts

Match = Literal["strict", "substring"]
RATES = ("strict_hit", "substring_hit", "agreement", "valid_rate")


class WrittenStage2Module(WritesTexts, Stage2Module):
    """The second stage when it writes a title, greedily, in place of scoring all of them. For tests alone.

    A candidate that the text names has the score 1, all others 0: an answer that names none ties them all,
    which the ranking metrics count as chance. Beside these metrics each group has, of its rows,
    ``strict_hit``, the share whose text is the target's title, no more and no less; ``substring_hit``, the
    share whose text holds it (the authors' code, for which "It" is a hit in "It Follows"); ``agreement``, how
    often the two say the same; ``valid_rate``, the share whose text is the title of any candidate.

    Args:
        match: which texts name a candidate: ``strict`` or ``substring``.
        constrained: hold the text to the candidates' titles, token by token, so that every row names one and
            ``valid_rate`` is 1. It is the title that begins best, not the likeliest one.
        options: see ``Stage2Module``.

    Raises:
        ValueError: an unknown match.
    """

    def __init__(self, match: Match = "strict", constrained: bool = False, **options: Any) -> None:
        super().__init__(**options)
        if match not in get_args(Match):
            raise ValueError(f"match is {match!r}, expected one of {', '.join(get_args(Match))}")
        self.match, self.constrained = match, constrained
        self.generations = Generations()
        self.rates: dict[str, MeanMetric] = {}  # group/name

    def encode(self, batch: Batch) -> Listed:
        """What each row's text names."""
        assert batch.candidates is not None
        texts = self.written(batch)
        named = [
            named_titles(text, [self.shown(i) for i in row])
            for text, row in zip(texts, batch.candidates.tolist(), strict=True)
        ]
        strict, within = (
            torch.tensor([pair[which] for pair in named], device=batch.candidates.device)
            & (batch.candidates > 0)
            for which in (0, 1)
        )  # (B, C) each
        self._count_rates(batch, strict, within)
        scores = (strict if self.match == "strict" else within).float()
        return Listed(batch.candidates, scores)

    def shown(self, item: int) -> str:
        """The title as a prompt shows it, without its quotes; "" for padding."""
        return str(self.tokenizer.decode(self.table.title(item)))[1:-1] if item else ""

    def written(self, batch: Batch) -> list[str]:
        """(B,) greedy texts behind the prompts."""
        choices = None
        if self.constrained:
            choices = [[title for title in row if title] for row in self.candidate_titles(batch)]
        with self.soft(batch, self._split):
            tokens = self.write(
                prompts_of(batch), self.title_tokens + 1, batch.row.tolist(), choices
            )
        return [self.said(ids) for ids in tokens]

    def _count_rates(self, batch: Batch, strict: Tensor, within: Tensor) -> None:
        assert batch.groups is not None
        assert batch.target is not None
        is_target = batch.candidates == batch.target[:, None]  # (B, C)
        hit, loose = (strict & is_target).any(1), (within & is_target).any(1)  # (B,)
        each = dict(zip(RATES, (hit, loose, hit == loose, strict.any(1)), strict=True))
        for key, metric in self.rates.items():
            group, _, name = key.partition("/")
            member = batch.groups[:, self._group_names.index(group)]
            metric.update(each[name].float(), member.float())

    @property
    def _group_names(self) -> list[str]:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        return list(data.group_names)

    def _reset(self, split: str) -> None:
        """Fresh sums."""
        super()._reset(split)
        names = [f"{group}/{name}" for group in self._group_names for name in RATES]
        self.rates = {name: MeanMetric().to(self.device) for name in names}

    def _log(self, split: str) -> dict[str, Tensor]:
        """Also the rates; of a group without rows there are none."""
        found = {n: m.compute().double() for n, m in self.rates.items()}
        return {**super()._log(split), **{n: v for n, v in found.items() if v.isfinite()}}


def named_titles(text: str, titles: Sequence[str]) -> tuple[list[bool], list[bool]]:
    """(C,) which titles a text is, and (C,) which it holds.

    Strictly, it is a title without regard to quotes, case and blanks around. Loosely, as the authors' code
    has it: what stands between the first and the last double quote, else the whole text, in lower case, holds
    the title in lower case.
    """
    said = plain(text)
    quoted = re.search(r'"(.*)"', text, re.DOTALL)
    loose = (quoted[1] if quoted else text).lower()
    strict = [bool(title) and said == plain(title) for title in titles]
    return strict, [bool(title) and title.lower() in loose for title in titles]
