"""What is printed and written: plans, settings, tables, ``results.md`` and the README's part."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from datamodules.versioning import write_json
from experiments import beside, config, messages, page, report, results
from experiments.artifacts import PlannedStage
from experiments.compared import Asked
from experiments.errors import UserError
from experiments.intervals import Interval
from experiments.model_card import write_card

BASIC, OTHER = "sasrec/movielens_100k", "gru4rec/movielens_100k"
GROUPS = ("all", "cold_item", "warm_item", "cold_user", "warm_user")
README = f"# Title\n\nBefore.\n\n{results.START}\nold table\n{results.END}\n\nAfter.\n"
NAMES = ("hit@1", "hit@5", "hit@10", "ndcg@10", "mrr")


def protocol(name: str = "movielens-100k") -> dict[str, Any]:
    return {"name": name, "filters": [], "split": "LeaveOneOut()", "ties": "stable",
            "candidates": "FullRanking()", "groups": "QuantileGroups()", "mask_seen": True}  # fmt: skip


def row(value: float, error: float = 0.01) -> dict[str, dict[str, float]]:
    cells = {f"{g}/{n}": {"value": value, "stderr": error} for g in GROUPS for n in NAMES}
    return {**cells, **{f"{g}/n": {"value": 60.0, "stderr": 0.0} for g in GROUPS}}


def write_run(
    runs: Path, folder: str, rows: dict[str, float], *, fingerprint: str = "f1", seed: int = 0,
    overrides: tuple[str, ...] = (), finished: str = "2026-01-01 00:00:00", done: bool = True,
    error: float = 0.01,
) -> Path:  # fmt: skip
    """A tested stage's files, without the run."""
    where = runs / folder
    where.mkdir(parents=True)
    modules = {name: {"_target_": "x", "seed": seed} for name in rows}  # as iALS, which draws
    job = {"experiment": BASIC, "stage": "evaluate", "overrides": list(overrides),
           "inputs": {}, "spec": {"modules": modules, "seed": seed, "run": "test"}}  # fmt: skip
    metrics = {"fingerprint": fingerprint, "protocol": protocol(),
               "rows": {name: row(value, error) for name, value in rows.items()}}  # fmt: skip
    (where / "stage.json").write_text(json.dumps(job))
    (where / "metrics.json").write_text(json.dumps(metrics))
    if done:
        note = {"commit": "abc", "finished": finished, "seconds": 1.0, "sources": {}}
        (where / "done.json").write_text(json.dumps(note))
    return where


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    (tmp_path / "repo" / "experiments").mkdir(parents=True)
    (tmp_path / "repo" / "README.md").write_text(README)
    return tmp_path / "repo"


# ---------------------------------------------------------------- results.md and README.md


def test_seeds_become_a_mean_and_an_interval(tmp_path: Path, repo: Path) -> None:
    for seed, value in enumerate((0.10, 0.12, 0.17)):
        overrides = (f"seed={seed}", "launch.threads=1", "data.root=/somewhere",
                     "data.interactions=/somewhere/events.csv", "logger=wandb",
                     *["~stages.reference"] * (seed > 0))  # fmt: skip
        write_run(
            tmp_path / "runs", f"e-{seed}", {"evaluate": value}, seed=seed, overrides=overrides
        )
    (one,) = results.collect(tmp_path / "runs")
    assert one.seeds == (0, 1, 2)
    assert one.overrides == ()
    # mean 0.13; squared deviations 0.0009 + 0.0001 + 0.0016 = 0.0026, over two: 0.0013; t of two is 4.303
    assert one.cell("all/ndcg@10") == f"0.1300 ±{4.303 * math.sqrt(0.0013 / 3):.4f}"
    results.write_results(tmp_path / "runs", repo)
    readme = (repo / "README.md").read_text()
    assert f"| {BASIC} | `make exp NAME={BASIC}` |" in readme
    assert "0.1300 ±0.0896 | 3 | f1 |" in readme
    assert readme.startswith("# Title\n\nBefore.\n")
    assert readme.endswith(f"{results.END}\n\nAfter.\n")
    assert "old table" not in readme


def test_what_is_published_is_asked_for(tmp_path: Path, repo: Path) -> None:
    """Otherwise one own run would take the place of everything in the README."""
    write_run(tmp_path / "runs", "e-1", {"evaluate": 0.1})
    before = (repo / "README.md").read_text()
    target = results.write_results(tmp_path / "runs")
    assert target == tmp_path / "runs" / "reports" / "results.md"
    assert "0.1000" in target.read_text()
    assert (repo / "README.md").read_text() == before
    published = results.write_results(tmp_path / "runs", repo)
    assert published.read_text() == target.read_text()
    assert "0.1000" in (repo / "README.md").read_text()


def test_writing_twice_changes_nothing(tmp_path: Path, repo: Path) -> None:
    write_run(tmp_path / "runs", "e-1", {"evaluate": 0.1})
    texts = []
    for _ in range(2):
        target = results.write_results(tmp_path / "runs", repo)
        texts.append((target.read_text(), (repo / "README.md").read_text()))
    assert texts[0] == texts[1]


def test_unlike_fingerprints_stand_in_different_tables(tmp_path: Path, repo: Path) -> None:
    write_run(tmp_path / "runs", "e-1", {"evaluate": 0.1})
    write_run(tmp_path / "runs", "e-2", {"evaluate": 0.9}, fingerprint="f2")
    text = results.write_results(tmp_path / "runs", repo).read_text()
    first, second = text.split("## movielens-100k, fingerprint ")[1:]
    assert first.startswith("f1")
    assert "0.1000" in first
    assert "0.9000" not in first
    assert "0.9000" in second


def test_labelled_rows_have_columns_of_their_own(
    tmp_path: Path, repo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """AUCs and calibration in place of ranks; scores that are no log-odds have dashes in their cells."""
    write_run(tmp_path / "runs", "e-1", {"evaluate": 0.1})
    numbers = {"all/auc": 0.71, "all/uauc": 0.62, "all/ece": 0.13, "all/brier": 0.25,
               "cold_item/auc": 0.54, "warm_item/auc": 0.75, "cold_user/auc": None,
               "warm_user/auc": 0.76}  # fmt: skip
    plain = {"all/auc": 0.57, "all/uauc": 0.58}
    for rows in ({"evaluate": numbers}, {"liked_fraction": plain, "popularity": plain}):
        folder = write_run(
            tmp_path / "runs", f"t-{len(rows)}", dict.fromkeys(rows, 0.0), fingerprint="f2"
        )
        metrics = json.loads((folder / "metrics.json").read_text())
        for name, values in rows.items():
            metrics["rows"][name] = {m: {"value": v, "stderr": None} for m, v in values.items()}
        metrics["protocol"] |= {"examples": "FewExamples(64)"}
        write_json(folder / "metrics.json", metrics)
    text = results.write_results(tmp_path / "runs", repo).read_text()
    ranked, labelled = text.split("## movielens-100k, fingerprint ")[1:]
    assert "auc" not in ranked
    assert "| all/hit@10 | all/ndcg@10 | all/mrr |" in ranked
    assert "| ndcg@10 over popularity | commit |" in ranked
    head, rule, *lines = [line for line in labelled.splitlines() if line.startswith("|")]
    assert head == (
        "| method | seeds | all/auc | all/uauc | all/ece | all/brier | cold item/auc | "
        "warm item/auc | cold user/auc | warm user/auc | commit |"
    )
    assert head.count("|") == rule.count("|")
    assert lines == [
        f"| {BASIC} | 1 | 0.7100 | 0.6200 | 0.1300 | 0.2500 | 0.5400 | 0.7500 | - | 0.7600 | abc |",
        *(f"| {name} `seed=0` | - | 0.5700 | 0.5800 | - | - | - | - | - | - | abc |"
          for name in ("liked_fraction", "popularity")),
    ]  # fmt: skip
    assert "* examples: FewExamples(64)" in labelled
    assert "candidates" not in labelled
    out = capsys.readouterr().out.split("fingerprint f2")[1]
    assert "0.2500" in out
    assert "over popularity" not in out


def test_a_changed_experiment_is_a_row_of_its_own(tmp_path: Path, repo: Path) -> None:
    write_run(tmp_path / "runs", "e-1", {"evaluate": 0.1})
    changed = ("stages.train.module.dropout=0.5", "seed=0")
    write_run(tmp_path / "runs", "e-2", {"evaluate": 0.2}, overrides=changed)
    without = ("~stages.train.inputs.weights",)
    write_run(tmp_path / "runs", "e-3", {"evaluate": 0.3}, overrides=without)
    text = results.write_results(tmp_path / "runs", repo).read_text()
    assert f"| {BASIC} | 1 | 0.1000" in text
    assert f"| {BASIC} `stages.train.module.dropout=0.5` | 1 | 0.2000" in text
    assert f"| {BASIC} `{without[0]}` | 1 | 0.3000" in text
    readme = (repo / "README.md").read_text()
    assert "0.1000" in readme
    assert "0.2000" not in readme, "the README shows experiments as shipped"


def test_unfinished_runs_are_left_out(tmp_path: Path, repo: Path) -> None:
    write_run(tmp_path / "runs", "e-1", {"evaluate": 0.1}, done=False)
    with pytest.raises(UserError, match="no finished test"):
        results.write_results(tmp_path / "runs", repo)


def test_a_readme_without_its_marks_is_left_alone(tmp_path: Path, repo: Path) -> None:
    write_run(tmp_path / "runs", "e-1", {"evaluate": 0.1})
    (repo / "README.md").write_text("# Mine\n")
    with pytest.raises(UserError, match="results: start"):
        results.write_results(tmp_path / "runs", repo)
    assert (repo / "README.md").read_text() == "# Mine\n"


@pytest.mark.parametrize("folders", [("e-1", "e-2"), ("e-2", "e-1")])
def test_of_a_seed_that_was_run_twice_the_newest_counts(
    tmp_path: Path, folders: tuple[str, str]
) -> None:
    """As after an edit of the experiment's file; the folders' names (hashes) say nothing of age."""
    old, new = folders
    write_run(tmp_path, old, {"evaluate": 0.1}, finished="2026-01-01 00:00:00")
    write_run(tmp_path, new, {"evaluate": 0.2}, finished="2026-03-01 00:00:00")
    (one,) = results.collect(tmp_path)
    assert one.cell("all/mrr") == "0.2000"
    assert one.seeds == (0,)


def test_reference_rows_need_no_seed(tmp_path: Path) -> None:
    write_run(tmp_path, "reference-1", {"random": 0.01, "popularity": 0.02})
    rows = {r.label: r for r in results.collect(tmp_path)}
    assert set(rows) == {"random", "popularity"}
    assert all(r.reference and r.seeds == () for r in rows.values())
    assert rows["popularity"].cell("all/hit@10") == "0.0200"
    assert rows["popularity"].cell("all/nothing") == "-"


# ---------------------------------------------------------------- the terminal


def stage(name: str, folder: Path | None, state: str, why: str) -> PlannedStage:
    return PlannedStage(name, {}, "k", folder, state, why)


def test_the_table_of_an_experiment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment = config.load(BASIC)
    one = write_run(tmp_path, "e-1", {"evaluate": 0.1234567})
    two = write_run(tmp_path, "r-1", {"random": 0.5, "popularity": math.nan}, fingerprint="f2")
    stages = [stage("train", tmp_path, "done", ""), stage("evaluate", one, "stale", "older"),
              stage("reference", two, "done", "")]  # fmt: skip
    report.print_results(experiment, stages)
    out = capsys.readouterr().out
    assert out.index("fingerprint f1") < out.index("0.1235") < out.index("fingerprint f2")
    assert "0.1235 ±0.020" in out, "1.96 x 0.01"
    assert f"{BASIC} *" in out
    assert "stale=rerun" in out
    assert out.rindex("random") > out.index("fingerprint f2")
    assert "nan" not in out


def test_no_hit_of_sixty_rows_is_no_certainty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_run(tmp_path, "e-1", {"evaluate": 0.0}, error=0.0)
    two = write_run(tmp_path, "r-1", {"random": 0.0625, "popularity": 1.0}, error=0.0)
    stages = [stage("evaluate", one, "done", ""), stage("reference", two, "done", "")]
    report.print_results(config.load(BASIC), stages)
    lines = capsys.readouterr().out.splitlines()
    ours, chance, most = (
        next(x for x in lines if f"│ {n} " in x) for n in (BASIC, "random", "popularity")
    )
    assert ours.count("0.0000 [0.000, 0.060]") == len(NAMES)  # 3.8416 / 63.8416
    assert most.count("1.0000 [0.940, 1.000]") == len(NAMES)
    assert chance.count("0.0625") == len(NAMES)
    assert not {"±", "["} & set(chance), "an expectation is exact"


SASREC = "lightning_modules.sasrec.SASRecModule"


def test_a_model_card_says_what_makes_an_item(tmp_path: Path) -> None:
    ids, words = "an item by its words", "the items of its catalogue alone"
    for number, (target, told, other) in enumerate((
        (SASREC, words, ids),
        ("lightning_modules.tallrec.TALLRecModule", ids, words),
        ("lightning_modules.align_vision.AlignVisionModule", "Histories", "It knows"),
    )):  # fmt: skip
        spec = {"modules": {"train": {"_target_": target}}, "data": {"_target_": "a.B"}, "seed": 0}
        folder = write_run(tmp_path, str(number), {"evaluate": 0.25})
        fit = replace(stage("train", folder, "done", ""), spec=spec)
        limits = (
            write_card(folder, config.load(BASIC), fit, [], {}, {}).read_text().split("## L")[1]
        )
        assert told in limits
        assert other not in limits


def test_a_model_card_has_the_ends_of_its_intervals(tmp_path: Path) -> None:
    spec = {"modules": {"train": {"_target_": SASREC}}, "data": {"_target_": "a.B"}, "seed": 0}
    for name, value, error in (("none", 0.0, 0.0), ("some", 0.25, 0.01)):
        folder = write_run(tmp_path, name, {"evaluate": value}, error=error)
        made = replace(stage("evaluate", folder, "done", ""), spec=spec)
        card = write_card(folder, config.load(BASIC), made, [made], {}, {}).read_text()
        told = {0.0: "0.0000 to 0.0602", 0.25: "0.2304 to 0.2696"}[
            value
        ]  # 3.8416 / 63.8416; 1.96 x 0.01
        assert f"| all | hit@1 | {value:.4f} | {told} |" in card
        assert "Protocol: name = movielens-100k; split = LeaveOneOut()" in card


def test_rows_of_other_experiments_stand_beside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the same fingerprint, each file once; the rest are named with the reason."""
    experiment, other = config.load(BASIC), config.load(OTHER)
    absent, unlike = replace(other, name="group/absent"), replace(other, name="group/unlike")
    one = write_run(tmp_path, "e-1", {"evaluate": 0.125})
    two = write_run(tmp_path, "e-2", {"evaluate": 0.25})
    three = write_run(tmp_path, "e-3", {"evaluate": 0.75}, fingerprint="f2")
    stages = [[stage("evaluate", folder, "done", "")] for folder in (one, two, three)]
    others = [(other, stages[1] + stages[0]), (absent, []), (unlike, stages[2])]
    report.print_results(experiment, stages[0], others)
    out = capsys.readouterr().out
    assert out.index("0.1250 ±0.020") < out.index("0.2500 ±0.020")
    assert out.count("0.1250 ±0.020") == len(GROUPS) * len(NAMES), "a shared stage is one row"
    assert "0.75" not in out
    assert "not run (make exp NAME=... adds a row): group/absent" in out
    assert "not shown: group/unlike" in out


def test_other_data_is_not_called_by_the_name_of_the_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table, the card of what is exported and the page; results.md has overrides in its labels."""
    overrides = ("data=custom", "data.interactions=/x.csv", "data.name=mine")
    experiment = config.load(BASIC, overrides)
    told = config.caption(BASIC, overrides)
    folder = write_run(tmp_path, "e-1", {"evaluate": 0.25}, overrides=overrides)
    report.print_results(experiment, [stage("evaluate", folder, "done", "")])
    out = capsys.readouterr().out
    assert f"{BASIC}: {told}" in out
    spec = {
        "modules": {"train": {"_target_": SASREC}}, "data": experiment.config["data"], "seed": 0,
    }  # fmt: skip
    fit = replace(stage("train", folder, "done", ""), spec=spec)
    counts = {"users": 3, "items": 4}
    card = write_card(tmp_path, experiment, fit, [], counts, {}).read_text()
    assert f"# {BASIC}\n\n{told}\n" in card
    assert "mine (CustomDataModule): 3 users, 4 items after filtering." in card
    html = page.made([Asked(BASIC, "", overrides)], [])
    assert told in html
    assert config.header(BASIC) not in out + card + html
    assert f"{BASIC} `data=custom` `data.name=mine`" in results.write_results(tmp_path).read_text()


@pytest.mark.parametrize("sampled", [True, False])
def test_a_catalogue_is_cut_at_ten_and_a_few_candidates_at_three(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sampled: bool
) -> None:
    folder = write_run(tmp_path, "e-1", {"evaluate": 0.125})
    metrics = json.loads((folder / "metrics.json").read_text())
    values = metrics["rows"]["evaluate"]
    values["all/hit@3"] = values["all/hit@10"]
    values |= {"all/auc": {"value": 0.5, "stderr": None}} if sampled else {}
    write_json(folder / "metrics.json", metrics)
    report.print_results(config.load(BASIC), [stage("evaluate", folder, "done", "")])
    out = capsys.readouterr().out
    assert ("hit@3" in out, "hit@10" in out) == (sampled, not sampled)


def test_what_an_experiment_lists_is_found_by_its_own_data_and_parts(tmp_path: Path) -> None:
    data = f"data.root={tmp_path}"
    experiment = config.load("a_llmrec/movielens_100k", [data, "llm=gemma3_270m", "seed=3"])
    found = {other.name: other for other, tested in beside.find(experiment) if not tested}
    assert set(found) == set(experiment.config["beside"]) - {experiment.name}
    for other in found.values():
        assert other.config["data"] == experiment.config["data"], "or its rows would be other ones"
        assert other.config.get("llm") in (None, experiment.config["llm"])
        assert other.config["seed"] == 3
    assert found["a_llmrec/movielens_100k_llm_only"].config["llm"] == experiment.config["llm"]


def test_an_experiment_beside_must_exist() -> None:
    experiment = config.load(BASIC, ["+beside=[sasrec/movielens_100]"])
    with pytest.raises(UserError, match="beside lists sasrec/movielens_100: no experiment"):
        list(beside.find(experiment))


def test_a_plan_names_state_folder_and_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [stage("train", tmp_path / "t-1", "partial", "was [cut] off"),
              stage("evaluate", None, "missing", "waits for train")]  # fmt: skip
    report.print_plan(BASIC, stages)
    out = capsys.readouterr().out
    for word in ("partial", "t-1", "was [cut] off", "missing", "no folder yet", "waits for train"):
        assert word in out


def test_settings_are_shown_with_where_they_came_from(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["seed=7", "stages.train.module.dropout=0.25"]
    report.print_config(config.load(BASIC, overrides), config.origins(BASIC, overrides))
    lines = dict(line.split("#", 1) for line in capsys.readouterr().out.splitlines())
    shown = {k.strip(): v.strip() for k, v in lines.items()}
    assert shown["seed: 7"] == "command line: seed=7"
    assert shown["launch.devices: 1"] == "experiments/base.yaml"
    assert shown["stages.train.module.dropout: 0.25"].startswith("command line")
    # The evaluation's module is the training's, override included: so is where it came from.
    assert shown["stages.evaluate.module.dropout: 0.25"].startswith("command line")


def test_an_error_is_one_sentence_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    messages.print_error(UserError("what is wrong"))
    out = capsys.readouterr()
    assert out.err == "error: what is wrong\n"
    assert out.out == ""


def test_lists_and_cells(capsys: pytest.CaptureFixture[str]) -> None:
    report.print_list([("a/b", "first"), ("long/name", "second")])
    assert capsys.readouterr().out == "a/b        first\nlong/name  second\n"
    assert report.cell(None) == report.cell({"value": math.nan, "stderr": 0.1}) == "-"
    assert report.cell({"value": 0.05, "stderr": math.nan}) == "0.0500"
    assert (
        report.cell({"value": 0.05}, Interval(0.05, 0.05 - 0.196, 0.05 + 0.196)) == "0.0500 ±0.196"
    )
    assert report.cell({"value": 0.0}, Interval(0.0, 0.0, 0.0741)) == "0.0000 [0.000, 0.074]"
    assert report.cell({"value": 0.0}, Interval(0.0, 0.0, 0.00004)) == "0.0000 [0.00000, 0.00004]"


def test_seeds_of_other_settings_are_not_averaged_and_old_code_is_marked(
    tmp_path: Path,
) -> None:
    for number, (seed, width) in enumerate([(0, 8), (1, 16), (2, 16)]):
        folder = tmp_path / f"sasrec.evaluate-{number}"
        folder.mkdir()
        spec = {"modules": {"evaluate": {"hidden_size": width}}, "seed": seed}
        job = {"experiment": "sasrec/movielens_100k", "stage": "evaluate", "overrides": [],
               "inputs": {}, "spec": spec}  # fmt: skip
        rows = {"evaluate": {"all/ndcg@10": {"value": number / 10, "stderr": 0.0}}}
        metrics = {"fingerprint": "f", "protocol": {"name": "x"}, "rows": rows}
        done = {"commit": "abc", "finished": f"2026-01-0{number + 1}", "seconds": 1.0,
                "sources": {"datamodules/gone.py": "0"}}  # fmt: skip
        for name, value in (("stage", job), ("metrics", metrics), ("done", done)):
            (folder / f"{name}.json").write_text(json.dumps(value))
    (row,) = results.collect(tmp_path)
    assert row.seeds == (1, 2)
    assert row.values["all/ndcg@10"] == [0.1, 0.2]
    assert row.older
