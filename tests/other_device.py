"""A device that this machine lacks, played by the CPU: it has no float64, and waiting is counted.

Tensors on it are wrappers that name PyTorch's spare device; what is done with them is done with the
CPU tensors inside. So the code under test takes the paths of another device, and the rules of one
hold: tensors of two devices do not mix, float64 does not exist, and whatever needs a number or a
size from the device is a wait.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten


class _Module(backend_registration._DummyBackendModule):
    """What `torch.autocast` asks of a device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def is_initialized(self) -> bool:
        return True


backend_registration._setup_privateuseone_for_python_backend("other", _Module())
DEVICE = torch.device("other", 0)
WAITING = {
    aten._local_scalar_dense,
    aten.equal,
    aten.is_nonzero,
    aten.masked_select,
    aten.nonzero,
    aten.nonzero_numpy,
    aten._unique2,
    aten.unique_consecutive,
    aten.unique_dim,
    aten.bincount,
}
"""What must know numbers on the device before it can go on."""


class Elsewhere(Tensor):
    """A tensor on DEVICE."""

    inside: Tensor
    float64 = False
    """Whether the device has it, as CUDA does."""

    @staticmethod
    def __new__(cls, inside: Tensor) -> Elsewhere:
        if inside.dtype == torch.float64 and not cls.float64:
            raise TypeError("this device has no float64")
        found = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inside.size(),
            strides=inside.stride(),
            storage_offset=inside.storage_offset(),
            dtype=inside.dtype,
            device=DEVICE,
        )
        found.inside = inside
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of OtherDevice")


def inside(x: Any) -> Any:
    """What a tensor on DEVICE holds; all else as it is."""
    return x.inside if isinstance(x, Elsewhere) else x


class OtherDevice(TorchDispatchMode):
    """Makes DEVICE exist; `waits` counts the operations that waited for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given, _ = tree_flatten((args, kwargs))
        ours = [x for x in given if isinstance(x, Elsewhere)]
        asked = kwargs.get("device")
        there = bool(ours) if asked is None else asked.type == DEVICE.type
        if not ours and not there:
            return func(*args, **kwargs)
        moves = func.overloadpacket in (aten._to_copy, aten.copy_)
        for x in given:
            mixed = isinstance(x, Tensor) and not isinstance(x, Elsewhere) and x.ndim > 0
            if mixed and ours and not moves:
                raise AssertionError(f"{func} mixes devices")
        if self._waits(func, args, ours, there):
            self.waits[str(func)] += 1
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        if func.overloadpacket is aten._fused_sdp_choice:
            return 0  # the plain products
        args, kwargs = tree_map(inside, (args, kwargs))
        result = func(*args, **kwargs)
        known = {id(x.inside): x for x in ours}

        def wrapped(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return known.get(id(x)) if id(x) in known else Elsewhere(x)

        return tree_map(wrapped, result) if there else result

    def _waits(self, func: Any, args: Any, ours: list[Elsewhere], there: bool) -> bool:
        packet = func.overloadpacket
        if packet is aten.copy_:
            return bool(ours) and not isinstance(args[0], Elsewhere)
        if packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
            return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        if packet is aten.repeat_interleave:
            return func is aten.repeat_interleave.Tensor
        return bool(ours) and (packet in WAITING or not there)


def moved(module: nn.Module) -> nn.Module:
    """A module on DEVICE, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                inside = Elsewhere(parameter.detach())
                part._parameters[name] = nn.Parameter(inside, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Elsewhere(buffer)
    return module
