"""Rows of integers as callers have them: lists, arrays, tensors."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
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
