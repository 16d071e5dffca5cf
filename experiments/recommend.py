"""The command behind ``make recommend``: what a finished experiment would show somebody next.

``python -m experiments.recommend [NAME [key=value ...]]``. Variables, besides NAME and ARGS as for
``experiments.run``: LLMREC_USER, a user's raw id (``USER=`` of the Makefile; shells have a USER of their
own), or HISTORY, titles or raw ids with semicolons between them; K, how many items; EXCLUDE, ids or titles
that are not wanted; ITEMS, JSON lines of items that nobody has seen; REQUEST, what is looked for, for methods
that read words; RETRIEVER, a finished experiment that finds candidates; FORMAT, table or
json. What people write reaches Python through these variables, never through a recipe or an argument.
No torch here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from datamodules.sources import cache_root
from experiments import artifacts, config
from experiments.artifacts import PlannedStage
from experiments.command import exit_status, whole_number
from experiments.errors import UserError
from experiments.messages import say
from experiments.places import needed_by
from experiments.processes import in_process
from experiments.run import request

MOST = 100  # items of a list
CANDIDATES = 20  # that a method without a catalogue of its own chooses among, at least
FORMATS = ("table", "json")


@dataclass(frozen=True)
class Wanted:
    """What the variables say."""

    user: str
    history: tuple[str, ...]
    count: int
    exclude: tuple[str, ...]
    items: str | None
    words: str
    retriever: str
    format: str

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Wanted:
        """Read them.

        Raises:
            UserError: nobody is named, or a value is none of those that are possible.
        """
        told = {
            name: environment.get(name, "").strip()
            for name in ("LLMREC_USER", "K", "REQUEST", "RETRIEVER", "FORMAT")
        }
        lists = {
            name: tuple(w.strip() for w in environment.get(name, "").split(";") if w.strip())
            for name in ("HISTORY", "EXCLUDE")
        }
        if not told["LLMREC_USER"] and not lists["HISTORY"]:
            raise UserError(
                "USER is missing: make recommend NAME=... USER=<the user's id in the data>, or "
                'HISTORY="title; title"'
            )
        form = told["FORMAT"] or "table"
        if form not in FORMATS:
            raise UserError(f"FORMAT={form!r}, expected {' or '.join(FORMATS)}")
        items = new_items(environment)
        k = whole_number("K", told["K"] or "10", 1, MOST)
        return cls(
            told["LLMREC_USER"], lists["HISTORY"], k, lists["EXCLUDE"],
            items, told["REQUEST"], told["RETRIEVER"], form,
        )  # fmt: skip


def new_items(environment: Mapping[str, str]) -> str | None:
    """The file of items that nobody has seen, if ITEMS names one.

    Raises:
        UserError: there is no such file.
    """
    path = environment.get("ITEMS", "").strip()
    if path and not Path(path).is_file():
        raise UserError(f"ITEMS={path!r} is no file: give JSON lines, an item a line")
    return path or None


def tests(experiment: config.Experiment) -> list[PlannedStage]:
    """The tests of one module each, once the data are prepared."""
    planned = artifacts.plan(experiment, cache_root())
    if any(stage.folder is None for stage in planned):
        try:
            in_process("experiments.check", ["--report", experiment.name, *experiment.overrides])
        except SystemExit as error:
            raise UserError(f"the data of {experiment.name} cannot be prepared") from error
        planned = artifacts.plan(experiment, cache_root())
    return [s for s in planned if s.spec["run"] == "test" and len(s.spec["modules"]) == 1]


def chosen(experiment: config.Experiment) -> PlannedStage:
    """The stage whose module is asked: ``evaluate``, or the first test of one module.

    Raises:
        UserError: there is none, or what it needs has not been made.
    """
    found = tests(experiment)
    if not found:
        raise UserError(f"{experiment.name} tests no single method: there is nothing to ask")
    stage = next((s for s in found if s.name == "evaluate"), found[0])
    needed = needed_by(stage.name, experiment.stages)
    planned = artifacts.plan(experiment, cache_root())
    if unfinished := [s.name for s in planned if s.name in needed and not s.done]:
        raise UserError(
            f"{experiment.name} has not been trained to its end ({', '.join(unfinished)}): make exp "
            f"NAME={experiment.name}"
        )
    return stage


def main(argv: Sequence[str]) -> int:
    """Exit status, see ``exit_status``."""
    return exit_status(lambda: _run(argv))


def _run(argv: Sequence[str]) -> None:
    name, overrides = request(list(argv))
    Wanted.of(os.environ)
    experiment = config.load(config.full_name(name), overrides)
    chosen(experiment)
    say(f"{experiment.name}: loading ...")
    in_process("experiments.recommendation", [experiment.name, *experiment.overrides])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
