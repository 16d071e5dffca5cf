"""Full ranking of a synthetic catalogue: speed, share of the matrix product's peak, and memory.

``python tests/benchmarks/bench_evaluation.py`` writes 200,000 users and 1,000,000 items into a temporary
folder as prepared data, and lets Lightning validate and test an untrained SASRec (width 64) on them: the
very loaders, steps, metrics and scores files that experiments use. Without ``--full`` only some batches
are run and the seconds of all users are extrapolated, which the output says. The peak is measured in the
same process, just before: a product (rows, 64) x (64, 16,384), the best of several.

Legend: U users, I items, N events, B rows of a batch.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 64
BLOCK = 16_384
MiB = 2**20


def memory(name: str) -> float:
    """MiB of this process: ``VmRSS`` now, ``VmHWM`` at most."""
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss would count the process that started this one as well
        line = next(x for x in status.read_text().splitlines() if x.startswith(name))
        return int(line.split()[1]) / 1024
    unit = MiB if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def write_data(folder: Path, users: int, items: int, events: int, seed: int = 0) -> None:
    """Prepared data: histories of ``events`` / 2 to 3 / 2 ``events`` uniform items, leave-one-out."""
    import polars as pl

    from datamodules.prepared import store
    from datamodules.types import TEST, TRAIN, VALID, Histories

    draw = np.random.default_rng(seed)
    counts = draw.integers(max(3, events // 2), events + events // 2 + 3, users)
    offsets = np.concatenate([[0, 0], np.cumsum(counts)])  # (U + 2,)
    total = int(offsets[-1])
    bought = draw.integers(1, items + 1, total, dtype=np.int32)  # (N,)
    split = np.full(total, TRAIN, np.int8)
    tables = {}
    for name, code, back in (("valid", VALID, 2), ("test", TEST, 1)):
        place = offsets[2:] - back
        split[place] = code
        target = bought[place].astype(np.int64)
        columns = {
            "user": np.arange(1, users + 1), "position": place, "target": target,
            "weight": np.ones(users), "all": np.ones(users, bool), "cold_item": target % 3 == 0,
        }  # fmt: skip
        tables[name] = pl.DataFrame(columns)
    zeros = np.zeros(total, np.int64)
    histories = Histories(offsets, bought, split, zeros, items, np.ones(total, np.float32))
    names = pl.DataFrame({"item_id": [f"B{i:09d}" for i in range(1, items + 1)]})
    people = pl.DataFrame({"user_id": [f"A{u:012d}" for u in range(1, users + 1)]})
    store(folder, histories, names, people, tables, {"counts": {"items": items}})


def data_module(folder: Path, batch_size: int) -> Any:
    """The data module of experiments, over a folder that is prepared already."""
    from datamodules.base import SequenceDataModule
    from datamodules.prepared import Prepared
    from datamodules.types import RawData

    class Synthetic(SequenceDataModule):
        def load_raw(self) -> RawData:
            raise NotImplementedError("the folder is prepared already")

        def asked(self) -> dict[str, Any]:
            return {}

    data = Synthetic("synthetic")
    data._prepared, data.batch_size = Prepared(folder), batch_size
    return data


def peak_flops(rows: int) -> float:
    """FLOP/s of the fastest of ten products (rows, 64) x (64, 16,384)."""
    import torch

    users, items = torch.rand(rows, WIDTH), torch.rand(BLOCK, WIDTH)
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        users @ items.T
        seconds.append(time.perf_counter() - began)
    return 2 * rows * WIDTH * BLOCK / min(seconds)


def run_pass(
    module: Any, data: Any, test: bool, batches: int | None, folder: Path
) -> dict[str, Any]:
    """Validate or test; seconds and memory are taken at the end of each batch."""
    import lightning.pytorch as pl

    from callbacks.scores import ScoresWriter

    ends: list[tuple[float, float]] = []  # seconds, MiB

    class Watch(pl.Callback):
        def on_validation_batch_end(self, *unused: Any) -> None:
            ends.append((time.perf_counter(), memory("VmRSS")))

        def on_test_batch_end(self, *unused: Any) -> None:
            self.on_validation_batch_end()

    limit: float | int = 1.0 if batches is None else batches
    callbacks = [Watch(), *([ScoresWriter(folder / "scores.parquet")] if test else [])]
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, use_distributed_sampler=False,
        limit_val_batches=limit, limit_test_batches=limit, callbacks=callbacks,
        default_root_dir=folder,
    )  # fmt: skip
    began = time.perf_counter()
    (trainer.test if test else trainer.validate)(module, datamodule=data, verbose=False)
    whole = time.perf_counter() - began
    # The first batch pays for threads and buffers; the pass around the batches is small and fixed.
    steady = (ends[-1][0] - ends[0][0]) / (len(ends) - 1)
    return {
        "batches": len(ends), "seconds": whole, "seconds_a_batch": steady,
        "grown_mib": ends[-1][1] - ends[len(ends) // 2][1], "peak_mib": memory("VmHWM"),
    }  # fmt: skip


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both passes on one synthetic data set."""
    import torch

    from lightning_modules.sasrec import SASRecModule

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    write_data(folder, arguments.users, arguments.items, arguments.events)
    data = data_module(folder, arguments.batch_size)
    module = SASRecModule(arguments.items, hidden_size=WIDTH, num_blocks=1, block_size=BLOCK)
    batches = None if arguments.full else arguments.batches
    found: dict[str, Any] = {"peak_flops": peak_flops(arguments.batch_size)}
    for name in arguments.passes:
        found[name] = run_pass(module, data, name == "test", batches, folder)
    return found


def line(name: str, found: dict[str, Any], peak: float, arguments: argparse.Namespace) -> str:
    """What one pass came to."""
    rows = min(arguments.batch_size, arguments.users)
    flops = 2 * rows * WIDTH * arguments.items / found["seconds_a_batch"]
    every = -(-arguments.users // arguments.batch_size)
    if found["batches"] == every:
        whole = f"all users {found['seconds']:.1f} s"
    else:
        seconds = every * found["seconds_a_batch"]
        whole = (
            f"all users {seconds:.0f} s (EXTRAPOLATED from {found['batches']} of {every} batches)"
        )
    return (
        f"{name:>8}  {1000 * found['seconds_a_batch'] / rows:7.3f} ms/user  {flops / 1e9:6.1f} GFLOP/s = "
        f"{flops / peak:4.0%} of the product's {peak / 1e9:.0f}  {whole}  "
        f"peak {found['peak_mib'] / 1024:.2f} GiB  second half grew by {found['grown_mib']:.0f} MiB"
    )


def parse(argv: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else "")
    parser.add_argument("--users", type=int, default=200_000)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--events", type=int, default=25, help="events of a user, on average")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--batches", type=int, default=20, help="batches of a pass, unless --full")
    parser.add_argument("--full", action="store_true", help="run every user")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true", help="print plain values on one line")
    parser.add_argument("--passes", nargs="+", default=["validate", "test"])
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Measure and print."""
    arguments = parse(argv)
    sys.path.insert(0, str(ROOT))  # a script's own folder is there, the checkout is not
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments, Path(folder))
    if arguments.json:
        print(json.dumps(found))
        return
    print(
        f"{arguments.users:,} users x {arguments.items:,} items, width {WIDTH}, "
        f"{arguments.threads} threads"
    )
    for name in arguments.passes:
        print(line(name, found[name], found["peak_flops"], arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
