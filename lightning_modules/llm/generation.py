"""Answers that are written out: greedy or drawn, free or held to a list, and matched without mercy.

Scoring is cheaper and never fails to answer (``label_scoring``, ``candidate_scoring``). Writing is for what
has no list of answers, and to measure how often a model that writes says something that can be used.

Legend: B rows, L tokens.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lightning_modules.llm.label_scoring import SharedPrefix, pad_left
from lightning_modules.llm.masks import layer_windows
from lightning_modules.llm.prompt_tokens import common_beginning
from lightning_modules.llm.sampling import RowSampler

_WORTH_READING_ONCE = 32  # tokens that all prompts of a batch begin with
_QUOTES = "\"'`“”‘’«»*_ \t\n"


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    choices: Sequence[Sequence[Sequence[int]]] | None = None,
    sampler: RowSampler | None = None,
    pictures: Mapping[str, torch.Tensor] | None = None,
    share: bool = True,
) -> list[list[int]]:
    """New tokens of each row, greedily chosen or drawn, up to the end of its text.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer; tells what pads and what ends a text.
        prompts: (B) token ids.
        max_new_tokens: at most.
        choices: (B) lists of token sequences, one of which a row must write; None leaves it free.
        sampler: draws each row's next token; None takes the likeliest.
        pictures: what the prompts show, as ``pictures.beside`` gives it for these rows.
        share: read what all prompts begin with (an instruction, worked examples) once, where the model can
            and no pictures are shown; False where equal tokens do not mean the same.

    Raises:
        ValueError: a row has no choice, or one without tokens.
    """
    opening = _opening(model, prompts) if share and pictures is None else []
    rests, mask = pad_left([ids[len(opening) :] for ids in prompts], tokenizer.pad_token_id)
    # Padding stands between the opening and each row's own tokens.
    first = torch.tensor([opening] * len(prompts), dtype=torch.long).view(len(prompts), -1)
    tokens = torch.cat([first, rests], dim=1)  # (B, L)
    mask = torch.cat([torch.ones_like(first), mask], dim=1)  # (B, L)
    end, ends = tokenizer.eos_token_id, ends_of(model, tokenizer)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if choices is not None:
        tries = [TokenTrie(row, end) for row in choices]
        width = tokens.shape[1]
        options["max_new_tokens"] = 1 + max(len(c) for row in choices for c in row)
        options["prefix_allowed_tokens_fn"] = lambda row, ids: tries[row].after(
            ids[width:].tolist()
        )
    if sampler is not None:  # what it draws is the only token left, and so the likeliest
        options["logits_processor"] = [sampler]
    options |= {name: value.to(model.device) for name, value in (pictures or {}).items()}
    with torch.no_grad():
        if opening:
            options["past_key_values"] = SharedPrefix(model, opening).cache(len(prompts))
        out = model.generate(
            input_ids=tokens.to(model.device),
            attention_mask=mask.to(model.device),
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=None,  # some models' files ask for one (Qwen2.5-VL: 1.05)
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=ends,
            **options,
        )
    return [until(row, ends) for row in out[:, tokens.shape[1] :].tolist()]


def _opening(model: Any, prompts: Sequence[Sequence[int]]) -> list[int]:
    """Tokens that all prompts begin with, if reading them once is possible and worth it.

    Windows are counted in columns by ``generate``, padding included; adapters that add tokens keep a cache of
    their own.
    """
    windows = layer_windows(model)
    adapter = getattr(model, "active_peft_config", None)
    adds_tokens = bool(getattr(adapter, "is_prompt_learning", False))
    if len(prompts) < 2 or adds_tokens or windows is None or any(windows.values()):
        return []
    shared = common_beginning([np.asarray(ids) for ids in prompts])
    return shared if len(shared) >= _WORTH_READING_ONCE else []


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a text: the tokenizer's, and those that the model's files name (Gemma: of a turn)."""
    told = getattr(model.generation_config, "eos_token_id", None)
    more = told if isinstance(told, list) else [] if told is None else [told]
    return [*dict.fromkeys([tokenizer.eos_token_id, *more])]


def until(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Tokens before the first that ends a text."""
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


class TokenTrie:
    """Which tokens may come next when one of some token sequences is written.

    Args:
        sequences: the allowed ones; one may begin with another.
        end: the token that ends a text.

    Raises:
        ValueError: there is none, or one is empty.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], end: int) -> None:
        if not sequences or not all(len(s) for s in sequences):
            raise ValueError("constrained decoding needs choices of at least one token each")
        self.end = end
        self.root: dict[int, Any] = {}
        for sequence in sequences:
            node = self.root
            for token in (*sequence, end):
                node = node.setdefault(int(token), {})

    def after(self, written: Sequence[int]) -> list[int]:
        """Tokens that may follow what is written; ``end`` alone where a text has ended."""
        node = self.root
        for token in written:
            node = node.get(int(token), {})
        return sorted(node) or [self.end]


def plain(text: str) -> str:
    """Without quotes, emphasis and blanks around, in one case and one Unicode form."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).strip(_QUOTES)).casefold()


def match_answer(text: str, answers: Sequence[str]) -> int | None:
    """Which answer a text begins with: its index, or None where it begins with none.

    The answer must end where a word ends, and the longest one wins: "Aliens" is not the answer "Alien". A
    text that only mentions an answer further on is no answer: what comes before might deny it.
    """
    said = plain(text)
    found = None
    for index, answer in enumerate(answers):
        wanted = plain(answer)
        follows = said[len(wanted) : len(wanted) + 1]
        fits = bool(wanted) and said.startswith(wanted) and not follows.isalnum()
        if fits and (found is None or len(wanted) > len(plain(answers[found]))):
            found = index
    return found


def valid_rate(texts: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Share of texts that are one of their row's answers; the others are refusals or inventions."""
    if not texts:
        return float("nan")
    rows = zip(texts, answers, strict=True)
    return sum(match_answer(text, row) is not None for text, row in rows) / len(texts)
