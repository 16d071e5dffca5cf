"""One user's list from a finished module; ``experiments.recommend`` starts this process.

``python -m experiments.recommendation NAME STAGE USER K REQUEST [key=value ...]``
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from datamodules.base import SequenceDataModule
from datamodules.errors import DataFormatError, DataSourceError
from datamodules.requests import asking
from datamodules.sources import cache_root
from experiments import artifacts, build, config
from experiments.errors import UserError
from experiments.keys import nearest
from experiments.messages import print_error, put
from experiments.report import print_table
from experiments.stage import quiet
from experiments.trainers import make_predictor
from lightning_modules.base import Best, RankingModule
from lightning_modules.errors import ModelError


@dataclass(frozen=True)
class Recommendation:
    """What one user is shown, best first.

    Args:
        items, scores: internal ids and the method's scores.
        places: of each item in the list that a retriever handed over; None where there was none.
        reason: why the first one, in a language model's words; None of methods that have none.
    """

    items: list[int]
    scores: list[float]
    places: list[int] | None = None
    reason: str | None = None


def recommend(
    module: RankingModule,
    data: SequenceDataModule,
    launch: dict[str, Any],
    user: int,
    wish: str = "",
) -> Recommendation:
    """Ask a finished module for one user's next items; what the user has had is left out.

    A method that chooses among candidates is given the best ones of its retriever.

    Args:
        module: with its weights.
        data: that it was trained on.
        launch: the experiment's settings of devices.
        user: internal id.
        wish: what the user is looking for, in words; may be empty.

    Raises:
        UserError: the method cannot be asked for that.
    """
    name = type(module).__name__
    if module.labelled:
        raise UserError(f"{name} says yes or no to one item at a time: it has no list to recommend")
    if wish and not module.reads_requests:
        raise UserError(
            f"{name} reads no words: leave REQUEST out, or ask a language model's method"
        )
    module.request = wish or None
    first: Best | None = None
    candidates = None
    if module.retriever is not None:
        first = _ask(module.retriever, data, launch, user, None)
        candidates = first.items[:, : module.num_candidates].cpu().numpy().astype(np.int32)
    elif module.num_candidates:
        raise UserError(
            f"{name} chooses among candidates, and here it has no collaborative model to retrieve them: "
            "recommend with an experiment that has one, such as a_llmrec/movielens_100k"
        )
    module.explains = module.reads_requests
    found = _ask(module, data, launch, user, candidates)
    real = found.items[0] > 0
    items = found.items[0][real].tolist()
    places = None
    if first is not None:
        order = first.items[0].tolist()
        places = [order.index(item) + 1 for item in items]
    reason = found.reasons[0] if found.reasons else None
    return Recommendation(items, found.scores[0][real].tolist(), places, reason)


def _ask(
    module: RankingModule,
    data: SequenceDataModule,
    launch: dict[str, Any],
    user: int,
    candidates: np.ndarray | None,
) -> Best:
    try:
        data.ask(asking(data.histories, [user], candidates))
        predicted: Any = make_predictor(module, launch).predict(module, datamodule=data)
    except ValueError as error:
        raise UserError(str(error)) from error
    best = predicted[0]  # one user is one batch
    assert isinstance(best, Best)
    return best


def internal_user(data: SequenceDataModule, raw: str) -> int:
    """The internal id of a raw one; raises UserError with the nearest ids where there is none."""
    known = data.prepared.users["user_id"].cast(str).to_list()
    if raw not in known:
        raise UserError(
            f"{data.name} has no user {raw!r}{nearest(raw, known)}; it has {len(known):,} users, such as "
            f"{', '.join(known[:3])}"
        )
    return known.index(raw) + 1


def show(found: Recommendation, data: SequenceDataModule, raw: str, count: int, name: str) -> None:
    """Print the list."""
    ids = data.raw_items(np.array(found.items[:count])).to_list()
    titles = data.titles
    columns = ["", "item", "title", "score", *(["retrieved as"] if found.places else [])]
    lines = [
        [str(place + 1), str(ids[place]), titles[item], f"{found.scores[place]:.4f}",
         *([str(found.places[place])] if found.places else [])]
        for place, item in enumerate(found.items[:count])
    ]  # fmt: skip
    print_table(f"user {raw}, {name}", columns, lines)
    if found.reason is not None:
        put(f"the model's own words, unchecked: {found.reason}")


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 done, 2 failed (the reason is on the screen)."""
    quiet()
    name, stage_name, raw, count, wish, *overrides = argv
    try:
        experiment = config.load(name, overrides)
        (stage,) = (s for s in artifacts.plan(experiment, cache_root()) if s.name == stage_name)
        launch = experiment.config["launch"]
        torch.set_num_threads(launch["threads"] or os.cpu_count() or 1)
        data = build.build(stage.spec["data"])
        data.seed = stage.spec["seed"]
        user = internal_user(data, raw)
        (node,) = stage.spec["modules"].values()
        module = build.build_on(node, data, **stage.inputs)
        show(recommend(module, data, launch, user, wish), data, raw, int(count), experiment.name)
    except (UserError, DataSourceError, DataFormatError, ModelError) as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
