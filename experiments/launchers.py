"""How a process of ours is started: by itself, or inside a Slurm job as one task a device (``srun``).

The batch script of ``make slurm`` sets ``LLMREC_SRUN`` to the site's options of srun; the number of nodes and
of tasks a node is always that of the stage's ``launch``.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from callbacks import stop_request
from callbacks.stop_request import Stopped
from experiments.messages import say
from experiments.source_graph import REPO

SRUN = "LLMREC_SRUN"  # in a batch script: start stages through srun, with these options
STEP = "LLMREC_STEP"  # in a task of such a step
STEPS = 5  # of one stage in one job
PAUSE_SECONDS = 3.0
REFUSED = ".refused"  # in the run folder: one of several processes has said what is wrong


def through_srun(environment: Mapping[str, str]) -> bool:
    """Whether this driver starts its stages through srun."""
    return SRUN in environment


def is_task(environment: Mapping[str, str]) -> bool:
    """Whether this process is one of several that srun has started for a stage."""
    return STEP in environment


def stopping_signals(environment: Mapping[str, str]) -> tuple[signal.Signals, ...]:
    """What asks a stage to save and stop.

    Under Slurm also what ends a job early, or makes room for another: SIGTERM, with seconds to go.
    """
    return (signal.SIGUSR1, *([signal.SIGTERM] if is_task(environment) else []))


def command(
    module: str,
    arguments: Sequence[str],
    launch: Mapping[str, Any] | None,
    environment: Mapping[str, str],
) -> list[str]:
    """The words that start one of our modules.

    Args:
        module: dotted name.
        arguments: for it.
        launch: of a stage; None for what needs one process only.
        environment: of the driver.
    """
    words = [sys.executable, "-m", module, *arguments]
    if launch is None or not through_srun(environment):
        return words
    nodes, devices = int(launch["num_nodes"]), int(launch["devices"])
    gpus = f"gpu:{devices}" if launch["accelerator"] in ("gpu", "cuda") else "none"
    # Of `auto` it is not known here: without the option a step has all that the job has.
    gres = [] if launch["accelerator"] == "auto" else [f"--gres={gpus}"]
    # A task that ends badly ends the others, which would wait for it for ever.
    options = [
        f"--nodes={nodes}", f"--ntasks={nodes * devices}", f"--ntasks-per-node={devices}",
        *gres, "--kill-on-bad-exit=1", "--input=none", "--export=ALL",
    ]  # fmt: skip
    if cpus := environment.get("SLURM_CPUS_PER_TASK"):  # srun does not take it from the job
        options.append(f"--cpus-per-task={cpus}")
    return ["srun", *options, *shlex.split(environment[SRUN]), *words]


def until_done(work: Callable[[], None], environment: Mapping[str, str]) -> None:
    """Do a stage's work; a step of Slurm's that was ended, though the job was not, is begun again at once.

    Slurm repeats, a minute later, what it could not tell a busy node: that a step is to end. By then a job
    that was queued again may run anew, and its steps have the same numbers. To queue again on that would
    go on for ever; the next step in this job has a number of its own.

    Raises:
        Stopped: the job was asked to stop, or the work runs in no such step.
    """
    for left in reversed(range(STEPS)):
        try:
            work()
            return
        except Stopped:
            if stop_request.asked() or not left or not through_srun(environment):
                raise
            say("  the step was told to end, this job was not: going on with another step")
            time.sleep(PAUSE_SECONDS)  # where the job is to end, too, it is told meanwhile
            if stop_request.asked():
                raise


def environment_of(launch: Mapping[str, Any] | None) -> dict[str, str]:
    """What a process that ``command`` starts sees."""
    environment = dict(os.environ)
    # Threads that spin while they wait starve each other when the machine does anything else. Of four
    # epochs on two cores: GNU OpenMP's default took 9 s quiet and 95 to 190 s busy, sleeping at once 14 s
    # and 16 s, a short spin 9 s and 21 s.
    environment.setdefault("GOMP_SPINCOUNT", "1000")
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(REPO), *filter(None, [environment.get("PYTHONPATH")])]
    )
    if launch is not None and through_srun(environment):
        return {**environment, STEP: "1"}
    return {**environment, "LLMREC_DRIVER": str(os.getpid())}
