"""The parts of ``make bench`` that decide what is compared: quality, split, cache, verdicts."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.movielens import MovieLensDataModule
from datamodules.types import TEST, VALID
from lightning_modules.sasrec import SASRecModule
from tests.benchmarks import bench_sequential, sequential_measure, sequential_profile
from tests.benchmarks.bench_sequential import run_side
from tests.benchmarks.sequential_measure import (
    Clock,
    cache_name,
    common_quality,
    digest,
    histories,
    ndcg_at_10,
    seconds_to,
)
from tests.benchmarks.sequential_ours import best_items, export
from tests.benchmarks.sequential_report import OURS, SHIPPED, summary, verdicts


@pytest.fixture(scope="module")
def data(tiny_movielens: Path, data_cache: Path) -> MovieLensDataModule:
    return MovieLensDataModule(release="100k", root=str(tiny_movielens), cache=str(data_cache))


def test_ndcg_is_by_place_and_nothing_where_the_target_is_missing() -> None:
    top = np.arange(1, 11)[None].repeat(4, 0)
    target = np.array([1, 3, 10, 99])
    expected = (1 / math.log2(2) + 1 / math.log2(4) + 1 / math.log2(11) + 0) / 4
    assert ndcg_at_10(top, target) == pytest.approx(expected)
    assert ndcg_at_10(np.zeros((2, 10), np.int64), np.array([5, 6])) == 0  # nothing recommended


def test_common_quality_was_reached_by_all_and_time_is_of_the_first_that_reached_it() -> None:
    fast = [(1, 1.0, 0.05), (2, 2.0, 0.10)]
    slow = [(1, 9.0, 0.02), (2, 18.0, 0.08), (3, 27.0, 0.07)]
    quality = common_quality([fast, slow])
    assert quality == pytest.approx(0.95 * 0.08)
    assert (seconds_to(fast, quality), seconds_to(slow, quality)) == (2.0, 18.0)
    assert seconds_to(fast, 0.2) is None


def test_the_clock_stands_still_while_quality_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(sequential_measure.time, "perf_counter", lambda: now[0])

    def measure() -> float:
        now[0] += 1000
        return 0.5

    clock = Clock(measure, every=2, name="side")
    now[0] += 3
    clock.begins()
    for _ in range(3):
        now[0] += 2
        clock.epoch_ends()
    report = clock.report()
    assert report["setup"] == 3
    assert report["epoch_seconds"] == [2, 2, 2]
    assert report["trace"] == [(2, 7, 0.5)]
    assert "bench: side: epoch 2, 7.0 s, NDCG@10 0.5000" in capsys.readouterr().err


def test_what_is_exported_is_the_split(data: MovieLensDataModule, tmp_path: Path) -> None:
    rows = export(data)
    np.savez(tmp_path / "rows.npz", **rows)
    read = dict(np.load(tmp_path / "rows.npz"))
    assert digest(read) == digest(rows)
    known = read["train"]
    for name, code in (("valid", VALID), ("test", TEST)):
        held_out, events = data.rows(code), data.histories
        users, items = histories(read, known)
        of = dict(zip(users.tolist(), items, strict=True))
        for user, position, target in zip(
            held_out.user, held_out.position, held_out.target, strict=True
        ):
            np.testing.assert_array_equal(
                of[user], events.items[events.offsets[user] : position], str(user)
            )
            assert target == events.items[position]
        np.testing.assert_array_equal(read[f"{name}_user"], held_out.user)
        np.testing.assert_array_equal(read[f"{name}_item"], held_out.target)
        known = known | read["valid"]


def test_digest_follows_content_alone(data: MovieLensDataModule) -> None:
    rows = export(data)
    assert digest(dict(reversed(rows.items()))) == digest(rows)
    changed = rows["item"].copy()
    changed[:2] = changed[1::-1]
    assert digest({**rows, "item": changed}) != digest(rows)


@pytest.mark.parametrize("code", [VALID, TEST])
def test_our_best_items_are_those_of_a_naive_ranking(
    data: MovieLensDataModule, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.benchmarks.sequential_ours.EVAL_BATCH", 16)  # several batches
    torch.manual_seed(0)
    module = SASRecModule(num_items=data.num_items, max_length=6, hidden_size=8).eval()
    rows, events = data.rows(code), data.histories
    with torch.no_grad():
        found = best_items(module, data, code)
        for row in range(0, len(rows.user), 7):
            seen = events.items[events.offsets[rows.user[row]] : rows.position[row]]
            history = torch.from_numpy(seen[-6:].astype(np.int64))[None]
            state = module.network.last(history, torch.tensor([history.shape[1]]))[0]
            scores = {
                item: float(state @ module.item_vectors()[item])
                for item in range(1, data.num_items + 1)
                if item not in seen
            }
            assert found[row].tolist() == sorted(scores, key=lambda i: -scores[i])[:10]


def _facts(**changed: Any) -> dict[str, Any]:
    facts = {"versions": {"rectools": "0.19.0", "torch": "2.13.0"}, "epochs": 5, "threads": 2}
    return {**facts, **changed}


def test_a_cached_result_is_named_by_version_and_by_all_that_decides_it() -> None:
    name = cache_name("rectools", _facts())
    assert name.startswith("rectools-0.19.0-")
    assert cache_name("rectools", dict(reversed(_facts().items()))) == name
    others = [
        _facts(epochs=6),
        _facts(threads=1),
        _facts(versions={"rectools": "0.19.0", "torch": "2.12.0"}),
    ]
    assert len({name, *(cache_name("rectools", facts) for facts in others)}) == 4


def test_peers_are_measured_once_unless_asked_to_refresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []

    def measured(words: list[str], job: dict[str, Any], folder: Path) -> dict[str, Any]:
        runs.append(job["epochs"])
        return {"when": "now", "number": len(runs)}

    monkeypatch.setattr(bench_sequential, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(bench_sequential, "run_side", measured)
    monkeypatch.setattr(
        bench_sequential, "versions", lambda peer, python: {peer: "1.0", "torch": "2"}
    )
    keep = argparse.Namespace(environments=tmp_path, refresh=False)
    again = argparse.Namespace(environments=tmp_path, refresh=True)

    def ask(turn: int, how: argparse.Namespace, **job: Any) -> int:
        job = {"name": "x", "rows": f"{len(runs)}.npz", "epochs": 1, **job}
        found = bench_sequential.peer_result("replay", job, turn, how, tmp_path)
        return int(found["number"])

    assert [ask(0, keep), ask(0, keep)] == [1, 1]  # another scratch file is no other measurement
    assert [ask(1, keep), ask(0, keep, epochs=2), ask(0, again), ask(0, keep)] == [2, 3, 4, 4]


def _script(folder: Path, body: str) -> list[str]:
    file = folder / "side.py"
    file.write_text(f"import json, os, sys\n{body}")
    return [sys.executable, str(file)]


def test_a_side_reports_progress_and_its_result(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    body = (
        "job = json.load(open(sys.argv[1]))\n"
        "print('noise'); print('bench: half way', file=sys.stderr)\n"
        "found = {'seen': job['threads'], 'threads': os.environ['OMP_NUM_THREADS']}\n"
        "json.dump(found, open(sys.argv[2], 'w'))\n"
    )
    job = {"name": "side", "threads": 3}
    assert run_side(_script(tmp_path, body), job, tmp_path) == {"seen": 3, "threads": "3"}
    assert capfd.readouterr().err == "bench: half way\n"


def test_a_side_that_fails_is_named_with_its_last_lines(tmp_path: Path) -> None:
    words = _script(tmp_path, "print('the reason'); sys.exit(3)")
    with pytest.raises(SystemExit, match=r"side failed:\nthe reason"):
        run_side(words, {"name": "side", "threads": 1}, tmp_path)


def _turn(epoch: float, trace: list[tuple[int, float, float]], evaluation: float) -> dict[str, Any]:
    return {
        "epoch_seconds": [epoch, epoch, 50 * epoch], "trace": trace, "evaluation": evaluation,
        "test_ndcg": 0.1, "peak": 1.0, "gflops": 100.0,
    }  # fmt: skip


def test_verdicts_are_against_the_fastest_peer_of_each_figure() -> None:
    sides = {
        OURS: [_turn(1, [(1, 2.0, 0.10)], 0.2), _turn(3, [(1, 4.0, 0.10)], 0.4)],
        "rectools": [_turn(4, [(1, 30.0, 0.10)], 0.6), _turn(4, [(1, 30.0, 0.11)], 0.6)],
        "replay": [_turn(8, [(1, 18.0, 0.10)], 1.5), _turn(8, [(1, 18.0, 0.12)], 1.5)],
        "recbole": [{**_turn(100, [], 2.0), "steps": 9}],
        SHIPPED: [_turn(9, [(1, 1.0, 0.2)], 0.1)],
    }
    found: dict[str, Any] = {"sides": sides}
    told = summary(found)
    assert found["quality"] == pytest.approx(0.095)
    assert told[OURS] == pytest.approx(
        {"epoch": 2, "quality": 3, "evaluation": 0.3, "test": 0.1, "memory": 1}
    )
    assert told["recbole"]["quality"] is None
    assert told["recbole"]["test"] is None
    assert list(verdicts(told)) == [
        "an epoch: rectools / ours = 2.0",
        "to the common quality: replay / ours = 6.0 (target 5: met)",
        "to the common quality: replay / ours, as shipped = 18.0 (target 5: met)",
        "evaluation: rectools / ours = 2.0 (target 3: missed)",
        "evaluation: rectools / ours, as shipped = 6.0 (target 3: met)",
    ]


def test_parts_of_a_step_hold_the_gradients_of_what_ran_in_them() -> None:
    def event(name: str, micros: float, number: int = -1, *inside: Any) -> SimpleNamespace:
        return SimpleNamespace(
            name=name, cpu_time_total=micros, sequence_nr=number, cpu_children=list(inside)
        )

    product = event("aten::mm", 2e6)
    softmax = event(sequential_profile.LOSS, 5e6, -1, event("aten::exp_", 1e6, 7), product)
    attention = event("aten::scaled_dot_product_attention", 1e6, -1, event("aten::bmm", 1e6, 8))
    engine = "autograd::engine::evaluate_function: "
    backward = [event(engine + "SoftmaxBackward", 4e6, 7), event(engine + "BmmBackward0", 3e6, 8)]
    other = event(engine + "AddmmBackward0", 9e6, 3)
    optimizer = event("aten::_fused_adamw_", 1e6)
    events = [softmax, product, attention, *backward, other, optimizer]
    assert list(sequential_profile.parts(events, 30.0).values()) == [2, 7, 4, 1, 0, 16]


def test_data_that_is_not_there_is_left_out_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data", "beauty", "--peers", "--json", str(tmp_path / "out.json")]
    bench_sequential.main(words)
    assert "beauty is left out: --beauty-file was not given" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no environment of replay: run make bench-peers first"):
        bench_sequential.main(["--peers", "replay", "--environments", str(tmp_path)])
