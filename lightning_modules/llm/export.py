"""A trained language model for others: PEFT's adapter folder, and plain weights with it merged in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightning_modules.errors import ModelError
from lightning_modules.llm.adapters import merged, save_adapter
from lightning_modules.llm.specs import AdapterSpec

ADAPTER, MERGED = "adapter", "merged"


def export_model(model: Any, tokenizer: Any, adapter: AdapterSpec, folder: Path) -> dict[str, Path]:
    """Write what ``adapter`` has trained; ``model`` is taken apart.

    ``adapter/`` loads in plain PEFT, ``merged/`` in plain transformers and in servers that read its folders.
    Weights that were quantized are unpacked before an adapter is merged into them, so that the merged model
    computes what was trained and evaluated.

    Args:
        model: the trained model, as ``attach_adapter`` made it.
        tokenizer: goes into ``merged/``.
        adapter: what of it was trained.
        folder: made if need be; files of the same names are overwritten.

    Returns:
        What was written, by kind.

    Raises:
        ModelError: nothing was trained.
    """
    if adapter.method == "none":
        raise ModelError("its adapter is none: nothing was trained, so there is nothing to export")
    written: dict[str, Path] = {}
    if adapter.method != "full":
        save_adapter(model, folder / ADAPTER)
        written[ADAPTER] = folder / ADAPTER
    if not adapter.adds_tokens:
        dtype = _kept_dtype(model)
        whole = model.to(dtype) if adapter.method == "full" else merged(model, dtype)
        whole.config.use_cache = True  # off in training alone
        whole.save_pretrained(folder / MERGED, safe_serialization=True)
        tokenizer.save_pretrained(folder / MERGED)
        written[MERGED] = folder / MERGED
    return written


def _kept_dtype(model: Any) -> torch.dtype:
    """The type of the weights that are neither trained nor quantized; without any, what it was loaded in."""
    kept = (p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point())
    loaded: torch.dtype = model.config.dtype
    return next(kept, loaded)
