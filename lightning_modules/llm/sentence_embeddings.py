"""Texts to vectors: each distinct text is encoded once, ever.

Legend: N texts, B texts of a batch, L tokens, d width.
"""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.nn import functional as F

from datamodules.sources import cache_root
from lightning_modules.llm.backbones import SentenceEncoderSpec, load_sentence_encoder
from lightning_modules.llm.bars import bar_of

logger = logging.getLogger(__name__)
_VERSION = 1  # part of a file's name: raise it when vectors are computed in another way


def pool(hidden: Tensor, mask: Tensor, how: Literal["mean", "cls"]) -> Tensor:
    """One vector (B, d) a text: the mean of its tokens' states, or the first one's.

    Args:
        hidden: last hidden states (B, L, d).
        mask: (B, L), 1 at tokens and 0 at padding.
        how: see ``SentenceEncoderSpec``.
    """
    if how == "cls":
        return hidden[:, 0]
    weights = mask[..., None].to(hidden)  # (B, L, 1)
    return (hidden * weights).sum(1) / weights.sum(1)


def encode_texts(
    spec: SentenceEncoderSpec,
    texts: Sequence[str],
    device: torch.device | str = "cpu",
    batch_size: int = 64,
) -> np.ndarray:
    """Vectors (N, d) float32 of texts; a blank text has the zero vector.

    They are kept in ``$LLMREC_CACHE/embeddings`` under a hash of the encoder and the distinct texts. A second
    process that wants the same (another rank, another run) waits for the first and reads its file.

    Args:
        spec: the encoder.
        texts: (N,).
        device: where to compute; changes the last bits of what is not kept yet, like ``batch_size``.
        batch_size: texts at a time, those of like lengths together.

    Raises:
        DataSourceError: the encoder cannot be had or loaded.
    """
    distinct = sorted({text for text in texts if text.strip()})
    names = [spec.digest(), str(_VERSION), *distinct]
    vectors = kept(
        cache_root() / "embeddings" / f"{_digest(names)}.npy",
        len(distinct),
        lambda: _encode(spec, distinct, device, batch_size),
    )
    place = {text: i for i, text in enumerate(distinct)}
    index = np.fromiter((place.get(text, -1) for text in texts), np.int64, len(texts))
    found = np.zeros((len(texts), vectors.shape[1]), np.float32)
    found[index >= 0] = vectors[index[index >= 0]]
    return found


def kept(file: Path, rows: int, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """The array (rows, d) float32 in ``file``; computed and written first if it is not there.

    Written atomically and under a lock, so that no two processes compute one file. A file that is damaged is
    computed again, with a warning.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock")):
        if file.is_file():
            found, problem = _read(file, rows)
            if found is not None:
                return found
            logger.warning("%s is damaged (%s): it is computed again", file, problem)
        computed = compute()
        part = file.with_name(f".{file.name}.part")  # we hold the lock, so nobody else writes there
        with part.open("wb") as stream:
            np.save(stream, computed)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    return computed


def _read(file: Path, rows: int) -> tuple[np.ndarray | None, str]:
    """The array, or None and what is wrong with the file."""
    try:
        found = np.load(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        return None, str(error).partition("\n")[0]
    if not isinstance(found, np.ndarray) or found.dtype != np.float32:
        return None, "no array of float32"
    if found.ndim != 2 or len(found) != rows:
        return None, f"its shape is {found.shape}, expected {rows} rows"
    # One number instead of a table of truth values; float64 cannot overflow here.
    if not np.isfinite(found.sum(dtype=np.float64)):
        return None, "a value is not finite"
    return found, ""


def _encode(
    spec: SentenceEncoderSpec, texts: Sequence[str], device: torch.device | str, batch_size: int
) -> np.ndarray:
    """Vectors (N, d) of texts; longest first: like lengths share a batch, and one too large fails at once."""
    tokenizer, model = load_sentence_encoder(spec)
    model.to(device)
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    vectors = np.empty((len(texts), model.config.hidden_size), np.float32)
    with bar_of(len(texts), "texts") as bar, torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            tokens = tokenizer(
                [texts[i] for i in chosen], padding=True, padding_side="right", truncation=True,
                max_length=spec.max_length, return_tensors="pt",
            ).to(device)  # fmt: skip
            hidden = model(**tokens).last_hidden_state  # (B, L, d)
            pooled = pool(hidden, tokens["attention_mask"], spec.pooling)  # (B, d)
            vectors[chosen] = (F.normalize(pooled) if spec.normalise else pooled).cpu().numpy()
            bar.update(len(chosen))
    return vectors


def _digest(words: Sequence[str]) -> str:
    """A name of 24 hex digits; each word with its length, so that no two lists run together."""
    digest = hashlib.sha256()
    for word in words:
        encoded = word.encode()
        digest.update(f"{len(encoded)}:".encode() + encoded)
    return digest.hexdigest()[:24]
