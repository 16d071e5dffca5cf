"""Processes forked from one that has made the slow imports are like those of ``python -m``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments import forked, launchers, processes

pytestmark = pytest.mark.skipif(not forked.possible({}), reason="needs Linux without a GPU")

CHILD = """
import json, os, signal, sys, time
with open(sys.argv[1], "w") as file:
    json.dump({
        "imported": "lightning.pytorch" in sys.modules, "ours": "experiments.stage" in sys.modules,
        "polars": "polars" in sys.modules, "name": __name__, "argv": sys.argv[2:],
        "main": sys.modules["__main__"].__spec__.name, "driver": os.environ["LLMREC_DRIVER"],
        "parent": os.getppid(), "interrupts": str(signal.getsignal(signal.SIGINT)),
        "asks": str(signal.getsignal(signal.SIGUSR1)), "own": os.environ.get("OWN"),
        "masked": len(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    }, file)
exec(sys.argv[2])
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("forked")
    (folder / "a_child.py").write_text(CHILD)
    paths = os.pathsep.join([str(folder), launchers.environment_of(None)["PYTHONPATH"]])
    return {**launchers.environment_of(None), "PYTHONPATH": paths, "OWN": "$`;' \n"}


@pytest.fixture(scope="module")
def origin(environment: dict[str, str]) -> Iterator[forked.Origin]:
    made = forked.Origin(environment, ["csv"])
    yield made
    made.close()


def begun(file: Path) -> dict[str, Any]:
    """What a child has written of itself."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        try:
            told: dict[str, Any] = json.loads(file.read_text())
            return told
        except (FileNotFoundError, json.JSONDecodeError):
            time.sleep(0.02)
    raise AssertionError("it has not begun")


def test_it_finds_the_slow_imports_done_and_else_what_a_new_process_finds(
    origin: forked.Origin, tmp_path: Path
) -> None:
    child = origin.start("a_child", [str(tmp_path / "told"), "raise SystemExit(0)", "a b"])
    assert child.wait() == 0
    told = begun(tmp_path / "told")
    parent = told.pop("parent")
    assert told == {
        "imported": True, "ours": False, "polars": False, "argv": ["raise SystemExit(0)", "a b"],
        "name": "__main__", "main": "a_child",  # Lightning starts further ranks by it
        "driver": str(parent), "own": "$`;' \n", "masked": 0,
        "interrupts": str(signal.default_int_handler), "asks": str(int(signal.SIG_DFL)),
    }  # fmt: skip
    assert parent != os.getpid()


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("pass", 0),
        ("raise SystemExit(2)", 2),
        ("raise SystemExit('why')", 1),
        ("raise ValueError", 1),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("os._exit(75)", 75),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    ],
)
def test_its_end_is_told_as_popen_tells_it(
    origin: forked.Origin, environment: dict[str, str], tmp_path: Path, words: str, status: int
) -> None:
    given = [str(tmp_path / "told"), words]
    child = origin.start("a_child", given)
    assert child.wait() == child.poll() == child.returncode == status
    fresh = [sys.executable, "-m", "a_child", *given]
    assert subprocess.run(fresh, env=environment, check=False, stderr=-3).returncode == status


def test_signals_reach_it_and_not_what_it_was_forked_from(
    origin: forked.Origin, tmp_path: Path
) -> None:
    pause = (
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75)); open(sys.argv[3], 'w').write('1')"
    )
    ready = tmp_path / "ready"
    child = origin.start(
        "a_child", [str(tmp_path / "told"), f"{pause}; time.sleep(60)", str(ready)]
    )
    assert begun(ready) == 1
    assert child.poll() is None
    for number in (signal.SIGINT, signal.SIGUSR1):  # as a terminal sends it to all of them
        os.kill(begun(tmp_path / "told")["parent"], number)
    child.send_signal(signal.SIGUSR1)
    assert child.wait() == 75
    child.send_signal(signal.SIGUSR1)  # to nobody: the number may be another's by now
    killed = origin.start("a_child", [str(tmp_path / "again"), "time.sleep(60)"])
    begun(tmp_path / "again")
    killed.kill()
    assert killed.wait() == -signal.SIGKILL


def test_an_origin_that_cannot_import_ends_as_a_process_would(
    environment: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lightning").mkdir()
    (tmp_path / "lightning" / "__init__.py").write_text("raise ImportError('damaged')")
    paths = os.pathsep.join([str(tmp_path), environment["PYTHONPATH"]])
    broken = forked.Origin({**environment, "PYTHONPATH": paths}, [])
    for _ in range(2):
        child = broken.start("a_child", ["told", "pass"])
        assert child.wait() == child.poll() == 1
        child.send_signal(signal.SIGTERM)
    broken.close()
    assert "ImportError: damaged" in capfd.readouterr().err


def test_a_stage_ends_with_the_process_that_its_own_was_forked_from(
    environment: dict[str, str], tmp_path: Path
) -> None:
    origin = forked.Origin(environment, [])
    watch = "from experiments.stage import _die_with_driver; _die_with_driver(); time.sleep(60)"
    child = origin.start("a_child", [str(tmp_path / "told"), watch])
    parent = begun(tmp_path / "told")["parent"]
    os.kill(parent, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    _gone(child.pid)
    origin.close()


def _gone(pid: int) -> None:
    until = time.monotonic() + 60
    while Path(f"/proc/{pid}/stat").exists():
        if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return  # nobody here takes its status
        assert time.monotonic() < until, "it goes on"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("environment", "gpus", "expected"),
    [
        ({}, (), True),
        ({"LLMREC_FORK": "0"}, (), False),
        ({"LLMREC_FORK": "1"}, (), True),
        ({"LLMREC_SRUN": ""}, (), False),
        ({}, (Path(os.devnull),), False),
    ],
)
def test_where_processes_are_forked(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], gpus: tuple[Path, ...], expected: bool
) -> None:  # fmt: skip
    monkeypatch.setattr(forked, "GPUS", gpus)
    assert forked.possible(environment) is expected


def test_nothing_is_begun_where_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(*unused: Any, **also: Any) -> None:
        raise AssertionError("a process")

    monkeypatch.setattr(subprocess, "Popen", begin)
    monkeypatch.setenv("LLMREC_FORK", "1")
    with processes.forking(), processes.forking():
        pass


@pytest.mark.parametrize("how", [lambda: None, lambda: os.environ.update(LLMREC_FORK="0")])
def test_a_module_that_refuses_ends_the_command_either_way(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], how: Callable[[], None]
) -> None:
    monkeypatch.setenv("LLMREC_FORK", "1")
    how()
    with processes.forking(), pytest.raises(SystemExit) as end:
        processes.in_process("experiments.check", ["no/such_experiment"])
    assert end.value.code == 2
    assert "no/such_experiment" in capfd.readouterr().err
