"""A model's files, written by whichever process comes first."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def save_model(model: Any, folder: Path) -> None:
    """``save_pretrained`` of a model of transformers, on any rank.

    Where processes are joined transformers saves on rank 0 alone, and leaves the others' folders without
    weights. Here one process fills a folder of its own under a lock, and any rank may be that one.
    """
    model.should_save_on_this_rank = lambda is_main_process: True
    model.save_pretrained(folder)
