"""The command behind ``make hallucinations``: how much of what a run's texts state is made up.

``python -m experiments.hallucinations [NAME [key=value ...]]``. Variables: NAME and ARGS, as for
``experiments.run``; VOCABULARY, a JSON file ``{attribute: [value, ...]}`` (the catalogue's categories and
brands, and what the toy shop's pictures show). A line for each stage that writes texts of items or of users,
with its model and what was wrong with its input; ``statements.counted`` defines the rate.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from datamodules import toy_pictures
from datamodules.base import SequenceDataModule
from datamodules.sources import cache_root
from datamodules.toy_shop import ToyShopDataModule
from datamodules.written import read_written
from experiments import artifacts, build, config, report
from experiments.artifacts import PlannedStage
from experiments.command import exit_status
from experiments.errors import UserError
from experiments.intervals import of_share
from experiments.keys import flatten
from experiments.messages import put
from experiments.run import request
from experiments.statements import (
    Counted,
    Vocabulary,
    Words,
    catalogue_vocabulary,
    counted,
    truths,
)
from lightning_modules.item_summaries.base import WritesItemTexts
from lightning_modules.user_summaries import UserSummariesModule

TABLE = "predictions.parquet"
WRONG = {"pictures": ("swapped", "blank"), "texts": ("swapped",)}
_SHOWN: dict[str, Iterable[str]] = {
    "shape": toy_pictures.SHAPES, "colour": toy_pictures.COLOURS,
    "background": toy_pictures.BACKGROUNDS, "pattern": toy_pictures.PATTERNS,
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Exit status, see ``exit_status``."""
    return exit_status(lambda: _run(argv))


def _run(argv: Sequence[str]) -> None:
    name, overrides = request(list(argv))
    experiment = config.load(config.full_name(name), overrides)
    tell(experiment, os.environ.get("VOCABULARY", "").strip())


def tell(experiment: config.Experiment, vocabulary: str) -> None:
    """Print the table.

    Args:
        experiment: that was run.
        vocabulary: a file, or "".

    Raises:
        UserError: it writes no texts, none of them is finished, or the file is no vocabulary.
    """
    planned = artifacts.plan(experiment, cache_root())
    stages = [s for s in planned if _writes(s)]
    done = [s for s in stages if s.done]
    if not done:
        names = ", ".join(s.name for s in stages)
        raise UserError(
            f"{experiment.name} has no finished stage that writes texts of items or users"
            + (f" ({names} missing): make exp with the same words" if names else "")
        )
    given = given_vocabulary(Path(vocabulary).expanduser()) if vocabulary else None
    lines, used = [], dict[str, None]()
    for stage in done:
        words, found = _counted(stage, given)
        used |= dict.fromkeys(words.vocabulary)
        lines.append((stage, found))
    heads = (
        "stage",
        "model",
        "input",
        "texts",
        "stating",
        "stated",
        "false [95 % interval]",
        *used,
    )
    rows = [_line(stage, found, planned, list(used)) for stage, found in lines]
    report.print_table(f"{experiment.name}: statements that nothing supports", heads, rows)
    put(
        "stated: values of the vocabulary in a text; false: neither in the picture, where it is known what "
        "it shows, nor in the metadata of the item (of any item of a user's history); intervals are "
        "Wilson's and take statements as independent"
    )
    if waiting := [s.name for s in stages if not s.done]:
        put(f"not run yet: {', '.join(waiting)}")


def _writes(stage: PlannedStage) -> bool:
    if stage.spec["run"] != "predict":
        return False
    nodes = stage.spec["modules"].values()
    kinds = (WritesItemTexts, UserSummariesModule)
    return all(issubclass(build.locate(node["_target_"]), kinds) for node in nodes)


def given_vocabulary(file: Path) -> dict[str, list[str]]:
    """A vocabulary of the user's. Raises UserError where the file holds none."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"VOCABULARY={file} cannot be read: {error}") from error
    good = isinstance(told, dict) and all(
        isinstance(values, list) and values and all(isinstance(v, str) for v in values)
        for values in told.values()
    )
    if not good or not told:
        raise UserError(
            f'VOCABULARY={file} is no vocabulary: expected {{"colour": ["red", "blue"], ...}}'
        )
    return {str(name): list(values) for name, values in told.items()}


def _known(data: SequenceDataModule) -> tuple[dict[str, list[str]], pl.DataFrame | None]:
    """The attributes of a data set, and what its pictures show, where that is known."""
    own = catalogue_vocabulary(data.prepared.items)
    if not isinstance(data, ToyShopDataModule):
        return own, None
    shown = {name: list(values) for name, values in _SHOWN.items()}
    return {**shown, **own}, data.attributes().select(*_SHOWN)


def _counted(stage: PlannedStage, given: Vocabulary | None) -> tuple[Words, Counted]:
    data = build.build(stage.spec["data"])
    own, shown = _known(data)
    words = Words(own if given is None else given)
    true = truths(words, data.prepared.items, shown)
    assert stage.folder is not None
    table = read_written(stage.folder / TABLE, ("text",))
    return words, counted(words, _pairs(stage, table, data, true))


def _pairs(
    stage: PlannedStage, table: pl.DataFrame, data: SequenceDataModule, true: Sequence[set[str]]
) -> Iterator[tuple[str | None, set[str]]]:
    """Each text with what is true of what it is about."""
    if "user" not in table.columns:
        for item, text in table.select("item", "text").iter_rows():
            yield text, true[item]
        return
    (node,) = stage.spec["modules"].values()
    longest, items = node.get("max_length"), data.histories.items
    for start, stop, text in table.select("start", "stop", "text").iter_rows():
        first = start if longest is None else max(start, stop - longest)
        yield text, set[str]().union(*(true[item] for item in items[first:stop]))


def _line(
    stage: PlannedStage, found: Counted, planned: Sequence[PlannedStage], names: Sequence[str]
) -> list[str]:
    (node,) = stage.spec["modules"].values()
    wrong = sorted(wrong_inputs(stage, planned))
    head = [stage.name, model_name(node.get("llm")), ", ".join(wrong) or "own"]
    _, total = found.rate()
    cells = [_told(*found.rate(name)) if name in found.stated else "-" for name in names]
    return [
        *head, str(found.texts), str(found.stating), str(total), _told(*found.rate(), interval=True), *cells,
    ]  # fmt: skip


def _told(false: int, total: int, interval: bool = False) -> str:
    """A rate; a dash where nothing is stated."""
    if not total:
        return "-"
    if not interval:
        return f"{false / total:.2f} of {total}"
    found = of_share([1.0] * false + [0.0] * (total - false))
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def wrong_inputs(stage: PlannedStage, planned: Sequence[PlannedStage]) -> set[str]:
    """What was wrong with what a stage, or one that it reads, was shown: ``swapped pictures``."""
    found = {
        f"{data[kind]} {kind}"
        for data in (stage.spec["data"],)
        for kind, values in WRONG.items()
        if data["_target_"].startswith("datamodules.corrupted.") and data.get(kind) in values
    }
    folders = {s.folder: s for s in planned if s.folder is not None}
    for file in stage.inputs.values():
        if (before := folders.get(Path(file).parent)) is not None:
            found |= wrong_inputs(before, planned)
    return found


def model_name(node: Any) -> str:
    """What a model is called by its source: a hub id, the packages that it is put together of, its sizes."""
    source = node.get("source") if isinstance(node, Mapping) else None
    if isinstance(source, str):
        return "/".join(Path(source).parts[-2:])
    leaves = dict(flatten(source)) if source else {}
    packages = [str(v) for k, v in leaves.items() if k.rpartition(".")[2] == "package"]
    return " + ".join(packages) or str(leaves.get("_target_", "-")).rpartition(".")[2]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
