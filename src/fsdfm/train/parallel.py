"""Several processes that train as one: start, share out, reduce.

torchrun starts them and says, in the environment, which one this is. Each has a part of every pass.
Sharding `none`: each holds the whole network, and DistributedDataParallel averages the gradients.
Sharding `fsdp`: each holds a part of every tensor (FSDP2). What a block needs is gathered while it
works, the ends of the network (embedding, head, what all blocks are told) for a whole pass, and the
gradients are summed in float32 where each part lives.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fsdfm.core.errors import ConfigError
from fsdfm.core.workers import Workers, alone

PATIENCE = timedelta(minutes=10)
"""How long a process waits for the others: all do the same, at the same time."""
SHARDINGS = ("none", "fsdp")


@dataclass(frozen=True, slots=True)
class World(Workers):
    """This process among those that train together; the first one writes and speaks."""

    def rows(self, count: int) -> range:
        """The samples of a pass that fall to this process, of as many in each."""
        return range(self.rank * count, (self.rank + 1) * count)

    def share(self, batch_size: int) -> int:
        """Samples of a pass for each process.

        Raises:
            ConfigError: they cannot be dealt evenly.
        """
        if batch_size % self.size:
            raise ConfigError(
                f"batch_size={batch_size} cannot be dealt evenly to {self.size} processes: choose "
                f"a multiple of {self.size}.",
                "batch_size",
            )
        return batch_size // self.size

    def shards(self, sharding: str) -> bool:
        """Whether processes hold parts of the network: those that torchrun started, be it one."""
        group = torch.distributed
        return sharding == "fsdp" and group.is_initialized() and group.get_world_size() == self.size

    def wrap(
        self, module: Pass, average: nn.Module, sharding: str, device: torch.device, dtype: Any
    ) -> nn.Module:
        """The module, its gradients averaged over processes in every backward pass.

        Args:
            module: with a network, whose parameters become DTensors where they are sharded.
            average: of that network, which is sharded like it.
            sharding: one of SHARDINGS.
            device: of this process.
            dtype: of products. On a GPU the blocks are gathered in it.
        """
        if not self.shards(sharding):
            if self.size == 1:
                return module
            # An objective may train a part of the network: what it leaves alone has no gradient.
            return DistributedDataParallel(module, find_unused_parameters=True)
        mesh = init_device_mesh(device.type, (self.size,))
        exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        gathered = dtype if device.type == "cuda" else None
        rounded = MixedPrecisionPolicy(gathered, torch.float32, cast_forward_inputs=False)
        for network in (module.model, average):
            for block in getattr(network, "blocks", ()):
                fully_shard(block, mesh=mesh, mp_policy=rounded)
        for root in (module, average):
            fully_shard(root, mesh=mesh, mp_policy=exact, reshard_after_forward=False)
        register_fsdp_forward_method(average, "body")  # what gathers it, where it is asked at all
        return module

    def mean(self, values: Tensor) -> Tensor:
        """Means over processes, on the device."""
        return self.sum(values) / self.size


ALONE = World()


def started(device: torch.device) -> AbstractContextManager[World]:
    """Join the other processes of this run, if torchrun started several.

    Args:
        device: of this process (`own_device`).

    Raises:
        ConfigError: fewer GPUs than processes on this machine.
        WorkerError: the others cannot be reached, or one of them ended.
    """
    if alone() or device.type != "cuda":
        return World.joined(patience=PATIENCE)
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise ConfigError(
            f"There are {count} GPUs here, too few for process {local + 1}: start as many "
            "processes as there are GPUs."
        )
    torch.cuda.set_device(device)
    return World.joined("cpu:gloo,cuda:nccl", PATIENCE)


@contextmanager
def unshared(module: nn.Module) -> Iterator[None]:
    """Gradients of backward passes in it may stay this process's, until one outside it.

    Sharded ones do not: whole gradients would need the memory that sharding saves.
    """
    if isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
    else:
        yield


class Pass(nn.Module):
    """An objective on a network, as one module: what can be wrapped."""

    def __init__(self, objective: Any, model: nn.Module) -> None:
        super().__init__()
        self.objective, self.model = objective, model

    def forward(self, ema: Any, x_1: Tensor, random: Any) -> dict[str, Tensor]:
        """See `Objective.loss`."""
        found: dict[str, Tensor] = self.objective.loss(self.model, ema, x_1, random)
        if isinstance(ema, FSDPModule):
            ema.reshard()  # its ends stay gathered for the head until here
        return found


def is_sharded(network: nn.Module) -> bool:
    """Whether processes hold parts of it."""
    return any(isinstance(parameter, DTensor) for parameter in network.parameters())


def here(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, which shares its memory; all of it, if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor. Of a sharded one every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A copy of a whole tensor, in the format of another one, and sharded if that is."""
    tensor = tensor.to(other.device, other.dtype, copy=True)
    if not isinstance(other, DTensor):
        return tensor
    # Everybody has all of it: nobody is to send anything.
    parts = distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)
    return parts.clone()  # or the part would keep the whole in memory


class Plain:
    """Makes an ordinary network of a sharded one: to validate, to draw samples, to export.

    Args:
        network: before it is sharded; only its shape is kept.
    """

    def __init__(self, network: nn.Module) -> None:
        empty = {
            id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False)
            for p in network.parameters()
        }
        self.network = copy.deepcopy(network, empty)
        self.empty = dict(self.network.named_parameters())

    @contextmanager
    def filled(self, network: nn.Module, device: torch.device, wanted: bool) -> Iterator[Any]:
        """The network with its whole weights, while the block runs.

        Args:
            network: sharded by now; every process must ask.
            device: where the whole weights are to be.
            wanted: whether this process needs them; else what it gets has none.
        """
        full = dict(self.empty)
        for name, parameter in network.named_parameters():
            tensor = whole(parameter.detach())
            if wanted:
                full[name] = nn.Parameter(tensor.to(device), requires_grad=False)
        self.network.load_state_dict(full, assign=True)
        for buffer in self.network.buffers():
            buffer.data = buffer.data.to(device)
        try:
            yield self.network
        finally:
            self.network.load_state_dict(self.empty, assign=True)
