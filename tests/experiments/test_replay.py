"""A kept batch is put together again from tensors and plain values alone."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from callbacks.nonfinite import _built
from datamodules.types import TokenBatch
from experiments import replay, replay_step
from experiments.errors import UserError
from tests.conftest import REPO


@dataclasses.dataclass
class Foreign:
    row: torch.Tensor


def again(value: Any) -> Any:
    tensors: dict[str, torch.Tensor] = {}
    node = json.loads(json.dumps(_built("batch", value, tensors)))
    return replay_step.rebuilt(node, tensors)


def test_a_batch_is_what_it_was() -> None:
    ones = torch.ones(2, 3)
    batch = TokenBatch(ones.long(), ones, ones[:, :1], torch.tensor(6.0), columns=torch.arange(1))
    found = again((batch, {"pixels": [ones.bfloat16()], "keys": ("a", 1, None, True)}))
    assert isinstance(found, tuple)
    assert type(found[0]) is TokenBatch
    for one in dataclasses.fields(batch):
        mine, theirs = getattr(found[0], one.name), getattr(batch, one.name)
        assert (mine is None) == (theirs is None)
        assert mine is None or (mine.dtype == theirs.dtype and torch.equal(mine, theirs))
    assert found[1]["keys"] == ("a", 1, None, True)
    assert torch.equal(found[1]["pixels"][0], ones.bfloat16())


def test_what_is_not_ours_or_was_not_kept_is_refused() -> None:
    with pytest.raises(UserError, match="which is no batch of ours"):
        again(Foreign(torch.ones(1)))
    with pytest.raises(UserError, match="which is no batch of ours"):
        replay_step.rebuilt({"type": "experiments.stage.main", "fields": {}}, {})
    with pytest.raises(UserError, match=r"holds .*object.* could not be kept"):
        again([object()])


def test_a_wrong_path_is_told_without_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "import sys; from experiments import replay; told = replay.main([sys.argv[1]]); "
    words += "sys.exit(9 if 'torch' in sys.modules else told)"
    done = subprocess.run(
        [sys.executable, "-c", words, str(tmp_path / "nothere")],
        cwd=REPO, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "nothere' is no batch that a run has kept" in done.stderr
    monkeypatch.setenv("BATCH", " ")
    assert replay.main([]) == 2
    assert capsys.readouterr().err.startswith("error: BATCH is missing: give the nonfinite.")


def test_files_that_are_no_kept_batch_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "nonfinite.0.safetensors"
    assert replay.main([str(tmp_path / "best.ckpt")]) == 2
    assert "is no batch that a run has kept" in capsys.readouterr().err
    save_file({"batch.row": torch.ones(1)}, file)
    assert replay.main([str(file)]) == 2
    assert "cannot be read" in capsys.readouterr().err
    (tmp_path / "stage.json").write_text('{"spec": {}}')
    file.with_suffix(".json").write_text('{"batch": {"batch.epoch": 1}}')
    assert replay.main([str(file)]) == 2
    assert "kept by older code" in capsys.readouterr().err
