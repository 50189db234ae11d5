"""How the blocks of a network are run in training: compiled, their activations kept or not."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def run_blocks(model: nn.Module, *, recompute: bool, compiled: bool) -> None:
    """Change how each of the blocks runs, in place; what they compute stays the same.

    Args:
        model: a network with `blocks`; one without is left alone.
        recompute: keep of a block only what goes in, and compute the rest again for its gradient.
        compiled: by torch.compile.
    """
    for block in getattr(model, "blocks", ()):
        # Below the hooks of a block, so that a sharded one is whole while it runs, also again.
        forward: Any = block.forward
        if compiled:
            forward = torch.compile(forward)
        if recompute:
            # Nothing in a block is random.
            forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
        if compiled or recompute:
            block.forward = forward
