"""``make table``: the papers' files, what is found for a cell, what is started, printed and written."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from experiments import compared, config, paper_table, published, reproduction
from experiments.artifacts import targets
from experiments.baseline import setting
from experiments.errors import UserError
from experiments.frame import GROUPS
from experiments.published import Cell
from lightning_modules.base import KS
from tests.experiments.test_report import BASIC, OTHER, write_run

GROUPS_OF_ROWS = ("all", "cold_item", "warm_item", "cold_user", "warm_user")
# The line of improvements below MLLM-SRec's table 5, in per cent.
GAINS = {
    "NDCG@5": 9.44, "NDCG@10": 10.50, "NDCG@20": 9.82,
    "Recall@5": 14.70, "Recall@10": 12.53, "Recall@20": 8.42,
}  # fmt: skip
PAPER = """
title: A paper
source: its table 1
differs: {paper: nothing, cpu: much}
tables:
  - table: "1"
    told: a quality
    metric: all/ndcg@10
    scale: 0.01
    columns: {A: {run: sasrec/movielens_100k}, B: {run: gru4rec/movielens_100k}}
    cpu: {small: {like: B, run: sasrec/movielens_100k}}
    rows:
      - method: ours
        published: [12.0, 30.0]
        paper: "{run}"
        cpu: "{run}"
      - method: theirs
        published: [null, 40.0]
        paper: {A: "none: it is a secret", rest: "{run} seed=3"}
        cpu: "none: it is a secret"
  - table: "2"
    told: another
    metric: all/hit@1
    columns: {A: {}}
    cpu: "none: too large"
    rows:
      - {method: ours, published: [0.5], paper: "sasrec/movielens_100k stages.train.batch_size=7"}
"""


def every_cell() -> list[tuple[str, str, str, Cell]]:
    return [
        (paper, size, grid.table, cell)
        for paper in published.names()
        for size in published.SIZES
        for grid in published.grids(paper, size)
        for cell in grid.cells
    ]


# ---------------------------------------------------------------- the files


def test_each_cell_stands_once_with_a_source_and_an_experiment_or_a_reason() -> None:
    cells = every_cell()
    places = [(paper, size, table, c.row, c.column) for paper, size, table, c in cells]
    assert len(set(places)) == len(places) > 400
    for paper, _, _, cell in cells:
        assert bool(cell.run) != bool(cell.why), cell
        assert cell.published is not None
        assert 0 < cell.published < 1, cell
        assert published.read(paper)["source"]
    for paper in published.names():
        known = {(g.table, c.column) for g in published.grids(paper, "paper") for c in g.cells}
        for grid in published.grids(paper, "cpu"):
            assert grid.cells or grid.why
            assert {(grid.table, c.like) for c in grid.cells} <= known  # said to be beside another


def _runs() -> dict[str, set[str]]:
    """Runs of cells and their metrics: so many that each key, stage and metric of a paper comes once.

    Composing all would take a minute; as shipped all files are composed, and bound, by ``test_config``.
    """
    told: dict[str, tuple[str, set[str]]] = {}
    known = config.names()
    for paper, _, _, cell in every_cell():
        if cell.run:
            told.setdefault(cell.run, (paper, set()))[1].add(cell.metric)
            first, *words = shlex.split(cell.run)
            assert first.partition(":")[0] in known, cell
            for word in words:
                group, _, option = word.partition("=")
                assert group not in GROUPS or (config.ROOT / group / f"{option}.yaml").is_file(), (
                    cell
                )
    found, seen = dict[str, set[str]](), set[Any]()
    for run, (paper, metrics) in sorted(told.items(), key=lambda r: -len(r[0].split())):
        first, *words = shlex.split(run)
        parts = {(paper, setting(w)) for w in words} | {(paper, m) for m in metrics}
        parts.add((paper, first.partition(":")[2]))
        if parts - seen:
            found[run] = metrics
            seen |= parts
    return found


@pytest.mark.parametrize(("run", "metrics"), _runs().items())
def test_each_experiment_composes_tests_that_stage_and_has_that_metric(
    run: str, metrics: set[str]
) -> None:
    (one,) = compared.asked(shlex.split(run))
    experiment = config.load(one.name, one.overrides)
    stage = experiment.stages[one.stage or paper_table.TESTED]
    assert stage["run"] == "test"
    data = stage.get("data") or experiment.config["data"]
    text = str(data)
    labelled = "datamodules.examples." in text or "datamodules.few_examples." in text
    ranks = not labelled or any("mllm_" in t for t in targets(stage["module"]))
    names = {f"{m}@{k}" for m in ("hit", "recall", "ndcg", "mrr") for k in KS} if ranks else set()
    names |= {"auc", "uauc"} if labelled else {"uauc"}
    for metric in metrics:
        group, _, name = metric.partition("/")
        assert group in GROUPS_OF_ROWS
        assert name in names, (run, metric)


def columns(paper: str, table: str) -> set[str]:
    (grid,) = [g for g in published.grids(paper, "paper") if g.table == table]
    return {c.column for c in grid.cells}


def _value(paper: str, table: str, row: str, column: str) -> float:
    return published.value(paper, table, row, column)


def test_numbers_that_papers_print_twice_agree() -> None:
    """What a slip of a column or a row would break, by the papers' own arithmetic."""
    for column in ("Movies", "Games", "Beauty", "Toys"):
        whole = _value("a_llmrec", "1", "A-LLMRec", column)
        for table, row in (("8", "full"), ("9", "full"), ("11", "SASRec")):
            if column in columns("a_llmrec", table):
                assert _value("a_llmrec", table, row, column) == whole
    for column in ("Movies", "Beauty", "Toys"):  # as the notes on the paper remark
        without = _value("a_llmrec", "8", "no L_match", column)
        assert without == _value("a_llmrec", "1", "MLP-LLM", column)
    users = _value("a_llmrec", "5", "SASRec", "Movies")
    assert _value("a_llmrec", "4", "SASRec", "Movies cold") == users  # so do they on this one
    for column, gain in GAINS.items():
        base = _value("mllm_srec", "5", "base MLLM", column)
        best = _value("mllm_srec", "5", "MLLM-SRec (adds TUBC)", column)
        assert (best / base - 1) * 100 == pytest.approx(gain, abs=0.01)
    heads = {"MicroLens": "MicroLens", "Baby": "Baby (column 2)", "Game": "Game (column 3)"}
    for column, head in heads.items():  # what was read off a figure, and the table's
        whole = _value("mllm_msr", "main", "MLLM-MSR", f"{head} AUC")
        assert _value("mllm_msr", "ablation", "full", column) == pytest.approx(whole, abs=0.003)


def test_experiments_take_their_expected_numbers_from_the_tables() -> None:
    (entry,) = config.load("tallrec/movie_64shot_paper").config["expected"]
    assert entry["value"] == _value("tallrec", "1", "TALLRec", "movie 64") == 0.6748
    value = "${published:tallrec,1,TALLRec,movie 65}"
    entry = f"expected=[{{metric: all/auc, source: x, value: '{value}'}}]"
    with pytest.raises(UserError, match="no published number in table 1, TALLRec, movie 65"):
        config.load("tallrec/movie_64shot_paper", [entry])


# ---------------------------------------------------------------- what is found, printed and started


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two seeds of SASRec, and a paper of its own."""
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "p.yaml").write_text(PAPER)
    monkeypatch.setattr(published, "ROOT", tmp_path / "papers")
    monkeypatch.setattr(paper_table, "REPO", tmp_path)
    (tmp_path / "experiments").mkdir()
    monkeypatch.setenv("LLMREC_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PAPER", "p")
    for seed, value in enumerate((0.10, 0.12)):
        overrides = (f"seed={seed}", "launch.threads=1")
        row = {"evaluate": value}
        write_run(tmp_path / "runs", f"e-{seed}", row, seed=seed, overrides=overrides)
    return tmp_path / "runs"


def test_cells_are_run_or_not_or_have_no_experiment(runs: Path) -> None:
    filled = paper_table.fill(published.grids("p", "paper"), [], (), runs)
    (_, first), (_, second) = filled
    texts = [one.texts() for one in first]
    # mean 0.11; deviations 0.01 each: standard error 0.01; t of one degree of freedom 12.706
    assert texts[0] == ["ours", "A", "0.1200", "0.1100 ±0.1271", "-0.0100", "60", "2", "f1"]
    assert texts[1] == ["ours", "B", "0.3000", *"-----"]
    assert texts[2] == ["theirs", "A", "-", "no experiment", *"----"]
    assert second[0].row is None
    left = paper_table.missing(filled)
    assert [one.command for one in left] == [
        f"make exp NAME={OTHER}", f'make exp NAME={OTHER} ARGS="seed=3"',
        f'make exp NAME={BASIC} ARGS="stages.train.batch_size=7"',
    ]  # fmt: skip
    assert paper_table.command_of(left[0], (4,)).endswith("SEEDS=4,")
    (_, few), _ = paper_table.fill(published.grids("p", "paper"), [], (1,), runs)
    assert few[0].texts()[3:7] == ["0.1200 ±0.0196", "+0.0000", "60", "1"]  # 1.96 x 0.01 over rows
    (_, none), _ = paper_table.fill(published.grids("p", "paper"), [], (0, 5), runs)
    assert none[0].row is None


def test_the_small_grid_says_that_it_is_none_of_the_papers(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("SIZE", "cpu")
    assert paper_table.main() == 0
    out = capsys.readouterr().out
    assert "this is no reproduction" in out
    assert "small (beside B)" in out
    assert "differs: much" in out
    assert "no experiment for table 2: too large" in out
    assert "2 cells: 1 run, 0 not run, 1 without an experiment" in out
    written = (tmp_path / "experiments" / "REPRODUCTION.md").read_text()
    assert (
        "| ours | small (beside B) | 0.3000 | 0.1100 ±0.1271 | -0.1900 | 60 | 2 | f1 |" in written
    )
    assert "this is no reproduction" in written
    assert "Nothing of it has been run: `make table PAPER=p SIZE=paper` lists it." in written


def test_other_sections_stay_and_overrides_write_none(
    runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = reproduction.write(tmp_path, reproduction.VERIFY, ["| kept |"])
    assert paper_table.main() == 0
    text = file.read_text()
    assert "| kept |" in text
    assert "| ours | A | 0.1200 | 0.1100 ±0.1271 |" in text
    assert "| ours | B | 0.3000 | - | - | - | - | - |" in text
    reproduction.write(tmp_path, reproduction.VERIFY, ["| anew |"])
    assert file.read_text() == text.replace("| kept |", "| anew |")
    before = file.read_text()
    for name, value in (("ARGS", "stages.train.batch_size=7"), ("TABLE", "1")):
        monkeypatch.setenv(name, value)
        assert paper_table.main() == 0
        assert file.read_text() == before
        monkeypatch.delenv(name)
    monkeypatch.setenv("LLMREC_RUNS", str(tmp_path / "none"))
    assert paper_table.main() == 0  # nothing was run there: what stands in the file stays
    assert file.read_text() == before


def test_rows_of_unlike_fingerprints_in_a_column_are_told(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "papers" / "q.yaml").write_text(
        PAPER.replace('cpu: "none: it is a secret"', 'cpu: "{run} stages.train.batch_size=7"')
    )
    words = ("stages.train.batch_size=7",)
    write_run(runs, "other", {"evaluate": 0.2}, fingerprint="f2", overrides=words)
    monkeypatch.setenv("PAPER", "q")
    monkeypatch.setenv("SIZE", "cpu")
    assert paper_table.main() == 0
    assert "table 1, small: rows of 2 fingerprints, which differ in" in capsys.readouterr().out


class Started:
    """A process that is not: what it was asked, and how it ends."""

    asked: list[tuple[list[str], dict[str, str]]]

    def __init__(self, words: list[str], env: dict[str, str]) -> None:
        self.asked.append((words[1:], env))
        self.words = words

    def wait(self) -> int:
        return 2 if "seed=3" in self.words else 0


@pytest.mark.parametrize(
    ("switch", "module"), [("RUN", ["experiments.run", "exp"]), ("SLURM", ["experiments.slurm"])]
)
def test_what_is_missing_is_started_only_when_asked_for(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    switch: str, module: list[str],
) -> None:  # fmt: skip
    Started.asked = []
    monkeypatch.setattr(paper_table.subprocess, "Popen", Started)
    assert paper_table.main() == 0
    assert Started.asked == []
    assert f"  make exp NAME={OTHER}\n" in capsys.readouterr().out
    monkeypatch.setenv(switch, "1")
    monkeypatch.setenv("ARGS", "launch.threads=1")
    monkeypatch.setenv("SEEDS", "0,1")
    assert paper_table.main() == 2
    told = capsys.readouterr()
    assert f'- make exp NAME={OTHER} ARGS="launch.threads=1 seed=3"' not in told.out
    words = [w for w, _ in Started.asked]
    assert words[0] == ["-m", *module, OTHER, "launch.threads=1"]
    assert len(words) == 3
    for _, env in Started.asked:
        assert env["SEEDS"] == "0,1"
        assert not {"ARGS", switch} & set(env)
    assert "these failed" in told.err
    assert "seed=3" in told.err.partition("these failed")[2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"PAPER": ""}, "PAPER is missing: make table PAPER="),
        ({"PAPER": "tallrek"}, "did you mean 'tallrec'?"),
        ({"SIZE": "cpus"}, "SIZE='cpus', expected one of paper, cpu; did you mean 'cpu'?"),
        ({"TABLE": "12"}, "TABLE='12', expected one of 1"),
        ({"RUN": "1", "SLURM": "1"}, "leave one of them out"),
        ({"ARGS": "'"}, "cannot be read"),
        ({"SEEDS": "x"}, "SEEDS='x' is neither"),
    ],
)
def test_what_cannot_be_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: dict[str, str], message: str
) -> None:  # fmt: skip
    for name, value in {"PAPER": "tallrec", **given}.items():
        monkeypatch.setenv(name, value)
    assert paper_table.main() == 2
    assert message in capsys.readouterr().err
