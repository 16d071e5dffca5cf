"""Where each stage's results lie, and whether they are there: content-addressed run folders.

A stage's folder is named by a hash of everything that can change its result: its module, its data
(configuration and content digest), its inputs' keys, trainer, selection, batch size and seed. How it is
run (``launch``), what watches it (``logger``, ``callbacks``) and where files lie are left out.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from datamodules.versioning import code_digest, place_stats, read_json, value_digest, write_json
from experiments import lock
from experiments.config import Experiment
from experiments.errors import UserError
from experiments.keys import flatten
from experiments.places import content_of, is_place, stages_before
from experiments.shown_images import shown_images
from experiments.source_graph import REPO, changed_sources, some_of, sources

# Data settings that say where bytes are or how strictly they are checked: the digest covers the rest.
# What changes no prepared file.
UNPREPARED_KEYS = (
    "mask_seen", "expected", "allow_mismatch", "images", "image_ids", "words", "test_rows",
)  # fmt: skip
# Places of the user's: their content counts, not where they lie.
LOCAL_PLACES = ("root", "interactions", "items", "images", "instructions")
LOCAL_DATA_KEYS = (*LOCAL_PLACES, "on_bad_row", "expected", "allow_mismatch")
# What `make results`, `verify` and `table` write is no change of the code that made the results.
WRITTEN = ("README.md", "experiments/results.md", "experiments/REPRODUCTION.md")
# Settings of the Trainer that a test does not read.
FIT_KEYS = (
    "max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "gradient_clip_val",
    "gradient_clip_algorithm", "val_check_interval", "check_val_every_n_epoch",
    "limit_train_batches", "limit_val_batches",
)  # fmt: skip
DONE, PARTIAL, MISSING, STALE, RUNNING = "done", "partial", "missing", "stale", "running"


def runs_root() -> Path:
    """Where run folders lie: ``LLMREC_RUNS``, else ``runs/`` in the project."""
    return Path(os.environ.get("LLMREC_RUNS") or REPO / "runs")


@dataclass(frozen=True)
class PlannedStage:
    """One stage, its folder (None while its data is not prepared) and its state."""

    name: str
    spec: dict[str, Any]
    key: str | None
    folder: Path | None
    state: str
    why: str
    sources: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)  # constructor argument -> file path

    @property
    def done(self) -> bool:
        """Whether its results can be used (also when older code made them)."""
        return self.state in (DONE, STALE)


def plan(experiment: Experiment, cache: Path) -> list[PlannedStage]:
    """Every stage in running order with its state and the reason for it. Reads small files only."""
    planned: dict[str, PlannedStage] = {}
    for name in _order(experiment.stages):
        planned[name] = _plan_stage(experiment, name, planned, cache)
    return list(planned.values())


def _plan_stage(
    experiment: Experiment, name: str, planned: dict[str, PlannedStage], cache: Path
) -> PlannedStage:
    spec = stage_spec(experiment, name)
    roots = (*targets(spec["modules"]), *targets(spec["data"]), "experiments.stage")
    code = sources(roots)
    prepared = prepared_data(spec["data"], cache)
    places = {arg: Path(src).expanduser() for arg, src in spec["inputs"].items() if is_place(src)}
    upstream = {a: str(s).partition("/") for a, s in spec["inputs"].items() if a not in places}
    nameless = sorted({s for s, _, _ in upstream.values() if planned[s].folder is None})
    if prepared is None or nameless:
        own = "its data is not prepared yet"
        why = own if prepared is None else f"waits for {', '.join(nameless)}"
        return PlannedStage(name, spec, None, None, MISSING, why, code)
    keys = {arg: f"{planned[stage].key}/{file}" for arg, (stage, _, file) in upstream.items()}
    keys |= {arg: content_of(place, f"stages.{name}.inputs.{arg}") for arg, place in places.items()}
    shown = tuple(targets(spec["modules"]))
    keys |= shown_images(shown, spec["data"], Path(prepared["folder"]), cache)
    key = stage_key(spec, prepared["digest"], keys)
    folder = _folder(spec, name, key)
    inputs = {a: str(planned[s].folder / f) for a, (s, _, f) in upstream.items()}  # type: ignore[operator]
    inputs |= {arg: str(place.resolve()) for arg, place in places.items()}
    state, why = _state(folder, code, inputs)
    waiting = [s for s, _, _ in upstream.values() if not planned[s].done]
    if state == MISSING and waiting:
        why = f"waits for {', '.join(sorted(set(waiting)))}"
    elif state == MISSING:
        why = _nearest_run(folder, spec)
    return PlannedStage(name, spec, key, folder, state, why, code, inputs)


def stage_spec(experiment: Experiment, name: str) -> dict[str, Any]:
    """A stage with everything it inherits from the experiment filled in."""
    stage = experiment.stages[name]
    config = experiment.config
    modules = stage.get("modules") or {name: stage["module"]}
    test = stage.get("run") == "test"
    return {
        "run": stage.get("run"),
        "modules": {row: m for row, m in modules.items() if m is not None},  # null takes a row out
        "inputs": stage.get("inputs") or {},
        "data": stage.get("data") or config["data"],
        "trainer": {**config.get("trainer", {}), **(stage.get("trainer") or {})},
        "select": stage.get("select"),
        "batch_size": stage.get("batch_size", 128),
        "seed": config.get("seed", 0),
        "split": (stage.get("split") or config.get("split", "test")) if test else None,
    }


def stage_key(spec: dict[str, Any], data_digest: str, inputs: dict[str, str]) -> str:
    """The hash that names the folder (12 hex digits).

    A test or a predict stage draws nothing and optimises nothing, so its seed, batch size and what is only
    for a fit are no part of it; the reference rows of one data set are then shared by every experiment and
    seed.
    """
    test, fit = spec["run"] == "test", spec["run"] == "fit"
    trainer = spec["trainer"] if fit else _without(spec["trainer"], FIT_KEYS)
    scored = {"split": spec["split"]} if test and spec["split"] != "test" else {}
    return value_digest(
        {
            **scored,
            "run": spec["run"],
            "modules": spec["modules"],
            "inputs": inputs,
            # What is tested is nothing to the others.
            "data": _without(spec["data"], LOCAL_DATA_KEYS + (() if test else ("test_rows",))),
            "digest": data_digest,
            "trainer": trainer,
            "select": spec["select"],
            "batch_size": spec["batch_size"] if fit else None,
            "seed": spec["seed"] if fit else None,
        }
    )


def data_key(data: dict[str, Any]) -> str:
    """Names a data configuration on this machine: its settings, its parsers' code, its local files."""
    asked = _without(data, UNPREPARED_KEYS)
    files = [place_stats(place) for place in _places(asked)]
    return value_digest({"data": asked, "files": files, "code": _data_code()}, 16)


def _places(data: dict[str, Any]) -> Iterator[str]:
    """The user's files and folders that a data configuration, or a part of it, names."""
    for key, value in sorted(data.items()):
        if isinstance(value, dict):
            yield from _places(value)
        elif key in LOCAL_PLACES and value:
            yield str(value)


def prepared_data(data: dict[str, Any], cache: Path) -> dict[str, Any] | None:
    """What ``record_prepared`` wrote for this data configuration, if its folder still stands."""
    note = read_json(cache / "index" / f"{data_key(data)}.json")
    if note is None or not (Path(note["folder"]) / "manifest.json").is_file():
        return None
    return note


def record_prepared(data: dict[str, Any], cache: Path, folder: Path, digest: str) -> None:
    """Remember which prepared folder belongs to this data configuration."""
    note = {"folder": str(folder), "digest": digest}
    write_json(cache / "index" / f"{data_key(data)}.json", note)


def mismatches(data: dict[str, Any], manifest: dict[str, Any]) -> str:
    """Counts that the data, or a part of it, does not have as expected, as text; empty where all agree."""
    counts = manifest["counts"]
    told = {n: e for n, e in (data.get("expected") or {}).items() if e is not None}
    wrong = [
        f"{counts.get(n, 0):,} {n} (expected {e:,})" for n, e in told.items() if counts.get(n) != e
    ]
    for name, folder in manifest.get("parts", {}).items():
        part = data.get("parts", {}).get(name, {})
        if not part.get("allow_mismatch"):
            found = mismatches(part, read_json(Path(folder) / "manifest.json"))
            wrong += [f"in {name} {found}"] if found else []
    return ", ".join(wrong)


def require_expected(
    experiment: Experiment, data: dict[str, Any], manifest: dict[str, Any]
) -> None:
    """Refuse a paper's preset on data that are not the paper's.

    Raises:
        UserError: the counts differ and ``data.allow_mismatch`` is not set.
    """
    wrong = mismatches(data, manifest)
    paper = experiment.config.get("preset") == "paper"
    if wrong and paper and not data.get("allow_mismatch"):
        raise UserError(
            f"{experiment.name} is a paper's preset, but the data has {wrong}: get the paper's data, or "
            "run on yours with data.allow_mismatch=true"
        )


def commit() -> str:
    """The git commit, ``+changes`` if the tree differs from it, or ``unknown``."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + (
            "+changes"
            if _git("status", "--porcelain", "-uno", "--", ".", *(f":!{f}" for f in WRITTEN))
            else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def targets(tree: Any) -> Iterator[str]:
    """Every ``_target_`` in a configuration."""
    for key, value in flatten(tree):
        if key.rpartition(".")[2] == "_target_" and isinstance(value, str):
            yield value
        elif isinstance(value, list):
            for item in value:
                yield from targets(item) if isinstance(item, dict) else ()


@cache
def _data_code() -> str:
    return code_digest((REPO / "datamodules").glob("*.py"))


def _git(*words: str) -> str:
    command = ["git", "-C", str(REPO), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _order(stages: dict[str, dict[str, Any]]) -> list[str]:
    """File order, but a stage always after the stages it takes inputs from; reference rows last."""
    ordered: list[str] = []
    todo = sorted(stages, key=lambda s: "modules" in stages[s])
    while todo:
        ready = [s for s in todo if stages_before(stages[s]) <= set(ordered)]
        if not ready:
            raise UserError(f"the inputs of {', '.join(todo)} form a circle")
        ordered.append(ready[0])
        todo.remove(ready[0])
    return ordered


def _folder(spec: dict[str, Any], name: str, key: str) -> Path:
    """The folder with this key under whatever name it was made, else the name it would get now."""
    found = sorted(runs_root().glob(f"*-{key}"))
    if found:
        return found[0]
    module = next(iter(spec["modules"].values()))["_target_"].split(".")
    method = module[1] if len(module) > 2 else Path(spec["data"]["_target_"]).stem
    method = method if len(spec["modules"]) == 1 else "reference"
    return runs_root() / (f"{method}.{name}-{key}" if method != name else f"{name}-{key}")


def done_mark(folder: Path) -> dict[str, Any] | None:
    """What ``done.json`` says; None where the stage has not ended, or the mark is damaged."""
    done: dict[str, Any] = read_json(folder / "done.json") or {}
    return done if {"sources", "seconds", "finished"} <= done.keys() else None


def _state(folder: Path, code: dict[str, str], inputs: dict[str, str]) -> tuple[str, str]:
    if (holder := lock.holder(folder)) is not None:
        return RUNNING, holder
    done = done_mark(folder)
    if done is None:
        if not (folder / "last.ckpt").is_file():
            return MISSING, "never run"
        begun = (read_json(folder / "stage.json") or {}).get("sources", code)
        changed = changed_sources(begun, code)
        note = f" with changed code ({', '.join(changed)})" if changed else ""
        return PARTIAL, f"was cut off: resumes from last.ckpt{note}"
    changed = changed_sources(done["sources"], code)
    if changed:
        return STALE, f'made by older code ({some_of(changed)}); ARGS="stale=rerun" makes it anew'
    if renewed := _renewed(folder, inputs):
        return STALE, f'{renewed} was made anew since; ARGS="stale=rerun" makes this anew too'
    return DONE, f"{done['seconds']:.0f} s on {done['finished']}"


def _renewed(folder: Path, inputs: dict[str, str]) -> str:
    """The inputs whose content is not what this stage read."""
    read = (read_json(folder / "stage.json") or {}).get("inputs_digest", {})
    return ", ".join(a for a, f in inputs.items() if read.get(a) != output_digest(Path(f)))


def output_digest(file: Path) -> str | None:
    """Content digest of a finished stage's file, as its ``done.json`` has it."""
    done = done_mark(file.parent) or {}
    digest: str | None = done.get("outputs", {}).get(file.name)
    return digest


def _nearest_run(folder: Path, spec: dict[str, Any]) -> str:
    """Why a stage is missing although something like it was run: what differs from the nearest run."""
    mine = dict(flatten(_comparable(spec)))
    best: tuple[int, str, list[str]] | None = None
    for other in runs_root().glob(f"{folder.name.rpartition('-')[0]}-*/stage.json"):
        recorded = (read_json(other) if other.parent != folder else None) or {}
        theirs = dict(flatten(_comparable(recorded["spec"]))) if "spec" in recorded else {}
        differs = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
        if theirs and (best is None or len(differs) < best[0]):
            words = [f"{k} {theirs.get(k)!r} -> {mine.get(k)!r}" for k in differs]
            best = (len(differs), other.parent.name, words)
    if best is None:
        return "never run"
    listed = "; ".join(best[2][:3]) + (f" and {len(best[2]) - 3} more" if len(best[2]) > 3 else "")
    return f"never run; unlike {best[1]}: {listed or 'its inputs or its data differ'}"


def _comparable(spec: dict[str, Any]) -> dict[str, Any]:
    return {**spec, "data": _without(spec["data"], LOCAL_DATA_KEYS)}


def _without(mapping: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """A mapping without these keys, at any depth (the parts of joined data have places, too)."""
    return {
        k: _without(v, keys) if isinstance(v, dict) else v
        for k, v in mapping.items()
        if k not in keys
    }
