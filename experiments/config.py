"""Experiment files: composed by Hydra's compose API, checked for unknown keys, and traceable.

Composition only: no torch here, so that planning answers at once. An experiment is one YAML file
below ``experiments/``; its name is its path without the ending, for instance ``sasrec/movielens_100k``.
``data/NAME`` is the experiment that every data config is by itself: the rows without a model on it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments import published
from experiments.errors import UserError
from experiments.frame import GROUPS, TRAINER_KEYS, structure_problems
from experiments.keys import flatten, nearest
from experiments.source_graph import parameters

ROOT = Path(__file__).resolve().parent
_DATA_SETS = ("data.release", "data.category", "data.name")  # name another one of the same config
ORIGINS = "origins.json"  # in a run folder: what ``origins`` said


def _merged(*parts: DictConfig) -> dict[str, Any]:
    """``${merge:A,B}``: a mapping with what later ones set; what A names is resolved."""
    found: dict[str, Any] = {}
    for part in parts:
        told = OmegaConf.to_container(part, resolve=True) if OmegaConf.is_config(part) else part
        assert isinstance(told, dict)
        found |= {str(key): value for key, value in told.items()}
    return found


OmegaConf.register_new_resolver("merge", _merged, replace=True)
# ``${published:paper,table,row,column}``: a paper's number, which stands in ``papers/`` alone
OmegaConf.register_new_resolver("published", published.value, replace=True)


@dataclass(frozen=True)
class Experiment:
    """A composed and resolved experiment: plain dictionaries, ready to hash or to instantiate."""

    name: str
    config: dict[str, Any]
    overrides: tuple[str, ...]
    path: Path

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """Stage name -> its configuration."""
        return self.config["stages"]

    @property
    def data_sets(self) -> list[dict[str, Any]]:
        """The data configurations of all stages, each once."""
        stages = [s for s in self.stages.values() if isinstance(s, dict)]
        specs = [stage.get("data") or self.config["data"] for stage in stages]
        return list({json.dumps(s, sort_keys=True): s for s in specs}.values())


def names() -> list[str]:
    """Every experiment file, as ``method/dataset``; config groups, sweeps' spaces and ``base`` are none."""
    files = sorted(ROOT.glob("*/*.yaml"))
    others = (*GROUPS, "sweeps", "papers")
    return [f"{f.parent.name}/{f.stem}" for f in files if f.parent.name not in others]


def data_names() -> list[str]:
    """Every data config, as ``data/NAME``."""
    return [f"data/{f.stem}" for f in sorted((ROOT / "data").glob("*.yaml"))]


def full_name(name: str) -> str:
    """``data/NAME`` where a bare name is a data config's: ``make data NAME=bookcrossing``."""
    return f"data/{name}" if f"data/{name}" in data_names() else name


def _start(name: str) -> tuple[str, list[str]]:
    """The file that composition starts from, and what is added to it first."""
    if name in data_names():
        return "base", [f"+data={name.removeprefix('data/')}"]
    return name, []


def header(name: str) -> str:
    """The first comment line below ``# @package``: what the experiment is, in one line."""
    for line in (ROOT / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ").strip()
    return ""


def caption(name: str, overrides: Sequence[str] = ()) -> str:
    """What was run, in one line: the header, or what stands in its place on other data than the file's."""
    told = {key.lstrip("+"): value for key, _, value in (o.partition("=") for o in overrides)}
    moved = [f"{key}={told[key]}" for key in _DATA_SETS if key in told]
    chosen = told.get("data")
    if chosen is not None and not _is_own_data(name, chosen):
        moved = [f"data={chosen}", *moved]
    if not moved:
        return header(name)
    own = told.get("data.name", "").strip("'\"")
    if not own and chosen is not None and f"data/{chosen}" in data_names():
        own = header(f"data/{chosen}").partition(":")[0]
    words = " ".join(m for m in moved if not own or not m.startswith("data.name="))
    where = f"{own} ({words})" if own and words else own or words
    return f"its method and settings on {where}, not on the data of its file"


def _is_own_data(name: str, chosen: str) -> bool:
    """Whether a data config is what the file takes by itself."""
    try:
        return composed(name).config["data"] == composed(name, [f"data={chosen}"]).config["data"]
    except UserError:  # a file that has changed since its run
        return False


class FrameError(UserError):
    """The frame of an experiment is wrong; ``experiments.check`` tells this and all else at once."""


def load(name: str, overrides: Sequence[str] = ()) -> Experiment:
    """Compose, apply the overrides, resolve, and refuse every unknown key.

    Raises:
        UserError: unknown experiment, group, key or value.
        FrameError: problems of the composed experiment, all at once.
    """
    experiment = composed(name, overrides)
    problems = list(structure_problems(experiment.config))
    if problems:
        raise FrameError(cannot_run(name, problems))
    return experiment


def cannot_run(name: str, problems: Sequence[str]) -> str:
    """The message that lists everything that keeps an experiment from running."""
    return f"{name} cannot run:\n" + "\n".join(f"  - {p}" for p in dict.fromkeys(problems))


def composed(name: str, overrides: Sequence[str] = ()) -> Experiment:
    """An experiment as its files and overrides give it, not looked at yet."""
    path = find(name)
    with _hydra():
        tree = _compose(name, _accepting(name, overrides))
    try:
        config = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{name}: {_first_line(error)}") from error
    assert isinstance(config, dict)
    return Experiment(name, {str(k): v for k, v in config.items()}, tuple(overrides), path)


def find(name: str) -> Path:
    """The file of an experiment; an unknown name is answered with the nearest ones."""
    known = [*names(), *data_names()]
    if not name:
        raise UserError(
            "NAME is missing: make exp NAME=sasrec/movielens_100k (make list shows all)"
        )
    if name not in known:
        raise UserError(
            f"no experiment is called {name!r}{nearest(name, known)}; make list shows all"
        )
    return ROOT / f"{name}.yaml"


def origins(name: str, overrides: Sequence[str] = ()) -> dict[str, str]:
    """For every leaf of the composed tree, the file (or command-line override) that set it last."""
    with _hydra():
        loader = GlobalHydra.instance().config_loader()
        start, added = _start(name)
        added += overrides
        defaults = loader.compute_defaults_list(start, added, RunMode.RUN).defaults
        loaded = [
            (str(d.config_path), d.package or "", OmegaConf.load(ROOT / f"{d.config_path}.yaml"))
            for d in defaults
            if d.config_path and not str(d.config_path).startswith(("hydra/", "_"))
        ]
    found: dict[str, str] = {}
    links: dict[str, str] = {}  # `module: ${stages.train.module}` has its leaves from there
    for path, package, tree in loaded:
        raw = OmegaConf.to_container(tree, resolve=False)
        if isinstance(raw, dict):
            raw.pop("defaults", None)
            for key, value in flatten(raw, "" if package == "_global_" else package):
                found[key] = f"experiments/{path}.yaml"
                links.pop(key, None)
                if whole := re.fullmatch(r"\$\{([\w.]+)\}", str(value)):
                    links[key] = whole[1]
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        for key, _ in flatten(override.value(), override.key_or_group):
            found[key] = f"command line: {override.input_line}"
            links.pop(key, None)
    for key, link in links.items():
        through = {
            f"{key}{k[len(link) :]}": v for k, v in found.items() if k.startswith(f"{link}.")
        }
        found = {**through, **found}
    return found


def origin_of(key: str, found: dict[str, str]) -> str:
    """The origin of a resolved leaf: its own, or that of the nearest node above it that was set."""
    while key:
        if key in found:
            return found[key]
        key = key.rpartition(".")[0]
    return "default"


class _hydra:  # noqa: N801 - a context manager, used like a function
    """Hydra's global state, opened and closed around one composition."""

    def __enter__(self) -> None:
        GlobalHydra.instance().clear()
        initialize_config_dir(str(ROOT), version_base="1.3").__enter__()

    def __exit__(self, *exc: object) -> None:
        GlobalHydra.instance().clear()


def _compose(name: str, overrides: Sequence[str]) -> DictConfig:
    try:
        start, added = _start(name)
        return compose(start, overrides=[*added, *_replacing(overrides)])
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(_explain(name, overrides, error)) from error


def _replacing(overrides: Sequence[str]) -> list[str]:
    """An object given whole (``key={_target_: ...}``) replaces the file's: Hydra would mix the two."""
    replaced: list[str] = []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key, value, line = override.key_or_group, override.value(), str(override.input_line)
        whole = isinstance(value, dict) and "_target_" in value
        change = override.type is OverrideType.CHANGE
        replaced += [f"~{key}", f"+{line}"] if whole and change else [line]
    return replaced


def as_text(override: str) -> str:
    """An override that Hydra's grammar cannot read, with its value quoted: a path with blanks, say."""
    key, equals, value = override.partition("=")
    if _parses(override) or not equals or not value or not re.fullmatch(r"[+~]*[\w./@]+", key):
        return override
    escaped = value.replace("'", "\\'")
    quoted = f"{key}='{escaped}'"
    return quoted if value[0] not in "[{'\"" and _parses(quoted) else override


def _parses(override: str) -> bool:
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True


def _accepting(name: str, overrides: Sequence[str]) -> list[str]:
    """Overrides of arguments that a constructor has and the files leave at their defaults.

    Hydra wants a ``+`` for a key that no file sets; a user need not know which those are.
    """
    if not overrides:
        return []
    swapped = [o for o in overrides if o.partition("=")[0] in GROUPS]  # have keys of their own
    tree = OmegaConf.to_container(_compose(name, swapped), resolve=False)
    return [f"+{o}" if _is_argument(tree, o.partition("=")[0]) else o for o in overrides]


def _is_argument(tree: Any, key: str) -> bool:
    """Whether ``key`` names an unset argument of an object (or of a stage's Trainer) in the tree."""
    *parents, leaf = key.split(".")
    for part in parents:
        if not isinstance(tree, dict):
            return False  # `${...}`: what it names is to be set
        tree = tree.get(part)
    if not isinstance(tree, dict) or leaf in tree:
        # A stage without a `trainer` of its own may be given one; constructor checks come later.
        unset = parents[:1] == ["stages"] and parents[2:] == ["trainer"] and tree is None
        return unset and leaf in TRAINER_KEYS
    if parents[-1:] == ["trainer"]:
        return leaf in TRAINER_KEYS
    return leaf in (parameters(str(tree.get("_target_"))) or ())


def _unset_arguments(leaves: dict[str, Any]) -> Iterator[str]:
    """Keys of constructor arguments that no file sets."""
    for key, target in leaves.items():
        node, _, leaf = key.rpartition(".")
        if leaf == "_target_":
            yield from (f"{node}.{name}" for name in parameters(str(target)) or ())


def _explain(name: str, overrides: Sequence[str], error: Exception) -> str:
    """Hydra's own messages name what is wrong but not what was meant."""
    text = str(error)
    if found := re.search(r"Could not (?:override|delete from config\.) '([^']+)'", text):
        tree = OmegaConf.to_container(_compose(name, ()), resolve=False)
        leaves = dict(flatten(tree))
        options = [*GROUPS, *leaves, *_unset_arguments(leaves)]
        key = found[1].split("@")[0]
        if key in GROUPS:
            return f"{name} uses no {key} config, so there is none to swap"
        return f"unknown key {key!r} in {name}{nearest(key, options)} (`+{key}=...` adds a new one)"
    if found := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        group, option = found[1], found[2]
        options = sorted(f.stem for f in (ROOT / group).glob("*.yaml"))
        listing = ", ".join(options) or "no files"
        return f"no {group} config is called {option!r}{nearest(option, options)} ({listing})"
    if isinstance(error, (OverrideParseException, ValueError)):
        bad = " ".join(overrides)
        return f"the overrides {bad!r} cannot be read: write key=value, lists as key=[a,b]"
    return f"{name}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
