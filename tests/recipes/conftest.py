"""One finished run of SASRec on the tiny data, which many tests read."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from experiments import load
from experiments.recommender import Recommender
from tests import preloaded

EXPERIMENT = "sasrec/movielens_100k"
Command = Callable[..., subprocess.CompletedProcess[str]]


def ask(
    environment: dict[str, str], *words: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """``make recommend``, as the Makefile starts it."""
    return preloaded.run("experiments.recommend", *words, env={**environment, **variables})


@dataclass(frozen=True)
class Finished:
    """A run to its end, and where it left what."""

    runs: Path
    result: subprocess.CompletedProcess[str]

    def folder(self, stage: str) -> Path:
        """The one folder of a stage."""
        found = [f for f in self.runs.iterdir() if f.name.split("-")[0].split(".")[-1] == stage]
        assert len(found) == 1, (stage, found, self.result.stderr)
        return found[0]

    def json(self, stage: str, name: str) -> Any:
        """A JSON file of a stage."""
        return json.loads((self.folder(stage) / name).read_text())


@pytest.fixture(scope="session")
def finish(
    run_command: Command, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Finished]:
    """``finish(name, overrides, runs=None)``: run an experiment and require that it went well."""

    def run(
        name: str, overrides: list[str], runs: Path | None = None, real: bool = False
    ) -> Finished:
        runs = runs or tmp_path_factory.mktemp("runs")
        result = run_command("exp", name, *overrides, runs=runs, real=real)
        assert result.returncode == 0, result.stderr[-4000:]
        return Finished(runs, result)

    return run


@pytest.fixture(scope="session")
def finished(finish: Callable[..., Finished], tiny: list[str]) -> Finished:
    """SASRec and the reference rows on the tiny data, from nothing that was imported before."""
    return finish(EXPERIMENT, tiny, real=True)


@pytest.fixture(scope="session")
def model(finished: Finished, tiny: list[str], data_cache: Path) -> Recommender:
    """``finished``, ready to be asked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMREC_RUNS", str(finished.runs))
        patch.setenv("LLMREC_CACHE", str(data_cache))
        return load(EXPERIMENT, *tiny)


@contextmanager
def chromium(address: str) -> Iterator[Any]:
    """A browser without a screen on a page, with its logs; the test is skipped where there is none."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for option in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{option}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    browser = webdriver.Chrome(options=options, service=service)
    try:
        browser.get(address)
        yield browser
    finally:
        browser.quit()
