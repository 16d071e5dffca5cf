"""One stage in one process: data -> module -> trainer -> outputs.

``python -m experiments.stage FOLDER`` reads ``FOLDER/stage.json``, which ``experiments.run`` wrote. Under
DDP Lightning, or srun, starts this command again for every further rank; the driver alone holds the lock.
"""

from __future__ import annotations

import os
import signal

from callbacks import stop_request
from experiments import launchers

SIGNALS = launchers.stopping_signals(os.environ)
if __name__ == "__main__":  # before the slow imports
    stop_request.listen(*SIGNALS)
    stop_request.listen_to_interrupts()

import logging
import math
import sys
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks.checkpoints import BEFORE, LAST, Patience, checkpoints, unreadable
from callbacks.generations import GenerationsLog
from callbacks.nonfinite import NonFinite, NonFiniteError
from callbacks.progress import RunProgress
from callbacks.samples import Samples
from callbacks.scores import ScoresWriter
from callbacks.throughput import Throughput
from datamodules.base import SequenceDataModule
from datamodules.errors import DataFormatError, DataSourceError
from datamodules.sources import cache_root
from datamodules.stage_data import StageDataModule
from datamodules.types import TEST, VALID
from datamodules.versioning import read_json, write_json
from experiments import build, faults, tracking
from experiments.errors import UserError
from experiments.frame import PREDICTIONS
from experiments.messages import print_error, say
from experiments.records import Outcome, finish, peak_memory, protocol_of
from experiments.shown_images import READER
from experiments.trainers import make_trainer
from lightning_modules.base import RankingModule
from lightning_modules.calibration import Calibration
from lightning_modules.errors import ModelError
from lightning_modules.predicting import PredictingModule
from lightning_modules.stage_module import StageModule


def run_stage(folder: Path) -> None:
    """Carry out the stage that ``folder/stage.json`` describes; ``done.json`` is written last."""
    job = read_json(folder / "stage.json")
    if job is None:
        raise UserError(f"{folder} has no readable stage.json: start it with make exp NAME=...")
    started = time.monotonic()  # the day's clock may be set back
    spec, launch = job["spec"], job["launch"]
    torch.set_num_threads(launch["threads"] or os.cpu_count() or 1)
    pl.seed_everything(spec["seed"], verbose=False)
    # Filling every new tensor with NaN is a debugging aid of deterministic mode; it costs, and hides nothing.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    data = build_data(job)
    if spec["run"] == "fit":
        outcome = _fit(folder, job, data)
    elif spec["run"] == "test":
        outcome = _test(folder, job, data)
    else:
        outcome = _predict(folder, job, data)
    if outcome.trainer.is_global_zero:
        finish(folder, job, outcome, time.monotonic() - started)


def build_data(job: dict[str, Any]) -> StageDataModule:
    """The data module that a stage is told of."""
    data: StageDataModule = build.build(job["spec"]["data"])
    data.batch_size = job["spec"]["batch_size"]
    data.num_workers = job["launch"]["num_workers"]
    data.seed = job["spec"]["seed"]
    data.test_code = VALID if job["spec"].get("split") == "valid" else TEST
    return data


def build_module(node: dict[str, Any], job: dict[str, Any], data: StageDataModule) -> StageModule:
    """Build a module from its config, the data's facts and the earlier stages' files."""
    for file in map(Path, job["inputs"].values()):
        if file.suffix == ".ckpt":
            _require_readable(file)
    module: StageModule = build.build_on(node, data, **job["inputs"])
    return module


def _fit(folder: Path, job: dict[str, Any], data: StageDataModule) -> Outcome:
    spec = job["spec"]
    module = build_module(next(iter(spec["modules"].values())), job, data)
    _require_possible(module, data)
    try:
        if job["launch"].get("compile"):
            module.compile_training()
        if job["launch"].get("activation_checkpointing"):
            module.checkpoint_activations()
    except ValueError as error:
        raise UserError(str(error)) from error
    select = spec["select"] or {}
    metric, mode = select.get("metric"), select.get("mode", "max")
    best, last = checkpoints(folder, metric, mode)
    callbacks: list[pl.Callback] = [best, last]
    if metric and select.get("patience") is not None:
        callbacks.append(Patience(metric, patience=select["patience"], mode=mode))
    progress = RunProgress(job["label"], metric, mode)
    speed = Throughput()
    callbacks += [progress, speed, NonFinite(folder), _samples(folder, job, job["stage"])]
    trainer = make_trainer(folder, job, data, module, callbacks)
    if reason := module.untrainable(trainer):
        raise UserError(reason)
    resume = _resumed_from(folder)
    ckpt_path = str(resume) if resume else None
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    if not (folder / "best.ckpt").is_file():
        raise UserError(f"no epoch was selected: {metric} was never a number; see the csv log")
    score = None if best.best_model_score is None else {metric: float(best.best_model_score)}
    _tell(trainer, module, speed)
    tracking.record(trainer, folder, job, data, job["stage"], speed.summary())
    results = {"selected": score, "epochs": trainer.current_epoch}
    return Outcome(trainer, results, speed.summary())


def _samples(folder: Path, job: dict[str, Any], name: str) -> Samples:
    """With pictures, where the stage's code can show any."""
    return Samples(folder, name, READER in job["sources"])


def _tell(trainer: pl.Trainer, module: StageModule, speed: Throughput) -> None:
    """What a user should know besides the metrics; of a stage that goes on after a kill, of its last part."""
    if trainer.is_global_zero:
        told = speed.told()
        peak = ", ".join(f"{most:,} MiB of the {of}" for of, most in peak_memory().items())
        for line in (*([told, f"peak memory: {peak}"] if told else []), *module.remarks()):
            say(f"  {line}")


def _impossible(module: StageModule, data: StageDataModule) -> str | None:
    """Why a method that reads histories means nothing on these."""
    if isinstance(module, RankingModule) and isinstance(data, SequenceDataModule):
        return module.impossible(data.histories)
    return None


def _require_possible(module: StageModule, data: StageDataModule) -> None:
    if reason := _impossible(module, data):
        raise UserError(f"{type(module).__name__} cannot be run on {data.name}: {reason}")


def _require_readable(checkpoint: Path) -> None:
    if reason := unreadable(checkpoint):
        raise UserError(
            f"{checkpoint} cannot be read ({reason}): delete it, and done.json beside it, and the same "
            "command trains anew"
        )


def _resumed_from(folder: Path) -> Path | None:
    """The newest checkpoint of a fit that was cut off; where it is damaged, the one before."""
    last, before = folder / LAST, folder / BEFORE
    if not last.is_file():
        return None
    reason = unreadable(last)
    if reason and before.is_file() and not unreadable(before):
        say(f"  {last} cannot be read ({reason}): going on from the one before, {before.name}")
        return before
    _require_readable(last)
    return last


def _test(folder: Path, job: dict[str, Any], data: StageDataModule) -> Outcome:
    """Test each row; rows share the data and the loader's batches.

    Of several rows those that mean nothing on the data are left out, and the reason is kept.
    """
    rows: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    speeds: dict[str, dict[str, float]] = {}
    several = len(job["spec"]["modules"]) > 1
    for name, node in job["spec"]["modules"].items():
        module = build_module(node, job, data)
        assert isinstance(module, RankingModule)  # experiments.check has refused others
        if several and (reason := _impossible(module, data)):
            left_out[name] = reason
            continue
        _require_possible(module, data)
        progress = RunProgress(f"{job['label']} {name}" if several else job["label"], None)
        writer = ScoresWriter(folder / f"scores.{name}.parquet")
        row = name if several else ""
        speed = Throughput()
        callbacks: list[pl.Callback] = [writer, progress, speed, _samples(folder, job, name)]
        if module.generations is not None:
            callbacks.append(GenerationsLog(folder, name))
        trainer = make_trainer(folder, job, data, module, callbacks, row)
        trainer.test(module, datamodule=data, verbose=False)
        _tell(trainer, module, speed)
        speeds[name] = speed.summary()
        calibration = module.label_metrics.get("all")
        if isinstance(calibration, Calibration) and trainer.is_global_zero:
            write_json(folder / f"reliability.{name}.json", calibration.curve)
        tracking.record(trainer, folder, job, data, name, speed.summary(), module.results)
        rows[name] = {
            metric: {"value": _or_null(value), "stderr": _or_null(error)}
            for metric, (value, error) in module.results.items()
        }
    protocol, fingerprint = protocol_of(data, job["spec"]["trainer"])
    if trainer.is_global_zero:
        metrics = {"fingerprint": fingerprint, "protocol": protocol, "rows": rows}
        metrics |= {"left_out": left_out} if left_out else {}
        write_json(folder / "metrics.json", metrics)
    return Outcome(trainer, {"fingerprint": fingerprint}, speeds)


def _predict(folder: Path, job: dict[str, Any], data: StageDataModule) -> Outcome:
    """Go through the module's things, and keep its table for later stages."""
    module = build_module(next(iter(job["spec"]["modules"].values())), job, data)
    assert isinstance(module, PredictingModule)  # experiments.check has refused others
    callbacks: list[pl.Callback] = [
        RunProgress(job["label"], None),
        _samples(folder, job, job["stage"]),
    ]
    if module.generations is not None:
        callbacks.append(GenerationsLog(folder, job["stage"], cache_root() / "generations"))
    trainer = make_trainer(folder, job, data, module, callbacks)
    trainer.predict(module, datamodule=data, return_predictions=False)
    if trainer.is_global_zero:
        part = folder / ".predictions.parquet.part"
        module.table().write_parquet(part)
        part.replace(folder / PREDICTIONS)
    _tell(trainer, module, Throughput())
    tracking.record(trainer, folder, job, data, job["stage"], {})
    return Outcome(trainer, {}, {})


def _or_null(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def _die_with_driver() -> None:
    """Stop when the driver is gone (killed): an orphan must not write into a folder that others take."""
    # Lightning's further ranks are children of rank 0, not of the driver.
    further = "LOCAL_RANK" in os.environ
    driver = str(os.getppid()) if further else os.environ.get("LLMREC_DRIVER")

    def watch() -> None:
        while str(os.getppid()) == driver:
            time.sleep(0.2)
        os._exit(75)

    if driver:
        threading.Thread(target=watch, daemon=True).start()


def quiet() -> None:
    """Leave the terminal to the bar and to what matters: Lightning's greetings say nothing new."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It asks for a package that would run code of a model hub; our layers compute without.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*recommended to use `self.log.*sync_dist.*")
    warnings.filterwarnings("ignore", message=".*is smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*predict returned None.*")
    # Frozen language models are meant to be in eval mode; transformers asks itself under an old name.
    warnings.filterwarnings("ignore", message=".*module.s. in eval mode at the start of training.*")
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated.*")
    # Our samplers go on behind the last batch of a checkpoint, and srun is for what make slurm starts.
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
    warnings.filterwarnings("ignore", message=".*The `srun` command is available.*")
    # Epochs without a validation; a metric that never comes is an error of its own at the end of the fit.
    warnings.filterwarnings("ignore", message=".*could not find the monitored key.*")


def _stopped(folder: Path) -> int:
    """Leave the mark that this process stopped because it was asked to; the exit status."""
    (folder / stop_request.MARK).touch()
    return stop_request.STATUS


def _refused(folder: Path, error: Exception) -> int:
    """Tell what is wrong; the mark says that it was told, whatever becomes of the other processes."""
    print_error(error)
    if "LOCAL_RANK" in os.environ or launchers.is_task(os.environ):
        with suppress(OSError):
            (folder / launchers.REFUSED).touch()
    return 2


def main(argv: list[str]) -> int:
    """Exit status: 0 done, 2 a problem the user can mend, 75 stopped as asked, 130 stopped by a signal."""
    if signal.SIGTERM not in SIGNALS:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends at once: resumable
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # too large a file is an error like any other
    _die_with_driver()
    quiet()
    folder = Path(argv[0])
    try:
        if stop_request.asked():  # while it imported
            return _stopped(folder)
        run_stage(folder)
    except (UserError, DataSourceError, DataFormatError, ModelError, NonFiniteError) as error:
        return _refused(folder, error)
    except (KeyboardInterrupt, SystemExit, SIGTERMException):  # Lightning turns Ctrl-C into an exit
        return 130
    except stop_request.Stopped:
        return _stopped(folder)
    except Exception as error:
        if stop_request.asked():
            # Left alone by a rank that has stopped already, this one's next exchange fails somehow.
            say(f"stopped as asked, by {type(error).__name__}: {error}")
            return _stopped(folder)
        if (told := faults.explained(error, folder, read_json(folder / "stage.json"))) is None:
            raise
        refusal = UserError(told)
        refusal.__cause__ = error  # for LLMREC_TRACEBACK=1
        return _refused(folder, refusal)
    finally:  # the interpreter's end would make the signal deadly again
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
