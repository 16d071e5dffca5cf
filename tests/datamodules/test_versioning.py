"""Digests of code: what is remembered between runs must never hide a change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
DIGEST = """
import sys
from pathlib import Path
from datamodules.versioning import code_digest
print(code_digest([Path(sys.argv[1])]))
"""


def _digest(file: Path, cache: Path) -> str:
    environment = {**os.environ, "LLMREC_CACHE": str(cache), "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", DIGEST, str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_comments_do_not_count_and_code_does(tmp_path: Path) -> None:
    file, cache = tmp_path / "part.py", tmp_path / "cache"
    file.write_text('"""What it is."""\nanswer = 41\n')
    first = _digest(file, cache)
    assert json.loads((cache / "index" / "code.json").read_text())[str(file)]
    assert _digest(file, cache) == first
    file.write_text('"""Told otherwise."""\n\nanswer = 41  # nearly\n')
    assert _digest(file, cache) == first
    file.write_text('"""Told otherwise."""\n\nanswer = 42  # nearly\n')
    assert _digest(file, cache) != first


@pytest.mark.parametrize("text", ["", "{", "[]", '{"%s": 3}', '{"%s": [[1, 2, "x"], "made up"]}'])
def test_a_memory_that_is_broken_or_of_another_time_is_not_believed(
    text: str, tmp_path: Path
) -> None:
    file = tmp_path / "part.py"
    file.write_text("answer = 41\n")
    expected = _digest(file, tmp_path / "fresh")
    memory = tmp_path / "cache" / "index" / "code.json"
    memory.parent.mkdir(parents=True)
    memory.write_text(text.replace("%s", str(file)))
    assert _digest(file, tmp_path / "cache") == expected


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path: Path) -> None:
    file = tmp_path / "part.py"
    file.write_text("answer = 41\n")
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert _digest(file, tmp_path / "cache") == _digest(file, tmp_path / "fresh")
