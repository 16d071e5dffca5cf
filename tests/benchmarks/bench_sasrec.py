"""SASRec on MovieLens-100K, ours against RecTools', side by side in one run.

``make bench`` (after ``make bench-peers``) starts both as processes of their own, in turns: ours,
peer, ours, peer. Both learn from the very same training rows and are measured by the same lines
below: NDCG@10 of every user's last event, whole catalogue, seen films left out. The clock runs from
before the loaders are built and stands still while we measure, so neither pays for it.

Legend: R test rows, I items, N events.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
PEER_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
EXPERIMENT = "sasrec/movielens_100k"
TARGET = 0.075
PEER_EPOCHS = 100  # it stops at the target; this only ends a run that never gets there
K = 10


def ndcg_at_10(top: np.ndarray, target: np.ndarray) -> float:
    """Mean of 1 / log2(place + 1) over rows: ``top`` (R, 10) items, best first; ``target`` (R,)."""
    place = (top == target[:, None]) @ np.arange(1, K + 1)  # (R,) 0 where the target is not there
    return float(np.where(place > 0, 1 / np.log2(place.clip(1) + 1), 0).mean())


class Clock:
    """Seconds of training, and what was measured after which of them."""

    def __init__(self, measure: Callable[[], float], every: int, to_the_end: bool) -> None:
        self.measure, self.every, self.to_the_end = measure, every, to_the_end
        self.started = time.perf_counter()
        self.paused = 0.0
        self.trace: list[tuple[int, float, float]] = []  # epoch, seconds, NDCG@10
        self.first_epoch = 0.0  # seconds before the first epoch began: building, loading

    def seconds(self) -> float:
        """Training time so far."""
        return time.perf_counter() - self.started - self.paused

    def epoch_ends(self, epoch: int) -> bool:
        """Measure where it is due; true when the run has shown what it had to."""
        if epoch % self.every:
            return False
        now = time.perf_counter()
        self.trace.append((epoch, self.seconds(), self.measure()))
        self.paused += time.perf_counter() - now
        return self.trace[-1][2] >= TARGET and not self.to_the_end

    def report(self, epochs: int, seconds: float) -> dict[str, Any]:
        """What the driver prints, as plain values."""
        reached = next((t for t in self.trace if t[2] >= TARGET), None)
        per_epoch = (seconds - self.first_epoch) / max(1, epochs)
        return {
            "trace": self.trace, "per_epoch": per_epoch, "setup": self.first_epoch,
            "reached": reached, "best": max((t[2] for t in self.trace), default=0.0),
        }  # fmt: skip


def watcher(base: type[Any], clock: Clock) -> Any:
    """A Lightning callback, of whichever Lightning ``base`` is from, that runs ``clock``."""

    class Watch(base):  # type: ignore[misc]
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 0:
                clock.first_epoch = clock.seconds()

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            trainer.should_stop = clock.epoch_ends(trainer.current_epoch + 1)
            module.train()

    return Watch()


def export(folder: Path, options: list[str]) -> Path:
    """Write the split as arrays that need no library of ours to be read."""
    from datamodules.types import TEST, TRAIN, VALID

    data = fit_parts(options)[0]
    histories, rows = data.histories, data.rows(TEST)
    order = np.arange(len(histories.items)) - histories.offsets[histories.users]  # place in time
    file = folder / "rows.npz"
    np.savez(
        file,
        user=histories.users, item=histories.items, order=order,
        train=histories.split == TRAIN, known=np.isin(histories.split, [TRAIN, VALID]),
        test_user=rows.user, test_item=rows.target,
    )  # fmt: skip
    return file


def fit_parts(options: list[str]) -> tuple[Any, dict[str, Any]]:
    """Data module and fit stage of the shipped experiment, with overrides as in make exp."""
    from experiments import artifacts, build, config

    experiment = config.load(EXPERIMENT, options)
    spec = artifacts.stage_spec(experiment, "train")
    data = build.build(spec["data"])
    data.batch_size, data.seed = spec["batch_size"], spec["seed"]
    return data, spec


def run_ours(
    rows: dict[str, np.ndarray], every: int, to_the_end: bool, threads: int, options: list[str]
) -> dict[str, Any]:
    """The fit stage of the shipped experiment, without validation: the peer does none either."""
    import lightning.pytorch as pl
    import torch

    from datamodules.types import TEST, Rows
    from experiments import build

    torch.set_num_threads(threads)
    data, spec = fit_parts(options)
    histories, test = data.histories, data.rows(TEST)
    pl.seed_everything(spec["seed"], verbose=False)
    torch.utils.deterministic.fill_uninitialized_memory = False  # as experiments/stage.py sets it
    seen = torch.zeros(histories.num_users + 1, histories.num_items + 1, dtype=torch.bool)
    seen[rows["user"][rows["known"]], rows["item"][rows["known"]]] = True
    seen[:, 0] = True  # padding

    @torch.no_grad()
    def measure() -> float:
        number = np.arange(len(test.user))
        asked = Rows(
            histories, number, test.user, histories.offsets[test.user], test.position, 0, 0
        )
        batch = module.eval().collator(training=False)(asked)
        scores = module.user_vectors(batch) @ module.item_vectors().T  # (R, I + 1)
        scores[seen[test.user]] = -torch.inf
        return ndcg_at_10(scores.topk(K).indices.numpy(), test.target)

    clock = Clock(measure, every, to_the_end)
    node = next(iter(spec["modules"].values()))
    module = build.build(node, **build.runtime_arguments(node["_target_"], data))
    trainer = pl.Trainer(
        **spec["trainer"], accelerator="cpu", devices=1, logger=False, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        use_distributed_sampler=False, callbacks=[watcher(pl.Callback, clock)],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return clock.report(trainer.current_epoch, clock.seconds())


def run_peer(
    rows: dict[str, np.ndarray], every: int, to_the_end: bool, threads: int
) -> dict[str, Any]:
    """RecTools' SASRec: 2 blocks, width 64, 50 events, softmax loss, the rest as it comes."""
    import pandas as pd
    import torch
    from pytorch_lightning import Callback, Trainer
    from rectools import Columns
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel

    torch.set_num_threads(threads)

    def dataset(chosen: np.ndarray) -> Dataset:
        frame = pd.DataFrame(
            {
                Columns.User: rows["user"][chosen],
                Columns.Item: rows["item"][chosen],
                Columns.Weight: 1.0,
                Columns.Datetime: pd.to_datetime(rows["order"][chosen], unit="s"),
            }
        )
        return Dataset.construct(frame)

    train, known = dataset(rows["train"]), dataset(rows["known"])

    def measure() -> float:
        model.is_fitted = True
        found = model.recommend(rows["test_user"], known, k=K, filter_viewed=True)
        top = np.zeros((int(rows["user"].max()) + 1, K), np.int64)
        top[found[Columns.User], found[Columns.Rank] - 1] = found[Columns.Item]
        return ndcg_at_10(top[rows["test_user"]], rows["test_item"])

    def trainer() -> Trainer:
        return Trainer(
            max_epochs=PEER_EPOCHS, accelerator="cpu", devices=1, logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            callbacks=[watcher(Callback, clock)],
        )  # fmt: skip

    clock = Clock(measure, every, to_the_end)
    model = SASRecModel(
        n_blocks=2, n_factors=64, session_max_len=50, loss="softmax", batch_size=128, lr=1e-3,
        get_trainer_func=trainer, recommend_torch_device="cpu",
    )  # fmt: skip
    model.fit(train)
    return clock.report(model.fit_trainer.current_epoch, clock.seconds())


def one_run(side: str, file: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Start one side as a process of its own and read what it reports on its last line."""
    python = sys.executable if side == "ours" else str(arguments.peer_python)
    words = [python, __file__, "--side", side, "--rows", str(file)]
    words += ["--every", str(arguments.every), "--threads", str(arguments.threads)]
    words += ["--to-the-end"] * arguments.to_the_end + arguments.options
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    environment.setdefault("GOMP_SPINCOUNT", "1000")  # as experiments/run.py; for both sides
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed with status {done.returncode}:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def row(side: str, result: dict[str, Any]) -> str:
    """One line of the table."""
    reached = result["reached"]
    when = f"{reached[1]:6.1f} s (epoch {reached[0]})" if reached else "not reached"
    return (
        f"{side:>5}  {result['per_epoch']:6.2f} s/epoch  setup {result['setup']:5.2f} s  "
        f"NDCG@10 {TARGET}: {when}  best {result['best']:.4f}"
    )


def compare(arguments: argparse.Namespace) -> None:
    """Ours and the peer's, in turns, so that whatever else the machine does hits both alike."""
    if not Path(arguments.peer_python).exists():
        raise SystemExit(f"{arguments.peer_python} is missing: run make bench-peers first.")
    sides: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    with tempfile.TemporaryDirectory() as folder:
        file = export(Path(folder), arguments.options)
        for _ in range(arguments.rounds):
            for side, results in sides.items():
                results.append(one_run(side, file, arguments))
                print(row(side, results[-1]), flush=True)
    times = {s: [r["reached"][1] for r in results if r["reached"]] for s, results in sides.items()}
    epochs = {s: min(r["per_epoch"] for r in results) for s, results in sides.items()}
    print(f"an epoch: peer / ours = {epochs['peer'] / epochs['ours']:.1f}")
    if times["ours"] and times["peer"]:
        ratio = float(np.median(times["peer"]) / np.median(times["ours"]))
        print(f"time to NDCG@10 {TARGET}: peer / ours = {ratio:.1f}")


def parse(argv: list[str]) -> argparse.Namespace:
    """Command line; what is left over are overrides of the experiment (``data.root=...``)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=2, help="turns of ours and peer")
    parser.add_argument("--every", type=int, default=1, help="epochs between measurements")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--to-the-end", action="store_true", help="do not stop at the target")
    parser.add_argument("--peer-python", type=Path, default=PEER_PYTHON)
    parser.add_argument("--side", choices=["ours", "peer"], help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("options", nargs="*", help="overrides of the experiment, key=value")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Compare, or be one side of a comparison."""
    arguments = parse(argv)
    sys.path.insert(0, str(ROOT))  # a script's own folder is there, the checkout is not
    if arguments.side is None:
        compare(arguments)
        return
    rows = dict(np.load(arguments.rows))
    how = (rows, arguments.every, arguments.to_the_end, arguments.threads)
    result = run_ours(*how, arguments.options) if arguments.side == "ours" else run_peer(*how)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
