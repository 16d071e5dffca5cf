"""Several ranks on this machine: a function in one gloo group, or a command as torchrun starts it."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def in_ranks(world: int, work: Callable[..., None], *args: Any, seconds: float = 120) -> None:
    """``work(rank, *args)`` in as many processes of one group; all of them must end well.

    Args:
        world: how many.
        work: at the top of a module, so that a new process can import it.
        args: what all ranks are given.
        seconds: that each may take to end.
    """
    import torch  # not above: tests that want a port alone start without it

    context, port = torch.multiprocessing.get_context("spawn"), free_port()
    ranks = [
        context.Process(target=_in_group, args=(rank, world, port, work, args))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(timeout=seconds)
    finally:
        for process in ranks:
            process.kill()  # one that waits for a dead one
            process.join()
    assert [process.exitcode for process in ranks] == [0] * world


def _in_group(
    rank: int, world: int, port: int, work: Callable[..., None], args: Sequence[Any]
) -> None:
    import torch

    torch.set_num_threads(1)
    place = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=world)
    work(rank, *args)
    torch.distributed.destroy_process_group()


def start_ranks(
    world: int, command: Sequence[str], folder: Path, variables: Mapping[str, str],
    seconds: float = 900,
) -> None:  # fmt: skip
    """The same command once for each rank, with what torchrun tells its processes (nothing to a single one).

    Args:
        world: how many.
        command: its words.
        folder: that it is started in.
        variables: on top of the environment.
        seconds: that each may take to end.
    """
    port, running = str(free_port()), []
    for rank in map(str, range(world)):
        told = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test",
        }  # fmt: skip
        running.append(subprocess.Popen(
            command, env={**os.environ, **variables, **(told if world > 1 else {})}, cwd=folder,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ))  # fmt: skip
    try:
        told_by = [process.communicate(timeout=seconds)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert not any(process.returncode for process in running), "\n".join(t[-3000:] for t in told_by)
