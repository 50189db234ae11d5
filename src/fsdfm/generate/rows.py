"""Rows of integers as callers have them: lists, arrays, tensors."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fsdfm.core.errors import ConfigError

T = TypeVar("T")
Rows = Sequence[Sequence[T]] | Sequence[NDArray[Any]] | NDArray[Any] | Tensor
"""Samples one after the other, or as a matrix."""


def integer_rows(name: str, rows: Any) -> list[list[int]]:
    """Rows of whatever holds integers as plain ones; bools are 0 and 1 in `frozen` alone.

    Args:
        name: what to call them in an error.
        rows: of a matrix, or one after the other.

    Raises:
        ConfigError: something that is no row, or no integer.
    """
    plain = []
    for number, row in enumerate(_listed(rows, name)):
        plain.append(values := _listed(row, f"{name}[{number}]"))
        for place, value in enumerate(values):
            if isinstance(value, np.generic | Tensor):
                value = values[place] = value.tolist()
            if not isinstance(value, int) or (isinstance(value, bool) and name != "frozen"):
                raise ConfigError(
                    f"fill needs integers, got {name}[{number}][{place}] = {reprlib.repr(value)}"
                    + ("; any will do where nothing is frozen." if name == "token_ids" else ".")
                )
    return plain


def given_rows(token_ids: Any, frozen: Any, vocab_size: int) -> tuple[Tensor, Tensor]:
    """What `Generator.fill` is given.

    Args:
        token_ids: tokens of each sample.
        frozen: which of them are given.
        vocab_size: V.

    Returns:
        Tokens, int64, 0 where none is given, and which are given, bool; both (B, L).

    Raises:
        ConfigError: rows that are no integers, do not fit each other, or are out of the vocabulary.
    """
    ids = integer_rows("token_ids", token_ids)
    given = integer_rows("frozen", frozen)
    lengths = {len(row) for row in (*ids, *given)}
    if len(lengths) != 1 or len(ids) != len(given):
        raise ConfigError("fill needs token_ids and frozen of one shape, all rows as long.")
    if not all(flag in (0, 1) for row in given for flag in row):
        raise ConfigError("fill needs frozen as bools, or as 0 and 1.")
    kept = [
        [token if flag else 0 for token, flag in zip(*rows, strict=True)]
        for rows in zip(ids, given, strict=True)
    ]
    if not all(0 <= token < vocab_size for row in kept for token in row):
        raise ConfigError(f"fill needs token ids from 0 to {vocab_size - 1}.")
    return torch.tensor(kept), torch.tensor(given, dtype=torch.bool)


def _listed(values: Any, name: str) -> list[Any]:
    """A list of what is in a sequence, an array or a tensor."""
    if isinstance(values, np.ndarray | Tensor) and values.ndim > 0:
        found: list[Any] = values.tolist()
        return found
    if isinstance(values, Sequence) and not isinstance(values, str | bytes):
        return list(values)
    raise ConfigError(
        f"fill needs token_ids and frozen as rows of integers, got {name} as "
        f"{type(values).__name__}."
    )
