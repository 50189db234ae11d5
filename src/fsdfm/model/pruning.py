"""Fewer layers and neurons in a network, with what they said made up for by those that stay.

Each block that stays keeps the neurons without which it can say least. Its last matrix is solved
anew, by least squares: it says again what the other neurons said, what the layers said that are
left out behind it, and what blocks before it lost. It aims at what the whole network has there.

Shapes: B sequences, L positions, D hidden, M neurons of a block.

Sources: Optimal Brain Surgeon (Hassibi and Stork, 1993) for choosing and making up;
arXiv 2407.14679 for layers and neurons together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fsdfm.core.errors import ConfigError
from fsdfm.core.progress import Progress
from fsdfm.flow.grid import SMALLEST_STEP
from fsdfm.model.causal import CausalBlock, CausalNetwork
from fsdfm.model.rounding import Example, add_products
from fsdfm.model.transformer import FlowNetwork

DAMPING = 1e-3
"""Added to the diagonal, as a part of its mean: few examples know little of rare directions."""
AT_ONCE = 16
"""Neurons that go before the others are asked again."""


def fewest_lost(weight: Tensor, gram: Tensor, missing: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which columns of W to keep, and what they become.

        minimise E |(y + m) - W' a|^2, where y = W a, over columns of W' that stay

    Columns go by what each costs once the others have made up for it, a few at a time.

    Args:
        weight: W, (D, M).
        gram: sum of a a^T over the inputs, (M, M).
        missing: sum of m a^T, (D, M): what the products should have said beside y.
        count: columns that stay.

    Returns:
        Their numbers, ascending, (count,); W' without the others, (D, count).
    """
    gram = gram.double()
    damping = DAMPING * gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    inverse = torch.linalg.inv(gram + damping * torch.eye(len(gram), dtype=gram.dtype))
    left, kept = weight.double(), torch.arange(len(gram))
    while len(kept) > count:
        cost = left.square().sum(0) / inverse.diagonal()
        gone = cost.topk(min(AT_ONCE, len(kept) - count), largest=False).indices
        rest = torch.ones(len(kept), dtype=torch.bool)
        rest[gone] = False
        pull = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, rest])
        left = left[:, rest] - left[:, gone] @ pull
        inverse = inverse[rest][:, rest] - inverse[rest][:, gone] @ pull
        kept = kept[rest]
    return kept, (left + missing.double()[:, kept] @ inverse).to(weight.dtype)


def prunable(
    model: FlowNetwork, mlp_size: int | None, layers: Sequence[int] | None = None
) -> CausalNetwork:
    """The network, if it can be pruned to these layers and so many neurons in each.

    Raises:
        ConfigError: another kind of network, or layers or neurons that it does not have.
    """
    if not isinstance(model, CausalNetwork):
        raise ConfigError("Its MLPs are not gated: only networks from fsdfm adapt can be pruned.")
    size = model.config.mlp_size
    if mlp_size is not None and not 1 <= mlp_size <= size:
        raise ConfigError(
            f"mlp_size must be from 1 to {size}, which the model has, got {mlp_size}.", "mlp_size"
        )
    count = model.config.blocks
    if layers is not None and (not layers or [*layers] != sorted({*layers} & {*range(count)})):
        raise ConfigError(
            f"layers must be some of 0 to {count - 1}, ascending, got {list(layers)}.", "layers"
        )
    return model


@torch.no_grad()
def pruned(
    model: FlowNetwork,
    examples: Sequence[Example],
    *,
    layers: Sequence[int] | None = None,
    mlp_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> CausalNetwork:
    """The network with fewer layers, fewer neurons in each, or both; all else is as it was.

    Args:
        model: a network that `fsdfm adapt` made, which stays as it is.
        examples: batches to look at: some ten thousand rows, or they are learned by heart.
        layers: those that stay, ascending; None: all.
        mlp_size: neurons that each block keeps; None: all.
        dtype: of the matrix products that lead to the inputs.
        progress: told ("pruning", blocks done, blocks that stay).

    Raises:
        ConfigError: another kind of network, no examples, layers or neurons that it does not have,
            or inputs that are not finite.
    """
    model = prunable(model, mlp_size, layers)
    if not examples:
        raise ConfigError("Pruning needs at least one example.")
    count = model.config.blocks
    stay = tuple(range(count)) if layers is None else tuple(layers)
    size = mlp_size or model.config.mlp_size
    small = CausalNetwork(replace(model.config, blocks=len(stay), mlp_size=size)).eval()
    small.load_state_dict(_kept_as_they_are(model, stay), strict=False)
    behind = [_Behind.none(model, example) for example in examples]
    products = torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)
    for place, (number, until) in enumerate(zip(stay, (*stay[1:], count), strict=True)):
        whole, narrow = model.blocks[number], small.blocks[place]
        assert isinstance(whole, CausalBlock) and isinstance(narrow, CausalBlock)
        start = number if place else 0
        with products:
            gram, missing = _read_and_missing(whole, model.blocks[start:until], behind)
        if not (gram.isfinite().all() and missing.isfinite().all()):
            raise ConfigError(f"Pruning met inputs of layer {number} that are not finite.")
        kept, weight = fewest_lost(whole.mlp_out.weight, gram, missing, size)
        gate, up = whole.mlp_in.weight.chunk(2)
        narrow.mlp_in.weight.copy_(torch.cat((gate[kept], up[kept])))
        narrow.mlp_out.weight.copy_(weight)
        with products:
            for each in behind:
                each.ours = each.through(narrow, each.ours)
        if progress is not None:
            progress("pruning", place + 1, len(stay))
    return small


@dataclass(slots=True)
class _Behind:
    """What an example is behind some of the blocks."""

    exact: Tensor
    """Of the whole network, (B, L, D)."""
    ours: Tensor
    """Of the pruned one, (B, L, D)."""
    condition: Tensor
    tables: tuple[Tensor, Tensor]
    """Of the rotary positions."""

    @classmethod
    def none(cls, model: CausalNetwork, example: Example) -> _Behind:
        """Before the first block."""
        t = example.t.float()
        x, c, cos, sin = model.entered(example.x_t, t, torch.full_like(t, SMALLEST_STEP))
        return cls(x, x, c, (cos, sin))

    def through(self, block: nn.Module, x: Tensor) -> Tensor:
        """x behind one block more."""
        y: Tensor = block(x, self.condition, *self.tables)
        return y


def _read_and_missing(
    block: CausalBlock, whole: Iterable[nn.Module], behind: Sequence[_Behind]
) -> tuple[Tensor, Tensor]:
    """Sums of a a^T and of m a^T, where a is what the last matrix of a block reads behind pruned
    blocks, and m is what is missing after it there.

    Args:
        block: as it is in the whole network.
        whole: blocks of the whole network that its rows pass meanwhile, `block` among them; they
            are behind these afterwards.
        behind: the examples.
    """
    width, size = block.mlp_out.weight.shape
    gram, missing, read = torch.zeros(size, size), torch.zeros(width, size), list[Tensor]()
    handle = block.mlp_out.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    try:
        for each in behind:
            for one in whole:
                each.exact = each.through(one, each.exact)
            read.clear()
            m, a = each.exact - each.through(block, each.ours), read.pop()
            add_products(gram, a, a)
            add_products(missing, m, a)
    finally:
        handle.remove()
    return gram, missing


def _kept_as_they_are(model: CausalNetwork, stay: Sequence[int]) -> dict[str, Tensor]:
    """Tensors that pruning leaves alone, by their new names."""
    found = {}
    for name, weight in model.state_dict().items():
        room, _, rest = name.partition(".")
        if room == "blocks":
            number, _, part = rest.partition(".")
            if int(number) not in stay or part.startswith(("mlp_in.", "mlp_out.")):
                continue
            name = f"blocks.{stay.index(int(number))}.{part}"
        found[name] = weight
    return found
