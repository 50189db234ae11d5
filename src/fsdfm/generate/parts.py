"""Results that are written in parts, and put together in order when all are there.

Beside the results OUT stands a directory OUT.parts with a file of JSON lines for each process. A
kill loses at most the line that it cuts. The results appear whole, and then the parts go.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fsdfm.core.errors import ConfigError, DataError
from fsdfm.core.files import replacing

PARQUET = ".parquet"
START = b'{"id": "'
"""How the line of a result begins."""
ROWS = 1024
"""Rows of a parquet file that are held together."""


def check_kind(out: Path) -> None:
    """Raises ConfigError where results cannot be kept: parquet without pyarrow, or no file."""
    if out.exists() and not out.is_file():
        raise ConfigError(
            f"{out} is no regular file: results are read back when the same command goes on, so "
            "give a file.",
            "out",
        )
    if out.suffix == PARQUET and importlib.util.find_spec("pyarrow") is None:
        raise ConfigError("Parquet needs pyarrow: pip install 'fsdfm[data]' brings it.")


class Parts:
    """The parts of a file of results.

    Args:
        out: the file.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.directory = Path(f"{out}.parts")

    def own(self, rank: int) -> Path:
        """The part of a process."""
        return self.directory / f"{rank}.jsonl"

    def done(self) -> set[str]:
        """Ids of all results that there are.

        Raises:
            DataError: a line that is no result.
        """
        written = (record["id"] for record in self._written())
        return {*written, *(name for name, *_ in self._lines())}

    def finish(self, order: Sequence[str], *, logprobs: bool) -> None:
        """Put the parts together, and remove them.

        Args:
            order: ids as they are to follow each other; results that are there stay before them.
            logprobs: whether results have them.
        """
        lines = {name: (path, at, size) for name, path, at, size in self._lines()}
        if not lines and self.out.exists():
            shutil.rmtree(self.directory, ignore_errors=True)
            return
        records = self._ordered(order, lines)
        with replacing(self.out) as partial:
            if self.out.suffix == PARQUET:
                _write_parquet(partial, records, logprobs=logprobs)
            else:
                with partial.open("wb") as file:
                    for record in records:
                        file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        shutil.rmtree(self.directory, ignore_errors=True)

    def _ordered(
        self, order: Sequence[str], lines: Mapping[str, tuple[Path, int, int]]
    ) -> Iterator[Mapping[str, Any]]:
        there = set()
        for record in self._written():
            there.add(record["id"])
            yield record
        with contextlib.ExitStack() as stack:
            files = {p: stack.enter_context(p.open("rb")) for p, *_ in lines.values()}
            for name in dict.fromkeys((*order, *lines)):  # also what is asked for no more
                if name in there or name not in lines:
                    continue
                path, at, size = lines[name]
                files[path].seek(at)
                yield json.loads(files[path].read(size))

    def _written(self) -> Iterator[Mapping[str, Any]]:
        """What the results hold already."""
        if not self.out.exists():
            return
        if self.out.suffix == PARQUET:
            yield from _read_parquet(self.out)
            return
        yield from (record for record, _, _ in results(self.out))

    def _lines(self) -> list[tuple[str, Path, int, int]]:
        """Id, file, first byte and size of every whole line of the parts."""
        return [
            (record["id"], path, at, size)
            for path in sorted(self.directory.glob("*.jsonl"))
            for record, at, size in results(path)
        ]


def results(path: Path) -> Iterator[tuple[Mapping[str, Any], int, int]]:
    """Result, first byte and size of every whole line of a file, if it is there.

    Raises:
        DataError: a line that is no result, or a last one that is not the beginning of one.
    """
    if not path.exists():
        return
    at = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            found = None
            if line.endswith(b"\n"):
                with contextlib.suppress(ValueError, RecursionError):
                    found = json.loads(line)
            elif START.startswith(line[: len(START)]):
                return  # a kill has cut it
            if not isinstance(found, dict) or not {"id", "nfe"} <= found.keys():
                raise DataError(
                    f"{path}, line {number} is no result of a request: give another place for "
                    "results."
                )
            yield found, at, len(line)
            at += len(line)


def _read_parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            if "id" not in file.schema_arrow.names:
                raise DataError(f"{path} holds no results: give another place for them.")
            for batch in file.iter_batches(ROWS):
                yield from batch.to_pylist()
    except ArrowException:
        raise DataError(f"{path} is no parquet file: give another place for results.") from None


def _write_parquet(path: Path, records: Iterator[Mapping[str, Any]], *, logprobs: bool) -> None:
    import pyarrow
    from pyarrow import parquet

    whole, real, text = pyarrow.int64(), pyarrow.float64(), pyarrow.string()
    kinds = {"id": text, "text": text, "tokens": whole, "nfe": whole, "seed": whole}
    kinds |= {"seconds": real, "tokens_per_second": real}
    kinds |= {"spans": pyarrow.list_(pyarrow.list_(whole)), "finish": text}
    if logprobs:
        kinds |= {"token_ids": pyarrow.list_(whole), "logprobs": pyarrow.list_(real)}
    schema = pyarrow.schema(list(kinds.items()))
    with parquet.ParquetWriter(path, schema) as writer:
        rows: list[Mapping[str, Any]] = []
        for record in records:
            rows.append(record)
            if len(rows) == ROWS:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema))
                rows = []
        writer.write_table(pyarrow.Table.from_pylist(rows, schema))
