"""Files of a finished run that a full disk or a broken copy has cut: told in a sentence, or made anew."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from experiments import page, page_texts, results, significance
from experiments.errors import UserError
from experiments.intervals import scores_columns
from tests.recipes.conftest import EXPERIMENT, Finished


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Finished:
    runs = tmp_path / "runs"
    shutil.copytree(finished.runs, runs)
    return Finished(runs, finished.result)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("stage", "name", "untested", "told"),
    [("evaluate", "metrics.json", False, "metrics.json is missing or damaged: delete that folder"),
     ("train", "best.ckpt", True, "best.ckpt cannot be read")],
)  # fmt: skip
def test_results_and_weights_that_were_cut_are_named(
    copied: Finished, run_command: Callable[..., Any], tiny: list[str],
    stage: str, name: str, untested: bool, told: str,
) -> None:  # fmt: skip
    cut(copied.folder(stage) / name)
    if untested:
        shutil.rmtree(copied.folder("evaluate"))
    result = run_command("exp", EXPERIMENT, *tiny, runs=copied.runs)
    assert result.returncode == 2
    assert told in result.stderr
    assert "Traceback" not in result.stderr


def test_a_note_of_the_end_that_was_cut_is_written_anew(
    copied: Finished, run_command: Callable[..., Any], tiny: list[str]
) -> None:
    done = copied.folder("train") / "done.json"
    before = copied.json("train", "done.json")
    done.write_text(done.read_text()[:40])
    result = run_command("exp", EXPERIMENT, *tiny, runs=copied.runs)
    assert result.returncode == 0, result.stderr
    assert "train: resuming" in result.stderr + result.stdout
    assert copied.json("train", "done.json")["results"] == before["results"]


def test_scores_that_were_cut_are_named(
    copied: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    (scores,) = copied.folder("evaluate").glob("scores.*.parquet")
    assert "above" in scores_columns(scores)
    cut(scores)
    for read in (lambda: significance.compare([scores], [scores]), lambda: scores_columns(scores)):
        with pytest.raises(UserError, match=r"cannot be read .*: delete its folder"):
            read()
    # A report has its tables without them, and says what it lacks.
    (row,) = (r for r in results.collect(copied.runs) if not r.reference)
    html = page.made([], [([row], [])])
    (line,) = page.unreadable([row]).values()
    assert line.startswith(f"{scores.parent.name}/{scores.name} cannot be read")
    assert line.endswith(
        "delete its folder, and make exp tests anew; charts that need it are left out"
    )
    assert f"{line}\n" in capsys.readouterr().err
    assert html.count(f'<p class="warn">{line}</p>') == 1
    assert "ndcg@10" in html


def test_texts_that_were_cut_are_named_on_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / name for name in ("cut", "whole")]
    for folder in folders:
        folder.mkdir()
        texts = pl.DataFrame({"text": [f"a note of {folder.name}"]})
        texts.write_parquet(folder / "predictions.parquet")
    cut(folders[0] / "predictions.parquet")
    html = page_texts.texts(folders)
    assert "a note of whole" in html
    (line,) = capsys.readouterr().err.splitlines()
    assert "cut/predictions.parquet cannot be read" in line
    assert html.count(f'<p class="warn">{line}</p>') == 1
