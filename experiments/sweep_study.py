"""A sweep's trials in its folder: what was tried, what runs, what comes next; many processes may ask.

Optuna keeps them in ``trials.journal``, one line an event, so that a kill loses nothing. Whoever runs a
trial holds the lock of its folder; a running trial that nobody holds was killed, and is queued again with its
values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from datamodules.versioning import value_digest
from experiments import lock
from experiments.errors import UserError
from experiments.sweep_space import Choices, Range, Space

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial, Trial

STUDY = "sweep"
JOURNAL = "trials.journal"
# What we note beside a trial: its number among those that count, seconds, the folder of its stage, why it
# ended badly, and whether another took its place.
PLACE, SECONDS, FOLDER, WHY, REPLACED = "place", "seconds", "folder", "why", "replaced"
BEFORE_TPE = 10  # trials drawn at random before TPE has something to learn from


@dataclass(frozen=True)
class Tried:
    """A trial as the storage has it."""

    place: int
    point: dict[str, Any]
    state: str  # done, pruned, failed, running or waiting
    value: float | None
    seconds: float | None
    folder: str | None
    why: str
    epochs: int  # of which validation was read


@dataclass
class Asked:
    """A trial that this process is to run; its folder's lock is held until it is told."""

    trial: Trial
    place: int
    point: dict[str, Any]
    folder: Path
    held: ExitStack = field(repr=False)


def require_optuna() -> Any:
    """The package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            "a sweep needs the package optuna: .venv/bin/python -m pip install -c constraints.txt "
            "-e '.[sweep]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


class Study:
    """The trials of one sweep.

    Args:
        folder: of the sweep.
        space: what is tried.
        total: how many trials there are to be.
    """

    def __init__(self, folder: Path, space: Space, total: int) -> None:
        optuna = require_optuna()
        self.folder, self.space, self.total = folder, space, total
        journal = folder / JOURNAL
        own = optuna.storages.journal.JournalFileSymlinkLock(str(journal))
        _mend(journal, own)
        backend = optuna.storages.journal.JournalFileBackend(str(journal), lock_obj=own)
        self._storage = optuna.storages.JournalStorage(backend)
        pruner = optuna.pruners.NopPruner()
        if space.pruner == "median":
            pruner = optuna.pruners.MedianPruner(space.startup, n_warmup_steps=space.warmup + 1)
        self._study = optuna.create_study(
            study_name=STUDY, storage=self._storage, load_if_exists=True, pruner=pruner,
            sampler=_seeded(space.seed), direction=f"{space.mode}imize",
        )  # fmt: skip
        self._axes: dict[str, BaseDistribution] = {a.key: _distribution(a) for a in space.axes}

    def tried(self) -> list[Tried]:
        """Every trial that counts, by place; one that was cut off is the one that took its place."""
        return sorted(map(_told, self._counting()), key=lambda t: t.place)

    def missing(self) -> int:
        """How many trials are still to be started, those that were cut off among them."""
        begun = [t for t in self._counting() if t.state.name != "WAITING" and not self._cut_off(t)]
        return max(0, self.total - len(begun))

    def next(self) -> Asked | None:
        """The next trial to run, None when as many as asked for were begun."""
        with self.alone():
            self._requeue_dead()
            counting = self._counting()
            if not any(t.state.name == "WAITING" for t in counting):
                if len(counting) >= self.total:
                    return None
                point = self._untried(counting) if self.space.sampler == "grid" else {}
                self._study.enqueue_trial(point, user_attrs={PLACE: len(counting)})
            trial = self._study.ask(self._axes)
            place = int(trial.user_attrs[PLACE])
            folder = self.folder / "trials" / f"{place:03d}"
            held = ExitStack()
            held.enter_context(lock.hold(folder))
            return Asked(trial, place, dict(trial.params), folder, held)

    def elsewhere(self) -> int:
        """How many trials run in other processes (or are to be run again, where those have died)."""
        return sum(t.state.name in ("RUNNING", "WAITING") for t in self._counting())

    def told(
        self, asked: Asked, state: str, seconds: float, value: float | None = None, **notes: str
    ) -> None:
        """Note how a trial ended: done, pruned, failed, or cut off, which queues it again."""
        from optuna.trial import TrialState

        states = {"done": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
        asked.trial.set_user_attr(SECONDS, round(seconds, 2))
        for name, note in notes.items():
            asked.trial.set_user_attr(name, note)
        with self.alone():
            if state == "cut off":
                self._replace(asked.trial.number)
            elif state == "failed":
                self._study.tell(asked.trial.number, state=TrialState.FAIL)
            else:
                self._study.tell(asked.trial.number, value, state=states[state])
            asked.held.close()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process asks, tells or writes tables meanwhile."""
        with FileLock(self.folder / ".asking.lock"):
            yield

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _counting(self) -> list[FrozenTrial]:
        return [t for t in self._trials() if not t.user_attrs.get(REPLACED)]

    def _cut_off(self, trial: FrozenTrial) -> bool:
        folder = self.folder / "trials" / f"{int(trial.user_attrs[PLACE]):03d}"
        return trial.state.name == "RUNNING" and lock.holder(folder) is None

    def _requeue_dead(self) -> None:
        for trial in self._counting():
            if self._cut_off(trial):
                self._replace(trial.number)

    def _replace(self, number: int) -> None:
        """Fail a trial that did not come to its end, and queue its values again at its place.

        The new one is queued first, so that a kill in between loses no place.
        """
        from optuna.trial import TrialState

        trial = self._trials()[number]
        place = {PLACE: trial.user_attrs[PLACE]}
        if not any(
            t.number != number and place.items() <= t.user_attrs.items() for t in self._counting()
        ):
            self._study.enqueue_trial(trial.params, user_attrs=place)
        study_id = self._storage.get_study_id_from_name(STUDY)
        trial_id = self._storage.get_trial_id_from_study_id_trial_number(study_id, number)
        self._storage.set_trial_user_attr(trial_id, REPLACED, True)
        self._study.tell(number, state=TrialState.FAIL)

    def _untried(self, counting: Sequence[FrozenTrial]) -> dict[str, Any]:
        """The grid's point of the next place, in the values of the axes."""
        whole = {a.key: a.whole for a in self.space.axes if isinstance(a, Range)}
        point = self.space.points()[len(counting)]
        kinds = {key: int if whole[key] else float for key in point if key in whole}
        return {key: kinds.get(key, str)(text) for key, text in point.items()}


def _mend(journal: Path, own: Any) -> None:
    """Take away a last line that a kill left half written: the next one would be added to it."""
    if not journal.is_file():
        return
    own.acquire()
    try:
        with journal.open("rb+") as file:
            whole = file.read()
            if whole and not whole.endswith(b"\n"):
                file.truncate(whole.rfind(b"\n") + 1)
    finally:
        own.release()


def _told(trial: FrozenTrial) -> Tried:
    names = {"COMPLETE": "done", "PRUNED": "pruned", "FAIL": "failed"}
    read = trial.intermediate_values
    value = trial.value if trial.state.name == "COMPLETE" else None
    if trial.state.name == "PRUNED" and read:
        value = read[max(read)]
    notes = trial.user_attrs
    return Tried(
        int(notes[PLACE]), dict(trial.params), names.get(trial.state.name, trial.state.name.lower()),
        value, notes.get(SECONDS), notes.get(FOLDER), str(notes.get(WHY, "")), len(read),
    )  # fmt: skip


def _distribution(axis: Choices | Range) -> BaseDistribution:
    from optuna import distributions

    if isinstance(axis, Choices):
        return distributions.CategoricalDistribution(axis.texts)
    if axis.whole:
        return distributions.IntDistribution(
            int(axis.low), int(axis.high), log=axis.log, step=int(axis.step or 1)
        )
    return distributions.FloatDistribution(axis.low, axis.high, log=axis.log, step=axis.step)


def _seeded(seed: int) -> optuna.samplers.BaseSampler:
    """TPE whose draws depend on the seed and the trial's place alone.

    One generator for the whole sweep would begin anew in every process: a sweep that goes on after a kill,
    and the tasks of an array, would try the same values again.
    """
    from optuna.samplers import BaseSampler, TPESampler

    class Seeded(BaseSampler):
        def __init__(self) -> None:
            self._made: tuple[int, TPESampler] | None = None

        def _of(self, trial: Any) -> TPESampler:
            """One generator for all parameters of a trial, or all would be drawn alike."""
            if self._made is None or self._made[0] != trial.number:
                number = int(value_digest([seed, trial.user_attrs[PLACE]], 8), 16)
                self._made = trial.number, TPESampler(seed=number, n_startup_trials=BEFORE_TPE)
            return self._made[1]

        def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
            return self._of(trial).infer_relative_search_space(study, trial)

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
            return self._of(trial).sample_relative(study, trial, search_space)

        def sample_independent(self, study: Any, trial: Any, name: str, axis: Any) -> Any:
            return self._of(trial).sample_independent(study, trial, name, axis)

    return Seeded()
