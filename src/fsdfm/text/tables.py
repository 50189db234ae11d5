"""Texts from parquet and arrow files, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fsdfm.core.errors import DataError
from fsdfm.core.files import one_line
from fsdfm.text.corpus import SHOWN_FIELDS, Advance

TABLES = (".parquet", ".arrow")
ROWS_AT_ONCE = 256


def read_table(path: Path, advance: Advance | None = None, field: str = "text") -> Iterator[str]:
    """Texts of one column; a null is an empty text.

    Args:
        path: .parquet, or .arrow (a stream, as the library datasets saves one, or a file).
        advance: told of progress through the file, in bytes.
        field: the column.

    Raises:
        DataError: no such column of strings, a damaged file, or the package pyarrow is missing.
    """
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"{path} needs the package pyarrow: pip install 'fsdfm[data]'.") from None
    told, size = 0, path.stat().st_size
    try:
        for share, column in _columns(path, field):
            for text in column.to_pylist():
                yield text or ""
            if advance is not None:
                now = int(share * size)
                advance(now - told)
                told = now
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{path} is damaged or no {path.suffix} file ({one_line(error)})."
        ) from None
    if advance is not None:
        advance(size - told)


def _columns(path: Path, field: str) -> Iterator[tuple[float, Any]]:
    """How much of the file is read then, in [0, 1], and the column of some rows."""
    import pyarrow.parquet as parquet

    if path.suffix == ".parquet":
        with parquet.ParquetFile(path) as table:
            _check(path, table.schema_arrow, field)
            rows, done = max(1, table.metadata.num_rows), 0
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=[field]):
                done += batch.num_rows
                yield done / rows, batch.column(0)
        return
    with path.open("rb") as file:
        size = max(1, path.stat().st_size)
        for batch in _batches(path, file, field):
            yield min(1.0, file.tell() / size), batch.column(field)


def _batches(path: Path, file: Any, field: str) -> Iterator[Any]:
    import pyarrow

    if file.read(6) == b"ARROW1":
        with pyarrow.ipc.open_file(file) as table:
            _check(path, table.schema, field)
            for number in range(table.num_record_batches):
                yield table.get_batch(number)
        return
    file.seek(0)
    with pyarrow.ipc.open_stream(file) as stream:
        _check(path, stream.schema, field)
        yield from stream


def _check(path: Path, schema: Any, field: str) -> None:
    """Raises DataError unless there is a column of strings of this name."""
    from pyarrow import types

    kinds = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    texts = [c.name for c in schema if any(kind(c.type) for kind in kinds)]
    if field not in texts:
        names = ", ".join(f'"{name}"' for name in texts[:SHOWN_FIELDS]) or "none"
        raise DataError(
            f'{path}: no column of strings "{field}"; the columns with strings are {names}.',
            "field",
        )
