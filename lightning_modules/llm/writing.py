"""What the modules that write texts share: nothing is written twice, and nothing is trained.

Legend: B rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from typing import Any, Protocol

import lightning.pytorch as pl
from torch import Tensor

from datamodules.sources import file_digest
from lightning_modules.generations import Generations, key_of
from lightning_modules.llm.backbones import resolve_dtype
from lightning_modules.llm.generation import generate
from lightning_modules.llm.sampling import RowSampler, Sampling
from lightning_modules.llm.sharding import ShardedStrategy
from lightning_modules.llm.tuning import LanguageModelModule

_VERSION = 2  # of how tokens are chosen here: raise it when the same prompt is answered otherwise
_NEXT = -1  # no token: what follows is a choice


class Shown(Protocol):
    """What prompts show besides their tokens (``row_pictures.RowPictures``)."""

    def names(self, row: int) -> list[int]:
        """Numbers that name it."""
        ...

    def inputs(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """What the model is given of it, of some rows."""
        ...


class WritesTexts(LanguageModelModule):
    """A language model that writes texts, each once; ``callbacks/generations.py`` keeps them.

    Its class declares ``generations``, and its constructor sets them to ``Generations()``.
    """

    generations: Generations | None = None
    written_by = "test"  # the kind of stage that it is for

    def untrainable(self, trainer: pl.Trainer) -> str | None:
        """No loss goes through a text that was chosen word by word."""
        return (
            f"{type(self).__name__} writes texts and trains nothing: use it in a `run: {self.written_by}` "
            "stage"
        )

    def sharded_strategy(self, devices: int) -> ShardedStrategy:
        """None: split layers run on all devices or none, and answers end after unlike numbers of words.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{type(self).__name__} writes texts, which weights that are spread over devices cannot: run "
            "its stage with launch.strategy=ddp or on one device"
        )

    @cached_property
    def writer(self) -> str:
        """A digest of the model that writes, of the type that it computes in here, and of what runs it.

        The device and the rows of a batch are not part of it: they move the last bits only.
        """
        weights = file_digest(self._weights) if self._weights else ""
        dtype = resolve_dtype(self.llm, self.device)
        engine = f"transformers {version('transformers')} {_VERSION}"
        return hashlib.sha256(
            f"{self.llm.digest()} {dtype} {self.adapter!r} {weights} {engine}".encode()
        ).hexdigest()

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        behind: Sequence[int] | None = None,
        choices: Sequence[Sequence[Sequence[int]]] | None = None,
        sampling: Sampling | None = None,
        shown: Shown | None = None,
    ) -> list[list[int]]:
        """Continuations of prompts (B,), at most so many tokens each.

        Args:
            prompts: token ids.
            max_new_tokens: at most; of no meaning where there are choices.
            behind: (B,) the rows that prompts hold vectors of, where they do: equal tokens are then not
                enough to know an answer again, and rows are written all or none, as vectors are laid out.
            choices: (B) lists of token ids, one of which a row must write; None leaves it free.
            sampling: draws tokens, of each prompt from a stream of its own; None takes the likeliest ones.
            shown: what prompts show besides their tokens, by row.
        """
        chosen = "greedy" if sampling is None else repr(sampling)
        limit = str(max_new_tokens) if choices is None else "choice"
        how = f"{chosen} {limit} {self.writer}"
        names = [list(prompt) for prompt in prompts]
        for row, name in enumerate(names):
            name += [] if behind is None else [behind[row]]
            name += [] if choices is None else [i for one in choices[row] for i in (_NEXT, *one)]
            name += [] if shown is None else [_NEXT, *shown.names(row)]

        def write(unknown: list[Sequence[int]]) -> list[list[int]]:
            asked = [names.index(list(name)) for name in unknown]
            rows = asked if behind is None else list(range(len(names)))
            held = None if choices is None else [choices[row] for row in rows]
            texts = [prompts[row] for row in rows]
            streams = [key_of(names[row], how) for row in rows]
            more: dict[str, Any] = {}
            if sampling:
                more["sampler"] = RowSampler(sampling, streams)
            if shown is not None:
                more["pictures"] = shown.inputs(rows, texts)
            if behind is not None:
                more["share"] = False
            made = generate(self.model, self.tokenizer, texts, max_new_tokens, held, **more)
            written = dict(zip(rows, made, strict=True))
            return [written[row] for row in asked]

        assert self.generations is not None
        answers = self.generations.answers(names, how, write)
        self.generations.note(prompts, answers, getattr(shown, "items", None))
        return answers

    def said(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text
