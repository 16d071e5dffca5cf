"""The command behind ``make``: plan, then start each missing stage in a process of its own.

``python -m experiments.run [exp|plan|show|data|list|results|verify|crossover] [NAME [key=value ...]]``;
NAME and overrides may also come from the environment (NAME, ARGS), as the Makefile passes them; SEEDS and
BASELINE always do. No torch here.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from callbacks import stop_request
from callbacks.stop_request import Stopped
from datamodules.sources import cache_root
from datamodules.versioning import read_json, write_json
from experiments import (
    artifacts,
    beside,
    config,
    data_report,
    faults,
    launchers,
    lock,
    messages,
    preflight,
    report,
    results,
    secrets,
    seeds,
    trial_driver,
    verify,
)
from experiments.artifacts import MISSING, PARTIAL, RUNNING, STALE, PlannedStage
from experiments.command import switched
from experiments.errors import UserError
from experiments.processes import forking, in_process, mark_taken
from experiments.source_graph import REPO

VERBS = ("exp", "plan", "show", "data", "list", "results", "verify", "crossover")


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 done, 2 failed (the reason is on the screen), 75 stopped as asked, 130 stopped."""
    words = list(argv)
    verb = words.pop(0) if words and words[0] in VERBS else "exp"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    stop_request.listen(signal.SIGUSR1)
    trial_driver.end_with_sweep(os.environ)
    try:
        name, overrides = request(words)
        return _run(verb, name, overrides)
    except UserError as error:
        messages.print_error(error)
        return 2
    except (OSError, ImportError) as error:
        if isinstance(error, BrokenPipeError):  # `make show | head`
            sys.stdout = None
            return 0
        if (told := faults.explained(error)) is None:
            raise
        messages.print_error(UserError(told))
        return 2
    except Stopped:
        messages.say("stopped as asked; the same command goes on where it stood")
        return stop_request.STATUS
    except KeyboardInterrupt as error:
        messages.say("".join(["stopped", *error.args]))
        return 130


def request(words: list[str]) -> tuple[str, list[str]]:
    """NAME and overrides, from the command line or the environment."""
    name = words.pop(0) if words else os.environ.get("NAME", "")
    try:
        return name, words or shlex.split(os.environ.get("ARGS", ""))
    except ValueError as error:
        raise UserError(f"ARGS={os.environ.get('ARGS')!r} cannot be read: {error}") from error


def _run(verb: str, name: str, overrides: list[str]) -> int:
    if verb == "list":
        report.print_list([(n, config.header(n)) for n in config.names()])
        return 0
    if verb == "results":
        repo = REPO if switched("PUBLISH") else None  # whose README gets the table, too
        messages.say(f"wrote {messages.short(results.write_results(artifacts.runs_root(), repo))}")
        return 0
    if verb == "verify":
        return verify.verify(config.full_name(name) if name else "", artifacts.runs_root(), REPO)
    name = config.full_name(name)
    rerun = "stale=rerun" in overrides
    overrides = [config.as_text(o) for o in overrides if o != "stale=rerun"]
    if verb in ("exp", "plan") and (asked := seeds.requested(overrides)):
        each = {seed: _load(verb, name, [*overrides, f"seed={seed}"]) for seed in asked}
        if verb == "exp":
            with forking(_slow_imports(*each.values())):
                return seeds.run(each, lambda experiment: finish(experiment, rerun))
        for seed, experiment in each.items():
            report.print_plan(f"{name} seed={seed}", artifacts.plan(experiment, cache_root()))
        return 0
    if verb == "crossover":
        from experiments import crossover  # torch and scipy are slow to import

        some = seeds.requested(overrides) if os.environ.get("SEEDS", "").strip() else ()
        each = {seed: _load(verb, name, [*overrides, f"seed={seed}"]) for seed in some}
        crossover.tell(each or {0: _load(verb, name, overrides)})
        return 0
    experiment = _load(verb, name, overrides)
    if verb == "exp":
        with forking(_slow_imports(experiment)):
            stages = finish(experiment, rerun)
        report.print_results(experiment, stages, list(beside.find(experiment)))
        return 0
    if verb == "plan" and switched("COST"):
        with forking(_slow_imports(experiment)):
            preflight.tell(experiment, _job, in_process)
    elif verb == "plan":
        report.print_plan(experiment.name, artifacts.plan(experiment, cache_root()))
    elif verb == "show":
        report.print_config(experiment, config.origins(experiment.name, experiment.overrides))
    else:
        in_process("experiments.check", ["--report", experiment.name, *experiment.overrides])
        for data in experiment.data_sets:
            manifest = data_report.print_data_report(_prepared_folder(data), data)
            artifacts.require_expected(experiment, data, manifest)
    return 0


def _slow_imports(*of: config.Experiment) -> list[str]:
    """Adapters and quantized weights: what has a language model may have both."""
    return ["peft"] if any("llm" in experiment.config for experiment in of) else []


def _load(verb: str, name: str, overrides: list[str]) -> config.Experiment:
    try:
        return config.load(name, overrides)
    except config.FrameError:
        if verb == "exp":
            in_process("experiments.check", [name, *overrides])  # tells all problems, then ends
        raise


def finish(experiment: config.Experiment, rerun_stale: bool = False) -> list[PlannedStage]:
    """Do what is missing, resume what was cut off, skip what is done; the stages as they are then."""
    stages = _planned(experiment)
    if any(_wanted(s, rerun_stale) for s in stages):
        messages.say(f"{experiment.name}: checking the configuration and the data ...")
        in_process("experiments.check", [experiment.name, *experiment.overrides])
        stages = _planned(experiment)
    for number, planned in enumerate(stages, start=1):
        # Looked at again: what an earlier stage has just made may have made this one stale.
        stage = _planned(experiment)[number - 1]
        assert stage.name == planned.name
        _announce(stage, number, len(stages), rerun_stale)
        if _wanted(stage, rerun_stale):
            if stop_request.asked():  # while the stage before ended
                raise Stopped
            run_stage(experiment, stage, rerun_stale)
    return _planned(experiment)


def _planned(experiment: config.Experiment) -> list[PlannedStage]:
    """The stages; of a sweep's trial those that its metric needs, in a chain of jobs the job's own."""
    only, stages = trial_driver.stages(os.environ), artifacts.plan(experiment, cache_root())
    return [stage for stage in stages if not only or stage.name in only]


def run_stage(
    experiment: config.Experiment, stage: PlannedStage, rerun_stale: bool = False
) -> None:
    """Run one stage under its folder's lock.

    Raises:
        UserError: another process holds the folder, or the stage failed.
    """
    assert stage.folder is not None
    before = artifacts.done_mark(stage.folder)
    with lock.hold(stage.folder, wait=trial_driver.waits(os.environ)) as taken_over:
        for message in taken_over:
            messages.say(f"  {message}")
        if (now := artifacts.done_mark(stage.folder)) is not None:
            if not rerun_stale or now != before:
                return  # another driver finished it while this one waited to start
            # In this order: a kill in between leaves a stage that is resumed, never one without weights.
            done = stage.folder / "done.json"
            written = stage.folder.glob("generations.*.jsonl")
            for file in (done, *stage.folder.glob("*.ckpt"), *written):
                file.unlink()
        secrets.refuse(experiment.config, os.environ)
        job = _job(experiment, stage)
        for mark in (stop_request.MARK, launchers.REFUSED):
            mark_taken(stage.folder / mark)
        write_json(stage.folder / "stage.json", job)
        text = yaml.safe_dump(experiment.config, sort_keys=False, allow_unicode=True)
        (stage.folder / "config.yaml").write_text(text, encoding="utf-8")
        write_json(
            stage.folder / config.ORIGINS, config.origins(experiment.name, experiment.overrides)
        )
        write_json(
            stage.folder / data_report.KEPT,
            data_report.manifests(_prepared_folder(stage.spec["data"])),
        )
        words = ("experiments.stage", [str(stage.folder)], stage.folder, job["launch"])
        launchers.until_done(lambda: in_process(*words), os.environ)


def _wanted(stage: PlannedStage, rerun_stale: bool) -> bool:
    if stage.state == RUNNING and trial_driver.waits(os.environ):
        return True  # another job or trial runs it (rows without a model are shared): wait, then look again
    if stage.state == RUNNING:
        raise UserError(f"{stage.folder} is {stage.why}; wait for it, or stop it and run again")
    return stage.state in (MISSING, PARTIAL) or (rerun_stale and stage.state == STALE)


def _announce(stage: PlannedStage, number: int, total: int, rerun_stale: bool) -> None:
    folder = messages.short(stage.folder)
    if stage.done and not (rerun_stale and stage.state == STALE):
        note = "done" if stage.state == "done" else f"done, but {stage.why}"
        messages.say(f"[{number}/{total}] {stage.name}: {note} ({folder})")
    else:
        verb = f"resuming, {stage.why}" if stage.state == PARTIAL else "running"
        messages.say(f"[{number}/{total}] {stage.name}: {verb} ({folder})")


def _job(experiment: config.Experiment, stage: PlannedStage) -> dict[str, Any]:
    """Everything a stage process needs to know, as plain values."""
    settings = experiment.config
    return {
        "experiment": experiment.name,
        "stage": stage.name,
        "label": f"{experiment.name} {stage.name}",
        "key": stage.key,
        "spec": stage.spec,
        "inputs": stage.inputs,
        "launch": {**settings["launch"], **(experiment.stages[stage.name].get("launch") or {})},
        "logger": settings.get("logger"),
        "callbacks": settings.get("callbacks"),
        "overrides": list(experiment.overrides),
        "inputs_digest": {a: artifacts.output_digest(Path(f)) for a, f in stage.inputs.items()},
        "commit": artifacts.commit(),
        "sources": _begun_with(stage),
    }


def _begun_with(stage: PlannedStage) -> dict[str, str]:
    """The sources that the result will be marked with: for a resumed stage, those it began with."""
    begun = read_json(stage.folder / "stage.json") if stage.folder else None
    sources: dict[str, str] = (begun or {}).get("sources", stage.sources)
    return sources if stage.state == PARTIAL else stage.sources


def _prepared_folder(data: dict[str, Any]) -> Path:
    note = artifacts.prepared_data(data, cache_root())
    assert note is not None
    return Path(note["folder"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
