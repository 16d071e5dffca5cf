"""One list from a finished module, printed; ``experiments.recommend`` starts this process.

``python -m experiments.recommendation NAME [key=value ...]``; what is asked for stands in the environment.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence

from experiments.asked import Recommendations, plain_values
from experiments.command import exit_status
from experiments.loaded import load
from experiments.messages import put, put_exactly
from experiments.recommend import Wanted
from experiments.recommender import Recommender
from experiments.report import print_table


def answer(model: Recommender, wanted: Wanted) -> Recommendations:
    """What was asked for.

    Raises:
        UserError: a user or an item is unknown, or the method cannot be asked for that.
    """
    (found,) = model.recommend(
        [wanted.user] if wanted.user else None, wanted.count,
        histories=[wanted.history] if wanted.history else None, exclude=wanted.exclude,
        request=wanted.words, items=model.new_items if wanted.items else None,
    )  # fmt: skip
    return found


def show(found: Recommendations, model: Recommender) -> None:
    """Print a table, and what a language model has to say."""
    retrieved = any(r.retrieved for r in found.items)
    columns = ["", "item", "title", "score", *(["retrieved as"] if retrieved else [])]
    lines = [
        [str(place), r.item, r.title, f"{r.score:.4f}", *([str(r.retrieved)] if retrieved else [])]
        for place, r in enumerate(found.items, start=1)
    ]
    who = f"user {found.ask.user}" if found.ask.user else "a history of your own"
    for raw in found.ask.history or ():
        put(f"has {raw}: {model.names.titles[model.names.of_id(raw) - 1]}")
    print_table(f"{who}, {model.name}", columns, lines)
    if found.preference is not None:
        put(f"what the model was told of the user: {found.preference}")
    if found.reason is not None:
        put(f"in the model's words: {found.reason}")
    if found.dropped:
        put(f"{found.dropped} of its statements left out: the item's metadata do not support them")


def main(argv: Sequence[str]) -> int:
    """Exit status, see ``exit_status``."""
    return exit_status(lambda: _run(argv))


def _run(argv: Sequence[str]) -> None:
    wanted = Wanted.of(os.environ)
    retriever = shlex.split(wanted.retriever) or None
    model = load(argv[0], *argv[1:], retriever=retriever, new_items=wanted.items)
    found = answer(model, wanted)
    if wanted.format == "json":
        told = plain_values(found, model.name, model.names)
        put_exactly(json.dumps(told, ensure_ascii=False, indent=1))
    else:
        show(found, model)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
