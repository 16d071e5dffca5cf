"""Instructions and answers to tokens, once: what does not fit is cut where it hurts least, and counted.

Legend: R all rows of a file, B rows, L tokens, A answer tokens.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from lightning_modules.llm.layouts import answered
from lightning_modules.llm.prompt_tokens import AT_ONCE, in_steps, joined, kept_arrays

logger = logging.getLogger(__name__)
# Tokens of an answer, or all of a shorter one, that a row must have room for; else it is left out.
LEAST_ANSWER = 16


@dataclass
class Cut:
    """What did not fit, in rows."""

    inputs: int = 0  # lost the end of their input
    answers: int = 0  # lost all of their input, if they had any, and the end of their answer
    left_out: int = 0  # have no room for an answer

    def __bool__(self) -> bool:
        return bool(self.inputs or self.answers or self.left_out)


@dataclass
class InstructionTokens:
    """The tokens of all rows of a file, prompt and answer one after the other.

    Args:
        tokenizer: of transformers.
        texts: columns instruction, input, output (R,).
        name: a digest of the texts and the tokenizer.
        limit: tokens that a row may have.
        chat_template: which layout, see ``layouts.lay_out``.
    """

    tokenizer: Any
    texts: pl.DataFrame
    name: str
    limit: int
    chat_template: bool
    cut: Cut = field(default_factory=Cut)

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        # An example's prompt and answer stand for the words of the layout.
        layout = answered(self.tokenizer, self.chat_template, "i", "x", "o")
        bare = answered(self.tokenizer, self.chat_template, "i", "", "o")
        asked = f"{self.name} {self.limit} {LEAST_ANSWER} {layout} {bare}"
        kept = kept_arrays(hashlib.sha256(asked.encode()).hexdigest(), self._made)
        self.cut = Cut(*(int(n) for n in kept["cut"]))
        return kept

    def _made(self) -> dict[str, np.ndarray]:
        prompts: list[int] = []
        rows: list[list[int]] = []
        cut = Cut()
        texts = list(self.texts.select("instruction", "input", "output").iter_rows())
        for first in in_steps(len(texts)):
            for prompt, answer in self._tokenised(texts[first : first + AT_ONCE], cut):
                prompts.append(len(prompt))
                rows.append(prompt + answer)
        ids, offsets = joined(rows)
        counts = np.array([cut.inputs, cut.answers, cut.left_out], np.int64)
        return {"ids": ids, "offsets": offsets, "prompts": np.array(prompts), "cut": counts}

    def _tokenised(
        self, texts: Sequence[tuple[str, str, str]], cut: Cut
    ) -> list[tuple[list[int], list[int]]]:
        """Prompt and answer of each row; both empty where it is left out."""
        made = prompt_and_answer(self.tokenizer, self.chat_template, texts)
        for i, (prompt, answer) in enumerate(made):
            if len(prompt) + len(answer) > self.limit:
                made[i] = self._shortened(texts[i], cut)
        return made

    def _shortened(self, text: tuple[str, str, str], cut: Cut) -> tuple[list[int], list[int]]:
        """A row that is too long, without the end of its input, then without that of its answer."""
        instruction, given, output = text

        def having(characters: int) -> tuple[list[int], list[int]]:
            short = (instruction, given[:characters].rstrip(), output)
            return prompt_and_answer(self.tokenizer, self.chat_template, [short])[0]

        best = having(0)
        if sum(map(len, best)) > self.limit:
            room = self.limit - len(best[0])
            if room < min(LEAST_ANSWER, len(best[1])):
                cut.left_out += 1
                return [], []
            cut.answers += 1
            return best[0], best[1][:room]
        cut.inputs += 1
        low, high = 0, len(given)  # ``low`` characters fit
        while high - low > 1:
            middle = (low + high) // 2
            tried = having(middle)
            if sum(map(len, tried)) <= self.limit:
                low, best = middle, tried
            else:
                high = middle
        return best

    @property
    def lengths(self) -> np.ndarray:
        """(R,) tokens; 0 where a row is left out."""
        return np.diff(self._arrays["offsets"])

    @property
    def prompts(self) -> np.ndarray:
        """(R,) tokens of the prompt, where the answer begins."""
        return self._arrays["prompts"]

    def of(self, row: int) -> tuple[list[int], int]:
        """A row's tokens, and how many of them are its prompt."""
        start, stop = self._arrays["offsets"][row : row + 2]
        return self._arrays["ids"][start:stop].tolist(), int(self.prompts[row])

    def told(self) -> str | None:
        """What did not fit; None where all did."""
        lengths, cut = self.lengths, self.cut
        if not cut:
            return None
        return (
            f"of {len(lengths):,} instructions, {cut.inputs:,} lose the end of their input, {cut.answers:,} "
            f"that of their answer, and {cut.left_out:,} are left out: more than llm.max_length="
            f"{self.limit} tokens"
        )


def prompt_and_answer(
    tokenizer: Any, chat_template: bool, texts: Sequence[tuple[str, str, str]]
) -> list[tuple[list[int], list[int]]]:
    """Tokens of (instruction, input, output), parted where the answer begins.

    The answer is tokenised behind its prompt. Where that would change the prompt's own tokens, it is
    tokenised alone: a prompt must be read as it will be when the answer is not known.
    """
    special = not chat_template  # a chat template has them in its text
    laid_out = [answered(tokenizer, chat_template, *text) for text in texts]

    def ids_of(asked: list[str], special: bool) -> list[list[int]]:
        # Not verbose: what is too long is cut and told by the table.
        made = tokenizer(asked, add_special_tokens=special, verbose=False)
        ids: list[list[int]] = made["input_ids"]
        return ids

    prompts = ids_of([prompt for prompt, _ in laid_out], special)
    wholes = ids_of([prompt + answer for prompt, answer in laid_out], special)
    alone = ids_of([answer for _, answer in laid_out], False)
    return [
        (before, whole[len(before) :] if whole[: len(before)] == before else answer)
        for before, whole, answer in zip(prompts, wholes, alone, strict=True)
    ]
