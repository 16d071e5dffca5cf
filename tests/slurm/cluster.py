"""A real Slurm of two nodes on this machine alone: started and stopped by a test, in a folder of its own.

A machine that does much else besides answers late: a message may take long, and no node is given up. What
Slurm could not deliver it repeats a minute later, to a job's next attempt, too.

Loopback only, no cgroups, and two fake GPUs a node (character devices). Needs root and Debian's packages
slurmctld, slurmd, slurm-client and munge. Every daemon dies with this process.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "setpriv")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")
SBIN = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

CONF = """\
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/sock,cred_expire=5
StateSaveLocation={folder}/ctld
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobRequeue=1
FirstJobId={first}
ReturnToService=2
KillWait=30
MessageTimeout=60
SlurmdTimeout=0
MinJobAge=3600
GresTypes=gpu
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=8000 Gres=gpu:2
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=8000 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP OverSubscribe=NO
"""


def missing() -> str | None:
    """Why there can be no cluster here; None where there can."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=SBIN) is None]
    if lacking:
        return f"Slurm is not installed (no {', '.join(lacking)})"
    return None if os.geteuid() == 0 else "a cluster of daemons needs root"


def wait_until(true: Callable[[], bool], seconds: float) -> bool:
    """Whether it came true in time."""
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.1)
    return true()


class Cluster:
    """A running cluster.

    Attributes:
        environment: what its clients need.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ, "PATH": SBIN, "SLURM_CONF": str(folder / "slurm.conf"),
            "MASTER_ADDR": "127.0.0.1",  # node1 and node2 are names that no resolver knows
        }  # fmt: skip
        self._daemons: list[subprocess.Popen[bytes]] = []

    def ask(self, *words: str) -> str:
        """What a client program answers."""
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, check=False, timeout=30
        )
        return done.stdout + done.stderr

    def start(self) -> None:
        """Bring it up.

        Raises:
            RuntimeError: it does not come up; the logs' ends are in the message.
        """
        (self.folder / "munge").mkdir(mode=0o711)
        (self.folder / "ctld").mkdir()
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        ports = _free_ports(3)
        self._configure(ports)
        munge = self.folder / "munge"
        self._daemon(
            "munged", "--foreground", f"--key-file={key}", f"--socket={munge / 'sock'}",
            f"--pid-file={munge / 'pid'}", f"--log-file={munge / 'log'}", f"--seed-file={munge / 'seed'}",
        )  # fmt: skip
        wait_until((munge / "sock").exists, 10)
        self._daemon("slurmctld", "-D")
        for node in ("node1", "node2"):
            self._daemon("slurmd", "-D", "-N", node)
        if not wait_until(
            lambda: self.ask("sinfo", "-h", "-N", "-o", "%t").split() == ["idle"] * 2, 30
        ):
            ends = [f.read_text()[-1000:] for f in self.folder.glob("*.log")]
            raise RuntimeError("Slurm did not come up:\n" + "\n".join(ends))

    def _configure(self, ports: list[int]) -> None:
        conf = CONF.format(
            folder=self.folder, host=socket.gethostname().partition(".")[0], ports=ports,
            first=random.randrange(1000, 9000),  # of which torch makes its port
        )  # fmt: skip
        (self.folder / "slurm.conf").write_text(conf)
        lines = []
        for node in ("node1", "node2"):
            for number in (0, 1):
                os.mknod(self.folder / f"{node}-gpu{number}", 0o020666, os.makedev(1, 3))
            lines.append(f"NodeName={node} Name=gpu File={self.folder}/{node}-gpu[0-1]\n")
        (self.folder / "gres.conf").write_text("".join(lines))

    def _daemon(self, *words: str) -> None:
        command = ["setpriv", "--pdeathsig", "TERM", *words]
        with (self.folder / f"{words[0]}.{len(self._daemons)}.out").open("wb") as out:
            process = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        self._daemons.append(process)

    def stop(self) -> None:
        """End every job and every daemon."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.ask("scancel", "--quiet", "--full", "--user=root")
            wait_until(lambda: not self.ask("squeue", "-h").strip(), 20)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        words = self.ask("scontrol", "-o", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, number: str) -> str:
        """Of a job, without blanks behind it."""
        return self.job(number).get("JobState", "UNKNOWN")

    def ended(self, number: str, seconds: float) -> str:
        """The state in which a job has ended; of one that has not in time, what it is in."""
        wait_until(lambda: self.state(number) in ENDED, seconds)
        return self.state(number)

    def steps(self, number: str) -> list[str]:
        """Its steps that run now, besides the batch script."""
        names = self.ask("squeue", "-h", "-s", "-j", number, "-o", "%i").split()
        return [name for name in names if not name.endswith("batch")]


@contextlib.contextmanager
def cluster(more: Mapping[str, str]) -> Iterator[Cluster]:
    """A cluster that is gone afterwards, with its folder; ``more`` is added to its clients' environment."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-test-"))  # munge wants a path that all may enter
    folder.chmod(0o711)
    made = Cluster(folder)
    made.environment |= more
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports
