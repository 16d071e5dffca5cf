"""What the frame of an experiment may look like: top keys, stages and their settings.

Arguments of modules, data and loggers are checked against their constructors by ``experiments.check``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from experiments.keys import nearest
from experiments.places import is_place

# The last five are the axes of MLLM-SRec's ablations (experiments/mllm_srec).
GROUPS = (
    "data", "llm", "engine", "backbone", "trainer", "logger", "slurm", "worked",
    "srec_input", "srec_steps", "srec_tuning", "srec_reasoning", "srec_probes",
)  # fmt: skip
STAGE_KEYS = {
    "run", "module", "modules", "inputs", "data", "trainer", "select", "batch_size",
    "split", "launch",
}  # fmt: skip
TOP_KEYS = {
    "seed", "stages", "trainer", "logger", "launch", "callbacks", "expected", "preset", "split",
    "beside", "instructions", *GROUPS,
}  # fmt: skip
# `paper` repeats a published protocol, quirks included, and refuses data of other counts than published.
PRESETS = ("corrected", "paper")
RUNS = ("fit", "predict", "test")
PREDICTIONS = "predictions.parquet"  # the table that a finished predict leaves
OUTPUTS = ("best.ckpt", "last.ckpt")  # files of a finished fit that a later stage may read
STRATEGIES = ("auto", "ddp", "fsdp")
SPLITS = ("test", "valid")  # what a test stage scores; `valid` is for choosing between methods
EXPECTED_KEYS = ("metric", "value", "source", "tolerance", "row", "at_least")  # see verify.py
# How a run, or one of its stages, is carried out (base.yaml says what each is).
LAUNCH_KEYS = (
    "accelerator", "devices", "num_nodes", "strategy", "micro_batch_size", "num_workers", "threads",
    "activation_checkpointing", "compile",
)  # fmt: skip
# Where `make slurm` submits to (slurm/default.yaml says what each is), and which of them are lists.
SLURM_KEYS = (
    "account", "partition", "qos", "constraint", "gpu_type", "cpus_per_task", "memory", "python",
)  # fmt: skip
SLURM_LISTS = ("modules", "setup", "sbatch", "srun")
# What of lightning's Trainer may change a result; how a run is carried out belongs to `launch`.
TRAINER_KEYS = (
    "max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "precision", "deterministic",
    "benchmark", "gradient_clip_val", "gradient_clip_algorithm", "val_check_interval",
    "check_val_every_n_epoch", "limit_train_batches", "limit_val_batches", "limit_test_batches",
    "overfit_batches", "detect_anomaly", "inference_mode",
)  # fmt: skip


def structure_problems(config: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the frame of a composed experiment, before any constructor is looked at."""
    for key in config:
        if key not in TOP_KEYS:
            yield f"unknown key {key!r}{nearest(key, sorted(TOP_KEYS))}"
    if config.get("preset", "corrected") not in PRESETS:
        yield f"preset is {config['preset']!r}, expected one of {', '.join(PRESETS)}"
    yield from _split_problems("split", config)
    yield from _trainer_problems("trainer", config.get("trainer") or {})
    yield from _launch_problems("launch", config.get("launch") or {})
    if "slurm" in config:
        yield from _slurm_problems(config["slurm"] or {})
    yield from _expected_problems(config.get("expected") or [])
    beside = config.get("beside") or []
    if not isinstance(beside, list) or not all(isinstance(name, str) for name in beside):
        yield f"beside is {beside!r}, expected a list of experiments whose rows belong into the table"
    yield from _count_problems("seed", config.get("seed", 0), least=0)
    stages = config.get("stages") or {}
    if not stages:
        yield "no stages: an experiment lists at least one under `stages:`"
    for name, stage in stages.items():
        yield from _stage_problems(name, stage, stages)


def _launch_problems(where: str, launch: Any) -> Iterator[str]:
    """What is wrong with how a run, or one of its stages, is to be carried out."""
    if not isinstance(launch, dict):
        yield f"{where} is {launch!r}, expected a mapping"
        return
    for key in launch:
        if key not in LAUNCH_KEYS:
            yield f"{where}: unknown key {key!r}{nearest(key, LAUNCH_KEYS)}"
    for key in ("devices", "num_nodes"):
        yield from _count_problems(f"{where}.{key}", launch.get(key, 1))
    if launch.get("strategy", "auto") not in STRATEGIES:
        yield f"{where}.strategy is {launch['strategy']!r}, expected one of {', '.join(STRATEGIES)}"
    for key in ("threads", "micro_batch_size"):
        if launch.get(key) is not None:
            yield from _count_problems(f"{where}.{key}", launch[key])
    yield from _count_problems(f"{where}.num_workers", launch.get("num_workers", 0), least=0)
    for name in ("compile", "activation_checkpointing"):
        if not isinstance(launch.get(name, False), bool):
            yield f"{where}.{name} is {launch[name]!r}, expected true or false"


def _slurm_problems(site: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a site's copy of ``slurm/default.yaml``."""
    if gone := [key for key in (*SLURM_KEYS, *SLURM_LISTS) if key not in site]:
        yield f"slurm lacks {', '.join(gone)}: a site's file has all keys of slurm/default.yaml"
    for key in SLURM_LISTS:
        if not isinstance(site.get(key) or [], list):
            yield f"slurm.{key} is {site[key]!r}, expected a list: [{site[key]}]"


def _expected_problems(expected: Any) -> Iterator[str]:
    """What is wrong with an experiment's ``expected``."""
    if not isinstance(expected, list):
        yield f"expected is {expected!r}, expected a list of metric, value and source"
        return
    for number, entry in enumerate(expected):
        where = f"expected[{number}]"
        if not isinstance(entry, dict):
            yield f"{where} is {entry!r}, expected metric, value and source"
            continue
        unknown = sorted(set(entry) - set(EXPECTED_KEYS))
        missing = [key for key in EXPECTED_KEYS[:3] if entry.get(key) is None]
        if unknown:
            yield f"{where}: unknown {', '.join(unknown)} (known: {', '.join(EXPECTED_KEYS)})"
        if missing:
            yield f"{where} lacks {', '.join(missing)}"
        for key in ("value", "tolerance"):
            value = entry.get(key, 0)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | float)
            ):
                yield f"{where}.{key} is {value!r}, expected a number"


def _stage_problems(name: str, stage: dict[str, Any], stages: dict[str, Any]) -> Iterator[str]:
    if not isinstance(stage, dict):
        yield f"stages.{name} is {stage!r}, expected a mapping (~stages.{name} leaves the stage out)"
        return
    for key in stage:
        if key not in STAGE_KEYS:
            yield f"stages.{name}: unknown key {key!r}{nearest(key, sorted(STAGE_KEYS))}"
    if stage.get("run") not in RUNS:
        yield f"stages.{name}.run is {stage.get('run')!r}, expected one of {', '.join(RUNS)}"
    if ("module" in stage) == ("modules" in stage):
        yield f"stages.{name} needs either `module` or `modules` (several rows of one test)"
    if "modules" in stage and stage.get("run") != "test":
        yield f"stages.{name}.modules: only a test stage can have several modules"
    yield from _split_problems(f"stages.{name}.split", stage)
    yield from _count_problems(f"stages.{name}.batch_size", stage.get("batch_size", 1))
    if stage.get("select") and "metric" not in stage["select"]:
        yield f"stages.{name}.select needs `metric`, for instance val/all/ndcg@10"
    yield from _trainer_problems(f"stages.{name}.trainer", stage.get("trainer") or {})
    yield from _launch_problems(f"stages.{name}.launch", stage.get("launch") or {})
    for argument, source in (stage.get("inputs") or {}).items():
        upstream = str(source).partition("/")[0]
        if is_place(source):
            continue
        if upstream not in stages or "/" not in str(source):
            expected = (
                "an earlier stage's file, for instance train/best.ckpt, or a file or folder of yours, which "
                "begins with /, ~ or ."
            )
            yield f"stages.{name}.inputs.{argument} is {source!r}, expected {expected}"
        elif str(source).partition("/")[2] not in (left := _left_by(upstream, stages[upstream])):
            run = stages[upstream].get("run", "fit")
            yield f"stages.{name}.inputs.{argument} is {source!r}, but a {run} leaves {' and '.join(left)}"


def _left_by(name: str, stage: Any) -> tuple[str, ...]:
    """Files of a finished stage that a later one may read: of a test the scores of each row."""
    if not isinstance(stage, dict) or stage.get("run") not in ("test", "predict"):
        return OUTPUTS
    if stage["run"] == "predict":
        return (PREDICTIONS,)
    return tuple(f"scores.{row}.parquet" for row in stage.get("modules") or (name,))


def _split_problems(where: str, node: dict[str, Any]) -> Iterator[str]:
    if node.get("split", SPLITS[0]) not in SPLITS:
        yield f"{where} is {node['split']!r}, expected one of {', '.join(SPLITS)}"


def _count_problems(where: str, count: Any, least: int = 1) -> Iterator[str]:
    if not isinstance(count, int) or isinstance(count, bool) or count < least:
        yield f"{where} is {count!r}, expected a whole number of at least {least}"


def _trainer_problems(where: str, trainer: dict[str, Any]) -> Iterator[str]:
    for key in trainer:
        if key not in TRAINER_KEYS:
            hint = nearest(key, TRAINER_KEYS) or "; devices and the like are set by `launch`"
            yield f"{where}: unknown key {key!r}{hint}"
    for key in ("max_epochs", "max_steps"):
        if trainer.get(key) == 0:
            yield f"{where}.{key} is 0: nothing would be trained (~stages.NAME leaves a stage out)"
