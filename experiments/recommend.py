"""The command behind ``make recommend``: what a finished experiment would show one user next.

``python -m experiments.recommend [NAME [key=value ...]]``. Variables: NAME and ARGS, as for
``experiments.run``; LLMREC_USER, the user's raw id (``USER=`` of the Makefile; shells have a USER of their
own); K, how many items; REQUEST, what the user is looking for, for methods that read words. No torch here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from datamodules.sources import cache_root
from experiments import artifacts, config
from experiments.artifacts import PlannedStage
from experiments.errors import UserError
from experiments.messages import print_error, say
from experiments.run import in_process, request

MOST = 100  # items of a list


def chosen(experiment: config.Experiment) -> PlannedStage:
    """The stage whose module is asked: ``evaluate``, or the first test of one module.

    Raises:
        UserError: there is none, or what it needs has not been made.
    """
    planned = artifacts.plan(experiment, cache_root())
    tests = [s for s in planned if s.spec["run"] == "test" and len(s.spec["modules"]) == 1]
    if not tests:
        raise UserError(f"{experiment.name} tests no single method: there is nothing to ask")
    stage = next((s for s in tests if s.name == "evaluate"), tests[0])
    if unfinished := [s.name for s in planned if s.spec["run"] == "fit" and not s.done]:
        raise UserError(
            f"{experiment.name} has not been trained to its end ({', '.join(unfinished)}): make exp "
            f"NAME={experiment.name}"
        )
    return stage


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 done, 2 failed (the reason is on the screen)."""
    try:
        name, overrides = request(list(argv))
        user = os.environ.get("LLMREC_USER", "").strip()
        if not user:
            raise UserError(
                "USER is missing: make recommend NAME=... USER=<the user's id in the data>"
            )
        count = _count(os.environ.get("K", "").strip() or "10")
        experiment = config.load(config.full_name(name), overrides)
        stage = chosen(experiment)
        say(f"{experiment.name}: loading ...")
        words = [experiment.name, stage.name, user, count, os.environ.get("REQUEST", "").strip()]
        in_process("experiments.recommendation", [*words, *experiment.overrides])
    except UserError as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _count(text: str) -> str:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MOST:
        raise UserError(f"K={text!r}, expected a whole number from 1 to {MOST}")
    return text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
