"""FLOPs of a network's parts, by formula: 2 for a multiply-add, products alone."""

from __future__ import annotations

from dataclasses import dataclass

from fsdfm.model.causal import CausalConfig
from fsdfm.model.config import ModelConfig
from fsdfm.model.layers import SINUSOIDS
from fsdfm.model.transformer import MLP_RATIO


@dataclass(frozen=True, slots=True)
class _Block:
    """What one block multiplies for a position, and for a sequence's condition."""

    before: int
    """Weights of queries, keys and values."""
    after: int
    """Weights of what comes after attention: its output, and the MLP."""
    heads: int
    """Width of all heads together."""
    modulations: int
    """Rows of width D that a condition becomes."""


def _block(config: ModelConfig) -> _Block:
    width = config.hidden_size
    if not isinstance(config, CausalConfig):
        return _Block(3 * width**2, (1 + 2 * MLP_RATIO) * width**2, width, 6)
    heads, keys = (count * config.head_size for count in (config.heads, config.kv_heads))
    return _Block(width * (heads + 2 * keys), width * (heads + 3 * config.mlp_size), heads, 4)


def _passed(config: ModelConfig, length: int) -> int:
    """Positions that pass the blocks: a start token comes before the others."""
    return length + (isinstance(config, CausalConfig) and config.start_id is not None)


def body_flops(config: ModelConfig, batch: int, length: int) -> int:
    """FLOPs of one call of the body: its linear layers and attention, 2 for a multiply-add.

    A position takes 2 for each weight of every block (D^2 (4 + 2 MLP_RATIO) in the published
    network), and 4 L D for attention; a sequence takes the embeddings of time and step size and the
    modulations. Norms, rotations and activations are left out.

    Args:
        config: shape of the network.
        batch: sequences, B.
        length: positions, L.
    """
    width, cond, kind = config.hidden_size, config.cond_size, config.step_embedding
    block, passed = _block(config), _passed(config, length)
    position = config.blocks * (2 * (block.before + block.after) + 4 * passed * block.heads)
    scalars = 1 if kind == "none" else 2
    sequence = scalars * 2 * (SINUSOIDS * cond + cond**2)
    sequence += 2 * cond * width * (block.modulations * config.blocks + 2)
    if kind == "raw":
        sequence += 2 * (2 * cond) ** 2 + (config.blocks + 1) * 2 * (2 * cond) * cond
    return batch * (passed * position + sequence)


def last_block_flops(config: ModelConfig, length: int) -> int:
    """FLOPs of a position in a block after its queries, keys and values: what a still row skips.

    Args:
        config: shape of the network.
        length: positions, L.
    """
    if isinstance(config, CausalConfig) and config.attention == "causal":
        return 0  # every row is computed there
    block = _block(config)
    return 2 * block.after + 4 * _passed(config, length) * block.heads


def head_flops(config: ModelConfig, rows: int) -> int:
    """FLOPs of the head on some rows."""
    return 2 * rows * config.hidden_size * config.embedding_rows


def joint_flops(config: ModelConfig, rows: int) -> int:
    """FLOPs of the joint head on some rows; 0 without one."""
    out = 4 * rows * config.hidden_size**2 if config.neighbours else 0
    return joint_input_flops(config, rows) + out


def joint_input_flops(config: ModelConfig, rows: int) -> int:
    """Of these, what reads the rows and the tokens around them."""
    around = 2 * config.neighbours + 1
    return 4 * rows * around * config.hidden_size**2 if config.neighbours else 0
