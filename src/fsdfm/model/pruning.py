"""Fewer neurons in the gated MLPs of a network, chosen and made up for by what they are used for.

A block keeps the neurons without which it can say least of what it said, and its output matrix
says again, with those that stay, what the others said. It also makes up for what the blocks before
it lost: it answers with what the whole network has there.

Shapes: B sequences, L positions, D hidden, M neurons of a block.

Sources: Optimal Brain Surgeon (Hassibi and Stork, 1993) for choosing and making up;
arXiv 2407.14679 for fewer neurons instead of fewer layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fsdfm.core.errors import ConfigError
from fsdfm.core.progress import Progress
from fsdfm.flow.grid import SMALLEST_STEP
from fsdfm.model.causal import CausalBlock, CausalNetwork
from fsdfm.model.rounding import Example
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


@torch.no_grad()
def pruned(
    model: FlowNetwork,
    examples: Sequence[Example],
    mlp_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> CausalNetwork:
    """The network with fewer neurons in each block; all else is as it was.

    Args:
        model: a network that `fsdfm adapt` made, which stays as it is.
        examples: batches to look at, at least some thousand rows.
        mlp_size: neurons that each block keeps.
        dtype: of the matrix products that lead to the inputs.
        progress: told ("pruning blocks", blocks done, blocks in all).

    Raises:
        ConfigError: another kind of network, no examples, not fewer neurons than it has, or inputs
            that are not finite.
    """
    if not isinstance(model, CausalNetwork):
        raise ConfigError("Its MLPs are not gated: only networks from fsdfm adapt can be pruned.")
    if not examples:
        raise ConfigError("Pruning needs at least one example.")
    if not 1 <= mlp_size < model.config.mlp_size:
        raise ConfigError(
            f"mlp_size must be less than the {model.config.mlp_size} that the model has, "
            f"and at least 1, got {mlp_size}.",
            "mlp_size",
        )
    small = CausalNetwork(replace(model.config, mlp_size=mlp_size)).eval()
    rest = {name: w for name, w in model.state_dict().items() if not _of_an_mlp(name)}
    small.load_state_dict(rest, strict=False)
    behind = [_Behind.none(model, example) for example in examples]
    products = torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)
    for number, (whole, narrow) in enumerate(zip(model.blocks, small.blocks, strict=True)):
        assert isinstance(whole, CausalBlock) and isinstance(narrow, CausalBlock)
        with products:
            gram, missing = _read_and_missing(whole, behind)
        if not (gram.isfinite().all() and missing.isfinite().all()):
            raise ConfigError(f"Pruning met inputs of block {number} that are not finite.")
        kept, weight = fewest_lost(whole.mlp_out.weight, gram, missing, mlp_size)
        gate, up = whole.mlp_in.weight.chunk(2)
        narrow.mlp_in.weight.copy_(torch.cat((gate[kept], up[kept])))
        narrow.mlp_out.weight.copy_(weight)
        with products:
            for each in behind:
                each.ours = each.through(narrow, each.ours)
        if progress is not None:
            progress("pruning blocks", number + 1, len(model.blocks))
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
        tokens = model.shifted(example.x_t)
        x, h = model.vocab_embed(tokens), torch.full_like(example.t, SMALLEST_STEP)
        return cls(x, x, model.condition(example.t, h), model.rotary_emb.tables(tokens.shape[1]))

    def through(self, block: CausalBlock, x: Tensor) -> Tensor:
        """x behind one block more."""
        y: Tensor = block(x, self.condition, *self.tables)
        return y


def _read_and_missing(block: CausalBlock, behind: Sequence[_Behind]) -> tuple[Tensor, Tensor]:
    """Sums of a a^T and of m a^T, where a is what the last matrix of a whole block reads behind
    pruned blocks, and m is what is missing after it there.

    Rows of the whole network are behind this block afterwards.
    """
    width, size = block.mlp_out.weight.shape
    gram, missing, read = torch.zeros(size, size), torch.zeros(width, size), list[Tensor]()
    handle = block.mlp_out.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    try:
        for each in behind:
            each.exact = each.through(block, each.exact)
            read.clear()
            m = (each.exact - each.through(block, each.ours)).float().flatten(0, -2)
            a = read.pop().float().flatten(0, -2)
            with torch.autocast("cpu", enabled=False):
                gram.addmm_(a.T, a)
                missing.addmm_(m.T, a)
    finally:
        handle.remove()
    return gram, missing


def _of_an_mlp(name: str) -> bool:
    return name.startswith("blocks.") and name.split(".")[2] in ("mlp_in", "mlp_out")
