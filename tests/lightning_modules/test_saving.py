"""Whichever rank comes first leaves a whole model."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_modules.llm.model_files import require_model
from lightning_modules.llm.random_models import RandomModel


def test_any_rank_writes_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What transformers asks before it saves, as a second rank would be told.
    monkeypatch.setattr(
        "transformers.distributed.mixin._is_torch_distributed_initialized", lambda: True
    )
    monkeypatch.setattr("transformers.distributed.mixin._get_torch_distributed_rank", lambda: 1)
    RandomModel().write(tmp_path)
    assert require_model(tmp_path) == tmp_path
