"""Fusion and crossover report, tiny, through the real command."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from experiments import config, crossover
from experiments.errors import UserError
from tests.lightning_modules.tiny_bert import LONGEST, write_tiny_bert

FUSION = "fusion/movielens_100k_text"


@pytest.fixture(scope="module")
def words(tiny_movielens: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    encoder = write_tiny_bert(tmp_path_factory.mktemp("bert"))
    return [
        f"data.root={tiny_movielens}", "data.expected=null", "launch.threads=1",
        "launch.accelerator=cpu", "backbone.trainer.max_epochs=3", "~stages.reference",
        f"stages.evaluate_text.module.encoder.source={encoder}",
        f"stages.evaluate_text.module.encoder.max_length={LONGEST}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(finish: Callable[..., Any], words: list[str]) -> Any:
    return finish(FUSION, words)


def test_two_models_are_fused(run: Any) -> None:
    assert "weight of the second model by a candidate's training events" in run.result.stderr
    assert "60 validation rows: 0: " in run.result.stderr
    tested = {
        s: run.json(s, "metrics.json")
        for s in ("evaluate_backbone", "evaluate_text", "evaluate_fusion")
    }
    assert len({m["fingerprint"] for m in tested.values()}) == 1
    validated = [run.json(s, "metrics.json") for s in ("validate_backbone", "validate_text")]
    assert {m["protocol"]["scored"] for m in validated} == {"valid"}
    values = tested["evaluate_fusion"]["rows"]["evaluate_fusion"]
    assert values["all/n"]["value"] == 60
    chosen = {k: v["value"] for k, v in values.items() if k.startswith("gate/")}
    assert len(chosen) == 3 + 2 * 8
    assert all(0 <= v <= 1 for k, v in chosen.items() if k.startswith("gate/weight@"))
    # The tests that were read are outputs with a digest: made anew, they make the fusion stale.
    assert "scores.evaluate_text.parquet" in run.json("evaluate_text", "done.json")["outputs"]
    assert len(run.json("evaluate_fusion", "stage.json")["inputs_digest"]) == 4
    files = [next(run.folder(s).glob("scores.*.parquet")) for s in tested]
    rows = [pl.read_parquet(f).select("row", "item_id", "is_target") for f in files]
    assert rows[0].equals(rows[1])
    assert rows[0].equals(rows[2])


def test_the_table_the_sentence_and_the_plot(
    run: Any, run_command: Callable[..., Any], words: list[str]
) -> None:
    made = run_command("crossover", FUSION, *words, runs=run.runs)
    assert made.returncode == 0, made.stderr[-3000:]
    lines = [[c.strip() for c in x.split("│")[1:-1]] for x in made.stdout.splitlines() if "│" in x]
    opened = [line for line in lines if line[0]]
    assert [line[0] for line in opened] == [
        "all", "0", "1-4", "5-9", "10-19", "20-49", "50-99", "100-199", "200+",
    ]  # fmt: skip
    counts = [int(line[1]) for line in opened]
    assert counts[0] == sum(counts[1:]) == 60
    assert counts[-1] == 0
    assert lines[-1][2:] == ["evaluate_fusion", "-", "-", "-"]  # no row there
    for stage, line in zip(
        ("evaluate_backbone", "evaluate_text", "evaluate_fusion"), lines, strict=False
    ):
        value = run.json(stage, "metrics.json")["rows"][stage]["all/hit@1"]["value"]
        assert line[2] == stage
        assert line[3].startswith(f"{value:.4f} [")
    assert re.search(r"evaluate_text against evaluate_backbone: \w+", made.stdout)
    plot = run.folder("evaluate_fusion") / "crossover.svg"
    circles = ET.fromstring(plot.read_text()).findall(".//{http://www.w3.org/2000/svg}circle")
    assert len(circles) == 3 * sum(n > 0 for n in counts[1:])


def test_another_baseline_and_what_cannot_be_told(
    run: Any, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = config.load(FUSION, words)
    with pytest.raises(
        UserError, match=r"not been run to its end \(evaluate_backbone, .*make exp NAME="
    ):
        crossover.tell({0: experiment})  # in an empty folder
    monkeypatch.setenv("LLMREC_RUNS", str(run.runs))
    monkeypatch.setenv("BASELINE", "evaluate_text")
    crossover.tell({0: experiment})
    assert "evaluate_backbone against evaluate_text: " in capsys.readouterr().out
    monkeypatch.setenv("BASELINE", "evaluate_txt")
    with pytest.raises(UserError, match=r"did you mean 'evaluate_text'\?"):
        crossover.tell({0: experiment})
