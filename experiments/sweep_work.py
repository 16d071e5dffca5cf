"""Trials of a sweep at work: so many at once, each looked after until it has ended or was stopped."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from callbacks import stop_request
from callbacks.stop_request import Stopped
from experiments import baseline, config, messages, sweep_devices, sweep_report, sweep_space
from experiments.errors import UserError
from experiments.sweep_space import Space
from experiments.sweep_study import FOLDER, WHY, Asked, Study
from experiments.sweep_trial import Running, Target

POLL_SECONDS = 0.5
HOPELESS = 3  # trials that fail before any has ended well


@dataclass(frozen=True)
class Sweep:
    """What is swept, and where its trials lie."""

    experiment: config.Experiment
    space: Space
    aim: Target
    folder: Path
    total: int

    @property
    def gpus(self) -> int:
        """That one trial takes."""
        return sweep_devices.each_trial(self.experiment, self.aim.needs)

    def study(self) -> Study:
        """Its trials."""
        return Study(self.folder, self.space, self.total)


@dataclass
class Worker:
    """A place where a trial runs: its process, and what it was given."""

    asked: Asked
    running: Running
    pruned: bool = False


def work(sweep: Sweep, jobs: int, words: Sequence[str], only_one: bool = False) -> int:
    """Run trials until there are as many as asked for, and print their table.

    Args:
        sweep: whose trials.
        jobs: at once.
        words: more overrides, which change no result.
        only_one: the next trial alone.

    Raises:
        UserError: none of the first trials ended well.
        Stopped: we, or a trial, were asked to stop.
    """
    study = sweep.study()
    gpus = sweep_devices.visible(os.environ)
    jobs, fewer = sweep_devices.at_once(jobs, sweep.gpus, gpus)
    if fewer:
        messages.say(fewer)
    slots: dict[int, Worker] = {}
    begun, waiting = 0, False
    try:
        while True:
            while not (only_one and begun) and len(slots) < jobs and (asked := study.next()):
                slot = min(set(range(jobs)) - set(slots))
                given = sweep_devices.share(slot, jobs, sweep.gpus, gpus)
                slots[slot] = _start(sweep, asked, jobs, given, words)
                begun += 1
            if not slots and (only_one or not study.elsewhere()):
                break
            if not slots and not waiting:
                messages.say(f"waiting for {study.elsewhere()} trials that other processes run")
                waiting = True
            time.sleep(POLL_SECONDS)
            if stop_request.asked():
                raise Stopped
            for slot, worker in list(slots.items()):
                if how := _ended(sweep, study, worker):
                    del slots[slot]
                    _say(sweep, study, worker, how)
    except BaseException as error:
        _stop(
            study, slots.values(), signal.SIGUSR1 if isinstance(error, Stopped) else signal.SIGTERM
        )
        raise
    if only_one and not begun:
        messages.say(f"all {sweep.total} trials were begun already: there is nothing to do")
    return told(sweep, study)


def told(sweep: Sweep, study: Study | None = None) -> int:
    """Print the table of a sweep's trials and write it, and its plot, to the folder."""
    study = study or sweep.study()
    tried = study.tried()
    with study.alone():
        sweep_report.tell(sweep.folder, sweep.experiment, sweep.space, sweep.aim, tried)
    return 0 if any(t.value is not None for t in tried) else 2


def _start(
    sweep: Sweep, asked: Asked, jobs: int, devices: dict[str, str], words: Sequence[str]
) -> Worker:
    point = sweep_space.override_words(asked.point, sweep.space.axes)
    labels = sweep.space.labels()
    shown = " ".join(f"{labels[w.partition('=')[0]]}={w.partition('=')[2]}" for w in point)
    messages.say(f"trial {asked.place} of {sweep.total}: {shown}")
    given = [baseline.setting(o) for o in (*sweep.experiment.overrides, *words)]
    threads = max(1, _processors() // jobs)
    share = [f"launch.threads={threads}"] if jobs > 1 and "launch.threads" not in given else []
    overrides = [*sweep.experiment.overrides, *point, *sweep.aim.words, *words, *share]
    try:
        experiment = config.load(sweep.experiment.name, overrides)
        running = Running(experiment, sweep.aim, asked.folder, devices)
    except BaseException:
        asked.held.close()
        raise
    return Worker(asked, running)


def _processors() -> int:
    """Those that this process may use."""
    able = getattr(os, "sched_getaffinity", None)
    return len(able(0)) if able else os.cpu_count() or 1


def _ended(sweep: Sweep, study: Study, worker: Worker) -> str | None:
    """Look after a trial: report its validations, prune it, or note how it ended.

    Raises:
        UserError: the metric is never reported.
        Stopped: it was asked to stop by somebody else.
    """
    asked, running, space = worker.asked, worker.running, sweep.space
    how = running.ended()
    for epoch, read in running.read():
        asked.trial.report(read, epoch)
        if (
            how is None
            and not worker.pruned
            and space.pruner == "median"
            and asked.trial.should_prune()
        ):
            worker.pruned = True
            running.ask_to_stop(signal.SIGUSR1)
    if how is None:
        return None
    if how == "stopped" and not worker.pruned:
        raise Stopped
    notes = {FOLDER: str(folder)} if (folder := running.folder()) else {}
    value: float | None = None
    if how == "done":
        try:
            value = running.value()
        except UserError as error:
            how, notes[WHY] = "failed", str(error)
    elif how == "failed":
        notes[WHY] = running.why()
    how = "pruned" if how == "stopped" else how
    study.told(asked, how, running.seconds, value, **notes)
    return how


def _say(sweep: Sweep, study: Study, worker: Worker, how: str) -> None:
    """One line on a trial that has ended.

    Raises:
        UserError: none of the first trials ended well.
    """
    tried = study.tried()
    (one,) = (t for t in tried if t.place == worker.asked.place)
    seconds = f"{one.seconds:.0f} s"
    if how == "failed":
        messages.say(
            f"trial {one.place} failed after {seconds}: {one.why} ({messages.short(worker.running.log)})"
        )
        ends = [t for t in tried if t.state in ("done", "pruned", "failed")]
        if len(ends) >= HOPELESS and all(t.state == "failed" for t in ends):
            raise UserError(
                f"the first {len(ends)} trials have all failed, see above; nothing more is tried"
            )
        return
    best = sweep_report.best(tried, sweep.space)
    told = "-" if one.value is None else f"{one.value:.4f}"
    leads = (
        f" (best {best.value:.4f}, trial {best.place})" if best and best.value is not None else ""
    )
    after = f" after epoch {one.epochs}" if how == "pruned" else ""
    messages.say(f"trial {one.place} {how}{after} in {seconds}: {sweep.aim.metric} {told}{leads}")


def _stop(study: Study, workers: Iterable[Worker], number: signal.Signals) -> None:
    """Stop what runs, and queue it again."""
    for worker in workers:
        worker.running.ask_to_stop(number)
    for worker in workers:
        while (how := worker.running.ended()) is None:
            time.sleep(0.1)
        if how == "done":  # it came to its end before it was told to stop: its folder keeps that
            messages.say(
                f"trial {worker.asked.place} was done; the same command takes its value up"
            )
        study.told(worker.asked, "cut off", worker.running.seconds)
