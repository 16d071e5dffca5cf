"""The command behind ``make serve``: a finished experiment over HTTP, until SIGTERM or Ctrl-C.

``python -m experiments.serve [NAME [key=value ...]]``. Variables, besides NAME and ARGS as for
``experiments.run``: LLMREC_HOST (``HOST=`` of the Makefile, 127.0.0.1; compilers have a HOST of their own),
PORT (8000; 0 takes a free one), RETRIEVER and ITEMS as for ``experiments.recommend`` (ITEMS join the
catalogue of every list), and LIMITS, as in ``seconds=120 batch=64`` (``experiments.batching.Limits``).
What has been accepted is answered before it ends, with status 0.
"""

from __future__ import annotations

import math
import os
import shlex
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from datamodules.versioning import read_json
from experiments import config
from experiments.batching import Limits
from experiments.command import exit_status, whole_number
from experiments.errors import UserError
from experiments.keys import nearest
from experiments.messages import say
from experiments.recommend import chosen, new_items
from experiments.run import request

if TYPE_CHECKING:
    from experiments.recommender import Recommender


def limits_of(text: str) -> Limits:
    """What LIMITS says.

    Raises:
        UserError: a limit is unknown or no positive number.
    """
    kinds = {name: type(value) for name, value in asdict(Limits()).items()}
    found: dict[str, Any] = {}
    for word in text.split():
        key, _, value = word.partition("=")
        if key not in kinds:
            raise UserError(
                f"LIMITS has no {key!r}{nearest(key, list(kinds))}; there are {', '.join(kinds)}"
            )
        try:
            found[key] = kinds[key](value)
        except ValueError:
            found[key] = 0
        if not 0 < found[key] < math.inf:
            raise UserError(
                f"LIMITS: {word!r}, expected a positive {'whole ' * (kinds[key] is int)}number"
            )
    return Limits(**found)


def listening(host: str, port: int) -> socket.socket:
    """A socket, before a large model is loaded in vain.

    Raises:
        UserError: the address is unknown or taken.
    """
    try:
        kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(kind, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen()
    except OSError as error:
        raise UserError(
            f"HOST={host} PORT={port} cannot be listened on: {error.strerror or error}"
        ) from error
    return made


def loaded(
    experiment: config.Experiment, retriever: Sequence[str] | None, items: str | None
) -> Recommender:
    """The model, asked once: what it needs for the first list it has then."""
    from experiments.loaded import load

    model = load(experiment.name, *experiment.overrides, retriever=retriever, new_items=items)
    held_out = model.data.rows(model.data.test_code)
    (user,) = model.data.raw_users(held_out.user[:1]).cast(str).to_list()
    model.recommend(user, 1)
    return model


def about(model: Recommender) -> dict[str, Any]:
    """Plain values of ``service_schema.About``."""
    told = (read_json(model.stage.folder / "metrics.json") if model.stage.folder else None) or {}
    rows = list((told.get("rows") or {}).values())
    values = {k: v["value"] for k, v in rows[0].items()} if len(rows) == 1 else {}
    return {
        "experiment": model.name, "stage": model.stage.name, "method": type(model.module).__name__,
        "fingerprint": told.get("fingerprint"), "items": len(model.names.ids),
        "new_items": len(model.new_items), "users": len(model.users),
        "reads_histories": model.module.reads_histories,
        "reads_requests": model.module.reads_requests,
        "metrics": {k: v for k, v in values.items() if v is not None and math.isfinite(v)},
    }  # fmt: skip


def serve(
    experiment: config.Experiment, place: socket.socket, limits: Limits,
    retriever: Sequence[str] | None = None, items: str | None = None,
) -> None:  # fmt: skip
    """Answer until a signal.

    Raises:
        UserError: the experiment cannot be loaded, or cannot be asked.
    """
    from experiments.service import Service
    from experiments.service_connections import room, server

    def ready() -> Recommender:
        model = loaded(experiment, retriever, items)
        say(f"{experiment.name}: ready")
        return model

    def stop() -> None:
        running.should_exit = True

    most, waiting = room()
    # Fewer than connections: whoever asks how the service fares must get one.
    limits = replace(limits, requests=min(limits.requests, most * 3 // 4))
    service = Service(ready, limits, about, stop)
    running = server(service, most, waiting)
    # uvicorn raises the signal again when everything is answered: that it was told to end is no failure.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop())
    host, port = place.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    say(f"{experiment.name}: http://{host}:{port}/docs, loading ...")
    running.run(sockets=[place])
    if service.batcher.error is not None:
        raise service.batcher.error
    say(f"{experiment.name}: ended")


def main(argv: Sequence[str]) -> int:
    """Exit status, see ``exit_status``."""
    return exit_status(lambda: _run(argv, os.environ))


def _run(argv: Sequence[str], environment: Mapping[str, str]) -> None:
    name, overrides = request(list(argv))
    host = environment.get("LLMREC_HOST", "").strip() or "127.0.0.1"
    port = whole_number("PORT", environment.get("PORT", "").strip() or "8000", 0, 65535)
    limits = limits_of(environment.get("LIMITS", ""))
    items = new_items(environment)
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            "the service needs fastapi and uvicorn: .venv/bin/python -m pip install -c constraints.txt "
            "-e '.[serve]'"
        ) from error
    experiment = config.load(config.full_name(name), overrides)
    chosen(experiment)
    retriever = shlex.split(environment.get("RETRIEVER", "")) or None
    if retriever:
        chosen(config.load(config.full_name(retriever[0]), retriever[1:]))
    with listening(host, port) as place:
        serve(experiment, place, limits, retriever, items)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
