"""Other experiments whose rows belong into an experiment's table: what its file lists as ``beside``."""

from __future__ import annotations

from collections.abc import Iterator

from experiments import config
from experiments.artifacts import PlannedStage
from experiments.baseline import setting, shared_overrides, tested
from experiments.config import Experiment
from experiments.errors import UserError

SWAPPED = ("llm", "backbone")  # groups: a row that has the part is meant with the same one


def find(experiment: Experiment) -> Iterator[tuple[Experiment, list[PlannedStage]]]:
    """Each of them, by this experiment's data, seed and swapped parts, with its finished tests.

    Raises:
        UserError: a listed experiment does not exist, or cannot be composed.
    """
    shared = [*shared_overrides(experiment), f"seed={experiment.config['seed']}"]
    swapped = [o for o in experiment.overrides if _group(o) in SWAPPED]
    for name in experiment.config.get("beside") or []:
        try:
            parts = config.load(name).config if swapped else {}
            words = [*shared, *(o for o in swapped if _group(o) in parts)]
            other = config.load(name, words)
        except UserError as error:
            raise UserError(f"beside lists {name}: {error}") from error
        if other.config != experiment.config:
            yield other, tested(other)


def _group(override: str) -> str:
    return setting(override).split(".")[0]
