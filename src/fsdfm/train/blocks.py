"""How the blocks of a network are run in training: compiled, their activations kept or not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fsdfm.core.errors import TrainingError
from fsdfm.core.files import one_line


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


@contextmanager
def compiling(compiled: bool) -> Iterator[None]:
    """Blocks are compiled when they first run, forward and back: tell in one line what fails.

    Args:
        compiled: whether they are; else nothing is done.

    Raises:
        TrainingError: they cannot be compiled.
    """
    if not compiled:
        yield
        return
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        why = one_line(getattr(error, "inner_exception", error))
        raise TrainingError(
            f"The blocks cannot be compiled ({why}); run the same command without compile.",
            "compile",
        ) from None
