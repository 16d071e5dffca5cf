"""Texts that a model has written, by the content of what they answer: none is written twice.

Whoever keeps them (``callbacks/generations.py``) fills ``known`` before a pass and takes what is new after
each batch. Nothing here knows a model: it is told how to write.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Tokens = Sequence[int]
Write = Callable[[list[Tokens]], list[list[int]]]  # prompts (B,) -> new tokens of each


@dataclass(frozen=True)
class Generation:
    """One text: ``key`` names all that it depends on."""

    key: str
    tokens: list[int]


@dataclass
class Generations:
    """Texts by key, and those that nobody has stored yet."""

    known: dict[str, list[int]] = field(default_factory=dict)
    fresh: list[Generation] = field(default_factory=list)

    def answers(self, prompts: Sequence[Tokens], how: str, write: Write) -> list[list[int]]:
        """The answer to each of the prompts (B,); ``write`` is asked for those that are not known.

        Args:
            prompts: token ids.
            how: a digest of what else texts depend on: weights, length, choices.
            write: writes answers; equal prompts are asked for once.
        """
        keys = [_key(prompt, how) for prompt in prompts]
        pairs = zip(keys, prompts, strict=True)
        asked = {key: prompt for key, prompt in pairs if key not in self.known}
        if asked:
            for key, tokens in zip(asked, write(list(asked.values())), strict=True):
                self.known[key] = tokens
                self.fresh.append(Generation(key, tokens))
        return [self.known[key] for key in keys]

    def take_fresh(self) -> list[Generation]:
        """What was written since this was last asked."""
        taken, self.fresh = self.fresh, []
        return taken


def _key(prompt: Tokens, how: str) -> str:
    content = json.dumps([how, [int(i) for i in prompt]])
    return hashlib.sha256(content.encode()).hexdigest()[:32]
