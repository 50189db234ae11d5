"""AdamW with decay on matrices only, Muon, and the learning-rate schedule."""

from __future__ import annotations

import torch
from torch import Tensor, nn

OPTIMIZERS = ("adamw", "muon")
ADAMW_MOMENTS, MUON_MOMENTS = ("exp_avg", "exp_avg_sq"), ("momentum_buffer",)
MOMENTS = ADAMW_MOMENTS + MUON_MOMENTS
"""What optimizers keep of a parameter, by their names in torch."""


class Optimizer:
    """One optimizer, or two that share the parameters out.

    Args:
        parts: optimizers of different parameters.
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    def set_learning_rate(self, value: float) -> None:
        """For the updates from now on."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = value

    @torch.no_grad()
    def step(self, healthy: Tensor | None = None) -> None:
        """One update, or none.

        Args:
            healthy: scalar, bool, on the parameters' device; where it is false nothing changes,
                neither parameters nor moments, and nobody waits to know.
        """
        for part in self.parts:
            if isinstance(part, torch.optim.Muon):
                _muon_step(part, healthy)
            else:
                # What GradScaler tells a fused optimizer: 1 skips the update.
                part.found_inf = None if healthy is None else (~healthy).float()  # type: ignore[attr-defined]
                part.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What it keeps of a parameter between updates; empty before the first."""
        return {
            name: value
            for part in self.parts
            if parameter in part.state
            for name, value in part.state[parameter].items()
            if name in MOMENTS
        }

    def restore(self, parameter: nn.Parameter, moments: dict[str, Tensor], step: int) -> None:
        """Inverse of `moments`, after so many updates.

        Raises:
            ValueError: moments of another optimizer.
        """
        part = next(part for part in self.parts if _holds(part, parameter))
        wanted = MUON_MOMENTS if isinstance(part, torch.optim.Muon) else ADAMW_MOMENTS
        if moments.keys() != set(wanted):
            raise ValueError("the state is another optimizer's")
        part.state[parameter] = dict(moments)
        if wanted == ADAMW_MOMENTS:
            counted = torch.tensor(float(step), device=parameter.device)
            part.state[parameter]["step"] = counted


def _muon_step(part: torch.optim.Muon, healthy: Tensor | None) -> None:
    """One update, or none: Muon has no way to skip one, so what it changes is put back."""
    if healthy is None:
        part.step()  # type: ignore[no-untyped-call]
        return
    before = []
    for parameter in (p for group in part.param_groups for p in group["params"]):
        if parameter.grad is not None:
            momentum = part.state[parameter].get("momentum_buffer")
            instead = torch.zeros_like(parameter) if momentum is None else momentum
            # The buffer moves towards the gradient: towards itself it stays, to the last bit.
            parameter.grad = torch.where(healthy, parameter.grad, instead)
            before.append((parameter, parameter.clone()))
    part.step()  # type: ignore[no-untyped-call]
    for parameter, old in before:
        parameter.copy_(torch.where(healthy, parameter, old))


def _holds(part: torch.optim.Optimizer, parameter: nn.Parameter) -> bool:
    return any(parameter is p for group in part.param_groups for p in group["params"])


def make_optimizer(model: nn.Module, weight_decay: float, kind: str = "adamw") -> Optimizer:
    """The optimizer of a network's trainable parameters.

    `adamw`: AdamW (0.9, 0.95); biases and norm weights are not decayed. `muon`: Muon on the
    matrices of the blocks, at AdamW's learning rate (its steps are scaled to AdamW's size), and
    AdamW on the rest.

    Args:
        model: whose parameters to train.
        weight_decay: for matrices.
        kind: one of OPTIMIZERS.

    Source: Muon, arXiv 2502.16982 and 2504.08451.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inner = {name for name, p in named if kind == "muon" and p.ndim == 2 and _in_block(name)}
    rest = [p for name, p in named if name not in inner]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
    if not inner:
        return Optimizer(adamw)
    muon = torch.optim.Muon(
        [p for name, p in named if name in inner],
        lr=0.0,
        weight_decay=weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return Optimizer(muon, adamw)


def _in_block(name: str) -> bool:
    """A product of the blocks, not what time and step size say to them."""
    return name.startswith("blocks.") and "odulation" not in name and "fuser" not in name
