"""Prompts to tokens, once: each row is tokenised when a loader first asks for it, and kept on disk.

Legend: B rows, R all rows of a split, L tokens.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from datamodules.sources import cache_root
from datamodules.types import Batch, Histories, Rows
from lightning_modules.errors import ModelError

logger = logging.getLogger(__name__)
AT_ONCE = 2_000  # rows between two ticks of the bar
SPELLED = 16  # rows whose prompts are part of the name that tokens are kept by

# Texts (B,) of rows whose oldest ``skip`` (B,) events are left out.
Texts = Callable[[Rows, np.ndarray], list[str]]


class RowTokens(Protocol):
    """What a method reads of its rows' prompts."""

    limit: int  # tokens that a prompt may have

    @property
    def cut_events(self) -> int:
        """History events that did not fit, over all rows."""
        ...

    def add(self, rows: Rows) -> np.ndarray:
        """Tokenise all rows of a split: their numbers of tokens (R,)."""
        ...

    def of(self, rows: Rows) -> list[np.ndarray]:
        """The tokens of each row, (B,) arrays of L."""
        ...

    def common_prefix(self) -> list[int]:
        """Tokens that all rows known so far begin with; always shorter than the shortest row."""
        ...


class PromptTable:
    """Tokens of the rows that were asked for.

    Rows are known by their places in the histories. Those of histories that are made for one question
    (``Histories.kept``) have the places of others: they are forgotten with the question, and not written.

    Args:
        tokenizer: of transformers.
        texts: the rows' prompts.
        limit: tokens a prompt may have; the oldest events go until it fits.
        name: a digest of all that prompts depend on besides the row: wording, tokenizer, data.
        special_tokens: whether the tokenizer adds its own (a chat template has them in its text).
    """

    def __init__(
        self, tokenizer: Any, texts: Texts, limit: int, name: str, special_tokens: bool = True
    ) -> None:
        self.special_tokens = special_tokens
        self.tokenizer, self.texts, self.limit, self.name = tokenizer, texts, limit, name
        self.cut_events = 0  # history events that did not fit, over all rows
        self._index: dict[tuple[int, int, int], int] = {}
        self._tokens: list[np.ndarray] = []
        self._question: Histories | None = None  # whose rows are known, if not the data's

    def add(self, rows: Rows, show: bool = True) -> np.ndarray:
        """Tokenise all rows of a split: their numbers of tokens (R,)."""
        self._turn_to(rows.histories)
        keys = _keys(rows)
        if any(key not in self._index for key in keys):
            ids, offsets, cut = self._kept(rows, show)
            self.cut_events += cut
            for row, key in enumerate(keys):
                self._index[key] = len(self._tokens)
                self._tokens.append(ids[offsets[row] : offsets[row + 1]])
        return np.array([len(tokens) for tokens in self.of(rows)], dtype=np.int64)

    def of(self, rows: Rows) -> list[np.ndarray]:
        """The tokens of each row, (B,) arrays of L; rows that nobody added are tokenised now."""
        self._turn_to(rows.histories)
        keys = _keys(rows)
        if any(key not in self._index for key in keys):
            self.add(rows, show=False)
        return [self._tokens[self._index[key]] for key in keys]

    def common_prefix(self) -> list[int]:
        """Tokens that all rows known so far begin with; always shorter than the shortest row."""
        return common_beginning(self._tokens)

    def _turn_to(self, histories: Histories) -> None:
        """Forget a question's rows when the next one comes, and the data's when a question comes."""
        question = None if histories.kept else histories
        if question is not self._question:
            self._question, self._index, self._tokens = question, {}, []

    def _kept(self, rows: Rows, show: bool) -> tuple[np.ndarray, np.ndarray, int]:
        """From the file that an earlier run left, or made now."""
        if not rows.histories.kept:
            kept = self._made(rows, show=False)
            return kept["ids"], kept["offsets"], int(kept["cut"][0])
        digest = hashlib.sha256(f"{self.name} {self.limit} {self.special_tokens}".encode())
        for column in (rows.user, rows.start, rows.stop, rows.target):
            digest.update(np.ascontiguousarray(column, dtype=np.int64).tobytes())
        for text in self._spelled(rows):
            digest.update(hashlib.sha256(text.encode()).digest())
        kept = kept_arrays(digest.hexdigest(), lambda: self._made(rows, show))
        return kept["ids"], kept["offsets"], int(kept["cut"][0])

    def _spelled(self, rows: Rows) -> list[str]:
        """Some rows' prompts as they are written today: code that writes others names tokens otherwise."""
        count = len(rows.row)
        some = np.unique(np.linspace(0, count - 1, min(count, SPELLED)).astype(np.int64))
        return self.texts(some_rows(rows, some), np.zeros(len(some), np.int64)) if count else []

    def _made(self, rows: Rows, show: bool) -> dict[str, np.ndarray]:
        made: list[list[int]] = []
        cut = 0
        for first in in_steps(len(rows.row), show):
            part = some_rows(rows, np.arange(first, min(len(rows.row), first + AT_ONCE)))
            ids, dropped = tokenise(
                self.tokenizer, self.texts, part, self.limit, self.special_tokens
            )
            made += ids
            cut += dropped
        flat, offsets = joined(made)
        return {"ids": flat, "offsets": offsets, "cut": np.array([cut], np.int64)}


def kept_arrays(name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What an earlier run has left in the cache under ``name``, or what ``make`` returns, which is then kept.

    Another version of what cuts texts into tokens finds nothing of this one's. A second process waits for the
    first. A file that was cut is made again, with a warning.
    """
    folder = cache_root() / "tokens"
    folder.mkdir(parents=True, exist_ok=True)
    cutters = " ".join(version(package) for package in ("tokenizers", "transformers"))
    digest = hashlib.sha256(f"{name} {cutters}".encode()).hexdigest()[:32]
    file = folder / f"{digest}.safetensors"
    with FileLock(f"{file}.lock"):
        if file.is_file():
            try:
                return load_file(file)
            except (OSError, SafetensorError) as error:
                logger.warning("%s is damaged (%s): it is made again", file, error)
        whole = file.with_suffix(".part")
        save_file(make(), whole)
        whole.replace(file)
        return load_file(file)


def common_beginning(texts: Sequence[np.ndarray]) -> list[int]:
    """Tokens that all texts (L,) begin with; always shorter than the shortest of them."""
    if not texts:
        return []
    first = texts[0]
    same = len(first) - 1
    for tokens in texts:
        same = min(same, len(tokens) - 1)
        parts = np.flatnonzero(tokens[:same] != first[:same])
        same = int(parts[0]) if len(parts) else same
    return [int(i) for i in first[: max(0, same)]]


def tokens_behind(tokenizer: Any, anchor: str, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of texts as they follow ``anchor``: some tokenizers mark the beginning of a text.

    Raises:
        ModelError: the anchor's end and a text's beginning are one token.
    """

    def cut(asked: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(list(asked), add_special_tokens=False)["input_ids"]
        return ids

    (start,) = cut([anchor])
    made = cut([anchor + text for text in texts]) if texts else []
    for text, ids in zip(texts, made, strict=True):
        if ids[: len(start)] != start:
            raise ModelError(
                f"this tokenizer joins {anchor!r} and what follows in {anchor + text!r} into one token: "
                "choose another language model"
            )
    return [ids[len(start) :] for ids in made]


def in_steps(count: int, show: bool = True) -> Iterator[int]:
    """0, ``AT_ONCE``, ... below ``count``, with a bar."""
    with tqdm(total=count, desc="tokenising", disable=None if show else True, leave=False) as bar:
        for first in range(0, count, AT_ONCE):
            yield first
            bar.update(min(AT_ONCE, count - first))


def joined(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """All rows' tokens one after the other, int32, and (R + 1,) where each begins and ends."""
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    flat = np.fromiter((i for ids in rows for i in ids), np.int32, count=int(offsets[-1]))
    return flat, offsets


def tokenise(
    tokenizer: Any, texts: Texts, rows: Rows, limit: int, special_tokens: bool = True
) -> tuple[list[list[int]], int]:
    """Tokens of each row's prompt, at most ``limit``, and how many history events did not fit.

    The oldest events are left out one by one; the item asked about and where the answer begins never are.

    Raises:
        ModelError: a prompt is too long even without any history.
    """
    skip = np.zeros(len(rows.row), dtype=np.int64)

    def cut(asked: list[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(asked, add_special_tokens=special_tokens)["input_ids"]
        return ids

    made = cut(texts(rows, skip))
    events = rows.stop - rows.start
    while long := [i for i, ids in enumerate(made) if len(ids) > limit]:
        if hopeless := [i for i in long if skip[i] >= events[i]]:
            raise ModelError(
                f"a prompt without any history has {len(made[hopeless[0]])} tokens, but {limit} are allowed: "
                "raise llm.max_length"
            )
        skip[long] += 1
        again = cut(texts(some_rows(rows, np.array(long)), skip[long]))
        for i, ids in zip(long, again, strict=True):
            made[i] = ids
    return made, int(skip.sum())


def some_rows(rows: Rows, keep: np.ndarray) -> Rows:
    """Rows by number."""
    per_row = ("row", "user", "start", "stop", "filler", "target", "label", "candidates")
    held = {f.name: getattr(rows, f.name) for f in fields(rows) if f.name in per_row}
    return replace(rows, **{n: v[keep] for n, v in held.items() if v is not None})


def _keys(rows: Rows) -> Sequence[tuple[int, int, int]]:
    assert rows.target is not None
    columns = (rows.start.tolist(), rows.stop.tolist(), rows.target.tolist())
    return list(zip(*columns, strict=True))


def prompts_of(batch: Batch) -> list[list[int]]:
    """(B) token ids without padding."""
    assert batch.tokens is not None
    assert batch.token_mask is not None
    pairs = zip(batch.tokens, batch.token_mask.bool(), strict=True)
    return [ids[real].tolist() for ids, real in pairs]
