"""TALLRec's two stages, tiny, through the real command: instructions, then examples from that adapter."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from datamodules.errors import DataSourceError
from datamodules.sources import cache_root
from experiments import artifacts, check, config
from experiments.errors import UserError
from tests import preloaded
from tests.lightning_modules.tiny_llm import tallrec_words, write_tiny_llm

BOTH, FIRST, SECOND = (
    f"tallrec/movie_64shot{end}" for end in ("_two_stage", "_alpaca_only", "")
)  # fmt: skip
QUICK = ["++stages.train.trainer.max_epochs=2", "++stages.train.module.warmup_steps=0"]
TUNED = [
    "stages.alpaca.trainer.max_epochs=3", "stages.alpaca.batch_size=8",
    "stages.alpaca.module.learning_rate=0.01", "stages.alpaca.module.warmup_steps=0",
]  # fmt: skip


def write_instructions(path: Path, answer: str = "It is") -> Path:
    rows = [
        {"instruction": f"Say {i}.", "input": "A number." if i % 3 else "", "output": f"{answer} {i}."}
        for i in range(30)
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def shrunk(tmp_path_factory: pytest.TempPathFactory, tiny_movielens: Path) -> list[str]:
    llm = write_tiny_llm(tmp_path_factory.mktemp("llm"), longest=1024)
    return [
        *tallrec_words(llm, tiny_movielens, examples=8),
        "launch.accelerator=cpu", "~stages.reference",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_instructions(tmp_path_factory.mktemp("instructions") / "some.jsonl")


@pytest.fixture(scope="module")
def words(shrunk: list[str], file: Path) -> list[str]:
    return [*shrunk, *QUICK, *TUNED, f"instructions={file}"]


@pytest.fixture(scope="module")
def finished(finish: Callable[..., Any], words: list[str]) -> Any:
    return finish(BOTH, words)


@pytest.fixture(scope="module")
def exported(
    finished: Any, words: list[str], command_environment: Callable[[Path], dict[str, str]]
) -> Any:
    """What ``make export`` has written."""
    done = preloaded.run("experiments.export", BOTH, *words, env=command_environment(finished.runs))
    assert done.returncode == 0, done.stderr[-2000:]
    return finished


def weights(run: Any, stage: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(
        run.folder(stage) / "best.ckpt", map_location="cpu", weights_only=True
    )["state_dict"]
    return found


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def test_both_stages_run_and_the_second_starts_where_the_first_ended(finished: Any) -> None:
    selected = finished.json("alpaca", "done.json")["results"]["selected"]["val/loss"]
    with (next(finished.folder("alpaca").glob("csv/**/metrics.csv"))).open() as log:
        validated = [float(r["val/loss"]) for r in csv.DictReader(log) if r.get("val/loss")]
    assert len(validated) == 3
    assert selected == pytest.approx(min(validated))
    assert validated[-1] < 0.9 * validated[0]
    first, second = weights(finished, "alpaca"), weights(finished, "train")
    assert not equal(first, second)
    # Eight examples move it a little, from there and not from where LoRA begins.
    moved = max((second[n] - first[n]).abs().max() for n in first)
    assert moved < max(w.abs().max() for n, w in first.items() if "lora_B" in n)
    (metrics,) = finished.json("evaluate", "metrics.json")["rows"].values()
    assert 0 <= metrics["all/auc"]["value"] <= 1
    assert "instructions: 28 train, 2 valid; left out: none" in finished.result.stderr


def test_the_files_content_names_the_stages_and_not_its_place(
    finished: Any, words: list[str], run_command: Callable[..., Any], tmp_path: Path, file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    copy = shutil.copy(file, tmp_path / "copy with a blank.jsonl")
    moved = [*words[:-1], f"instructions={copy}"]
    again = run_command("exp", BOTH, *moved, runs=finished.runs)
    assert again.returncode == 0, again.stderr
    assert "running" not in again.stderr
    monkeypatch.setenv("LLMREC_RUNS", str(finished.runs))
    other = write_instructions(tmp_path / "other.jsonl", "No")
    planned = artifacts.plan(
        config.load(BOTH, [*words[:-1], f"instructions={other}"]), cache_root()
    )
    assert next((s.name, s.state) for s in planned) == ("alpaca", "missing")
    assert all(s.folder is None for s in planned)  # its content is not known yet


def test_the_first_stage_alone_shares_its_folder(
    finished: Any, words: list[str], run_command: Callable[..., Any], tmp_path: Path
) -> None:
    folder = finished.folder("alpaca")
    shutil.copytree(folder, tmp_path / folder.name)
    alone = [w for w in words if not w.startswith("++stages.train")]
    done = run_command("exp", FIRST, *alone, runs=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "[1/2] alpaca: done" in done.stderr
    assert "[2/2] evaluate: running" in done.stderr
    assert FIRST in done.stdout


def test_both_adapters_are_exported(exported: Any) -> None:
    for stage in ("alpaca", "train"):
        folder = exported.folder(stage) / "export"
        stored = load_file(folder / "adapter" / "adapter_model.safetensors")
        kept = {n.replace(".default", "").removeprefix("model."): w
                for n, w in weights(exported, stage).items()}  # fmt: skip
        assert equal(stored, kept)
        assert (folder / "merged" / "model.safetensors").is_file()


def test_a_given_adapter_takes_the_first_stages_place(
    exported: Any, finish: Callable[..., Any], shrunk: list[str], tmp_path: Path
) -> None:
    adapter = shutil.copytree(
        exported.folder("alpaca") / "export" / "adapter", tmp_path / "adapter"
    )
    given = [*shrunk, *QUICK, "~stages.alpaca", f"stages.train.inputs.start={adapter}"]
    run = finish(BOTH, given)
    assert equal(weights(run, "train"), weights(exported, "train"))  # as if both had been run
    ours, theirs = (r.json("evaluate", "metrics.json")["rows"] for r in (run, exported))
    assert ours == theirs


def test_a_given_adapter_counts_by_content_and_has_to_fit(
    exported: Any, run_command: Callable[..., Any], shrunk: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("LLMREC_RUNS", str(exported.runs))
    adapter = exported.folder("alpaca") / "export" / "adapter"

    def key(place: Path) -> str | None:
        start = f"+stages.train.inputs.start={place}"
        planned = artifacts.plan(config.load(SECOND, [*shrunk, *QUICK, start]), cache_root())
        return next(s.key for s in planned if s.name == "train")

    copy = shutil.copytree(adapter, tmp_path / "copy")
    assert key(copy) == key(adapter) is not None
    assert key(exported.folder("train") / "export" / "adapter") != key(adapter)
    assert key(exported.folder("alpaca") / "best.ckpt") not in (None, key(adapter))
    with pytest.raises(UserError, match=r"stages.train.inputs.start is /nowhere, which is neither"):
        key(Path("/nowhere"))
    refused = run_command(
        "exp", SECOND, *shrunk, *QUICK, "stages.train.module.adapter.rank=4",
        f"+stages.train.inputs.start={adapter}", runs=tmp_path / "runs",
    )  # fmt: skip
    assert refused.returncode == 2
    assert "its r is 8, here 4" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
def test_a_stage_that_was_killed_ends_bit_equal(
    finished: Any, run_command: Callable[..., Any], words: list[str], tmp_path: Path
) -> None:
    alone = [w for w in words if not w.startswith("++stages.train")] + ["~stages.evaluate"]
    kill = "+callbacks.fault={_target_:faults.KillAtStep,step:6}"  # in the second epoch of three
    killed = run_command("exp", FIRST, *alone, kill, runs=tmp_path)
    assert "SIGKILL" in killed.stderr
    done = run_command("exp", FIRST, *alone, runs=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resuming" in done.stderr
    (folder,) = tmp_path.glob("llm.alpaca-*")
    resumed = torch.load(folder / "best.ckpt", weights_only=True)["state_dict"]
    assert equal(resumed, weights(finished, "alpaca"))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["instructions=null"], "there is no file of instructions"),
        (["stages.alpaca.select.mode=max"], "of which less is better: add mode: min"),
        (["stages.alpaca.select.metric=val/all/auc"], "'val/all/auc', which is never logged"),
        (["~stages.alpaca.data"], "InstructionModule does not learn from what MovieLensDataModule holds"),
        (["++stages.train.data=${stages.alpaca.data}"],
         "TALLRecModule does not learn from what InstructionDataModule holds"),
        (["stages.alpaca.run=test"], "InstructionModule has nothing to test"),
        (["stages.train.inputs.start=alpca/best.ckpt"], "begins with /, ~ or ."),
        (["++stages.alpaca.module.loss=margin"], "stages.alpaca.module.loss is 'margin'"),
        (["++stages.alpaca.module.max_length=3"], "has no argument 'max_length'"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_before_anything_runs(overrides: list[str], told: str) -> None:
    experiment = config.composed(BOTH, overrides)

    def checked() -> None:
        check.require_sound(experiment)
        check.prepare_data(experiment)

    with pytest.raises((UserError, DataSourceError)) as caught:
        checked()
    assert told in str(caught.value)
