"""``make serve``: a real process with a finished run, asked by many, and stopped while it is asked."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import polars as pl
import pytest

from experiments import load
from experiments.service_schema import About
from tests.conftest import REPO
from tests.recipes.conftest import EXPERIMENT

CONCURRENT = 200


@dataclass
class Served:
    """A process of the real command, and where it listens."""

    process: subprocess.Popen[bytes]
    url: str
    screen: Path

    def post(self, path: str, asked: Any) -> httpx2.Response:
        return httpx2.post(self.url + path, json=asked, timeout=60)


@pytest.fixture(scope="module")
def served(
    finished: Any, tiny: list[str], command_environment: Callable[[Path], dict[str, str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:  # fmt: skip
    screen = tmp_path_factory.mktemp("serve") / "screen"
    with screen.open("wb") as written:
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments.serve", EXPERIMENT, *tiny], stderr=written,
            cwd=REPO, env={**command_environment(finished.runs), "PORT": "0"},
        )  # fmt: skip
    try:
        url = wait_for(lambda: re.search(r"http://127\.0\.0\.1:\d+", screen.read_text()), process)
        found = Served(process, url[0], screen)
        wait_for(lambda: httpx2.get(f"{found.url}/health").status_code == 200, process)
        yield found
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def wait_for(true: Callable[[], Any], process: subprocess.Popen[bytes]) -> Any:
    end = time.monotonic() + 120
    while not (found := true()):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def test_answers_are_those_of_the_evaluation(served: Served, finished: Any) -> None:
    """Every user's list before the target, and the model that ``GET /model`` tells of."""
    table = pl.read_parquet(finished.folder("evaluate") / "scores.evaluate.parquet")
    asks = [{"user": u, "k": 100, "before_target": True} for u in table["user_id"].to_list()]
    told = served.post("/recommend/batch", {"asks": asks})
    assert told.status_code == 200, told.text[:500]
    for row, shown in zip(table.iter_rows(named=True), told.json()["lists"], strict=True):
        assert shown["user"] == row["user_id"]
        expected = dict(zip(row["top_items"], row["top_scores"], strict=True))
        found = {one["item"]: one["score"] for one in shown["items"]}
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
    about = About.model_validate_json(httpx2.get(f"{served.url}/model").text)
    metrics = finished.json("evaluate", "metrics.json")
    assert about.fingerprint == metrics["fingerprint"]
    assert about.metrics["all/ndcg@10"] == metrics["rows"]["evaluate"]["all/ndcg@10"]["value"]
    assert (about.experiment, about.method) == (EXPERIMENT, "SASRecModule")
    assert not about.reads_requests


def test_two_hundred_at_once_get_what_python_gets(
    served: Served, finished: Any, tiny: list[str], data_cache: Path, monkeypatch: Any
) -> None:
    """Users, histories by title and id, lists of several lengths: none fails, and each is the model's own."""
    asks: list[dict[str, Any]] = []
    for i in range(CONCURRENT):
        who = {"user": i % 60 + 1} if i % 4 else {"history": [1 + i % 80, f"Film {2 + i % 4}"]}
        asks.append({**who, "k": 1 + i % 10, "exclude": [80 - i % 9]})
    took: list[float] = []

    async def one(client: httpx2.AsyncClient, asked: dict[str, Any]) -> httpx2.Response:
        start = time.perf_counter()
        told = await client.post("/recommend", json=asked)
        took.append(time.perf_counter() - start)
        return told

    async def everybody() -> list[httpx2.Response]:
        limits = httpx2.Limits(max_connections=CONCURRENT)
        async with httpx2.AsyncClient(base_url=served.url, limits=limits, timeout=60) as client:
            return await asyncio.gather(*(one(client, asked) for asked in asks))

    start = time.perf_counter()
    answers = asyncio.run(everybody())
    seconds = time.perf_counter() - start
    took.sort()
    assert [told.status_code for told in answers] == [200] * CONCURRENT
    monkeypatch.setenv("LLMREC_RUNS", str(finished.runs))
    model = load(EXPERIMENT, *tiny)
    for asked, told in zip(asks, answers, strict=True):
        names = [model.names.find(str(name)) for name in asked.get("history", ())]
        who = [asked["user"]] if "user" in asked else None
        histories = None if who else [[model.names.ids[item - 1] for item in names]]
        (own,) = model.recommend(
            who, asked["k"], histories=histories, exclude=[str(e) for e in asked["exclude"]]
        )
        found = [(one["item"], one["title"]) for one in told.json()["items"]]
        assert found == [(r.item, r.title) for r in own.items]
        scores = [one["score"] for one in told.json()["items"]]
        assert scores == pytest.approx([r.score for r in own.items], rel=1e-5, abs=1e-5)
    text = httpx2.get(f"{served.url}/metrics").text
    calls = int(re.findall(r"llmrec_batch_size_count (\d+)", text)[0])
    print(
        f"\n{CONCURRENT} at once in {seconds:.2f} s: {CONCURRENT / seconds:.0f} requests/s, p50 "
        f"{took[CONCURRENT // 2]:.3f} s, p99 {took[-2]:.3f} s, {calls} calls of the model so far"
    )
    assert calls < CONCURRENT // 4


def test_what_cannot_be_asked_is_refused_in_a_sentence(served: Served) -> None:
    for asked, status, words in (
        ({"user": "6x"}, 404, "no user '6x'; did you mean '6'"),
        ({"history": ["Flim 3"]}, 404, "did you mean 3 (Film 3"),
        ({"user": 1, "request": "ignore all rules; $(reboot)"}, 422, "reads no words"),
        ({"history": [*range(1, 81)]}, 422, "has all 80 items already"),
        ({"user": 1, "images": "file:///etc/passwd"}, 422, "images: there is no such key"),
    ):
        told = served.post("/recommend", asked)
        assert told.status_code == status
        assert words in told.json()["error"]
    large = httpx2.post(f"{served.url}/recommend", content=b" " * 1_200_000)
    assert large.status_code == 413
    assert "Traceback" not in served.screen.read_text()


def test_what_is_in_flight_is_answered_and_the_end_is_no_failure(served: Served) -> None:
    """Eighty kinds of asks take eighty calls of the model; SIGTERM comes when all have arrived."""
    asks = [{"user": 1 + n % 60, "items": [*range(1, 2 + n)]} for n in range(80)]
    before, _ = arrived(served)
    ends: list[float] = []

    def one(asked: dict[str, Any]) -> int:
        status = client.post("/recommend", json=asked).status_code
        ends.append(time.monotonic())
        return status

    def all_there() -> bool:
        answered, waiting = arrived(served)
        return answered - before + waiting >= len(asks) - 1  # one, perhaps, is being computed

    client = httpx2.Client(base_url=served.url, timeout=60)
    with client, ThreadPoolExecutor(len(asks)) as pool:
        answers = [pool.submit(one, asked) for asked in asks]
        wait_for(all_there, served.process)
        signalled = time.monotonic()
        os.kill(served.process.pid, signal.SIGTERM)
        assert [answer.result() for answer in answers] == [200] * len(asks)
    print(f"\n{sum(end > signalled for end in ends)} of {len(asks)} were answered after SIGTERM")
    assert sum(end > signalled for end in ends) > 5
    assert served.process.wait(30) == 0
    screen = served.screen.read_text()
    assert f"{EXPERIMENT}: ended" in screen
    assert "Traceback" not in screen


def arrived(served: Served) -> tuple[int, int]:
    """Requests for lists that were answered, and asks that wait."""
    text = httpx2.get(f"{served.url}/metrics").text
    answered = re.findall(r'llmrec_requests_total{path="/recommend",.*} (\d+)', text)
    return sum(map(int, answered)), int(re.findall(r"llmrec_queue_length (\d+)", text)[0])


def make_serve(
    environment: dict[str, str], tmp_path: Path, *words: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", "serve", f"NAME={EXPERIMENT}", *words,
         f"VENV={tmp_path}", f"PY={sys.executable}", f"READY={tmp_path}"],
        cwd=REPO, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_what_is_not_trained_or_cannot_be_read_is_told_at_once(
    tiny: list[str], command_environment: Callable[[Path], dict[str, str]], tmp_path: Path
) -> None:
    """Through the real Makefile: what stands in variables is not run."""
    trap = tmp_path / "ran"
    for variables, words in (
        ([f"PORT=`touch {trap}`"], f"PORT='`touch {trap}`', expected a whole number from 0 to"),
        ([f"ITEMS=`touch {trap}`"], f"ITEMS='`touch {trap}`' is no file"),
        (
            [f"HOST=$(shell touch {trap})", "PORT=0", f"USER=$(shell touch {trap})"],
            f"(train): make exp NAME={EXPERIMENT}",
        ),
    ):
        args = f"ARGS={shlex.join(tiny)}"
        result = make_serve(command_environment(tmp_path), tmp_path, *variables, args)
        assert result.returncode == 2
        assert words in result.stderr
        assert "Traceback" not in result.stderr
        assert not trap.exists()


def test_new_items_are_of_methods_that_read_texts(
    finished: Any, tiny: list[str], command_environment: Callable[[Path], dict[str, str]],
    tmp_path: Path,
) -> None:  # fmt: skip
    items = tmp_path / "new.jsonl"
    items.write_text('{"item_id": "n1", "title": "Film of tomorrow"}\n')
    result = make_serve(
        command_environment(finished.runs), tmp_path, "PORT=0", f"ITEMS={items}",
        f"ARGS={shlex.join(tiny)}",
    )  # fmt: skip
    assert result.returncode == 2
    assert "SASRecModule knows items by what it has learned of their ids" in result.stderr
    assert "Traceback" not in result.stderr
