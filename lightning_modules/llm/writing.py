"""What the modules that write texts share: nothing is written twice, and nothing is trained.

Legend: B rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import lightning.pytorch as pl
from torch import Tensor

from datamodules.sources import file_digest
from lightning_modules.errors import ModelError
from lightning_modules.generations import Generations, key_of
from lightning_modules.llm.backbones import resolve_dtype
from lightning_modules.llm.engines import Engine, TransformersEngine, VLLMEngine
from lightning_modules.llm.generation import generate
from lightning_modules.llm.sampling import RowSampler, Sampling
from lightning_modules.llm.sharding import ShardedStrategy
from lightning_modules.llm.tuning import LanguageModelModule

_NEXT = -1  # no token: what follows is a choice


if TYPE_CHECKING:
    from PIL.Image import Image


class Shown(Protocol):
    """What prompts show besides their tokens (``row_pictures.RowPictures``)."""

    def names(self, row: int) -> list[int]:
        """Numbers that name it."""
        ...

    def inputs(self, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """What the model is given of it, of some rows."""
        ...

    def raw(self, row: int, prompt: Sequence[int]) -> tuple[list[int], list[Image]]:
        """A row's prompt with one token for each picture, and the pictures: for who reads them itself."""
        ...


class WritesTexts(LanguageModelModule):
    """A language model that writes texts, each once; ``callbacks/generations.py`` keeps them.

    Its class declares ``generations``, and its constructor sets them to ``Generations()``.
    """

    generations: Generations | None = None
    written_by = "test"  # the kind of stage that it is for
    engine: Engine = TransformersEngine()  # what runs the model
    pictures_a_prompt = 0  # at most
    served: Any = None  # the model, where another engine than transformers runs it

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

    def run_by(self, engine: Engine | None) -> None:
        """Choose what runs the model; None: transformers.

        Raises:
            ValueError: it cannot run it, see ``VLLMEngine.require``.
        """
        self.engine = engine or TransformersEngine()
        self.engine.require(self.llm)

    def configure_model(self) -> None:
        """Load the language model, or let the engine do it.

        Raises:
            ModelError: the stage has several processes, and an engine that spreads the model itself.
        """
        if not isinstance(self.engine, VLLMEngine):
            super().configure_model()
        elif self.trainer.world_size > 1:
            raise ModelError(
                "engine=vllm spreads a model over devices itself: take launch.devices=1, and set "
                "engine.tensor_parallel_size"
            )
        elif self.served is None:
            dtype = resolve_dtype(self.llm, self.trainer.strategy.root_device)
            self.served = self.engine.load(self.llm, dtype, self.tokenizer, self.pictures_a_prompt)

    @cached_property
    def writer(self) -> str:
        """A digest of the model that writes, of the type that it computes in here, and of what runs it.

        The device and the rows of a batch are not part of it: they move the last bits only.
        """
        weights = file_digest(self._weights) if self._weights else ""
        dtype = resolve_dtype(self.llm, self.device)
        named = self.engine.named()
        return hashlib.sha256(
            f"{self.llm.digest()} {dtype} {self.adapter!r} {weights} {named}".encode()
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
            if self.served is None:
                more: dict[str, Any] = {}
                if sampling:
                    more["sampler"] = RowSampler(sampling, streams)
                if shown is not None:
                    more["pictures"] = shown.inputs(rows, texts)
                if behind is not None:
                    more["share"] = False
                made = generate(self.model, self.tokenizer, texts, max_new_tokens, held, **more)
            else:
                assert held is None, (
                    "only stages that predict take an engine, and these leave rows free"
                )
                given = [
                    (ids, *(shown.raw(row, ids) if shown else (ids, [])))
                    for row, ids in zip(rows, texts, strict=True)
                ]
                made = self.served.write(given, max_new_tokens, sampling, streams)
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
