"""``make verify``: verdicts, what is printed and what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments import config, verify
from experiments.errors import UserError
from tests.experiments.test_report import BASIC, write_run


@pytest.mark.parametrize(
    ("ours", "tolerance", "at_least", "told"),
    [
        ((0.50,), 0.0, False, "PASS"),
        ((0.52,), 0.02, False, "PASS"),
        ((0.53,), 0.02, False, "FAIL"),
        ((0.53,), 0.02, True, "PASS"),
        ((0.47,), 0.02, True, "FAIL"),
        ((0.47, 0.51), 0.02, False, "PASS"),  # the mean, 0.49, counts
        ((), 9.0, True, "not run"),
    ],
)
def test_verdicts(ours: tuple[float, ...], tolerance: float, at_least: bool, told: str) -> None:
    verdict = verify.Verdict("e", "all/mrr", 0.5, "s", tolerance, at_least, ours)
    assert verdict.told == told


def test_seeds_that_agree_are_no_certainty() -> None:
    means = [
        verify.Verdict("e", "all/mrr", 0.5, "s", 0.0, False, ours).cells()[3]
        for ours in ((0.5, 0.5, 0.5), (0.4, 0.6))
    ]
    assert means == ["0.5000 (3 seeds)", "0.5000 ±1.2706 (2 seeds)"]  # 12.706 x 0.1


def test_a_run_that_had_no_time_to_end_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _expect(monkeypatch, at_least=True)
    words = ("stages.train.trainer.max_time=00:00:30:00",)
    write_run(tmp_path, "cut", {"evaluate": 0.09}, overrides=words)
    assert verify.verify(BASIC, tmp_path, tmp_path) == 0
    out = capsys.readouterr().out
    assert "0.0900 (max_time" in " ".join(out.split())
    assert "cut short" in out
    write_run(tmp_path, "other", {"evaluate": 0.9}, overrides=(*words, "stages.train.batch_size=1"))
    write_run(tmp_path, "whole", {"evaluate": 0.11})  # counts in place of the other two
    assert verify.verify(BASIC, tmp_path, tmp_path) == 0
    out = capsys.readouterr().out
    assert "0.1100" in out
    assert "max_time" not in out


def _expect(monkeypatch: pytest.MonkeyPatch, **entry: Any) -> None:
    monkeypatch.setattr(config, "names", lambda: [BASIC])
    load = config.load

    def loaded(name: str, overrides: Any = ()) -> config.Experiment:
        experiment = load(name, overrides)
        number = {"metric": "all/ndcg@10", "value": 0.1, "source": "a paper", **entry}
        experiment.config["expected"] = [number]
        return experiment

    monkeypatch.setattr(config, "load", loaded)


def test_a_run_is_compared_and_the_seeds_are_averaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _expect(monkeypatch, tolerance=0.011)
    for seed, value in enumerate((0.10, 0.12)):
        overrides = (f"seed={seed}",)
        write_run(tmp_path, f"e-{seed}", {"evaluate": value}, seed=seed, overrides=overrides)
    write_run(tmp_path, "other", {"evaluate": 0.9}, overrides=("stages.train.batch_size=1",))
    assert verify.verify(BASIC, tmp_path, tmp_path) == 0
    out = capsys.readouterr().out
    assert "+0.0100" in out
    assert "PASS" in out
    _expect(monkeypatch, tolerance=0.009)
    assert verify.verify(BASIC, tmp_path, tmp_path) == 1
    (tmp_path / "experiments").mkdir()
    assert verify.verify("", tmp_path, tmp_path) == 1
    written = (tmp_path / "experiments" / "REPRODUCTION.md").read_text()
    assert f"| {BASIC} | all/ndcg@10 | 0.1 (a paper) | 0.1100 ±0.1271 (2 seeds) |" in written
    assert "| FAIL | f1 |" in written


def test_what_was_not_run_or_expects_nothing_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="expects no number"):
        verify.verify("reference/movielens_100k", tmp_path, tmp_path)
    _expect(monkeypatch)
    with pytest.raises(UserError, match="has not been run to its end here: make exp"):
        verify.verify(BASIC, tmp_path, tmp_path)
    (tmp_path / "experiments").mkdir()
    assert verify.verify("", tmp_path, tmp_path) == 0
    assert "| not run |" in (tmp_path / "experiments" / "REPRODUCTION.md").read_text()


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ("3", "expected a list"),
        ("[3]", "expected metric, value and source"),
        ("[{metric: m, value: 1}]", "lacks source"),
        ("[{metric: m, value: x, source: s}]", "expected a number"),
        ("[{metric: m, value: 1, source: s, tolerence: 1}]", "unknown tolerence"),
    ],
)
def test_what_is_wrong_with_an_expected_number_is_told(expected: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.load(BASIC, [f"expected={expected}"])
