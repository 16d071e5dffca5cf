"""``load``: from the name of a finished experiment to what answers with it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from datamodules.base import SequenceDataModule
from datamodules.errors import DataFormatError, DataSourceError
from datamodules.new_items import add_items, read_items
from experiments import build, config
from experiments.artifacts import PlannedStage
from experiments.errors import UserError
from experiments.recommend import chosen, tests
from experiments.recommender import Recommender
from experiments.stage import quiet
from lightning_modules.base import RankingModule
from lightning_modules.errors import ModelError


def load(
    name: str,
    *overrides: str,
    retriever: str | Sequence[str] | Recommender | None = None,
    new_items: str | Path | None = None,
) -> Recommender:
    """A finished experiment, ready to be asked; nothing is trained.

    Args:
        name: ``sasrec/movielens_100k``.
        overrides: as of ``make exp``: those that it was run with.
        retriever: a finished experiment whose best items a method is handed that chooses among candidates
            and has no collaborative model: its name, or its name and overrides. Without one an experiment's
            own collaborative test stands in, where there is one.
        new_items: JSON lines of items that nobody has seen, see ``datamodules.new_items``; they stand behind
            the catalogue.

    Raises:
        UserError: it is not finished, its method has nothing to ask, or cannot score new items.
    """
    quiet()
    experiment = config.load(config.full_name(name), list(overrides))
    try:
        return _loaded(experiment, chosen(experiment), retriever, new_items)
    except (DataSourceError, DataFormatError, ModelError) as error:
        raise UserError(str(error)) from error


def asked_of(experiment: config.Experiment, stage: PlannedStage) -> Recommender:
    """What answers with one tested stage of an experiment."""
    quiet()
    return _loaded(experiment, stage, None, None)


def _loaded(
    experiment: config.Experiment, stage: PlannedStage, retriever: Any, new_items: str | Path | None
) -> Recommender:
    launch = experiment.config["launch"]
    torch.set_num_threads(launch["threads"] or os.cpu_count() or 1)
    (node,) = stage.spec["modules"].values()
    kind = build.locate(node["_target_"])
    data: SequenceDataModule = build.build(stage.spec["data"])
    added: list[str] = []
    if new_items is not None:
        _require_texts_alone(kind, stage)
        items, pictures = read_items(Path(new_items))
        add_items(data, items, pictures)
        added = items["item_id"].to_list()
    fallback = retriever if isinstance(retriever, Recommender) else None
    if isinstance(retriever, str):
        fallback = load(retriever)
    elif retriever is not None and fallback is None:
        fallback = load(*retriever)
    elif fallback is None and kind.labelled:
        own = _collaborative(experiment, stage)
        fallback = None if own is None else _loaded(experiment, own, None, None)
    return Recommender(experiment, stage, data, fallback, added)


def _require_texts_alone(kind: Any, stage: PlannedStage) -> None:
    if not kind.scores_new_items:
        raise UserError(
            f"{kind.__name__} knows items by what it has learned of their ids: it cannot score ITEMS that "
            "nobody has seen (methods that read texts alone can, such as item_text_similarity)"
        )
    if told := sorted(arg for arg in stage.inputs if arg.startswith(build.CATALOG)):
        raise UserError(
            f"{kind.__name__} reads texts here that an earlier stage wrote of each item ({', '.join(told)}): "
            "new ITEMS have none"
        )


def _collaborative(experiment: config.Experiment, stage: PlannedStage) -> PlannedStage | None:
    """Another test of the experiment, of one model that ranks the same catalogue by itself."""
    for other in tests(experiment):
        (node,) = other.spec["modules"].values()
        kind = build.locate(node["_target_"])
        ranks = isinstance(kind, type) and issubclass(kind, RankingModule)
        itself = ranks and not kind.labelled and not kind.num_candidates and not kind.reads_requests
        if itself and other.name != stage.name and other.spec["data"] == stage.spec["data"]:
            return other
    return None
