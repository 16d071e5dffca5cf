"""SEEDS and BASELINE: how they are read, what is refused, what a failed seed leaves and says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from experiments import baseline, config, results, seeds
from experiments.artifacts import PlannedStage
from experiments.errors import UserError

NAME = "sasrec/movielens_100k"


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def set_both(wanted: str = "", against: str = "") -> None:
        monkeypatch.setenv("SEEDS", wanted)
        monkeypatch.setenv("BASELINE", against)

    return set_both


def write_test(
    folder: Path, rows: dict[str, float], places: dict[str, list[int]], fingerprint: str = "f1"
) -> Path:
    """A finished test's files: metrics and, for each row, where the targets of its users stand."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        row: {"all/n": {"value": 4.0, "stderr": 0.0}, "all/ndcg@10": {"value": v, "stderr": 0.1}}
        for row, v in rows.items()
    }
    metrics = {"fingerprint": fingerprint, "protocol": {"name": "x"}, "rows": values}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    for row, above in places.items():
        frame = pl.DataFrame({"row": range(4), "user_id": ["a", "b", "c", "d"], "above": above})
        frame.with_columns(ties=pl.lit(0)).write_parquet(folder / f"scores.{row}.parquet")
    return folder


def finisher(runs: Path) -> Callable[[config.Experiment], list[PlannedStage]]:
    """Runs nothing: SASRec reaches 0.1 and 0.3, and its targets come first as often as the seed says."""
    reference = write_test(
        runs / "r-1", {"popularity": 0.4, "markov": 0.2},
        {"popularity": [0, 99, 99, 99], "markov": [99] * 4},
    )  # fmt: skip

    def finish(experiment: config.Experiment) -> list[PlannedStage]:
        seed = experiment.config["seed"]
        own = write_test(
            runs / f"e-{seed}", {"evaluate": 0.1 + 0.2 * seed}, {"evaluate": [0, 0, 0, 99 * seed]}
        )
        folders = {"train": runs / "t-1", "evaluate": own, "reference": reference}
        return [PlannedStage(name, {}, "k", f, "done", "") for name, f in folders.items()]

    return finish


def experiments(count: int = 2) -> dict[int, config.Experiment]:
    return {s: config.load(NAME, [f"seed={s}"]) for s in range(count)}


# ---------------------------------------------------------------- what is asked


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", ()), ("1", (0,)), ("5", (0, 1, 2, 3, 4)), ("0,3,7", (0, 3, 7)), (" 7, 3 ", (7, 3)),
     ("12,", (12,)), ("4294967295,0", (2**32 - 1, 0))],
)  # fmt: skip
def test_seeds_are_a_number_or_a_list(
    text: str, expected: tuple[int, ...], ask: Callable[..., None]
) -> None:
    ask(text)
    assert seeds.requested(["data.root=x"]) == expected


@pytest.mark.parametrize(
    "text",
    ["0", "-1", "five", "1.5", "3,3", ",", "1,,2", "1 2", "4294967296,", "9999", "٣", "$(x)"],
)
def test_bad_seeds_are_one_sentence(text: str, ask: Callable[..., None]) -> None:
    ask(text)
    with pytest.raises(UserError, match="neither a number of seeds") as caught:
        seeds.requested([])
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("override", ["seed=3", "+seed=3", "++seed=3"])
def test_seeds_and_a_seed_exclude_each_other(override: str, ask: Callable[..., None]) -> None:
    ask("2")
    with pytest.raises(UserError, match="exclude each other"):
        seeds.requested(["data.root=x", override])
    assert seeds.requested(["data.order_seed=3"]) == (0, 1)


def test_a_baseline_needs_seeds(ask: Callable[..., None]) -> None:
    ask("", "popularity")
    with pytest.raises(UserError, match="add SEEDS=5"):
        seeds.requested([])


# ---------------------------------------------------------------- runs and tables


def test_the_table_and_the_tests_of_two_seeds(
    tmp_path: Path, ask: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    ask("2")
    assert seeds.run(experiments(), finisher(tmp_path)) == 0
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    # t of one degree of freedom times 0.2 / 2.
    assert f"│ all │ {NAME} │ 4 │ 2 │ 0.2000 ±1.2706 │" in lines
    assert "│ │ popularity │ 4 │ - │ 0.4000 │" in lines
    assert "against popularity, the strongest row without a model, 4 users" in lines
    # hit: three users of four always and one half the time, against one of four.
    assert any(f"│ {NAME} │ hit@10 │ 0.8750 │ 0.2500 │ +0.6250 [" in line for line in lines)
    assert "Holm" in out


def test_holm_corrects_over_several_baselines(
    tmp_path: Path, ask: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    ask("2", "popularity; markov")
    assert seeds.run(experiments(), finisher(tmp_path)) == 0
    out = capsys.readouterr().out
    assert out.index("against popularity, 4 users") < out.index("against markov, 4 users")
    rows = [
        [c.strip() for c in li.split("│")] for li in out.splitlines() if "[" in li and NAME in li
    ]
    # Of four users' signed ranks: three differ from popularity, 2 / 2^3; all four from markov, 2 / 2^4.
    assert [(row[2], row[6]) for row in rows] == [
        ("ndcg@10", "0.2500"), ("hit@10", "0.2500"), ("ndcg@10", "0.1250"), ("hit@10", "0.1250"),
    ]  # fmt: skip
    assert [row[7] for row in rows] == ["0.5000"] * 4, "four times the least, and none below it"
    ask("2", "markov")
    assert seeds.run(experiments(), finisher(tmp_path)) == 0
    rows = [li for li in capsys.readouterr().out.splitlines() if "[" in li and NAME in li]
    assert all("0.1250" in li and "0.2500" in li for li in rows), "two tests, twice the least"


def test_a_seed_that_draws_the_data_has_a_fingerprint_of_its_own(
    tmp_path: Path, ask: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """As with few examples: the rows that are tested are the same, the reference rows are drawn, too."""
    ask("2")

    def finish(experiment: config.Experiment) -> list[PlannedStage]:
        seed = experiment.config["seed"]
        own = {"evaluate": [0, 0, 0, 99]}
        e = write_test(tmp_path / f"e-{seed}", {"evaluate": 0.5}, own, f"f{seed}")
        places = {"popularity": [0, 99, 99, 99], "markov": [99, 99, 99, 99 * seed]}
        means = {"popularity": 0.1 + 0.1 * seed, "markov": 0.14}
        r = write_test(tmp_path / f"r-{seed}", means, places, f"f{seed}")
        names = {"train": tmp_path / "t", "evaluate": e, "reference": r}
        return [PlannedStage(name, {}, "k", f, "done", "") for name, f in names.items()]

    assert seeds.run(experiments(), finish) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "test, fingerprint f0, f1" in lines
    assert "│ │ popularity │ 4 │ 2 │ 0.1500 ±0.6353 │" in lines
    assert any("each has a fingerprint of its own" in line for line in lines)
    assert any(line.startswith("against popularity (2 seeds), the strongest") for line in lines)


def test_a_row_that_no_seed_changes_counts_once(tmp_path: Path) -> None:
    finish = finisher(tmp_path)
    stages = finish(experiments(1)[0])
    rows = results.rows_of({s: (e, stages) for s, e in experiments().items()})
    assert [(r.label, r.seed_count) for r in rows] == [
        (NAME, "-"), ("popularity", "-"), ("markov", "-")
    ]  # fmt: skip
    assert rows[0].cell("all/ndcg@10") == "0.1000"


@pytest.mark.parametrize(
    ("failure", "expected"),
    [(UserError("it broke"), "it broke (seed 1;"), (SystemExit(2), "the reason stands above")],
)
def test_a_failed_seed_says_what_is_done(
    failure: BaseException, expected: str, tmp_path: Path, ask: Callable[..., None]
) -> None:
    ask("3")
    well = finisher(tmp_path)

    def finish(experiment: config.Experiment) -> list[PlannedStage]:
        if experiment.config["seed"] == 1:
            raise failure
        return well(experiment)

    with pytest.raises(UserError) as caught:
        seeds.run(experiments(3), finish)
    assert expected in str(caught.value)
    assert "seeds done: 0; the same command goes on with seed 1" in str(caught.value)
    assert not (tmp_path / "e-2").exists()


# ---------------------------------------------------------------- the baseline


def row(label: str, fingerprint: str = "f1", **changed: Any) -> results.Row:
    protocol = {"name": "x", "split": "last", "mask_seen": True, **changed.pop("protocol", {})}
    file = (Path(f"{label}.{fingerprint}"),)
    values: dict[str, list[float | None]] = {"all/ndcg@10": [changed.pop("value", 0.1)]}
    return results.Row(
        label, label, (), changed.pop("reference", False), fingerprint, protocol, (0,), values, (),
        False, file,
    )  # fmt: skip


def test_without_a_name_the_strongest_reference_row_of_the_fingerprint_is_taken() -> None:
    references = [
        row("low", reference=True), row("high", reference=True, value=0.3),
        row("empty", reference=True, value=None), row("other", "f2", reference=True, value=0.9),
    ]  # fmt: skip
    assert baseline.Baseline("").of(row("ours"), references) == references[1]
    assert baseline.Baseline("low").of(row("ours"), references) == references[0]
    assert baseline.Baseline("").of(row("ours"), []) is None
    with pytest.raises(UserError, match="BASELINE=markov is left out of the rows beside ours"):
        baseline.Baseline("markov").of(row("ours"), references)


def test_unlike_fingerprints_are_refused_by_what_differs() -> None:
    theirs = row("theirs", "f2", protocol={"split": "by time", "cut": {"limit_test_batches": 2}})
    with pytest.raises(UserError) as caught:
        baseline.Baseline("theirs", {}).of(row("ours"), [theirs])
    assert str(caught.value) == (
        "ours (fingerprint f1) and BASELINE theirs (fingerprint f2) differ in split (last against by "
        "time), cut.limit_test_batches (none against 2): choose a BASELINE of the same protocol"
    )


def test_baselines_that_cannot_be(ask: Callable[..., None]) -> None:
    shown = "data.root=/some where"
    own = {0: config.load(NAME, [config.as_text(shown), "seed=0"])}
    for text, words in {
        "popularty": ["neither a row of", "popularity, recent_popularity", "did you mean"],
        "popularity a=1": ["neither a row of"],
        "'x": ["cannot be read"],
        NAME: ["is the experiment itself"],
        "reference/movielens_100k": ["rows without a model alone", "markov"],
        "gru4rec/movielens_100k": [
            "has not been run to its end for seed 0: make exp NAME=gru4rec/movielens_100k SEEDS=1 ARGS=",
            "/some where",
        ],
        f"{NAME} stages.train.module.dropout=0.5": ["has not been run", "module.dropout=0.5"],
        "gru4rec/movielens_100k nothing=1": ["unknown key 'nothing'"],
        "markov; markov": ["names markov twice"],
        "markov; popularty": ["neither a row of"],
    }.items():
        ask("1", text)
        with pytest.raises(UserError) as caught:
            baseline.find_all(own)
        assert all(word in str(caught.value) for word in words), caught.value
    ask("1", "markov")
    assert baseline.find_all(own) == [baseline.Baseline("markov")]
    ask("1", "shuffled")
    probes = {0: config.load("tallrec/movie_64shot_probes")}
    assert baseline.find_all(probes) == [baseline.Baseline("tallrec/movie_64shot_probes shuffled")]
    ask("1", "evaluate")
    assert baseline.find_all(probes) == [baseline.Baseline("tallrec/movie_64shot_probes")]


def test_a_test_stage_of_the_experiment_is_a_baseline_for_the_others(tmp_path: Path) -> None:
    name = "tallrec/movie_64shot_probes"
    experiment = config.load(name)
    stages = []
    for stage, value in {"evaluate": 0.5, "shuffled": 0.4}.items():
        folder = write_test(tmp_path / stage, {stage: value}, {})
        stages.append(PlannedStage(stage, {}, "k", folder, "done", ""))
    pairs = list(baseline.Baseline(name).pairs({0: (experiment, stages)}))
    assert [(a.label, b.label) for a, b in pairs] == [(f"{name} shuffled", name)]
