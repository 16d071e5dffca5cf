"""Texts that a model has written, by the content of what they answer: none is written twice.

Whoever keeps them (``callbacks/generations.py``) fills ``known`` before a pass and takes what is new after
each batch; what other runs have written is ``elsewhere``. Nothing here knows a model: it is told how to
write.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

Tokens = Sequence[int]
Write = Callable[[list[Tokens]], list[list[int]]]  # prompts (B,) -> new tokens of each
Sample = tuple[Tokens, list[int], Sequence[int]]  # prompt, answer, items whose pictures were shown
SAMPLES = 8  # that are held at a time


@dataclass(frozen=True)
class Generation:
    """One text: ``key`` names all that it depends on; ``found`` where another run had written it."""

    key: str
    tokens: list[int]
    found: bool = False


class Elsewhere(Protocol):
    """Texts of other runs."""

    def get(self, key: str) -> list[int] | None:
        """The tokens of a text, if any run has written it."""
        ...


@dataclass
class Generations:
    """Texts by key, and those that the run has not stored yet."""

    known: dict[str, list[int]] = field(default_factory=dict)
    fresh: list[Generation] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)  # a few, for people to read
    elsewhere: Elsewhere | None = None

    def answers(self, prompts: Sequence[Tokens], how: str, write: Write) -> list[list[int]]:
        """The answer to each of the prompts (B,); ``write`` is asked for those that are not known.

        Args:
            prompts: token ids.
            how: a digest of what else texts depend on: weights, length, choices.
            write: writes answers; equal prompts are asked for once.
        """
        keys = [key_of(prompt, how) for prompt in prompts]
        self._look_up(keys)
        pairs = zip(keys, prompts, strict=True)
        asked = {key: prompt for key, prompt in pairs if key not in self.known}
        if asked:
            for key, tokens in zip(asked, write(list(asked.values())), strict=True):
                self.known[key] = tokens
                self.fresh.append(Generation(key, tokens))
        return [self.known[key] for key in keys]

    def _look_up(self, keys: Sequence[str]) -> None:
        """Take over what other runs have written."""
        if self.elsewhere is None:
            return
        for key in keys:
            if key not in self.known and (tokens := self.elsewhere.get(key)) is not None:
                self.known[key] = tokens
                self.fresh.append(Generation(key, tokens, found=True))

    def note(
        self,
        prompts: Sequence[Tokens],
        answers: Sequence[list[int]],
        shown: Sequence[Tokens] | None,
    ) -> None:
        """Hold some prompts (B,) with their answers and the items that they show, until they are taken."""
        items = shown or [()] * len(prompts)
        room = SAMPLES - len(self.samples)
        self.samples += list(zip(prompts, answers, items, strict=True))[:room]

    def take_samples(self) -> list[Sample]:
        """Prompts and answers since this was last asked, not all of them."""
        taken, self.samples = self.samples, []
        return taken

    def take_fresh(self) -> list[Generation]:
        """What was written or found since this was last asked."""
        taken, self.fresh = self.fresh, []
        return taken


def key_of(prompt: Tokens, how: str) -> str:
    """The name of an answer: 32 hexadecimal digits."""
    content = json.dumps([how, [int(i) for i in prompt]])
    return hashlib.sha256(content.encode()).hexdigest()[:32]
