"""What is different for a driver that runs one trial of a sweep, or one stage of a chain of Slurm jobs.

The sweep, or the batch script, says so by variables.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping

from experiments.launchers import through_srun

SWEEP = "LLMREC_SWEEP"  # the process that runs the sweep
STAGES = "LLMREC_STAGES"  # those to do: what a trial's metric needs (no test), or a job's one


def stages(environment: Mapping[str, str]) -> list[str]:
    """The stages to do; none named means all."""
    return environment.get(STAGES, "").split()


def waits(environment: Mapping[str, str]) -> bool:
    """Whether this driver waits for a stage that another one runs: seeds and trials share some."""
    return through_srun(environment) or SWEEP in environment


def end_with_sweep(environment: Mapping[str, str]) -> None:
    """Stop like Ctrl-C when the sweep that started this driver is gone (killed)."""
    sweep = environment.get(SWEEP)

    def watch() -> None:
        while str(os.getppid()) == sweep:
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    if sweep:
        threading.Thread(target=watch, daemon=True).start()
