"""Settings that only the language model's own files can refuse: one sentence from the real command."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.lightning_modules.tiny_llm import tallrec_words, write_tiny_llm

NAME = "tallrec/movie_64shot"


@pytest.mark.parametrize(
    ("template", "wrong", "told"),
    [(True, "++llm.max_length=60", r"tokens, but \d+ are allowed: raise llm.max_length"),
     (True, "++stages.train.module.adapter.targets=[query]", "has no layer called query; it has down_"),
     (True, "++stages.train.module.learning_rate=1e-50", "lora adapter has not moved in 6 steps"),
     (False, "++llm.chat_template=true", "no chat template: set chat_template=false")],
)  # fmt: skip
def test_what_a_language_model_refuses_is_a_sentence(
    template: bool, wrong: str, told: str,
    run_command: Callable[..., Any], tiny_movielens: Path, tmp_path: Path,
) -> None:  # fmt: skip
    llm = write_tiny_llm(tmp_path / "llm", template=template, longest=1024)
    words = tallrec_words(llm, tiny_movielens, examples=8)
    result = run_command(
        "exp", NAME, *words, "launch.accelerator=cpu", "~stages.reference",
        "++stages.train.trainer.max_epochs=1", wrong, runs=tmp_path / "runs",
    )  # fmt: skip
    assert result.returncode == 2, result.stderr[-2000:]
    first = next(line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert re.search(told, first), result.stderr
    assert "Traceback" not in result.stderr
