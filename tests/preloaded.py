"""Commands without the seconds of importing torch: a process that has imported it forks one for each.

What is forked is a process like any other: its own signals, status, files and environment; our own modules it
imports itself, from where its PYTHONPATH says. So do the processes that a command starts in turn, if they are
modules of ours in Python. ``LLMREC_TEST_PRELOADED=0`` starts all of them the usual way.

``python tests/preloaded.py SOCKET``: the process that forks. It ends when its standard input does.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import random
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

# Of others alone: what our own modules import, and in which order, stays to be found out by each process.
IMPORTED = (
    "torch", "torch._dynamo", "numpy", "polars", "scipy.stats", "lightning.pytorch", "torchmetrics", "hydra",
    "omegaconf", "pydantic", "rich.progress", "yaml", "PIL.Image", "transformers", "peft", "tokenizers",
    "transformers.models.llama.modeling_llama", "transformers.models.bert.modeling_bert",
)  # fmt: skip
REPO = Path(__file__).resolve().parents[1]
OURS = ("callbacks", "datamodules", "experiments", "lightning_modules", "tests", "faults")
_FIRST_FREE = 3  # behind standard input, output and errors
_PR_SET_PDEATHSIG = 1


class Preloaded:
    """Starts the process that forks, and asks it.

    Args:
        folder: for its socket; a short path.
    """

    def __init__(self, folder: Path) -> None:
        self._place = str(folder / "preloaded")
        words = [sys.executable, str(Path(__file__)), self._place]
        own = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "LLMREC_RUNS")}
        threads = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(words, env={**own, **threads}, stdin=subprocess.PIPE)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def run(
        self, words: Sequence[str], env: Mapping[str, str], cwd: Path, timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """``subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)``."""
        with (
            tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err,
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line,
        ):  # fmt: skip
            self._connect(line)
            asked = json.dumps({"words": list(words), "env": dict(env), "cwd": str(cwd)}).encode()
            socket.send_fds(line, [len(asked).to_bytes(8, "big")], [out.fileno(), err.fileno()])
            line.sendall(asked)
            line.settimeout(timeout)
            pid = int.from_bytes(_exactly(line, 8), "big")
            try:
                status = int.from_bytes(_exactly(line, 8), "big", signed=True)
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(list(words), timeout) from None
            told = []
            for file in (out, err):
                file.seek(0)
                told.append(file.read().decode())
        return subprocess.CompletedProcess([sys.executable, "-m", *words], status, *told)

    def _connect(self, line: socket.socket) -> None:
        until = time.monotonic() + 300  # a busy machine imports slowly
        while True:
            try:
                return line.connect(self._place)
            except (FileNotFoundError, ConnectionRefusedError):
                assert self._process.poll() is None, "the process that forks has ended"
                assert time.monotonic() < until, "the process that forks does not answer"
                time.sleep(0.1)


@cache
def _preloaded() -> Preloaded:
    """The one of this process."""
    folder = tempfile.TemporaryDirectory()
    made = Preloaded(Path(folder.name))
    atexit.register(folder.cleanup)
    atexit.register(made.close)
    return made


def run(
    *words: str, env: Mapping[str, str], cwd: Path = REPO, timeout: float = 600, real: bool = False
) -> subprocess.CompletedProcess[str]:
    """``python -m words`` to its end; ``real``: started the usual way."""
    if not real and os.environ.get("LLMREC_TEST_PRELOADED", "") != "0":
        return _preloaded().run(words, env, cwd, timeout)
    return subprocess.run(
        [sys.executable, "-m", *words], env=env, cwd=cwd, timeout=timeout,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def _exactly(line: socket.socket, count: int) -> bytes:
    read = b""
    while len(read) < count:
        more = line.recv(count - len(read))
        if not more:
            raise EOFError("the process that forks has hung up")
        read += more
    return read


# The process that forks ------------------------------------------------------------------------------------


def serve(place: str) -> None:
    """Fork for each who connects, until standard input ends."""
    base = sys.path[1:]
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # what is there stays shared
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
        door.bind(place)
        door.listen()
        found = selectors.DefaultSelector()
        found.register(door, selectors.EVENT_READ)
        found.register(sys.stdin, selectors.EVENT_READ)
        while all(key.fileobj is door for key, _ in found.select()):
            line, _ = door.accept()
            if os.fork() == 0:
                door.close()
                _attend(line, base)
            line.close()
    os.unlink(place)


def _attend(line: socket.socket, base: list[str]) -> None:
    """Fork the command, tell its number and its status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, files, _, _ = socket.recv_fds(line, 8, 2)
    asked = json.loads(_exactly(line, int.from_bytes(head, "big")))
    pid = os.fork()
    if pid == 0:
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, own in enumerate((nothing, *files)):
            os.dup2(own, number)
        os.chdir(asked["cwd"])
        become(asked["words"], asked["env"], base)
    line.sendall(pid.to_bytes(8, "big"))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):  # nobody waits any more
        line.sendall(status.to_bytes(8, "big", signed=True))
    os._exit(0)


def become(words: Sequence[str], env: Mapping[str, str], base: list[str]) -> None:
    """Be what ``python -m words`` is with this environment, to its end."""
    # What an exec would have done.
    os.closerange(_FIRST_FREE, 4096)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError, ValueError):
            if signal.getsignal(number) not in (signal.SIG_IGN, signal.SIG_DFL):
                signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    atexit._clear()
    os.environ.clear()
    os.environ.update(env)
    os.environ["LLMREC_FORK"] = (
        "0"  # forked from here is sooner than from a process that is yet to import
    )
    # What a new interpreter would have begun with.
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
        for number, mode, errors in ((0, "r", "strict"), (1, "w", "strict"), (2, "w", "backslashreplace"))
    )  # fmt: skip
    sys.stderr.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    paths = [p for p in env.get("PYTHONPATH", "").split(os.pathsep) if p]
    sys.path[:] = [os.getcwd(), *paths, *base]
    sys.argv[:] = [words[0], *words[1:]]
    for name in [n for n in sys.modules if n.partition(".")[0] in OURS]:
        del sys.modules[name]
    importlib.invalidate_caches()
    random.seed()
    sys.modules["numpy"].random.seed()
    forking(base)
    os._exit(_status(lambda: runpy.run_module(words[0], run_name="__main__", alter_sys=True)))


def _status(work: Callable[[], Any]) -> int:
    """What the interpreter would end with."""
    code: Any = 0
    try:
        work()
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    return (code or 0) & 0xFF


def forking(base: list[str]) -> None:
    """From here on this process forks the modules of ours that it is told to start."""
    usual = subprocess.Popen.__init__

    def start(self: Any, args: Any, *more: Any, **options: Any) -> None:
        known = set(options) <= {"env"} and not more and isinstance(args, list)
        ours = known and args[:2] == [sys.executable, "-m"] and args[2].startswith("experiments.")
        if not ours or _polars_has_begun():
            usual(self, args, *more, **options)
            return
        sys.stdout.flush()
        sys.stderr.flush()
        env = dict(options.get("env") or os.environ)
        pid = os.fork()
        if pid == 0:
            become(args[2:], env, base)
        _adopt(self, args, pid)

    subprocess.Popen.__init__ = start  # type: ignore[method-assign]


def _polars_has_begun() -> bool:
    """Whether Polars has computed here: its threads are not in a fork, which would wait for them for ever."""
    return any(f.read_text().strip() == "polars-0" for f in Path("/proc/self/task").glob("*/comm"))


def _adopt(process: Any, args: list[str], pid: int) -> None:
    """What ``Popen`` knows of a process that it has started."""
    process.args, process.pid, process.returncode = args, pid, None
    process.stdin = process.stdout = process.stderr = None
    process.encoding = process.errors = process.text_mode = process.universal_newlines = None
    process.pipesize, process.process_group = -1, None
    process._waitpid_lock = threading.Lock()
    process._input, process._communication_started = None, False
    process._child_created, process._sigint_wait_secs = True, 0.25
    process._closed_child_pipe_fds = True


def main(place: str) -> None:
    """Serve; end with the process that started this one, even if it is killed."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    serve(place)


if __name__ == "__main__":
    main(sys.argv[1])
