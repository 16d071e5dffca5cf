"""The model's process of ``make demo``: it loads what is asked, starts the page, and answers it.

``python -m experiments.demo_model NAME [key=value ...]``; the variables are those of ``experiments.demo``.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

from datamodules.sources import cache_root
from experiments import artifacts, config, stories
from experiments.command import exit_status
from experiments.demo import PAGE, Place
from experiments.demo_desk import Desk
from experiments.demo_link import serve
from experiments.errors import UserError
from experiments.loaded import load
from experiments.messages import put, say
from experiments.recommender import Recommender
from experiments.source_graph import REPO
from lightning_modules.errors import ModelError


def written_of(model: Recommender) -> stories.Written | None:
    """What a stage of the experiment wrote of users step by step; None where none did."""
    planned = artifacts.plan(
        config.load(model.name, list(model.experiment.overrides)), cache_root()
    )
    try:
        test, writer = stories.stages_of(planned)
    except UserError:
        return None
    return stories.Written(test, writer, model.data) if test.name == model.stage.name else None


def desk_of(name: str, overrides: Sequence[str], retriever: str, beside: str) -> Desk:
    """What answers the page.

    Args:
        name, overrides: of the experiment.
        retriever, beside: other experiments with their overrides, as one types them; "" for none.

    Raises:
        UserError: one is not finished, or cannot be asked.
    """
    say(f"{name}: loading ...")
    model = load(name, *overrides, retriever=shlex.split(retriever) or None)
    words = shlex.split(beside)
    if words:
        say(f"{words[0]}: loading ...")
    other = load(*words) if words else None
    return Desk(model, other, written_of(model) if model.module.reads_summaries else None)


def main(argv: Sequence[str]) -> int:
    """Exit status, see ``exit_status``."""
    return exit_status(lambda: _run(argv))


def _run(argv: Sequence[str]) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    place = Place.of(os.environ)
    desk = desk_of(argv[0], argv[1:], os.environ.get("RETRIEVER", ""), os.environ.get("BESIDE", ""))

    def ready() -> None:
        put(f"http://{place.shown}:{place.port} shows {desk.model.name}; Ctrl-C ends it")
        sys.stdout.flush()

    calls = {n: getattr(desk, n) for n in ("about", "somebody", "find", "cards", "history", "look")}
    ours, theirs = socket.socketpair()
    with ours, theirs:
        words = [place.python, "-P", "-m", PAGE, str(theirs.fileno()), place.host, str(place.port)]
        path = {"PYTHONPATH": str(REPO), "PYTHONNOUSERSITE": "1"}
        page = subprocess.Popen(words, pass_fds=[theirs.fileno()], env={**os.environ, **path})
        theirs.close()
        try:
            serve(ours, {**calls, "ready": ready}, (UserError, ModelError))
        finally:
            ours.close()
            status = page.wait()
    if status not in (0, -signal.SIGINT, -signal.SIGTERM, 130):
        raise UserError("the page has ended; what it had to say stands above")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
