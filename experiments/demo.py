"""The command behind ``make demo``: a page in the browser on which a finished experiment is asked.

``python -m experiments.demo [NAME [key=value ...]]``. Variables, besides NAME and ARGS as for
``experiments.run``: BESIDE, another finished experiment with its overrides, shown in a column of its own;
RETRIEVER, as for ``make recommend``; LLMREC_HOST (127.0.0.1; ``HOST=`` of the Makefile, as compilers have a
HOST of their own) and PORT (7860), where the page is served. Gradio has an environment of its own, which
``make demo`` makes on first use; LLMREC_DEMO_PYTHON names another Python that has Gradio. No torch here.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments import config
from experiments.command import exit_status, whole_number
from experiments.errors import UserError
from experiments.messages import say
from experiments.processes import in_process
from experiments.recommend import chosen
from experiments.run import request
from experiments.source_graph import REPO

PAGE = "experiments.demo_page"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Place:
    """Where the page is served, and the Python that serves it."""

    host: str
    port: int
    python: str

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Place:
        """Read the variables.

        Raises:
            UserError: PORT is no port, or there is no such Python.
        """
        host = environment.get("LLMREC_HOST", "").strip() or "127.0.0.1"
        port = whole_number("PORT", environment.get("PORT", "").strip() or "7860", 1, 65_535)
        told = environment.get("LLMREC_DEMO_PYTHON", "").strip()
        python = Path(told).expanduser() if told else REPO / ".venv-demo" / "bin" / "python"
        if not python.is_file():
            raise UserError(
                f"the page needs Gradio in an environment of its own, and there is no {python}: make demo "
                "NAME=... makes it, or name a Python that has Gradio in LLMREC_DEMO_PYTHON"
            )
        return cls(host, port, str(python))

    @property
    def shown(self) -> str:
        """The host as an address has it."""
        host = "127.0.0.1" if self.host in ("", "0.0.0.0", "::") else self.host
        return f"[{host}]" if ":" in host else host

    def require_free(self) -> None:
        """Bind once.

        Raises:
            UserError: the address is taken, or is none of this machine's.
        """
        kind = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        with socket.socket(kind, socket.SOCK_STREAM) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind((self.host, self.port))
            except OSError as error:
                raise UserError(
                    f"HOST={self.host} PORT={self.port} cannot be served ({error.strerror or error}): give "
                    f"another, PORT={self.port % 65_535 + 1}, say"
                ) from error


def main(argv: Sequence[str]) -> int:
    """Exit status, see ``exit_status``."""
    return exit_status(lambda: _run(argv))


def _run(argv: Sequence[str]) -> None:
    name, overrides = request(list(argv))
    place = Place.of(os.environ)
    experiment = config.load(config.full_name(name), overrides)
    chosen(experiment)
    place.require_free()
    if place.host not in LOOPBACK:
        say(f"warning: whoever reaches {place.host} can ask: the page knows no passwords")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the model's process is told, too
    try:
        in_process("experiments.demo_model", [experiment.name, *experiment.overrides])
    except KeyboardInterrupt:  # how a page that is served ends
        say(f"{experiment.name}: ended")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
