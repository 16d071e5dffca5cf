"""Fixtures of the whole suite: a tiny MovieLens-100K folder, folders of its own, the real command."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import preloaded

REPO = Path(__file__).resolve().parents[1]
USERS, ITEMS, MIN_EVENTS = 60, 80, 8
GENRES = 19  # flags of a line of u.item
# Variables that say what to do: those of the Makefile, and what it or a command sets for others.
_LISTED = re.search(r"^VARIABLES := ((?:.*\\\n)*.*)$", (REPO / "Makefile").read_text(), re.M)
assert _LISTED is not None
REQUEST = (*_LISTED[1].replace("\\", " ").split(), "LLMREC_DRIVER", "LLMREC_USER", "LLMREC_HOST")
LATIN_TITLE = "Café Amélie, été à la Señora (1997)"

Command = Callable[..., subprocess.CompletedProcess[str]]

# A shell ignores Ctrl-C in what it starts in the background, and children inherit that: tests that send it
# to a child would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# What takes minutes begins first, so that workers end together (with --no-loadscope-reorder).
FIRST = ("slurm", "recipes")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the folders of tests."""
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(
        key=lambda item: places.get(item.path.relative_to(REPO / "tests").parts[0], len(FIRST))
    )


def write_movielens_100k(folder: Path, seed: int = 0) -> Path:
    """u.data, u.item and u.user of ``USERS`` users whose taste follows a pattern, some times tied."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    events = []
    for user in range(1, USERS + 1):
        item, time = draw.randint(1, ITEMS), 874_724_710 + draw.randint(0, 10_000_000)
        taken: set[int] = set()
        for _ in range(MIN_EVENTS + draw.randint(0, 14)):
            while item in taken:
                item = draw.randint(1, ITEMS)
            taken.add(item)
            events.append((user, item, draw.randint(1, 5), time))
            # What follows is mostly the next number (to be learned); a third of all times are ties.
            item = item % ITEMS + 1 if draw.random() < 0.7 else draw.randint(1, ITEMS)
            time += draw.choice((0, 60, 90_000))
    draw.shuffle(events)
    lines = ["\t".join(map(str, event)) for event in events]
    (folder / "u.data").write_text("\n".join(lines) + "\n", encoding="latin-1")
    titles = [LATIN_TITLE if i == 7 else f"Film {i} (19{i % 100:02d})" for i in range(1, ITEMS + 1)]
    films = [
        "|".join([str(i), title, "01-Jan-1997", "", "", *(str(int(g == i % GENRES)) for g in range(GENRES))])
        for i, title in enumerate(titles, start=1)
    ]  # fmt: skip
    (folder / "u.item").write_text("\n".join(films) + "\n", encoding="latin-1")
    people = [f"{u}|{20 + u % 50}|{'MF'[u % 2]}|student|{10_000 + u}" for u in range(1, USERS + 1)]
    (folder / "u.user").write_text("\n".join(people) + "\n", encoding="latin-1")
    return folder


@pytest.fixture(scope="session")
def tiny_movielens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to pass as ``data.root``."""
    return write_movielens_100k(tmp_path_factory.mktemp("tiny") / "ml-100k")


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of prepared data for the whole session: runs are isolated, preparing is shared."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def isolated(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory, data_cache: Path
) -> None:
    """No test reads or writes the user's runs, caches, variables or accounts."""
    monkeypatch.setenv("LLMREC_RUNS", str(tmp_path_factory.mktemp("runs")))
    for name, value in _environment(data_cache).items():
        monkeypatch.setenv(name, value)
    for name in (*REQUEST, "LLMREC_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)


def _environment(cache: Path) -> dict[str, str]:
    return {
        "LLMREC_CACHE": str(cache),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
    }


@pytest.fixture(scope="session")
def command_environment(data_cache: Path) -> Callable[[Path], dict[str, str]]:
    """``command_environment(runs)``: what a subprocess of the real command sees."""

    def make(runs: Path) -> dict[str, str]:
        own = {k: v for k, v in os.environ.items() if k not in REQUEST}
        path = os.pathsep.join([str(REPO), str(REPO / "tests" / "recipes")])
        return {**own, **_environment(data_cache), "LLMREC_RUNS": str(runs), "PYTHONPATH": path}

    return make


@pytest.fixture(scope="session")
def run_command(command_environment: Callable[[Path], dict[str, str]]) -> Command:
    """``run_command("exp", name, *overrides, runs=folder, SEEDS="2")``: the real command, to its end."""

    def run(
        *words: str, runs: Path, timeout: float = 600, real: bool = False, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        env = {**command_environment(runs), **variables}
        return preloaded.run("experiments.run", *words, env=env, timeout=timeout, real=real)

    return run


@pytest.fixture(scope="session")
def tiny(tiny_movielens: Path) -> list[str]:
    """Overrides that shrink a SASRec experiment to seconds."""
    return [
        f"data.root={tiny_movielens}", "data.expected=null",
        "launch.threads=1", "launch.accelerator=cpu",
        "++stages.train.trainer.max_epochs=3", "++stages.train.batch_size=16",
        "++stages.train.module.hidden_size=16", "++stages.train.module.max_length=10",
    ]  # fmt: skip
