"""Language models whose weights are spread over devices: FSDP2, layer by layer.

Every parameter is a DTensor of which each device holds one part; a layer's weights are gathered just before
it runs and let go behind it (Zhao et al., "PyTorch FSDP", VLDB 2023, arXiv 2304.11277, in its second form,
``torch.distributed.fsdp.fully_shard``). The first form (Lightning's ``FSDPStrategy``) joins the parameters of
a layer into one flat tensor, which float32 adapters beside bfloat16 weights cannot share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor
from torch.optim import Optimizer

from lightning_modules.llm.backbones import decoder_layers


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all devices, with the checkpoints of one device: whole trained weights in a single file.

    Lightning's own would gather the frozen weights for each checkpoint, too, and number the optimizer's
    parameters so that no other strategy could resume from it.

    Args:
        devices: over all nodes.
    """

    def __init__(self, devices: int) -> None:
        super().__init__(
            data_parallel_size=devices, tensor_parallel_size=1, save_distributed_checkpoint=False
        )

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The trainer hands over what ``optimizer_state`` has made."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What is trained, whole, and buffers; every rank has to ask."""
        assert self.lightning_module is not None
        module = self.lightning_module
        # Tied weights have several names.
        trained = {n for n, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
        state = module.state_dict()
        return {n: whole(t) for n, t in state.items() if n in trained or not _is_split(t)}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each device takes its part of the whole weights."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        state = {
            n: _like(own[n], t) if n in own else t for n, t in checkpoint["state_dict"].items()
        }
        self.lightning_module.load_state_dict(state, strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As on one device, whole; every rank has to ask."""
        state = optimizer.state_dict()
        held = {
            key: {name: whole(value) for name, value in values.items()}
            for key, values in state["state"].items()
        }
        return {**state, "state": held}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each device takes its part of the whole state."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            mine = [p for group in optimizer.param_groups for p in group["params"]]
            ids = [i for group in state["param_groups"] for i in group["params"]]
            parameters = dict(zip(ids, mine, strict=True))
            held = {
                key: {name: _like(parameters[key], value) for name, value in values.items()}
                for key, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": held})

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The file as it is; the two methods above split it."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)


def shard(model: Any, mesh: Any) -> None:
    """Spread the weights of ``model`` (on the CPU, say) over the devices of ``mesh``, in place.

    One layer at a time goes to the device and is split there, so that no device ever holds the whole model.
    What is outside of the layers (embeddings, output head) is gathered for the whole of a step.

    Args:
        model: a language model, with or without an adapter; not quantized.
        mesh: of one dimension.
    """
    from torch.distributed.fsdp import fully_shard

    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _is_split(value: Any) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def whole(value: Any) -> Any:
    """A split tensor put together on the CPU, for which every rank has to ask; anything else as it is."""
    return value.full_tensor().cpu() if _is_split(value) else value


def _like(own: Any, value: Any) -> Any:
    """This device's part of a whole tensor, where ``own`` is split; all ranks have the same ``value``."""
    from torch.distributed.tensor import distribute_tensor

    # An optimizer's counts of steps are no tensors of their parameter's shape.
    if not _is_split(own) or not isinstance(value, Tensor) or value.shape != own.shape:
        return value
    moved = value.to(own.device)
    return distribute_tensor(moved, own.device_mesh, own.placements, src_data_rank=None)
