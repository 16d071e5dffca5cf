"""What a tested row cost: the whole chain of stages that it was made by, from their ``done.json`` files."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.versioning import read_json
from experiments.table_text import Value

HOURS = ("CPU-hours", "GPU-hours")
COLUMNS = (*HOURS, "users/s", "peak GiB", "peak GPU GiB")


@dataclass(frozen=True)
class Cost:
    """Of one seed; None where the folders do not say."""

    cpu_hours: float | None = None  # threads times hours
    gpu_hours: float | None = None  # devices times hours
    users_per_second: float | None = None  # of the test
    host_gib: float | None = None  # the most of any stage
    gpu_gib: float | None = None

    @property
    def cells(self) -> dict[str, float | None]:
        """As ``COLUMNS``."""
        told = (self.cpu_hours, self.gpu_hours, self.users_per_second, self.host_gib, self.gpu_gib)
        return dict(zip(COLUMNS, told, strict=True))


def chain(folder: Path) -> list[Path]:
    """A tested stage's folder and those of all stages that it took its inputs from, each once.

    Inputs are looked for beside the folder, so that runs which were moved are found as well.
    """
    found: dict[str, Path] = {}
    todo = [folder]
    while todo:
        here = todo.pop()
        if here.name in found:
            continue
        found[here.name] = here
        job = read_json(here / "stage.json") or {}
        beside = (here.with_name(Path(f).parent.name) for f in job.get("inputs", {}).values())
        todo += [f for f in beside if (f / "done.json").is_file()]
    return list(found.values())


def cost_of(scores: Path, shared: bool) -> Cost:
    """What the row of a scores file cost.

    Args:
        scores: ``scores.<row>.parquet`` of a tested stage's folder.
        shared: whether the stage tested several rows, so that its hours and memory are no one's.
    """
    row = scores.name.removeprefix("scores.").removesuffix(".parquet")
    done = read_json(scores.parent / "done.json") or {}
    speed = (done.get("throughput") or {}).get(row) or {}
    users = speed.get("users_per_second")
    if shared:
        return Cost(users_per_second=users)
    notes = [read_json(f / "done.json") or {} for f in chain(scores.parent)]
    hours = dict(_hours(notes))
    memory = [n.get("peak_memory_mb") or {} for n in notes]
    host, gpu = (
        max((m[k] / 1024 for m in memory if k in m), default=None) for k in ("host", "gpu")
    )
    return Cost(hours.get("cpu"), hours.get("gpu"), users, host, gpu)


def _hours(notes: Sequence[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """Kind of device and hours on it, where there are any."""
    spent: dict[str, float] = {}
    for note in notes:
        if "seconds" not in note or "device" not in note:
            continue
        threads = re.fullmatch(r"cpu, (\d+) threads", str(note["device"]))
        each = note["seconds"] / 3600 * note.get("devices", 1)
        kind = "cpu" if threads else "gpu"
        spent[kind] = spent.get(kind, 0.0) + each * (int(threads[1]) if threads else 1)
    yield from spent.items()


def cost_cells(files: Sequence[Path], shared: bool) -> dict[str, Value]:
    """The cells of a row, the mean over its seeds."""
    each = [cost_of(f, shared).cells for f in files]
    cells = {}
    for name in COLUMNS:
        told = [c[name] for c in each]
        values = [v for v in told if v is not None]
        mean = statistics.fmean(values) if values and len(values) == len(told) else None
        cells[name] = Value(mean, digits=-1)
    return cells
