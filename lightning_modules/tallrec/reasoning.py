"""Chain of thought: the model writes why before it answers. Nothing is trained.

Legend: B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from datamodules.types import Batch
from lightning_modules.calibration import AnswerRates
from lightning_modules.llm.generation import match_answer
from lightning_modules.llm.label_scoring import LabelTokens, label_tokens, pad_left
from lightning_modules.llm.prompt_tokens import prompts_of
from lightning_modules.tallrec.prompts import YesNoPrompt
from lightning_modules.tallrec.writing import WritingModule

THEREFORE = "\n\nSo the answer (Yes. or No.) is:\n"
_LABEL_WORDS = 4  # tokens that a written answer may have beyond the longer label


@dataclass(frozen=True)
class ReasoningPrompt(YesNoPrompt):
    """The question with a request for reasons in place of the bare answer."""

    def instruction(self) -> str:
        """What is asked of everybody."""
        return (
            f"Somebody has told us which {self.plural} they liked and which they disliked. Will they like "
            f"one more {self.singular}? Think step by step: say in one or two short sentences what they seem "
            f"to like, and how the {self.singular} fits that. Give the reasons alone; the answer is asked "
            "for later."
        )


class ChainOfThoughtModule(WritingModule):
    """Reasons first, then the margin of yes and no behind them.

    Zero-shot chain of thought in its two steps (Kojima et al., "Large Language Models are Zero-Shot
    Reasoners", NeurIPS 2022, arXiv 2205.11916): the model writes a short text, greedily; then the text and
    ``THEREFORE`` stand behind the prompt, and the label's logits are read there. Text only: no item image is
    looked at.

    Args:
        prompt: the question with its request for reasons.
        rationale_tokens: at most so many are written; a text that goes on is cut there.
        options: see ``TALLRecModule``.

    Raises:
        ValueError: no token to write.
    """

    def __init__(
        self,
        prompt: ReasoningPrompt | None = None,
        rationale_tokens: int = 48,
        **options: Any,
    ) -> None:
        super().__init__(prompt=prompt or ReasoningPrompt(), **options)
        if rationale_tokens < 1:
            raise ValueError(f"rationale_tokens must be at least 1, got {rationale_tokens}")
        self.rationale_tokens = rationale_tokens

    @cached_property
    def therefore(self) -> list[int]:
        """The tokens of ``THEREFORE``."""
        ids: list[int] = self.tokenizer(THEREFORE, add_special_tokens=False)["input_ids"]
        return ids

    @cached_property
    def answer_tokens(self) -> LabelTokens:
        """The two labels behind a whole text."""
        special = not self.llm.chat_template
        before = f"{self.example_prompt()}Their taste is clear.{THEREFORE}"
        return label_tokens(self.tokenizer, before, self.labels, special)

    def answer_room(self) -> int:
        """A rationale, ``THEREFORE`` and an answer."""
        return self.rationale_tokens + len(self.therefore) + self.written_room()

    def written_room(self) -> int:
        """Tokens that a written answer may have."""
        return max(map(len, self.answer_tokens.full)) + _LABEL_WORDS

    def reasoned(self, batch: Batch) -> list[list[int]]:
        """(B) token ids up to where the answer begins."""
        prompts = prompts_of(batch)
        rationales = self.write(prompts, self.rationale_tokens)
        return [p + r + self.therefore for p, r in zip(prompts, rationales, strict=True)]

    def encode(self, batch: Batch) -> Tensor:
        """The margins (B,) behind each row's rationale."""
        shared = list(self.answer_tokens.shared)
        read = [ids + shared for ids in self.reasoned(batch)]
        tokens, mask = pad_left(read, self.tokenizer.pad_token_id)
        moved = batch.user.device
        return self.margins(replace(batch, tokens=tokens.to(moved), token_mask=mask.to(moved)))


class WrittenAnswerModule(ChainOfThoughtModule):
    """Reasons first, then an answer that is written out and taken at its word.

    A text that begins with neither label is a refusal. Scores are 1 for yes, -1 for no and 0 for a refusal,
    which so ties with nothing but refusals; they are no probabilities and are not calibrated.
    """

    def encode(self, batch: Batch) -> Tensor:
        """(B,) float32: 1, -1 or 0."""
        texts = map(self.said, self.write(self.reasoned(batch), self.written_room()))
        return torch.tensor([said_yes(t, self.labels) for t in texts], device=batch.user.device)

    def label_metric(self) -> Metric | None:
        """Refusals and the share of yes."""
        return AnswerRates()

    def label_values(self, batch: Batch, scores: Tensor) -> tuple[Tensor, ...]:
        """The answers (B,)."""
        return (scores[:, 0],)


def said_yes(text: str, labels: Sequence[str]) -> float:
    """1.0 where a text begins with the first label (its dot may lack), -1.0 with the second, else 0.0."""
    found = match_answer(text, [label.rstrip(".") for label in labels])
    return 0.0 if found is None else (1.0, -1.0)[found]
