"""TALLRec's chain, tiny, through the real command."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("fastapi")

from fastapi.testclient import TestClient

from datamodules.loading import EvalDataset
from datamodules.types import TEST
from experiments import build, load
from experiments.asked import Ask
from experiments.batching import Limits
from experiments.errors import UserError
from experiments.serve import about
from experiments.service import Service
from lightning_modules.errors import ModelError
from tests import preloaded
from tests.lightning_modules.tiny_llm import tallrec_words, write_tiny_llm

NAME = "tallrec/movie_64shot"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, tiny_movielens: Path) -> list[str]:
    llm = write_tiny_llm(tmp_path_factory.mktemp("llm"), longest=1024)
    return [
        *tallrec_words(llm, tiny_movielens, examples=8),
        "launch.accelerator=cpu", "++stages.train.trainer.max_epochs=2", "++llm.dtype=float32",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(finish: Callable[..., Any], words: list[str]) -> Any:
    return finish(NAME, words)


def test_the_chain_runs_and_its_auc_is_that_of_the_scores_file(finished: Any) -> None:
    rows = finished.json("evaluate", "metrics.json")["rows"]
    (metrics,) = rows.values()
    scores = pl.read_parquet(next(finished.folder("evaluate").glob("scores.*.parquet")))
    expected = roc_auc_score(scores["label"], scores["score"])
    assert metrics["all/auc"]["value"] == pytest.approx(expected, abs=1e-9)
    assert metrics["all/auc"]["stderr"] > 0
    assert scores["score"].n_unique() > scores.height // 2
    assert "liked_fraction" in finished.result.stdout
    assert "resamples users" in finished.result.stdout


def test_a_second_run_has_nothing_to_do(
    finished: Any, run_command: Callable[..., Any], words: list[str]
) -> None:
    again = run_command("exp", NAME, *words, runs=finished.runs)
    assert again.returncode == 0
    assert "running" not in again.stdout + again.stderr


def test_a_history_of_ones_own_is_read_whatever_was_asked_before(
    finished: Any, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMREC_RUNS", str(finished.runs))
    models = load(NAME, *words), load(NAME, *words)

    def scores(model: Any, history: list[str]) -> dict[str, float]:
        (told,) = model.recommend(histories=[history], items=["5", "6", "7"])
        return {r.item: r.score for r in told.items}

    first, second = (scores(models[0], history) for history in (["1", "2"], ["30", "40"]))
    assert second == scores(models[1], ["30", "40"])
    assert all(first[item] != second[item] for item in first)
    assert first == scores(models[0], ["1", "2"])


def test_weights_that_are_not_those_of_the_fit_answer_nobody(
    finished: Any, words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The file is whole and its names and shapes are right; one number of an adapter is another."""
    runs = tmp_path / "runs"
    shutil.copytree(finished.runs, runs)
    path = next(runs.glob("*.train-*")) / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    name = next(n for n in checkpoint["state_dict"] if "lora_B" in n)
    checkpoint["state_dict"][name][0, 0] += 0.001
    torch.save(checkpoint, path)
    monkeypatch.setenv("LLMREC_RUNS", str(runs))
    with pytest.raises((ModelError, UserError), match=rf"best\.ckpt is damaged: its {name}"):
        load(NAME, *words).recommend(histories=[["1", "2"]], items=["5"])


@pytest.fixture(scope="module")
def new_items(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two films that nobody has seen, one with the title of film 5; a name that a shell would take apart."""
    path = tmp_path_factory.mktemp("new") / "new films; $(x).jsonl"
    lines = [{"item_id": "n1", "title": "Film 5 (1905)"}, {"item_id": "n2", "title": "Tomorrow"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_items_that_nobody_has_seen_are_scored_by_their_words(
    finished: Any, words: list[str], new_items: str, monkeypatch: pytest.MonkeyPatch,
    command_environment: Callable[[Path], dict[str, str]],
) -> None:  # fmt: skip
    """``ITEMS=`` ranks them alone; the score is that of a known item of the same words."""
    own = {**command_environment(finished.runs), "ITEMS": new_items, "HISTORY": "1; 2"}
    told = preloaded.run("experiments.recommend", NAME, *words, env={**own, "FORMAT": "json"})
    assert told.returncode == 0, told.stderr[-2000:]
    scores = {r["item"]: r["score"] for r in json.loads(told.stdout)["items"]}
    assert set(scores) == {"n1", "n2"}
    monkeypatch.setenv("LLMREC_RUNS", str(finished.runs))
    model = load(NAME, *words)
    assert model.names.titles[4] == "Film 5 (1905)"
    (known,) = model.recommend(histories=[["1", "2"]], items=["5"])
    assert scores["n1"] == pytest.approx(known.items[0].score, abs=1e-4)
    assert abs(scores["n2"] - scores["n1"]) > 1e-3


def test_a_service_has_them_in_its_catalogue(
    finished: Any, words: list[str], new_items: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMREC_RUNS", str(finished.runs))
    model = load(NAME, *words, new_items=new_items)
    assert about(model)["new_items"] == 2
    with TestClient(Service(lambda: model, Limits(), about).app) as client:
        while client.get("/health").status_code != 200:
            time.sleep(0.05)
        asked = {"history": ["1", 2], "items": ["n2", "film 6"]}
        told = client.post("/recommend", json=asked)
        assert told.status_code == 200, told.text
        assert {r["item"] for r in told.json()["items"]} == {"n2", "6"}
        assert client.get("/model").json()["new_items"] == 2


def test_a_retriever_of_other_data_hands_candidates_over(
    finished: Any, words: list[str], tiny: list[str], run_command: Callable[..., Any],
    command_environment: Callable[[Path], dict[str, str]], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    """SASRec's best items behind the same history, in the order of the yes/no margins."""
    other, runs = "sasrec/movielens_100k", tmp_path / "runs"
    shutil.copytree(finished.runs, runs)  # what others look for in the folder stays alone there
    trained = run_command("exp", other, *tiny, "~stages.reference", runs=runs)
    assert trained.returncode == 0, trained.stderr[-2000:]
    own = {**command_environment(runs), "LLMREC_USER": "7", "K": "5", "FORMAT": "json"}
    own |= {"RETRIEVER": shlex.join([other, *tiny, "~stages.reference"])}
    told = preloaded.run("experiments.recommend", NAME, *words, env=own)
    assert told.returncode == 0, told.stderr[-2000:]
    shown = json.loads(told.stdout)["items"]
    assert len(shown) == 5
    assert [r["score"] for r in shown] == sorted((r["score"] for r in shown), reverse=True)
    monkeypatch.setenv("LLMREC_RUNS", str(runs))
    model = load(NAME, *words)
    retriever = load(other, *tiny, "~stages.reference")
    events = model.history(Ask(user="7"))
    (found,) = retriever.recommend(histories=[events], k=20)
    assert [found.items[r["retrieved_as"] - 1].item for r in shown] == [r["item"] for r in shown]
    (alone,) = model.recommend("7", 20, items=[r.item for r in found.items])
    assert [r.item for r in alone.items[:5]] == [r["item"] for r in shown]


@pytest.fixture(scope="module")
def export(
    finished: Any, command_environment: Callable[[Path], dict[str, str]]
) -> Callable[..., Any]:
    """``make export``, as the Makefile starts it."""

    def run(name: str, *overrides: str) -> subprocess.CompletedProcess[str]:
        own = command_environment(finished.runs)
        return preloaded.run("experiments.export", name, *overrides, env=own)

    return run


@pytest.fixture(scope="module")
def exported(finished: Any, words: list[str], export: Callable[..., Any]) -> Path:
    """The folder of the finished model's export."""
    done = export(NAME, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    return finished.folder("train") / "export"


def test_a_finished_model_is_exported(
    exported: Path, words: list[str], export: Callable[..., Any]
) -> None:
    assert (exported / "adapter" / "adapter_model.safetensors").is_file()
    assert (exported / "merged" / "model.safetensors").is_file()
    never = export("sasrec/movielens_100k")
    assert never.returncode == 2
    assert "has not been run to its end" in never.stderr
    unfinished = export(NAME, *words, "seed=9")
    assert unfinished.returncode == 2
    assert "has not been run to its end" in unfinished.stderr


@torch.no_grad()
def plain_margins(run: Any, exported: Path) -> tuple[list[float], list[float], list[float]]:
    """Of each test row: of the run, of plain transformers with the merged weights, and with the untrained.

    Each row's prompt alone, whole, in float32; nothing of ours computes.
    """
    spec = run.json("evaluate", "stage.json")["spec"]
    (node,) = spec["modules"].values()
    data: Any = build.build(spec["data"])
    rows = EvalDataset(data.histories, data.rows(TEST), data.seed, data.liked_above).every()
    texts = build.build_on(node, data).texts(rows, np.zeros(len(rows.row), np.int64))
    tokenizer = AutoTokenizer.from_pretrained(exported / "merged")
    model = AutoModelForCausalLM.from_pretrained(exported / "merged", dtype=torch.float32).eval()
    base = AutoModelForCausalLM.from_pretrained(node["llm"]["source"], dtype=torch.float32).eval()

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def margin(of: Any, text: str) -> float:
        yes, no = ids(text + "Yes."), ids(text + "No.")
        parted = next(i for i, pair in enumerate(zip(yes, no, strict=False)) if pair[0] != pair[1])
        logits = of(torch.tensor([yes[:parted]])).logits[0, -1]
        return float(logits[yes[parted]] - logits[no[parted]])

    scores = pl.read_parquet(next(run.folder("evaluate").glob("scores.*.parquet")))
    assert scores["row"].to_list() == rows.row.tolist()
    merged, untrained = ([margin(of, text) for text in texts] for of in (model, base))
    return scores["score"].to_list(), merged, untrained


def test_plain_transformers_have_the_scores_of_the_run(finished: Any, exported: Path) -> None:
    scores, merged, untrained = plain_margins(finished, exported)
    assert merged == pytest.approx(scores, abs=1e-4)
    assert max(abs(a - b) for a, b in zip(merged, untrained, strict=True)) > 0.01


def test_a_run_in_bfloat16_is_merged_in_bfloat16(
    finish: Callable[..., Any], words: list[str],
    command_environment: Callable[[Path], dict[str, str]],
) -> None:  # fmt: skip
    """Every weight is the sum, rounded once; scores are those of the run, whose every product was rounded.

    A margin is a difference of two logits, each off by about 0.4% of the length of the state behind it.
    """
    words = [
        *(w for w in words if "llm.dtype" not in w),
        "++llm.dtype=bfloat16",
        "~stages.reference",
    ]
    run = finish(NAME, words)
    own = command_environment(run.runs)
    done = preloaded.run("experiments.export", NAME, *words, env=own)
    assert done.returncode == 0, done.stderr[-2000:]
    exported = run.folder("train") / "export"
    merged = load_file(exported / "merged" / "model.safetensors")
    assert {weight.dtype for weight in merged.values()} == {torch.bfloat16}
    adapter = load_file(exported / "adapter" / "adapter_model.safetensors")
    told = json.loads((exported / "adapter" / "adapter_config.json").read_text())
    spec = run.json("train", "stage.json")["spec"]
    (node,) = spec["modules"].values()
    base = load_file(Path(node["llm"]["source"]) / "model.safetensors")
    adapted = {n.partition(".lora_A")[0] for n in adapter if ".lora_A" in n}
    assert len(adapted) == 14  # all linear layers of two blocks
    for name in adapted:
        plain = name.removeprefix("base_model.model.") + ".weight"
        a, b = (adapter[f"{name}.lora_{x}.weight"].float() for x in "AB")
        scale = told["lora_alpha"] / told["r"]
        exact = base[plain].bfloat16().float() + scale * (b @ a)
        # Roundings: of A, of B and of the update, whose terms may cancel each other, and of the sum.
        bound = 2**-8 * (exact.abs() + 3 * scale * (b.abs() @ a.abs())) + 1e-6
        assert ((merged[plain].float() - exact).abs() / bound).max() <= 1, name
        assert not torch.equal(merged[plain], base[plain].bfloat16()), name
    scores, again, untrained = (torch.tensor(x) for x in plain_margins(run, exported))
    spread = (scores - untrained).std()
    assert (again - scores).square().mean().sqrt() < 0.2 * spread  # 0.12 was seen
    assert torch.corrcoef(torch.stack([again, scores]))[0, 1] > 0.98


def test_a_quantized_model_goes_through_the_same_chain(
    finish: Callable[..., Any], finished: Any, words: list[str]
) -> None:
    """Its weights are in 4 bits, its adapter has learned, and its scores are rounded ones."""
    run = finish(NAME, [*words, "++llm.quantization=nf4", "~stages.reference"])
    told = re.search(r"nf4: its weights take .* \(([\d.]+) bytes each\)", run.result.stderr)
    assert told is not None, run.result.stderr[-2000:]
    assert float(told[1]) < 2.5  # float32 takes 4; embeddings and the adapter are kept so
    kept = torch.load(run.folder("train") / "best.ckpt", weights_only=True)["state_dict"]
    learned = [weight for name, weight in kept.items() if "lora_B" in name]
    assert len(learned) == 14  # all linear layers of two blocks
    assert all(weight.abs().sum() > 0 for weight in learned)
    whole, rounded = (
        pl.read_parquet(next(r.folder("evaluate").glob("scores.*.parquet"))).sort("row")
        for r in (finished, run)
    )
    assert whole["row"].to_list() == rounded["row"].to_list()
    apart = np.abs((whole["score"] - rounded["score"]).to_numpy())
    assert apart.min() > 0
    assert apart.mean() < whole["score"].std()  # type: ignore[operator]
    assert np.corrcoef(whole["score"], rounded["score"])[0, 1] > 0.7


def test_weights_that_were_rounded_together_answer_nearer_to_the_model(
    finish: Callable[..., Any], words: list[str]
) -> None:
    """One adapter on both; what it is rounded by are questions about the catalogue."""
    left_out = [f"~stages.{name}" for name in ("nf4", "int8", "bfloat16", "reference")]
    run = finish(f"{NAME}_precisions", [*words, *left_out])
    apart = {}
    whole = pl.read_parquet(next(run.folder("evaluate").glob("scores.*.parquet"))).sort("row")
    for stage in ("nf4_blocks_of_32", "nf4_rounded"):
        found = pl.read_parquet(next(run.folder(stage).glob("scores.*.parquet"))).sort("row")
        apart[stage] = ((found["score"] - whole["score"]) ** 2).mean()
    assert 0 < apart["nf4_rounded"] < apart["nf4_blocks_of_32"]
