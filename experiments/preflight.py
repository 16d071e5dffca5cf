"""``make plan COST=1``: what each stage that is not done would take, from a few real steps of it.

TIME (as ``make slurm`` reads it) and MEMORY (GiB of a device; else this machine's) are what there is. The
steps run in a scratch folder that is deleted: nothing counts as done afterwards. No torch here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from datamodules.sources import cache_root
from datamodules.versioning import read_json, write_json
from experiments import artifacts, faults, report
from experiments.artifacts import PlannedStage
from experiments.config import Experiment
from experiments.errors import UserError
from experiments.messages import say
from experiments.slurm_time import seconds_of

COLUMNS = (
    "stage", "made from", "rows", "length 50/95/100 %", "cut", "steps", "time", "peak GiB",
    "checkpoint MiB", "device-hours",
)  # fmt: skip
BLOCKS = " ▁▂▃▄▅▆▇█"
Job = Callable[[Experiment, PlannedStage], dict[str, Any]]
Process = Callable[[str, list[str]], None]


def tell(experiment: Experiment, make_job: Job, in_process: Process) -> bool:
    """Print the table; whether everything fits.

    Args:
        experiment: composed.
        make_job: what ``stage.json`` says of a stage.
        in_process: runs one of our modules, see ``experiments.processes``.
    """
    limit, gib = limits(os.environ)
    stages = artifacts.plan(experiment, cache_root())
    if any(not stage.done for stage in stages):
        say(f"{experiment.name}: checking the configuration and the data ...")
        in_process("experiments.check", [experiment.name, *experiment.overrides])
        stages = artifacts.plan(experiment, cache_root())
    root = artifacts.runs_root()
    root.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".calibrating-", dir=root))
    try:
        found = dict(_estimates(experiment, stages, scratch, make_job, in_process))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    problems = [p for name, e in found.items() for p in _problems(name, e, gib)]
    total = sum(e["seconds"] for e in found.values() if "seconds" in e and not e.get("done"))
    if limit and total > limit:
        problems.append(
            f"all stages that are left take about {told_time(total)}, more than TIME={os.environ['TIME']}: "
            "give more, or let the job be requeued and go on"
        )
    _print(experiment, found, problems, total)
    return not problems


def limits(environment: Mapping[str, str]) -> tuple[int | None, float | None]:
    """Seconds of TIME, GiB of MEMORY; None where they are not given.

    Raises:
        UserError: one of them cannot be read.
    """
    asked, memory = environment.get("TIME", "").strip(), environment.get("MEMORY", "").strip()
    try:
        gib = float(memory) if memory else None
    except ValueError as error:
        raise UserError(
            f"MEMORY={memory!r}, expected GiB of a device, for instance MEMORY=24"
        ) from error
    return (seconds_of(asked) if asked else None), gib


def _estimates(
    experiment: Experiment,
    stages: list[PlannedStage],
    scratch: Path,
    make_job: Job,
    in_process: Process,
) -> Iterator[tuple[str, dict[str, Any]]]:
    stand_ins: dict[
        str, str
    ] = {}  # a file that an earlier stage has not made -> one of a few steps
    for number, stage in enumerate(stages, start=1):
        where = f"[{number}/{len(stages)}] {stage.name}"
        if stage.done and stage.folder:
            say(f"{where}: done")
            yield stage.name, _of_done(stage.folder)
            continue
        missing = [f for f in stage.inputs.values() if not Path(f).exists()]
        lacking = sorted({Path(f).parent.name for f in missing if f not in stand_ins})
        if lacking or stage.folder is None:
            say(f"{where}: not measured")
            what = f"what {', '.join(lacking)} makes is not there yet" if lacking else stage.why
            yield stage.name, {"failed": f"not measured: {what}", "unmeasured": True}
            continue
        say(f"{where}: a few steps ...")
        job = {**make_job(experiment, stage), "started": time.monotonic()}
        lower = faults.lower(job)
        job["inputs"] = {a: stand_ins.get(f, f) for a, f in stage.inputs.items()}
        devices = int(job["launch"]["devices"]) * int(job["launch"]["num_nodes"])
        job["launch"] = {
            **job["launch"],
            "devices": 1,
            "num_nodes": 1,
            "strategy": "auto",
            "compile": False,
        }
        fit = job["spec"]["run"] == "fit"
        # A fit's batch is that of all devices together, anything else's of each.
        job["spec"] = {
            **job["spec"],
            "batch_size": -(-job["spec"]["batch_size"] // devices)
            if fit
            else job["spec"]["batch_size"],
        }
        folder = scratch / stage.name
        found = {**_measured(folder, job, in_process), "lower": lower}
        if fit and (folder / "best.ckpt").is_file():
            stand_ins[str(stage.folder / "best.ckpt")] = str(folder / "best.ckpt")
            stand_ins[str(stage.folder / "last.ckpt")] = str(folder / "last.ckpt")
        yield stage.name, _scaled(found, stage, devices, bool(missing))


def _measured(folder: Path, job: dict[str, Any], in_process: Process) -> dict[str, Any]:
    write_json(folder / "stage.json", job)
    try:
        in_process("experiments.calibrate", [str(folder)])
    except UserError as error:
        return {"failed": str(error)}
    return read_json(folder / "estimate.json") or {"failed": "it left no estimate"}


def _scaled(
    found: dict[str, Any], stage: PlannedStage, devices: int, stands_in: bool
) -> dict[str, Any]:
    """Of all devices: a fit's global batches are as many on each; the rows of anything else are shared."""
    if "failed" in found:
        return found
    if devices > 1 and stage.spec["run"] != "fit":
        startup = found["startup"]
        found["seconds"] = startup + (found["seconds"] - startup) / devices
    gpu = "gpu" in found["peak_memory_mb"]
    basis = "stand-in inputs" if stands_in else "a few steps"
    return {**found, "devices": devices, "gpu": gpu, "basis": basis}


def _of_done(folder: Path) -> dict[str, Any]:
    done = read_json(folder / "done.json") or {}
    return {
        "done": True, "seconds": float(done.get("seconds", 0.0)), "basis": "its run",
        "devices": int(done.get("devices", 1)), "peak_memory_mb": done.get("peak_memory_mb", {}),
        "gpu": "gpu" in done.get("peak_memory_mb", {}),
    }  # fmt: skip


def _problems(name: str, found: dict[str, Any], gib: float | None) -> Iterator[str]:
    if "failed" in found:
        if not found.get("unmeasured"):
            yield f"{name}: {found['failed']}"
        return
    of = "gpu" if found["gpu"] else "host"
    there = (gib * 1024) if gib else _memory_here(found["gpu"])
    most = found["peak_memory_mb"].get(of)
    if most and there and most > there and not found.get("done"):
        yield (
            f"{name}: its longest step takes {most / 1024:.1f} GiB of a {of}'s {there / 1024:.1f}: "
            f"{'; '.join(found['lower'])}"
        )


def _memory_here(gpu: bool) -> float | None:
    """MiB of this machine, or of its first GPU."""
    if not gpu:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
    words = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30)
        return float(done.stdout.split()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def told_time(seconds: float) -> str:
    """``1:02:03``, with days where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}-" if days else "") + f"{hours}:{minutes:02d}:{rest:02d}"


def _print(
    experiment: Experiment, found: dict[str, dict[str, Any]], problems: list[str], total: float
) -> None:
    console = report.open_console()
    table = Table(title=experiment.name, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in COLUMNS[:2] else "right")
    for name, each in found.items():
        table.add_row(*(escape(cell) for cell in _cells(name, each)))
    console.print(table)
    for name, each in found.items():
        for loop, rows in (each.get("rows") or {}).items():
            if len(rows["counts"]) < 2:  # all alike
                continue
            what = "tokens" if each["tokens"] else "events"
            console.print(escape(f"{name}, {loop}: {what} {histogram(rows)}"), soft_wrap=True)
        for remark in each.get("remarks") or ():
            console.print(escape(f"{name}: {remark}"), soft_wrap=True)
        if each.get("unmeasured"):
            console.print(escape(f"{name}: {each['failed']}"), soft_wrap=True)
    without = any(each.get("unmeasured") for each in found.values())
    unknown = ", without what could not be measured" if without else ""
    console.print(
        f"about {told_time(total)} for what is left{unknown}. Time is of a few steps (patience may end a fit "
        "sooner; what devices say to each other is not in it), memory that of the longest step.",
        soft_wrap=True,
    )
    for problem in problems:
        console.print(f"[bold red]will not fit[/bold red] {escape(problem)}", soft_wrap=True)


def histogram(rows: dict[str, Any]) -> str:
    """``12 ▁▃█▂ 480``: how many rows are how long, from the shortest to the longest."""
    most = max(rows["counts"])
    bars = "".join(BLOCKS[-(-c * (len(BLOCKS) - 1) // most)] for c in rows["counts"])
    counts = ", ".join(
        f"{low}-{high - 1}: {count:,}"
        for low, high, count in zip(rows["edges"], rows["edges"][1:], rows["counts"], strict=False)
    )
    return f"{bars}  ({counts})"


def _cells(name: str, each: dict[str, Any]) -> Iterator[str]:
    yield name
    if "failed" in each:
        yield "not measured" if each.get("unmeasured") else "FAILED"
        yield from ["-"] * (len(COLUMNS) - 2)
        return
    yield "done" if each.get("done") else each["basis"]
    shown = each.get("rows") or {}
    rows = shown.get("train") or next(iter(shown.values()), None)
    yield "-" if rows is None else f"{rows['rows']:,}"
    yield "-" if rows is None else f"{rows['half']}/{rows['most']}/{rows['longest']}"
    yield "-" if rows is None or rows["cut"] is None else f"{rows['cut']:.1%}"
    steps = each.get("steps")
    most = "≤ " if each.get("at_most") else ""
    yield f"{most}{steps:,}" if steps else (f"{each['batches']:,}" if "batches" in each else "-")
    yield f"{most}{told_time(each['seconds'])}"
    peak = each["peak_memory_mb"].get("gpu" if each["gpu"] else "host")
    yield "-" if peak is None else f"{peak / 1024:.2f}"
    size = each.get("checkpoint_bytes")
    yield "-" if size is None else f"{size / 2**20:.1f}"
    hours = each["seconds"] * each["devices"] / 3600
    yield f"{most}{hours:.3f} {'GPU' if each['gpu'] else 'CPU'}"
