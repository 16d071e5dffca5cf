"""SASRec from files to table through the real command, tiny, on CPU: what it writes, skips and recomputes."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import polars as pl
import pytest
import torch

from datamodules.movielens import MovieLensDataModule
from lightning_modules.base import can_select
from lightning_modules.metrics import row_metrics
from lightning_modules.sasrec import SASRecModule

Finished = Any  # conftest.Finished
EXPERIMENT = "sasrec/movielens_100k"
KS = (1, 3, 5, 10, 20)
USER_AVERAGED = ("recall@", "uauc")
UNIFORM = "data.candidates={_target_:datamodules.candidates.UniformCandidates,count:20}"
ROWS = {"random", "popularity", "recent_popularity", "markov"}


def mtimes(runs: Path) -> dict[str, int]:
    return {str(f): f.stat().st_mtime_ns for f in runs.rglob("*") if f.is_file()}


def recomputed(scores: pl.DataFrame, group: str) -> dict[str, float]:
    """Every metric of a group of rows from rank counts, row by row; users weigh the same where due."""
    rows = scores if group == "all" else scores.filter(pl.col(group))
    counts = [torch.tensor(rows[c].to_list()) for c in ("above", "ties", "candidates")]
    values = row_metrics(*counts, KS)
    means = {}
    for name, value in values.items():
        weight = rows["weight"].to_list() if name.startswith(USER_AVERAGED) else [1.0] * rows.height
        pairs = [(v, w) for v, w in zip(value.tolist(), weight, strict=True) if math.isfinite(v)]
        total = math.fsum(w for _, w in pairs)
        means[name] = math.fsum(v * w for v, w in pairs) / total if total else math.nan
    return means


def counted(lines: pl.DataFrame) -> pl.DataFrame:
    """Rank counts of each row from its (row, candidate) lines."""
    groups = [c for c in lines.columns if c.startswith(("cold_", "warm_"))]
    target = pl.col("score").filter(pl.col("is_target")).first()
    return lines.group_by("row", maintain_order=True).agg(
        pl.col("is_target").sum().alias("targets"),
        (pl.col("score") > target).sum().alias("above"),
        ((pl.col("score") == target).sum() - 1).alias("ties"),
        pl.len().alias("candidates"),
        pl.col("item_id").n_unique().alias("distinct"),
        *(pl.col(c).first() for c in ["weight", *groups]),
    )


def require_equal(metrics: dict[str, Any], row: str, scores: pl.DataFrame) -> None:
    values = metrics["rows"][row]
    for group in ("all", "cold_item", "warm_item", "cold_user", "warm_user"):
        ours = recomputed(scores, group)
        n = scores.height if group == "all" else scores[group].sum()
        assert values[f"{group}/n"]["value"] == n > 0
        for name, value in ours.items():
            assert values[f"{group}/{name}"]["value"] == pytest.approx(value, abs=1e-6), (
                group,
                name,
            )


@pytest.mark.slow
def test_the_first_run_prints_its_table_and_names_its_folders(finished: Finished) -> None:
    out = finished.result.stdout
    for word in (
        "cold item",
        "warm item",
        "cold user",
        "warm user",
        EXPERIMENT,
        *ROWS,
        "fingerprint",
    ):
        assert word in out, word
    for stage in ("train", "evaluate", "reference"):
        assert finished.folder(stage).name in out.replace("\n", "")
        assert (finished.folder(stage) / "done.json").is_file()
    assert "Traceback" not in finished.result.stderr


def test_the_table_shows_the_numbers_of_the_files(finished: Finished) -> None:
    rows = {**finished.json("reference", "metrics.json")["rows"],
            EXPERIMENT: finished.json("evaluate", "metrics.json")["rows"]["evaluate"]}  # fmt: skip
    table = [line.split("│") for line in finished.result.stdout.splitlines() if "│" in line]
    shown = {cells[2].strip(): cells for cells in table[: len(rows)]}
    assert set(shown) == set(rows)
    for name, cells in shown.items():
        assert cells[1].strip() == ("all" if cells is table[0] else "")
        for cell, metric in ((cells[4], "all/hit@1"), (cells[7], "all/ndcg@10")):
            found = [float(number) for number in re.findall(r"[\d.]+", cell)]
            told, error = (rows[name][metric][key] for key in ("value", "stderr"))
            others = 1.96**2 / (rows[name]["all/n"]["value"] + 1.96**2)
            span = [1.96 * error] if error else [told * (1 - others), told + others * (1 - told)]
            expected = [told] if name == "random" else [told, *span]  # chance is exact
            assert found == pytest.approx(expected, abs=5e-4)


def test_what_a_stage_leaves_behind(finished: Finished) -> None:
    train, test = finished.folder("train"), finished.folder("evaluate")
    assert {"best.ckpt", "last.ckpt", "config.yaml", "stage.json"} <= {
        f.name for f in train.iterdir()
    }
    assert (test / "scores.evaluate.parquet").is_file()
    for row in ROWS:
        assert (finished.folder("reference") / f"scores.{row}.parquet").is_file()
    done = finished.json("train", "done.json")
    assert done["seconds"] > 0
    assert done["peak_memory_mb"]["host"] > 50
    assert done["versions"]["torch"] == torch.__version__
    assert done["results"]["epochs"] == 3
    assert "lightning_modules/sasrec/model.py" in done["sources"]
    assert "lightning_modules/markov/module.py" not in done["sources"]
    leftovers = [
        f for f in finished.runs.rglob("*") if f.name.endswith((".part", ".parts", ".lock"))
    ]
    assert leftovers == []


def test_loggers_get_every_test_metric_and_the_main_validation_ones(finished: Finished) -> None:
    def last(stage: str, column: str) -> dict[str, str]:
        with (finished.folder(stage) / "csv" / "version_0" / "metrics.csv").open() as file:
            return [row for row in csv.DictReader(file) if row.get(column)][-1]

    values = finished.json("evaluate", "metrics.json")["rows"]["evaluate"]
    tested = last("evaluate", "test/all/ndcg@10")
    for name, entry in values.items():
        if entry["value"] is not None:
            assert float(tested[f"test/{name}"]) == pytest.approx(entry["value"], abs=1e-6), name
    validated = last("train", "val/all/ndcg@10")
    assert {"val/all/mrr", "val/cold_item/ndcg@10"} <= validated.keys()
    assert "val/cold_item/mrr" not in validated
    assert all(map(can_select, (name for name in validated if name.startswith("val/"))))


def test_random_is_the_expectation_of_guessing(finished: Finished) -> None:
    scores = pl.read_parquet(finished.folder("reference") / "scores.random.parquet")
    random = finished.json("reference", "metrics.json")["rows"]["random"]
    for k in KS:
        expected = sum(min(k / c, 1) for c in scores["candidates"]) / scores.height
        assert random[f"all/hit@{k}"]["value"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("row", ["evaluate", *sorted(ROWS)])
def test_metrics_can_be_recomputed_from_the_scores_files(finished: Finished, row: str) -> None:
    stage = "evaluate" if row == "evaluate" else "reference"
    scores = pl.read_parquet(finished.folder(stage) / f"scores.{row}.parquet")
    assert scores["row"].to_list() == list(range(60)), "every row once, in order"
    require_equal(finished.json(stage, "metrics.json"), row, scores)


def test_top_items_agree_with_the_counts_and_hold_nothing_seen(
    finished: Finished, tiny_movielens: Path
) -> None:
    scores = pl.read_parquet(finished.folder("evaluate") / "scores.evaluate.parquet")
    events = [line.split("\t") for line in (tiny_movielens / "u.data").read_text().splitlines()]
    for line in scores.iter_rows(named=True):
        events_of_user = [e for e in events if e[0] == line["user_id"]]
        newest = max(int(e[3]) for e in events_of_user)
        assert line["target_id"] in [e[1] for e in events_of_user if int(e[3]) == newest]
        seen = {e[1] for e in events_of_user} - {line["target_id"]}
        assert line["candidates"] == 80 - len(seen) == len(line["top_items"])
        assert not seen & set(line["top_items"])
        above = sum(s > line["target_score"] for s in line["top_scores"])
        assert above == line["above"]
        assert line["top_items"][above : above + line["ties"] + 1].count(line["target_id"]) == 1


@pytest.mark.slow
def test_the_same_command_again_runs_nothing_and_prints_the_same_table(
    finished: Finished, finish: Callable[..., Finished], tiny: list[str]
) -> None:
    before = mtimes(finished.runs)
    again = finish(EXPERIMENT, tiny, finished.runs)
    assert mtimes(finished.runs) == before
    assert again.result.stdout == finished.result.stdout
    assert again.result.stderr.count(": done (") == 3


@pytest.mark.slow
def test_a_hyper_parameter_reruns_training_and_evaluation_alone(
    finished: Finished, finish: Callable[..., Finished], tiny: list[str]
) -> None:
    before = mtimes(finished.runs)
    changed = [*tiny, "++stages.train.module.dropout=0.5", "++stages.train.trainer.max_epochs=1"]
    result = finish(EXPERIMENT, changed, finished.runs).result
    after = mtimes(finished.runs)
    assert {f: after[f] for f in before} == before
    made = {Path(f).relative_to(finished.runs).parts[0] for f in after.keys() - before.keys()}
    assert {name.partition("-")[0] for name in made} == {"sasrec.train", "sasrec.evaluate"}
    assert "reference: done" in result.stderr
    for folder in made:
        shutil.rmtree(finished.runs / folder)  # `finished` keeps one folder a stage


@pytest.mark.slow
def test_validation_rows_can_be_scored_instead(
    finished: Finished, finish: Callable[..., Finished], tiny: list[str]
) -> None:
    """The best epoch's own validation figure comes out again, under a fingerprint of its own."""
    before = {f.name for f in finished.runs.iterdir()}
    usual = finished.json("evaluate", "metrics.json")["fingerprint"]
    run = finish(EXPERIMENT, [*tiny, "split=valid"], finished.runs)
    assert "train: done" in run.result.stderr
    made = {f for f in finished.runs.iterdir() if f.name not in before}
    assert {f.name.partition("-")[0] for f in made} == {"sasrec.evaluate", "reference"}
    (folder,) = (f for f in made if f.name.startswith("sasrec"))
    told = json.loads((folder / "metrics.json").read_text())
    (selected,) = finished.json("train", "done.json")["results"]["selected"].values()
    assert told["rows"]["evaluate"]["all/ndcg@10"]["value"] == pytest.approx(selected, abs=1e-6)
    assert told["protocol"]["scored"] == "valid"
    assert told["fingerprint"] != usual
    for folder in made:
        shutil.rmtree(folder)  # `finished` keeps one folder a stage


@pytest.fixture(scope="module")
def sampled(finish: Callable[..., Finished], tiny: list[str]) -> Finished:
    """The paper's file: BCE, one negative, sampled candidates; with TensorBoard's logger."""
    name = "sasrec/movielens_100k_paper"
    return finish(name, [*tiny, UNIFORM, "data.filters=[]", "logger=tensorboard"])


@pytest.mark.slow
def test_the_papers_chain_runs_with_drawn_candidates(sampled: Finished) -> None:
    metrics = sampled.json("evaluate", "metrics.json")
    lines = pl.read_parquet(sampled.folder("evaluate") / "scores.evaluate.parquet")
    rows = counted(lines)
    assert rows["row"].to_list() == list(range(60))
    assert rows["targets"].to_list() == [1] * 60
    assert rows["candidates"].to_list() == rows["distinct"].to_list() == [21] * 60
    require_equal(metrics, "evaluate", rows)
    other = pl.read_parquet(sampled.folder("reference") / "scores.popularity.parquet")
    same = ["row", "item_id", "is_target"]
    assert lines.select(same).equals(other.select(same)), "all methods rank the same candidates"


def test_unlike_protocols_have_unlike_fingerprints(finished: Finished, sampled: Finished) -> None:
    prints = [
        {run.json(stage, "metrics.json")["fingerprint"] for stage in ("evaluate", "reference")}
        for run in (finished, sampled)
    ]
    assert [len(p) for p in prints] == [1, 1]
    assert prints[0] != prints[1]


def test_tensorboard_files_and_a_falling_loss(sampled: Finished) -> None:
    train = sampled.folder("train")
    assert list(train.rglob("events.out.tfevents.*"))
    with (train / "csv" / "version_0" / "metrics.csv").open() as file:
        losses = [float(r["train/loss"]) for r in csv.DictReader(file) if r.get("train/loss")]
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("loss", ["ce", "sampled_ce", "bce", "gbce", "bpr"])
@pytest.mark.parametrize("windows", ["newest", "all"])
def test_every_loss_trains(tiny_movielens: Path, tmp_path: Path, loss: str, windows: str) -> None:
    """Two epochs in this process: the loss is a number, falls, and moves every weight."""
    lightning.seed_everything(0, verbose=False)
    data = MovieLensDataModule(root=str(tiny_movielens))
    data.batch_size = 16
    module = SASRecModule(
        data.histories.num_items, max_length=6, hidden_size=8, num_blocks=1, dropout=0.0,
        loss=loss, windows=windows, negatives=3, learning_rate=0.01,
    )  # fmt: skip
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    seen: list[float] = []

    class Watch(lightning.Callback):
        def on_train_epoch_end(self, trainer: lightning.Trainer, *unused: Any) -> None:
            seen.append(float(trainer.callback_metrics["train/loss"]))

    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        use_distributed_sampler=False, num_sanity_val_steps=0, callbacks=[Watch()],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    assert len(seen) == 2
    assert all(map(math.isfinite, seen))
    assert seen[1] < seen[0]
    still = [n for n, p in module.named_parameters() if torch.equal(p, before[n])]
    assert still == []


@pytest.mark.slow
def test_two_devices_and_micro_batches_change_nothing(
    finish: Callable[..., Finished], tiny: list[str]
) -> None:
    """One epoch without dropout; 37 rows a batch divide neither by 2 nor by 8."""
    plain = [
        *tiny, "~stages.reference", "++stages.train.module.dropout=0.0",
        "++stages.train.trainer.max_epochs=1", "++stages.train.batch_size=37",
        "++stages.train.module.loss=bce", "++stages.train.module.norm=pre",
    ]  # fmt: skip
    ddp = ["launch.devices=2", "launch.strategy=ddp"]
    runs = [
        finish(EXPERIMENT, [*plain, *extra])
        for extra in ([], ddp, ["launch.micro_batch_size=8"], [*ddp, "launch.micro_batch_size=8"])
    ]
    names = {tuple(sorted(f.name for f in run.runs.iterdir())) for run in runs}
    assert len(names) == 1, "how a stage is run must not name it"
    logged = []
    for run in runs:
        with (run.folder("train") / "csv" / "version_0" / "metrics.csv").open() as file:
            merged: dict[str, float] = {}
            for row in csv.DictReader(file):
                merged |= {k: float(v) for k, v in row.items() if v and not k.startswith("lr")}
        logged.append(merged)
    assert "train/loss" in logged[0]
    assert "val/all/ndcg@10" in logged[0]
    for other, words in zip(logged[1:], ("two devices", "micro batches", "both"), strict=True):
        for name in ("train/loss", *(n for n in logged[0] if n.startswith("val/"))):
            assert other[name] == pytest.approx(logged[0][name], abs=1e-5, nan_ok=True), (
                words,
                name,
            )
    # The same weights tested on two devices: every row once, to the last bit.
    one, two = runs[0], runs[1]
    assert one.json("evaluate", "done.json")["devices"] == 1
    assert two.json("evaluate", "done.json")["devices"] == 2
    for name in ("metrics.json", "scores.evaluate.parquet", "done.json"):
        (two.folder("evaluate") / name).unlink()
    weights = (one.folder("train") / "best.ckpt").read_bytes()
    (two.folder("train") / "best.ckpt").write_bytes(weights)
    again = finish(EXPERIMENT, [*plain, *ddp], two.runs)
    ours, theirs = (r.json("evaluate", "metrics.json")["rows"] for r in (again, one))
    assert json.dumps(ours) == json.dumps(theirs)


@pytest.mark.slow
def test_wandb_offline_keeps_one_id(finish: Callable[..., Finished], tiny: list[str]) -> None:
    short = [*tiny, "~stages.reference", "++stages.train.trainer.max_epochs=1", "logger=wandb"]
    first = finish(EXPERIMENT, short)
    train = first.folder("train")
    name = (train / "wandb_id").read_text()
    (run,) = (train / "wandb").glob("offline-run-*")
    assert run.name.endswith(f"-{name}")
    (train / "done.json").unlink()
    finish(EXPERIMENT, short, first.runs)
    assert (train / "wandb_id").read_text() == name
    found = list((train / "wandb").glob("offline-run-*"))
    assert all(f.name.endswith(f"-{name}") for f in found), found
