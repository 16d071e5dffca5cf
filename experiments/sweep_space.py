"""What a sweep tries: a YAML file of override keys, each with its values or its range. No torch, no Optuna.

``sampler: tpe`` draws from the ranges, ``sampler: grid`` goes through all combinations in the file's order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.config import ROOT
from experiments.errors import UserError
from experiments.keys import nearest

SPACES = ROOT / "sweeps"
KEYS = (
    "sampler", "metric", "mode", "stage", "on", "seed", "pruner", "startup",
    "warmup", "parameters",
)  # fmt: skip
RANGE_KEYS = ("low", "high", "log", "step")
VALIDATION, TEST = "validation", "test"
ONE_OF = {
    "sampler": ("tpe", "grid"), "mode": ("max", "min"), "on": (VALIDATION, TEST),
    "pruner": ("none", "median"),
}  # fmt: skip
# What names no folder of results: all its values would be one and the same run.
UNHASHED = ("launch", "logger", "callbacks", "slurm")


@dataclass(frozen=True)
class Choices:
    """Values to choose from, as the texts that stand behind ``key=``."""

    key: str
    texts: tuple[str, ...]

    def grid(self) -> tuple[str, ...]:
        """All of them."""
        return self.texts

    def ends(self) -> tuple[str, ...]:
        """Those that must compose: all of them."""
        return self.texts


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, whole ones where both are."""

    key: str
    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        """Whether its values are whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def text(self, value: float) -> str:
        """A value as an override has it: six digits are enough of what was drawn anywhere between."""
        if self.whole:
            return str(round(value))
        return repr(float(f"{value:.6g}" if self.step is None else f"{value:.12g}"))

    def grid(self) -> tuple[str, ...]:
        """Every step of it."""
        assert self.step is not None  # _range_problems has refused a grid without
        count = round((self.high - self.low) / self.step) + 1
        return tuple(self.text(self.low + i * self.step) for i in range(count))

    def ends(self) -> tuple[str, ...]:
        """Those that must compose: the two ends."""
        return self.text(self.low), self.text(self.high)


Axis = Choices | Range


@dataclass(frozen=True)
class Space:
    """A sweep's file, checked."""

    axes: tuple[Axis, ...]
    sampler: str
    metric: str
    mode: str = "max"
    stage: str | None = None
    on: str = VALIDATION
    seed: int = 0
    pruner: str = "none"
    startup: int = 5  # trials before one is pruned
    warmup: int = 0  # epochs of a trial in which nothing is pruned

    @property
    def better(self) -> int:
        """1 where more is better, else -1."""
        return 1 if self.mode == "max" else -1

    def points(self) -> list[dict[str, str]]:
        """Every combination of a grid, the last axis fastest."""
        keys = [axis.key for axis in self.axes]
        return [
            dict(zip(keys, v, strict=True)) for v in product(*(axis.grid() for axis in self.axes))
        ]

    def labels(self) -> dict[str, str]:
        """What tables call each key: its last words, as many as tell it from the others."""
        found = {}
        for axis in self.axes:
            words = axis.key.split(".")
            for count in range(1, len(words) + 1):
                tail = words[-count:]
                if sum(other.key.split(".")[-count:] == tail for other in self.axes) == 1:
                    break
            found[axis.key] = ".".join(tail)
        return found


def find(given: str) -> Path:
    """The file that SPACE names: a path, or the name of one in ``experiments/sweeps``.

    Raises:
        UserError: there is none.
    """
    known = {f.stem: f for f in sorted(SPACES.glob("*.yaml"))}
    if not given:
        raise UserError(
            f"SPACE is missing: SPACE=experiments/sweeps/NAME.yaml, NAME one of {', '.join(known)}"
        )
    path = Path(given).expanduser()
    if path.is_file():
        return path
    if given in known:
        return known[given]
    hint = nearest(path.stem, list(known))
    raise UserError(f"SPACE={given} is no file{hint} (experiments/sweeps has {', '.join(known)})")


def read(path: Path) -> dict[str, Any]:
    """A space file as plain values.

    Raises:
        UserError: it is not YAML, or no mapping.
    """
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise UserError(f"{path.name} is not readable YAML{line}: {reason}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path.name} holds no mapping with sampler, metric and parameters")
    return {"on" if key is True else str(key): value for key, value in tree.items()}  # YAML 1.1


def parse(settings: dict[str, Any], name: str) -> Space:
    """A checked space.

    Args:
        settings: what its file says.
        name: of the file, for messages.

    Raises:
        UserError: everything that is wrong with it, at once.
    """
    if problems := list(_problems(settings)):
        raise UserError(
            f"{name} is no space:\n" + "\n".join(f"  - {p}" for p in problems)
            if len(problems) > 1
            else f"{name}: {problems[0]}"
        )
    axes = [_axis(str(key), values) for key, values in settings["parameters"].items()]
    told = {k: v for k, v in settings.items() if k != "parameters" and v is not None}
    return Space(axes=tuple(axes), **told)


def _axis(key: str, values: Any) -> Axis:
    if isinstance(values, list):
        return Choices(key, tuple(text_of(v) for v in values))
    return Range(key, values["low"], values["high"], bool(values.get("log")), values.get("step"))


def _problems(settings: dict[str, Any]) -> Iterator[str]:
    for key in settings:
        if key not in KEYS:
            yield f"unknown key {key!r}{nearest(key, KEYS)} (override keys stand below parameters:)"
    for key, known in ONE_OF.items():
        required = key == "sampler"
        if (value := settings.get(key)) not in known and (required or value is not None):
            yield f"{key} is {value!r}, expected one of {', '.join(known)}"
    if not isinstance(settings.get("metric"), str):
        yield "metric is missing: name it as validation reports it, for instance ndcg@10 or auc"
    for key in ("seed", "startup", "warmup"):
        value = settings.get(key, 0)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            yield f"{key} is {value!r}, expected a whole number of at least 0"
    if settings.get("on") == TEST and settings.get("sampler") != "grid":
        yield (
            "on: test goes with sampler: grid alone, for a table of ablations; a search that chooses by "
            "the test set has no test set left"
        )
    if settings.get("on") == TEST and settings.get("pruner") == "median":
        yield "pruner: median reads validation, which on: test does not: leave it out"
    parameters = settings.get("parameters")
    if not isinstance(parameters, dict) or not parameters:
        yield "parameters is missing or empty: override keys, each with a list or {low: , high: }"
        return
    for key, values in parameters.items():
        yield from _axis_problems(str(key), values, settings.get("sampler") == "grid")


def _axis_problems(key: str, values: Any, grid: bool) -> Iterator[str]:
    if key.partition(".")[0] in UNHASHED:
        yield f"{key} changes no result, so there is nothing to choose: set it in ARGS"
    if key != key.strip() or not key or "=" in key:
        yield f"parameters: {key!r} is no override key"
    if isinstance(values, list):
        yield from _choice_problems(key, values)
    elif isinstance(values, dict):
        yield from _range_problems(key, values, grid)
    else:
        yield f"{key} is {values!r}, expected a list of values or {{low: , high: }}"


def _choice_problems(key: str, values: list[Any]) -> Iterator[str]:
    if not values:
        yield f"{key} is an empty list: there is nothing to choose from"
    try:
        texts = [text_of(v) for v in values]
    except UserError as error:
        yield f"{key}: {error}"
        return
    if len(set(texts)) < len(texts):
        yield f"{key} lists a value twice: {', '.join(texts)}"


def _range_problems(key: str, values: dict[str, Any], grid: bool) -> Iterator[str]:
    if unknown := [k for k in values if k not in RANGE_KEYS]:
        yield f"{key}: unknown key {unknown[0]!r}, expected low, high, log or step"
        return
    numbers = {k: values.get(k) for k in ("low", "high", "step") if k != "step" or k in values}
    for name, value in numbers.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or math.isnan(value):
            yield f"{key}: {name} is {value!r}, expected a number"
            return
    low, high, step, log = values["low"], values["high"], values.get("step"), values.get("log")
    if not low < high or math.isinf(low) or math.isinf(high):
        yield f"{key}: low: {low} is not below high: {high}"
    elif log and low <= 0:
        yield f"{key}: low: {low} has no logarithm, give one above 0 or leave log out"
    elif log and step is not None:
        yield f"{key}: log and step exclude each other, leave one out"
    elif step is not None and (step <= 0 or not _whole(step, (high - low) / step)):
        yield f"{key}: step: {step} does not lead from {low} to {high} in whole steps"
    elif step is not None and isinstance(low, int) and isinstance(high, int) and step != int(step):
        yield f"{key}: low and high are whole numbers, but step: {step} is not"
    elif grid and step is None:
        yield f"{key}: a grid needs a list of values, or a step"


def _whole(step: float, count: float) -> bool:
    return abs(count - round(count)) < 1e-6


def text_of(value: Any) -> str:
    """A value in Hydra's override grammar, such that it is read as the same value again.

    Raises:
        UserError: the grammar has no way to write it.
    """
    for text in (_plain(value), _quoted(value)):
        if text is not None and _reads_as(text, value):
            return text
    raise UserError(f"the value {value!r} cannot be written as an override")


def _plain(value: Any) -> str | None:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(text_of, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{k}:{text_of(v)}' for k, v in value.items())}}}"
    return repr(value) if isinstance(value, float) else str(value)


def _quoted(value: Any) -> str | None:
    return "'" + value.replace("'", "\\'") + "'" if isinstance(value, str) else None


def _reads_as(text: str, value: Any) -> bool:
    try:
        override = OverridesParser.create().parse_override(f"key={text}")
    except HydraException:
        return False
    if override.is_sweep_override():  # `a,b` and `choice(...)` are several values to Hydra
        return False
    read = override.value()
    return type(read) is type(value) and bool(read == value)


def override_words(point: dict[str, Any], axes: Sequence[Axis]) -> list[str]:
    """``key=value`` of each parameter of a trial.

    Args:
        point: by key; texts of choices, numbers of ranges.
        axes: of the space.
    """
    return [
        f"{a.key}={a.text(point[a.key]) if isinstance(a, Range) else point[a.key]}"
        for a in axes
        if a.key in point
    ]
