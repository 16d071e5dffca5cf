"""``make hallucinations``, tiny, through the real command: right and wrong inputs, counted anew by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from experiments import build, config
from tests import preloaded

NAME = "mllm_msr/toy_shop_hallucinations"
WORD = re.compile(r"\w\w+")
WRITERS = ("item_pictures", "item_fusion", "user_summaries")
KEPT = (
    "item_pictures", "item_pictures_swapped", "item_fusion", "item_fusion_swapped",
    "item_fusion_contradictory", "user_summaries",
)  # fmt: skip


@pytest.fixture(scope="module")
def words() -> list[str]:
    dropped = ("item_pictures_blank", "item_fusion_blank", "user_summaries_swapped",
               "user_summaries_blank", "user_summaries_contradictory", "reference")  # fmt: skip
    return [
        "llm=tiny_random_vision", "launch.threads=1", "launch.accelerator=cpu", "data.products=24",
        "data.shoppers=10", "data.purchases=4", "data.candidates.count=5",
        *(f"~stages.{name}" for name in dropped),
        *(f"stages.{name}.module.max_new_tokens=12" for name in WRITERS),
        "stages.align_vision.data.train=16", "stages.align_vision.data.valid=6",
        "stages.align_vision.trainer.max_epochs=1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(finish: Callable[..., Any], words: list[str]) -> Any:
    return finish(NAME, words)


def test_what_nothing_supports_is_counted_for_each_stage(
    run: Any,
    words: list[str],
    command_environment: Callable[[Path], dict[str, str]],
    tmp_path: Path,
) -> None:
    tables = {n: pl.read_parquet(run.folder(n) / "predictions.parquet") for n in KEPT}
    said = {n: [_words(text) for text in table["text"]] for n, table in tables.items()}
    known = sorted({word for texts in said.values() for text in texts for word in text})
    file = tmp_path / "words.json"
    file.write_text(json.dumps({"word": [*known, "nordvik", "palmera"]}))
    environment = command_environment(run.runs)
    asked = {**environment, "VOCABULARY": str(file)}
    made = preloaded.run("experiments.hallucinations", NAME, *words, env=asked)
    assert made.returncode == 0, made.stderr[-3000:]
    lines = [[c.strip() for c in x.split("│")[1:-1]] for x in made.stdout.splitlines() if "│" in x]
    told = {line[0]: line for line in lines}
    assert set(told) == set(KEPT)
    inputs = {name: line[2] for name, line in told.items()}
    assert inputs == {
        "item_pictures": "own", "item_fusion": "own", "user_summaries": "own",
        "item_pictures_swapped": "swapped pictures", "item_fusion_swapped": "swapped pictures",
        "item_fusion_contradictory": "swapped texts",
    }  # fmt: skip
    own = config.load(NAME, words).config["data"]
    data: Any = build.build({**own, "cache": environment["LLMREC_CACHE"]})
    told_of = data.prepared.items.select("title", "description", "categories", "brand").iter_rows()
    drawn = data.attributes().select("shape", "colour", "background", "pattern").iter_rows()
    known_of = [" ".join(_flat((*a, *b))) for a, b in zip(told_of, drawn, strict=True)]
    for name in ("item_pictures_swapped", "item_fusion", "item_fusion_contradictory"):
        true = [_words(text) for text in known_of]
        stated = sum(map(len, said[name]))
        false = sum(
            len(s - true[i - 1]) for s, i in zip(said[name], tables[name]["item"], strict=True)
        )
        assert int(told[name][5]) == stated
        assert told[name][6].partition(" ")[0] == (f"{false / stated:.3f}" if stated else "-")
    users = tables["user_summaries"]
    items = data.histories.items
    false = 0
    for text, start, stop in zip(
        said["user_summaries"], users["start"], users["stop"], strict=True
    ):
        false += len(text - _words(" ".join(known_of[i - 1] for i in items[start:stop])))
    stated = sum(map(len, said["user_summaries"]))
    assert told["user_summaries"][6].partition(" ")[0] == (
        f"{false / stated:.3f}" if stated else "-"
    )
    assert sum(int(line[5]) for line in told.values()) > 0


def test_wrong_inputs_make_other_texts(run: Any) -> None:
    """The same prompts and weights: what is shown alone is another item's."""
    pictures = {n: pl.read_parquet(run.folder(n) / "predictions.parquet")["text"] for n in KEPT[:2]}
    assert sorted(pictures["item_pictures"]) == sorted(pictures["item_pictures_swapped"])
    fused = [
        pl.read_parquet(run.folder(n) / "predictions.parquet")["text"].to_list() for n in KEPT[2:5]
    ]
    assert fused[0] != fused[1]
    assert fused[0] != fused[2]


def _words(text: str | None) -> set[str]:
    return set(WORD.findall((text or "").casefold()))


def _flat(row: tuple[Any, ...]) -> list[str]:
    return [" ".join(v) if isinstance(v, list) else str(v or "") for v in row]
