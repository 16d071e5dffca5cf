"""What is said where counts of training events cannot tell cold rows from warm ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from datamodules.groups import QuantileGroups
from datamodules.types import TRAIN, Histories
from datamodules.versioning import write_json
from experiments import compare, config, data_report, page_sections, report, results
from experiments.compared import asked, find
from tests.experiments.test_report import BASIC, stage, write_run


def sizes(events: list[int]) -> dict[str, int]:
    """Of items trained on this often, each event by a user of its own."""
    items = np.repeat(np.arange(1, len(events) + 1), events)
    return QuantileGroups().sizes(
        Histories(
            offsets=np.array([0, 0, *range(1, len(items) + 1)], dtype=np.int64),
            items=items.astype(np.int32), split=np.full(len(items), TRAIN, np.int8),
            timestamps=np.zeros(len(items), np.int64), num_items=len(events),
        )
    )  # fmt: skip


def kept(folder: Path, events: list[int]) -> Path:
    """The data report of a run."""
    folder.mkdir(exist_ok=True)
    manifest = {"recipe": {"name": "shop"}, "report": {"groups": sizes(events)}}
    write_json(folder / data_report.KEPT, [manifest])
    return folder


USERS = "No user is cold or warm: {0} of {0} users of shop have 1 training event"
APART = "too many for its least and its most trained items to be told apart"


@pytest.mark.parametrize(
    ("events", "told"),
    [
        ([2] * 6, "No item is cold or warm: 6 of 6 items of shop have 2 training events"),
        ([0, 0, 0, 0, 0, 7], f"5 of 6 items of shop have 0 training events, {APART}: all of these are cold, "
                             "and those with more are warm"),
        ([1, 5, 5, 5, 5, 5], f"5 of 6 items of shop have 5 training events, {APART}: all of these are warm, "
                             "and those with fewer are cold"),
        ([2, 2, 0, 2, 9, 2], f"4 of 6 items of shop have 2 training events, {APART}: these are neither, "
                             "those with fewer are cold and those with more are warm"),
        ([1, 2, 3, 4, 5, 6], None),
    ],
)  # fmt: skip
def test_a_sentence_for_items_and_one_for_users(
    tmp_path: Path, events: list[int], told: str | None
) -> None:
    found = data_report.group_notes([kept(tmp_path, events)] * 2)
    assert found == [*([told] if told else []), USERS.format(sum(events))]


def test_runs_without_ties_or_without_a_report_say_nothing(tmp_path: Path) -> None:
    write_json(tmp_path / data_report.KEPT, [{"recipe": {"name": "joined"}, "parts": {}}])
    assert data_report.group_notes([tmp_path, tmp_path / "none"]) == []


def test_every_table_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = kept(write_run(tmp_path, "e-1", {"evaluate": 0.25}), [2] * 6)
    users = USERS.format(12)
    monkeypatch.setenv("COLUMNS", "80")
    report.print_results(config.load(BASIC), [stage("evaluate", folder, "done", "")])
    assert users in capsys.readouterr().out.splitlines()
    rows = find(asked([BASIC]), (), tmp_path)
    assert f"{users}." in compare.accuracy(rows, "").remarks
    assert f"{users}." in page_sections.results(rows, [], [])
    assert f"* {users}" in results.write_results(tmp_path).read_text().splitlines()
