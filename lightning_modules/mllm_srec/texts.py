"""What MLLM-SRec's prompts say of users and of candidates, cut to what there is room for.

Legend: B rows, I items, U users.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from datamodules.types import Rows
from lightning_modules.llm.wording import as_data
from lightning_modules.mllm_msr.prompts import CANDIDATE
from lightning_modules.mllm_msr.texts import Frames, UserTexts, cut_to, token_ids
from lightning_modules.mllm_srec.profiles import Profiles
from lightning_modules.mllm_srec.prompts import SRecPrompt

_LINE = 4  # tokens that a line may take more than its parts


class CandidateTexts:
    """The candidates' parts of prompts.

    Args:
        frames, prompt: where they stand, and their words.
        tokenizer: of the language model.
        titles: (I,) or None where nothing that is written of items is told.
        notes: (I,) by step, what earlier stages wrote of each item; "" where they wrote nothing.
        most: tokens of a title and of a note, at most.
        pictured: (I + 1,) bool, whose picture is shown, at a mark; None: of none.
    """

    def __init__(
        self,
        frames: Frames,
        prompt: SRecPrompt,
        tokenizer: Any,
        titles: Sequence[str] | None,
        notes: Mapping[str, Sequence[str]],
        most: int,
        pictured: np.ndarray | None,
        count: int,
    ) -> None:
        def read(texts: Sequence[str]) -> list[str]:
            return cut_to(tokenizer, as_data(texts, tokenizer), [most] * len(texts))

        named: Sequence[str | None] = [None] * count if titles is None else read(titles)
        self.notes = {step: read(texts) for step, texts in notes.items()}  # (I,) each
        shows = [False] * count if pictured is None else pictured[1:].tolist()
        told = (prompt.item(named[i], shows[i], self.of(i)) for i in range(count))
        self.parts = ["", *(frames.item.replace(CANDIDATE, text) for text in told)]  # (I + 1,)

    def of(self, number: int) -> dict[str, str]:
        """What earlier stages wrote of an item, by step."""
        return {step: texts[number] for step, texts in self.notes.items()}


class ProfiledUserTexts(UserTexts):
    """The users' parts of prompts, each with a profile, and with an identifier where that is wanted.

    Args:
        profiles: what is told of a user besides.
        named: tell the user's number.
        most: tokens of a profile, at most.
        arguments: of ``UserTexts``; of its ``titles`` a history is listed.
    """

    prompt: SRecPrompt

    def __init__(
        self, *arguments: Any, profiles: Profiles | None, named: bool, most: int, **options: Any
    ) -> None:
        super().__init__(*arguments, **options)
        self.profiles, self.named, self.most = profiles, named, most
        profiled = 0 if profiles is None else most + self._length("Profile: \n") + _LINE
        identified = self._length("User: 0123456789\n") + _LINE if named else 0
        self.reserved = profiled + identified

    def _length(self, text: str) -> int:
        (ids,) = token_ids(self.tokenizer, [text])
        return len(ids)

    def _known(self, rows: Rows, skip: np.ndarray) -> list[str]:
        about = super()._known(rows, skip)
        if self.profiles is not None:
            lines = as_data(self.profiles(rows), self.tokenizer)
            lines = cut_to(self.tokenizer, lines, [self.most] * len(lines))
            about = [f"Profile: {line}\n{rest}" for line, rest in zip(lines, about, strict=True)]
        if self.named:
            pairs = zip(rows.user.tolist(), about, strict=True)
            about = [f"User: {user}\n{rest}" for user, rest in pairs]
        return about
