"""``make slurm``: one readable batch script that runs an experiment on a cluster and survives preemption.

``NAME``, ``ARGS`` and ``SEEDS`` are those of ``make exp``; GPUS a node (0: none, and TASKS processes), NODES,
TIME, LEAD (seconds before its end at which the job saves and queues again), CHAIN (see ``slurm_chain``) and
DRY come from the environment, too. The script calls the driver, which starts one ``srun`` step a stage
(``launchers``). No torch here.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from callbacks import stop_request
from datamodules.sources import cache_root
from datamodules.versioning import value_digest
from experiments import artifacts, baseline, config, messages, seeds, slurm_queue, trial_driver
from experiments.command import switched
from experiments.errors import UserError
from experiments.launchers import SRUN
from experiments.run import request
from experiments.slurm_submit import hand_in
from experiments.slurm_time import seconds_of
from experiments.source_graph import REPO

MOST_REQUEUES = 100
EARLY = 60  # seconds that Slurm may send a signal before it is due
# Directives are read by sbatch, not by a shell: blanks and quotes mean something else to it.
PLAIN = re.compile(r"[\w./:@%+,=&|()\[\]*-]+")
DIRECTIVES = ("account", "partition", "qos", "constraint")
# Of the shell that submits, which sbatch hands on.
FORGOTTEN = ("NAME", "ARGS", "SEEDS", "BASELINE", "SPACE", "N", "JOBS", "SLURM", "CHAIN")


@dataclass(frozen=True)
class Request:
    """What a job is given, checked."""

    gpus: int  # a node
    nodes: int
    tasks: int  # processes a node
    time: str
    lead: int  # seconds


def read_request(environment: Mapping[str, str]) -> Request:
    """GPUS, NODES, TASKS, TIME and LEAD.

    Raises:
        UserError: one of them cannot be, or the lead is longer than the time allows.
    """
    gpus = _count(environment, "GPUS", 1, least=0)
    nodes = _count(environment, "NODES", 1)
    tasks = _count(environment, "TASKS", gpus or 1)
    if gpus and tasks != gpus:
        raise UserError(f"TASKS={tasks} with GPUS={gpus}: a task is a GPU, leave TASKS out")
    time = environment.get("TIME", "").strip() or "1-00:00:00"
    lead, seconds = _count(environment, "LEAD", 120), seconds_of(time)
    if lead + EARLY >= seconds:
        raise UserError(
            f"LEAD={lead} seconds (and {EARLY} that Slurm may be early) are not less than TIME={time}: the "
            f"job would stop as soon as it starts, and queue for ever; give more TIME, or LEAD=30"
        )
    return Request(gpus, nodes, tasks, time, lead)


def _count(environment: Mapping[str, str], name: str, default: int, least: int = 1) -> int:
    text = environment.get(name, "").strip() or str(default)
    if not re.fullmatch(r"[0-9]{1,7}", text) or int(text) < least:
        raise UserError(f"{name}={text!r}, expected a whole number of at least {least}")
    return int(text)


def launch_words(
    asked: Request, experiment: config.Experiment, only: str | None = None
) -> list[str]:
    """The overrides that make a run's devices the job's; ``only`` is the one stage that the job runs.

    Raises:
        UserError: ARGS says how many devices, too, or a stage wants more than there are.
    """
    given = [baseline.setting(o) for o in experiment.overrides]
    for key, name in (("launch.devices", "GPUS"), ("launch.num_nodes", "NODES")):
        if key in given:
            raise UserError(
                f"{key} in ARGS and {name} mean the same: leave it out and give {name}="
            )
    for name, stage in experiment.stages.items():
        own = stage.get("launch") or {} if only in (None, name) else {}
        devices, nodes = int(own.get("devices", 1)), int(own.get("num_nodes", 1))
        if devices > asked.tasks or nodes > asked.nodes:
            raise UserError(
                f"stages.{name}.launch is {own}, more than the job has (GPUS={asked.gpus}, "
                f"NODES={asked.nodes}): give the job as many as its largest stage"
            )
    launch = experiment.config["launch"]
    words = [f"launch.devices={asked.tasks}", f"launch.num_nodes={asked.nodes}"]
    if "launch.accelerator" not in given:
        words.append(f"launch.accelerator={'gpu' if asked.gpus else 'cpu'}")
    if asked.tasks * asked.nodes > 1 and launch["strategy"] == "auto":
        words.append("launch.strategy=ddp")
    if (cores := experiment.config["slurm"]["cpus_per_task"]) and "launch.threads" not in given:
        words.append(f"launch.threads={cores}")
    return words


def directives(
    asked: Request, experiment: config.Experiment, each: Sequence[int], folder: Path,
    at_once: int = 0, only: str | None = None,
) -> list[str]:  # fmt: skip
    """The options of sbatch; of an array's tasks ``at_once`` run together (0: as many as there is room for).

    Raises:
        UserError: one has blanks or other signs that sbatch would read as something else.
    """
    site = experiment.config["slurm"]
    log = str(folder / ("%A_%a.log" if each else "%j.log"))
    options = [
        f"--job-name={job_name(experiment, only)}", f"--output={log}", "--open-mode=append",
        f"--nodes={asked.nodes}", f"--ntasks-per-node={asked.tasks}", f"--time={asked.time}",
        f"--signal=B:USR1@{asked.lead}", "--requeue",
    ]  # fmt: skip
    if asked.gpus:
        kind = f"{site['gpu_type']}:" if site["gpu_type"] else ""
        options.append(f"--gres=gpu:{kind}{asked.gpus}")
    if each:
        options.append(f"--array={_ranges(each)}" + (f"%{at_once}" if at_once else ""))
    # Many sites have no room for jobs without a GPU where the GPUs are.
    own = {} if asked.gpus else {"partition": site.get("cpu_partition") or site["partition"]}
    named = {key: {**site, **own}[key] for key in DIRECTIVES}
    options += [f"--{key}={value}" for key, value in named.items() if value is not None]
    if site["cpus_per_task"]:
        options.append(f"--cpus-per-task={site['cpus_per_task']}")
    if site["memory"]:
        options.append(f"--mem={site['memory']}")
    options += [str(option) for option in site["sbatch"] or ()]
    for option in options:
        if not PLAIN.fullmatch(option):
            raise UserError(
                f"{option!r} cannot stand in a batch script (blanks, quotes or line ends); where it is a "
                "path, set LLMREC_RUNS to one without"
            )
    return options


def job_name(experiment: config.Experiment, only: str | None = None) -> str:
    """What queues show: the experiment, and of a chain the stage."""
    return ".".join([experiment.name.replace("/", "."), *([only] if only else [])])


def _ranges(numbers: Sequence[int]) -> str:
    whole = list(numbers) == list(range(len(numbers)))
    return f"0-{len(numbers) - 1}" if whole else ",".join(map(str, numbers))


def script(
    asked: Request,
    experiment: config.Experiment,
    each: Sequence[int],
    folder: Path,
    more: Sequence[str] = (),
    own: Sequence[str] = (),
    at_once: int = 0,
    only: str | None = None,
    verb: str = "exp",
) -> str:
    """The batch script, whole.

    Args:
        asked, experiment, folder: what the job is given, what it runs, where its logs go.
        each: numbers of an array's tasks: seeds, where no ``own`` is given.
        more: words for the driver besides the overrides.
        own: another command of ours than the driver, which knows the overrides.
        at_once: how many tasks of an array run together; 0 for no limit.
        only: the one stage of a chain that it runs.
        verb: of the driver.
    """
    site = experiment.config["slurm"]
    launch = launch_words(asked, experiment, only)
    words = [*(() if own else (*more, *experiment.overrides)), *launch]
    driver = own or ("experiments.run", verb, experiment.name)
    command = [str(site["python"] or sys.executable), "-m", *driver]
    lines = [" ".join(map(shlex.quote, command)), *map(shlex.quote, words)]
    lines += ['"seed=$SLURM_ARRAY_TASK_ID"'] if each and not own else []
    places = {
        "LLMREC_RUNS": artifacts.runs_root().resolve(),
        "LLMREC_CACHE": cache_root().resolve(),
    }
    exports = [f"export {name}={shlex.quote(str(place))}" for name, place in places.items()]
    exports += [f"export {trial_driver.STAGES}={only}"] if only in experiment.stages else []
    srun = shlex.join(str(option) for option in site["srun"] or ())
    return TEMPLATE.format(
        name=experiment.name,
        directives="\n".join(
            f"#SBATCH {o}" for o in directives(asked, experiment, each, folder, at_once, only)
        ),
        setup="".join(
            f"{line}\n"
            for line in (
                *(f"module load {shlex.quote(str(m))}" for m in site["modules"] or ()),
                *(str(line) for line in site["setup"] or ()),
            )
        ),
        repo=shlex.quote(str(REPO)),
        exports="\n".join([*exports, f"export {SRUN}={shlex.quote(srun)}"]),
        forgotten=" ".join(FORGOTTEN),
        lead=asked.lead,
        command=" \\\n    ".join(lines),
        status=stop_request.STATUS,
        most=MOST_REQUEUES,
        failed=FAILED.format(stage=only, name=experiment.name) if only else "",
    )  # fmt: skip


TEMPLATE = """\
#!/bin/bash
# {name}, as `make slurm` has written it. To submit it again: sbatch THIS_FILE
{directives}

# {lead} seconds before the end, or when the job must make room, Slurm sends USR1 to this shell alone. The
# driver passes it on until the stage has saved and stopped; then the job queues again, and the command goes
# on where it stood.
asked= driver=
trap 'asked=1; [[ -z $driver ]] || kill -USR1 "$driver" 2>/dev/null' USR1

{setup}set -uo pipefail  # behind what is the site's: activate scripts read variables that are not set
cd {repo} || exit
{exports}
unset {forgotten}
driver= status=

# Plans, then starts each missing stage as one srun step with a task a device.
if [[ -z $asked ]]; then  # a process that has just been forked would lose the signal
{command} &
driver=$!
[[ -z $asked ]] || kill -USR1 "$driver"
else
    status={status}
fi
until [[ -n $status ]]; do  # a signal ends `wait`, not the driver
    wait "$driver"
    code=$?
    kill -0 "$driver" 2>/dev/null || status=$code
done

job=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_}}${{SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}}
if [[ $status == {status} || ( -n $asked && $status -gt 128 ) ]]; then
    if (( ${{SLURM_RESTART_COUNT:-0}} < {most} )); then
        scontrol requeue "$job" && sleep 600
    else
        echo "error: queued again {most} times already; does TIME suffice for one checkpoint?" >&2
    fi
fi
{failed}exit "$status"
"""
FAILED = """\
[[ $status == 0 ]] || echo "error: {stage} did not end well, and Slurm cancels the jobs that wait for it;" \\
    "mend what stands above, and the same make slurm NAME={name} CHAIN=1 ... submits what is missing" >&2
"""


def main(argv: Sequence[str]) -> int:
    """Exit status: 0 submitted (or printed), 2 refused."""
    try:
        name, overrides = request(list(argv))
        asked = read_request(os.environ)
        again = [o for o in overrides if o == "stale=rerun"]
        overrides = [config.as_text(o) for o in overrides if o not in again]
        each = seeds.requested(overrides)
        experiment = config.load(config.full_name(name), overrides)
        place = experiment.name.replace("/", ".")
        made = value_digest(
            [place, again, overrides, each, vars(asked), experiment.config["slurm"]]
        )
        folder = artifacts.runs_root().resolve() / "slurm" / f"{place}-{made}"
        load = [config.load(experiment.name, [*overrides, f"seed={seed}"]) for seed in each]
        if switched("CHAIN"):
            from experiments import slurm_chain  # it builds on this module

            return slurm_chain.submit(asked, load or [experiment], folder, again)
        text = script(asked, experiment, each, folder, again)
        left: list[dict[str, str]] = []
        if not switched("DRY"):
            left = [slurm_queue.missing(one, bool(again)) for one in load or [experiment]]
            slurm_queue.refuse_queued(left)
        if not (job := hand_in(text, folder)):
            return 0
        messages.put(job)
        tasks = [f"{job}_{seed}" for seed in each] or [job]
        for task, stages in zip(tasks, left, strict=True):
            slurm_queue.note_free(stages.values(), task, job_name(experiment))
    except UserError as error:
        messages.print_error(error)
        return 2
    log = f"{job}_SEED.log" if each else f"{job}.log"
    messages.say(
        f"submitted as job {job}: {messages.short(folder / 'job.sh')}, log {messages.short(folder / log)}"
    )
    if each:
        whole = "-" in _ranges(each)
        told = str(len(each)) if whole else ",".join(map(str, each)) + "," * (len(each) == 1)
        messages.say(
            f"when all have ended: make exp NAME={name} SEEDS={told} prints the table over seeds"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
