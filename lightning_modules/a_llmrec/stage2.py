"""A-LLMRec's second stage: a frozen language model reads users and items through trained projectors.

Legend: B rows, C candidates, L tokens, A answer tokens, N soft tokens, R rows of a split, I items; widths: d
of collaborative vectors, l of what stage 1 made of them, H of the language model's embeddings.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import numpy as np
import polars
import torch
from torch import Tensor

from datamodules.types import NO_TITLE, TRAIN, VALID, Batch, Collator, ItemWords, Rows
from lightning_modules.a_llmrec.advice import reason
from lightning_modules.a_llmrec.frozen import ItemTokens, ReadsFrozen, UnseenItems, freeze_sources
from lightning_modules.a_llmrec.model import Projector, make_projectors, require_moved
from lightning_modules.a_llmrec.prompts import USER, ChoiceCollator, ChoiceTable
from lightning_modules.a_llmrec.stage1 import Stage1Module
from lightning_modules.base import RankingModule
from lightning_modules.errors import ModelError
from lightning_modules.item_texts import without_years
from lightning_modules.llm.candidate_scoring import Listed, listed_scores
from lightning_modules.llm.label_scoring import answer_losses, last_logits
from lightning_modules.llm.prompt_tokens import prompts_of
from lightning_modules.llm.sharding import ShardedStrategy
from lightning_modules.llm.soft_tokens import soft_tokens
from lightning_modules.llm.specs import AdapterSpec, BackboneSpec
from lightning_modules.llm.tuning import LanguageModelModule
from lightning_modules.llm.wording import required_words
from lightning_modules.next_item import NextItemModule

ChoiceLoss = Literal["answer", "candidates"]


class Stage2Module(ReadsFrozen, LanguageModelModule, RankingModule):
    """Alignment with a language model (Kim et al., KDD 2024, arXiv 2404.11343, section 4.2).

    The projectors F_U and F_I are trained, by the loss of the target's title behind a prompt that lists it
    among others; all else is frozen, unless an adapter is asked for. A candidate's score is the likelihood of
    its title behind the prompt. The states x^u of the training, validation and test rows are computed apart,
    each from what stands before its target.

    Args:
        catalog, item_words: given by the runner from the data.
        llm, adapter: see ``LanguageModelModule``; without an adapter the language model is frozen.
        alignment: the first stage, with its backbone and with the checkpoint ``alignment.weights``.
        backbone, backbone_weights: a collaborative model in its place; nothing is aligned.
        user_token: begin with the user's soft token.
        item_tokens: behind each title, ``item``: the latent vector of its collaborative vector; ``text``: of
            its text, "A-LLMRec (SBERT)"; ``by_coldness``: of its text where it is cold and has one;
            ``collaborative``: no alignment, the backbone's own vector (MLP-LLM); ``random``; ``none``.
        projector_gain: see ``Projector``; None: soft tokens begin about as large as the model's embeddings.
        cold_share: of the items, the least trained ones, that ``by_coldness`` takes as cold.
        unseen_items: how x^u's backbone reads items that it never met in training: by their ``own`` vectors,
            which are random, or as the alignment rebuilds them from their ``text``.
        max_length: newest items that a prompt shows.
        num_candidates: that a training target is chosen among, itself included.
        title_tokens: tokens of a title in its quotes, at most.
        years: show the year that a film's title ends with; without them see ``without_years``.
        normalise: score by the mean over a title's tokens, not by their sum.
        loss: ``answer``: the cross-entropy of the tokens of the target's title and of the end, as published;
            ``candidates``: of the target among the candidates, by the scores that evaluation ranks by.
        max_users: train on so many users, drawn by the seed; None takes all.
        max_valid: validate on so many rows, drawn by the seed; None takes all.
        options: of the training, see ``LanguageModelModule``.

    Raises:
        ValueError: settings that do not go together; data that do not say what their items are called.
    """

    newest_target = True
    reads_requests = True
    lettered = False  # whether a candidate's letter is asked for, not its title

    def __init__(
        self,
        catalog: polars.DataFrame,
        item_words: ItemWords | None,
        llm: BackboneSpec,
        adapter: AdapterSpec | None = None,
        alignment: Stage1Module | None = None,
        backbone: NextItemModule | None = None,
        backbone_weights: str | None = None,
        user_token: bool = True,
        item_tokens: ItemTokens = "item",
        projector_gain: float | None = None,
        cold_share: float = 0.35,
        unseen_items: UnseenItems = "own",
        max_length: int = 10,
        num_candidates: int = 20,
        title_tokens: int = 32,
        years: bool = True,
        normalise: bool = True,
        loss: ChoiceLoss = "answer",
        max_users: int | None = None,
        max_valid: int | None = None,
        **options: Any,
    ) -> None:
        adapter = adapter or AdapterSpec(method="none")
        super().__init__(llm=llm, adapter=adapter, max_length=max_length, **options)
        for name, value, least in (
            ("num_candidates", num_candidates, 2), ("title_tokens", title_tokens, 3),
            ("max_users", max_users, 1), ("max_valid", max_valid, 1),
        ):  # fmt: skip
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}, expected at least {least}")
        if loss not in get_args(ChoiceLoss):
            raise ValueError(f"loss is {loss!r}, expected {' or '.join(get_args(ChoiceLoss))}")
        if not 0 < cold_share < 1:
            raise ValueError(f"cold_share is {cold_share}, expected a share between 0 and 1")
        if self.adapter.adds_tokens:
            raise ValueError(f"adapter {self.adapter.method} adds tokens of its own: take lora")
        freeze_sources(alignment, backbone, backbone_weights, user_token, item_tokens, unseen_items)
        self.alignment, self.backbone, self.unseen_items = alignment, backbone, unseen_items
        self.item_tokens, self.cold_share = item_tokens, cold_share
        self.user_token, self.projector_gain = user_token, projector_gain
        self.normalise, self.num_candidates = normalise, num_candidates
        self.loss = loss
        self.item_words, self.title_tokens = required_words(item_words), title_tokens
        titles = [title or "" for title in catalog["title"]]
        self.titles = titles if years else without_years(titles)  # (I,)
        limits = {TRAIN: max_users, VALID: max_valid}
        self.most_rows = {code: most for code, most in limits.items() if most is not None}
        # As wide as the parts turn out to be.
        self.user_projector: Projector | None = None
        self.item_projector: Projector | None = None
        self._split = "train"

    # Life ----------------------------------------------------------------------------------------------

    def untrainable(self, trainer: pl.Trainer) -> str | None:
        """Without soft tokens and adapter there is nothing to train."""
        if not self.user_token and self.item_tokens == "none" and self.adapter.method == "none":
            return "user_token=false, item_tokens=none and adapter none leave nothing to train"
        return super().untrainable(trainer)

    def sharded_strategy(self, devices: int) -> ShardedStrategy:
        """Refuse: projectors outside of the language model would learn apart on each device."""
        raise ValueError("Stage2Module's projectors cannot be spread: take launch.strategy=ddp")

    def setup(self, stage: str) -> None:
        """Refuse to test projectors that nobody has trained.

        Raises:
            ModelError: they were given no weights.
        """
        super().setup(stage)
        projects = self.user_token or self._has_slots
        if stage in ("test", "predict") and projects and self.model is None and not self._weights:
            raise ModelError(
                "the projectors were given no weights, so that the language model would read random vectors: "
                "give the stage inputs: {weights: stage2/best.ckpt}"
            )

    def configure_model(self) -> None:
        """Load what is frozen, then the language model, then make the projectors."""
        if self.model is None and self.alignment is not None:
            self.alignment.configure_model()
            self.alignment.requires_grad_(False).eval()
        super().configure_model()

    def add_parts(self, device: torch.device, seed: int) -> None:
        """The projectors, drawn from the seed."""
        user, item = self._projectors(seed)
        self.user_projector = None if user is None else user.to(device)
        self.item_projector = None if item is None else item.to(device)

    def _projectors(self, seed: int) -> tuple[Projector | None, Projector | None]:
        """F_U and F_I as they are before training; None where nothing is projected."""
        table = self.model.get_input_embeddings().weight  # (V, H)
        with torch.no_grad():
            part = self.collaborative
            size = 0 if part is None else part.item_vectors().shape[1]
        latent = size
        if self.alignment is not None and self.item_tokens != "collaborative":
            latent = self.alignment.latent_size
        items = (latent or table.shape[1]) if self._has_slots else None
        return make_projectors(
            seed, table, size if self.user_token else None, items, self.projector_gain
        )

    @property
    def item_size(self) -> int:
        """Of what F_I projects."""
        assert self.item_projector is not None
        return self.item_projector.size

    @property
    def _has_slots(self) -> bool:
        return self.item_tokens != "none"

    def remarks(self) -> list[str]:
        """What prompts lost."""
        notes = (
            (self.table.cut_events, f"of the histories' items did not fit into {self.table.limit} tokens"),
            (self.table.cut_titles, f"titles were cut to {self.title_tokens} tokens"),
            (sum(not title.strip() for title in self.titles),
             f"items have no title and are shown as {NO_TITLE}"),
        )  # fmt: skip
        return [*super().remarks(), *(f"{count:,} {what}" for count, what in notes if count)]

    # Tokens ----------------------------------------------------------------------------------------------

    @property
    def table(self) -> ChoiceTable:
        """The tokens of all prompts, which hold what is asked for now."""
        self._table.ask(self.request)
        return self._table

    @cached_property
    def _table(self) -> ChoiceTable:
        limit = self.llm.max_length - self.title_tokens - 1  # room for an answer and its end
        return ChoiceTable(
            self.tokenizer, self.item_words, self.titles, self.llm.chat_template, limit,
            self.max_length, self.title_tokens, self.user_token, self._has_slots, lettered=self.lettered,
        )  # fmt: skip

    def row_lengths(self, rows: Rows) -> np.ndarray:
        """(R,) tokens of each prompt."""
        return self.table.measure(rows)

    def collator(self, training: bool) -> Collator:
        """Prompts with their slots, and in training by ``answer`` with the target's title behind."""
        return ChoiceCollator(self.table, training and self.loss == "answer")

    def soft(self, batch: Batch, split: str) -> AbstractContextManager[None]:
        """While it is open the language model reads the rows' vectors at their slots."""
        assert batch.slots is not None
        where = batch.slots != 0  # (B, L)
        kind = batch.slots[where]  # (N,)
        if not len(kind):
            return nullcontext()
        owner = where.nonzero()[:, 0]  # (N,)
        vectors = []
        if self.user_projector is not None:
            vectors.append(self.user_projector(self.user_states(split)[batch.row]))  # (B, H)
        users = sum(map(len, vectors))
        place = owner.clone()
        if self.item_projector is not None:
            is_item = kind != USER
            distinct, which = kind[is_item].unique(return_inverse=True)
            vectors.append(self.item_projector(self.item_states()[distinct]))
            place[is_item] = users + which
        return soft_tokens(self.model, where, torch.cat(vectors)[place])

    # Training --------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """The mean over the rows of the whole global batch of each row's cross-entropy."""
        assert batch.weight is not None  # 0 at rows that only keep ranks in step
        assert batch.normaliser is not None
        each = (self._answer_losses if self.loss == "answer" else self._choice_losses)(batch)
        loss: Tensor = (each * batch.weight).sum() / batch.normaliser
        self.log_train_loss(loss)
        return loss

    def _answer_losses(self, batch: Batch) -> Tensor:
        """(B,) mean over the tokens of the target's title and of the end."""
        assert batch.tokens is not None
        assert batch.token_mask is not None
        assert batch.answers is not None
        with self.soft(batch, "train"):
            logits = last_logits(
                self.model, batch.tokens, batch.token_mask, batch.answers.shape[1]
            )  # (B, A, V): the head runs on no other position
        return answer_losses(logits, batch.answers)

    def _choice_losses(self, batch: Batch) -> Tensor:
        """(B,) of the target among the candidates."""
        assert batch.target is not None
        return self._listed(batch, "train").losses(batch.target)

    def on_train_end(self) -> None:
        """Sound the alarm when a projector has not moved.

        Raises:
            ValueError: one is as it was made, or see ``LanguageModelModule``.
        """
        super().on_train_end()
        seed: int = self.trainer.datamodule.seed  # type: ignore[attr-defined]
        pairs = zip((self.user_projector, self.item_projector), self._projectors(seed), strict=True)
        for now, before in pairs:
            require_moved(now, before, self.trainer.global_step)

    # Evaluation ------------------------------------------------------------------------------------------

    def _reset(self, split: str) -> None:
        """Fresh sums, and which rows' users are meant."""
        super()._reset(split)
        self._split = split

    def encode(self, batch: Batch) -> Listed:
        """Log-likelihoods of the titles of all candidates, in one pass."""
        return self._listed(batch, self._split)

    def _listed(self, batch: Batch, split: str) -> Listed:
        assert batch.candidates is not None
        with self.soft(batch, split):
            return listed_scores(
                self.model, prompts_of(batch), batch.candidates, self.candidate_titles(batch),
                self.tokenizer.pad_token_id, self.normalise,
            )  # fmt: skip

    def candidate_titles(self, batch: Batch) -> list[list[list[int]]]:
        """(B) lists of the tokens of each candidate's quoted title; none of padding."""
        assert batch.candidates is not None
        return [
            [self.table.title(i) if i else [] for i in row] for row in batch.candidates.tolist()
        ]

    @property
    def retriever(self) -> NextItemModule | None:
        """The backbone."""
        return self.collaborative

    def on_predict_epoch_start(self) -> None:
        """The users that are asked for are those of the test rows."""
        self._split = "test"
        self.forget_users("test")

    def reasons(self, batch: Batch, items: Tensor) -> list[str]:
        """In the language model's words, which nobody has checked; of batches of one row."""
        return [reason(self, batch, int(items[0]))]

    def score(self, state: Listed, items: Tensor) -> Tensor:
        """(B, C) of items (C,) or (B, C) that the prompts list; raises ValueError where one does not."""
        return state.of(items)
