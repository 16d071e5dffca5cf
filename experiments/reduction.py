"""DDP whose sums over ranks do not depend on the order of adding: a resumed run is exact beyond two ranks.

torch lays gradients out in new buckets behind a process's first step, in the order in which they came, and
a ring adds up each part of a bucket from another rank on. So the first step behind a resume, and it alone,
would round other than that of a run that nobody stopped; a thousand steps later metrics differ in the fourth
digit. Summed in float64, any order rounds to the same float32.
"""

# torch compares a hook's annotations with the types themselves: no `from __future__ import annotations`.
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor


def mean_in_float64(
    group: dist.ProcessGroup | None, bucket: dist.GradBucket
) -> torch.futures.Future[Tensor]:
    """A bucket's gradients, (n,), averaged over ranks and rounded once."""
    flat = bucket.buffer()  # (n,)
    wide = flat.double()
    work = dist.all_reduce(wide, group=group, async_op=True)
    assert work is not None

    def rounded(done: torch.futures.Future[list[Tensor]]) -> Tensor:
        (total,) = done.value()
        return flat.copy_(total / dist.get_world_size(group))

    return work.get_future().then(rounded)


class SteadyDDPStrategy(DDPStrategy):
    """DDP; on CPUs gradients are summed in float64. Kernels of GPUs differ in the last bit anyway."""

    def configure_ddp(self) -> None:
        """Lightning registers hooks for GPUs alone."""
        super().configure_ddp()
        if self.root_device.type == "cpu":
            assert isinstance(self.model, torch.nn.parallel.DistributedDataParallel)
            self.model.register_comm_hook(None, mean_in_float64)
