"""One finished run of SASRec on the tiny data, which many tests read."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

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
