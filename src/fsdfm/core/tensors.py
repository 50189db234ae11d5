"""A safetensors file, written tensor by tensor: no more than one of them need be in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""What the format calls them."""
UNKNOWN = "0" * 64
"""Stands for a checksum until the tensors have been seen."""
Shapes = Mapping[str, tuple["torch.dtype", Sequence[int]]]


def write_tensors(
    path: Path, shapes: Shapes, tensors: Iterable[Tensor], metadata: Mapping[str, str], begin: bytes
) -> None:
    """Write a file that safetensors reads.

    Args:
        path: the file.
        shapes: dtypes and shapes by name, in the order of the tensors.
        tensors: each is asked for when the one before is written.
        metadata: one of its texts has UNKNOWN in it, which becomes the SHA-256 of what is written.
        begin: what the SHA-256 starts with, before the bytes of the tensors.

    Raises:
        OSError: the file cannot be written.
        KeyError: a dtype that is none of CODES.

    Source: the format's description, https://github.com/huggingface/safetensors.
    """
    from fsdfm.core.files import digest, tensor_bytes

    entries, end = {}, 0
    for name, (dtype, shape) in shapes.items():
        start, size = end, dtype.itemsize
        for each in shape:
            size *= each
        end = start + size
        code = CODES[str(dtype).removeprefix("torch.")]
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps({"__metadata__": dict(metadata), **entries}).encode()
    header += b" " * (-len(header) % 8)  # so that tensors are where a processor likes them
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)

        def written() -> Iterator[memoryview]:
            for data in tensor_bytes(tensors):
                file.write(data)
                yield data

        found = digest(chain([begin], written()))
        assert file.tell() == 8 + len(header) + end
        file.seek(8)
        file.write(header.replace(UNKNOWN.encode(), found.encode(), 1))
