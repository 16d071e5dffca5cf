"""MLLM-SRec's recommender: MLLM-MSR's, with a user's profile and the steps of a chain of thought.

Legend: B rows, I items.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import polars as pl

from datamodules.samplers import others
from datamodules.types import NO_TITLE, ItemImages, ItemWords
from lightning_modules.item_texts import Field, item_texts
from lightning_modules.llm.specs import AdapterSpec, BackboneSpec, Quantization
from lightning_modules.llm.wording import as_data
from lightning_modules.mllm_msr.module import MLLMMSRModule
from lightning_modules.mllm_msr.preferences import Preferences
from lightning_modules.mllm_msr.prompts import USER
from lightning_modules.mllm_msr.texts import cut_to
from lightning_modules.mllm_srec.profiles import Profiles
from lightning_modules.mllm_srec.prompts import SRecPrompt, Step
from lightning_modules.mllm_srec.texts import CandidateTexts, ProfiledUserTexts

Texts = Literal["own", "swapped"]


class MLLMSRecModule(MLLMMSRModule):
    """MLLM-SRec (Sci. Rep. 2025, s41598-025-14251-1): the recommender that is tuned on yes and no.

    A prompt has the fields of its Table 1: the instruction; the user's number (left out unless ``user_id``:
    it says nothing of taste, and leaks what is learned of single users); a profile (``Profiles`` says what
    the paper leaves open); the preference text (TUBC), or the history where there is none; the target as
    image and text. The response is ``Yes.`` or ``No.``; p = sigmoid(margin), as in MLLM-MSR.

    With ``chain`` it is the last of four steps: what the others have found out about candidate (VIU, IMSG)
    and user (TUBC), each written once and cached, is numbered in the prompt, then the decision is asked for.
    A step that was not run is no part of the chain.

    Args:
        catalog, item_words, item_images, user_facts: given by the runner from the data.
        llm, adapter, preferences, candidate_first, pictures: see ``MLLMMSRModule``.
        history: of the catalogue, what a listed item is told by, where no preferences are.
        chain: the candidate's steps: ``picture`` (VIU) and ``fusion`` (IMSG), columns of the catalogue; None
            tells none and numbers nothing.
        told: tell what is written of a candidate: its title and ``fields``; without it the picture alone is
            shown.
        texts: ``swapped`` tells of each candidate another item's title, always the same, beside its own
            picture: contradictory text, a probe. What stages wrote follows, so that no step tells what was
            taken away: with ``pictures: swapped`` both steps are those of the picture's item, with
            ``blank`` both are unknown; with ``texts: swapped`` the summary, which joins both, is the title's.
        profile: tell a profile.
        side: columns of the data's users that a profile tells, where there are such.
        user_id: tell the user's number.
        profile_tokens: of a profile, at most.
        quantization: of the language model while it is tuned and asked, whatever ``llm`` says for the stages
            that write; None leaves it as it is.
        options: see ``MLLMMSRModule``; ``text_tokens`` limits each text, a listed item's and a step's, too.

    Raises:
        ValueError: an unknown choice, a step that is no column of the catalogue, nothing to tell of a
            candidate, or see ``MLLMMSRModule``.
    """

    def __init__(
        self,
        catalog: pl.DataFrame,
        item_words: ItemWords | None,
        user_facts: pl.DataFrame,
        llm: BackboneSpec,
        adapter: AdapterSpec,
        item_images: ItemImages | None = None,
        history: Sequence[Field] = ("title",),
        chain: Sequence[Step] | None = None,
        told: bool = True,
        texts: Texts = "own",
        profile: bool = True,
        side: Sequence[str] = ("age", "occupation"),
        user_id: bool = False,
        profile_tokens: int = 48,
        quantization: Quantization | None = None,
        **options: Any,
    ) -> None:
        spec = llm if quantization is None else replace(llm, quantization=quantization)
        super().__init__(catalog, item_words, spec, adapter, item_images=item_images, **options)
        self._require_sense(catalog, history, chain, told, texts, profile_tokens)
        self.history, self.told = tuple(history), told
        chain = None if chain is None else tuple(chain)
        self.prompt: SRecPrompt = SRecPrompt(self.prompt.words, self.prompt.candidate_first, chain)
        titled = catalog.with_columns(title=pl.Series(self.titles, dtype=pl.String))
        self.listed = [text or NO_TITLE for text in item_texts(titled, self.history)]  # (I,)
        named = item_texts(titled, ("title", *self.fields))
        whose = self._owners(texts, len(catalog))
        self.names = [named[i] for i in whose["title"]]  # (I,) what is written of candidates
        self.notes = {str(step): self._notes(catalog, step, whose[step]) for step in chain or ()}
        self.profiles = Profiles(self.prompt.words, catalog, user_facts, side) if profile else None
        self.profile_tokens, self.user_id = profile_tokens, user_id

    def _require_sense(
        self,
        catalog: pl.DataFrame,
        history: Sequence[str],
        chain: Sequence[str] | None,
        told: bool,
        texts: str,
        profile_tokens: int,
    ) -> None:
        if unknown := set(chain or ()) - set(get_args(Step)):
            known = ", ".join(get_args(Step))
            raise ValueError(f"chain names {', '.join(sorted(unknown))}, expected some of {known}")
        if texts not in get_args(Texts):
            raise ValueError(f"texts is {texts!r}, expected one of {', '.join(get_args(Texts))}")
        if profile_tokens < 1:
            raise ValueError(f"profile_tokens is {profile_tokens}, expected at least 1")
        if not history:
            raise ValueError(
                "history is empty: name what a listed item is told by, such as [title]"
            )
        if texts == "swapped" and (len(catalog) < 2 or not (told or "fusion" in (chain or ()))):
            raise ValueError(
                "texts=swapped needs two items of which something written is told: set told=true, or "
                "texts=own"
            )
        if not told and self.shown is None and not chain:
            raise ValueError(
                "told=false and pictures=none leave nothing to tell of a candidate: set one of them"
            )

    def _owners(self, texts: Texts, count: int) -> dict[str, np.ndarray]:
        """(I,) whose title, and whose text by each step, a candidate has: all follow what a probe changes."""
        every = np.arange(count)
        seen = every if self.shown is None else self.shown.of[1:] - 1
        if texts == "own":
            return {"title": every, "picture": seen, "fusion": seen}
        other = others(every)
        return {"title": other, "picture": seen, "fusion": other}

    def _notes(self, catalog: pl.DataFrame, step: Step, whose: np.ndarray) -> list[str]:
        """(I,) what a step has written; "" of items whose picture is grey, where nothing could be seen."""
        every = item_texts(catalog, [step])
        told = [every[i] for i in whose]
        if self.shown is None or self.shown.which != "blank":
            return told
        return [
            "" if there else text for text, there in zip(told, self.shown.mask[1:], strict=True)
        ]

    # Words ---------------------------------------------------------------------------------------------

    @cached_property
    def item_texts(self) -> CandidateTexts:  # type: ignore[override]
        """The candidates' parts of prompts."""
        return CandidateTexts(
            self.frames, self.prompt, self.tokenizer, self.names if self.told else None, self.notes,
            self.text_tokens, None if self.shown is None else self.shown.mask, len(self.titles),
        )  # fmt: skip

    @cached_property
    def listed_items(self) -> list[str]:
        """(I + 1,) what histories list."""
        return ["", *self.as_lines(self.listed)]

    def as_lines(self, texts: Sequence[str]) -> list[str]:
        """Texts of others as prompts have them."""
        plain = as_data(texts, self.tokenizer)
        return cut_to(self.tokenizer, plain, [self.text_tokens] * len(plain))

    @cached_property
    def user_texts(self) -> ProfiledUserTexts:
        """The users' parts of prompts; they may have what the longest item's part leaves."""
        room = self.llm.max_length - self.answer_room() - int(self.items.lengths.max())
        return ProfiledUserTexts(
            self.frames, self.prompt, self.tokenizer, self.listed_items, self.told_preferences,
            room, self.max_length, profiles=self.profiles, named=self.user_id,
            most=self.profile_tokens,
        )  # fmt: skip

    @property
    def told_preferences(self) -> Preferences | None:
        """The preferences that prompts tell."""
        return self.preferences

    def example_prompt(self) -> str:
        """A question about somebody of whom nothing is known."""
        user = self.frames.user.replace(USER, self.prompt.preference(""))
        return self.frames.whole(user, self.item_texts.parts[1])

    def wording(self) -> str:
        """The prompt's words, and what is told of users."""
        preferences = self.told_preferences
        known = self.listed_items if preferences is None else preferences.digest
        kinds = None if self.profiles is None else [self.profiles.kinds, self.profiles.side]
        sizes = [self.max_length, self.profile_tokens, self.user_id]
        told = [self.prompt.history(titles) for titles in ([], ["X"], ["X", "Y", "Z"])]
        told += [self.prompt.preference(text) for text in ("", "X Y")]
        frames = [self.frames.user, self.frames.item, *told]
        words = [frames, self.prompt.words.past, known, kinds, sizes]
        return hashlib.sha256(json.dumps(words).encode()).hexdigest()
