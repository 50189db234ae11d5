"""What is prepared: files, directories of files, data sets of the Hugging Face Hub.

All kinds give documents as `read_documents` does, so that the same texts give the same shards.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from fsdfm.core.errors import ConfigError, DataError
from fsdfm.core.files import file_digest, one_line
from fsdfm.text.corpus import COMPRESSIONS, SUFFIXES, Advance, check_files, pieces, read_documents
from fsdfm.text.tables import TABLES, read_table

HUB = "hf:"
"""What the name of a data set of the Hub begins with."""
KINDS = (*(kind + packed for kind in SUFFIXES for packed in COMPRESSIONS), *TABLES)
"""Ends of the names of files that are read from a directory."""
_HUB_NAME = re.compile(r"hf:(?P<path>[\w.-]+/[\w.-]+|[\w.-]+)(:(?P<name>[^@:]+))?(@(?P<split>.+))?")


@dataclass(frozen=True, slots=True)
class Source:
    """Documents from one place."""

    name: str
    files: tuple[Path, ...] = ()
    """In the order in which they are read; none for a data set of the Hub."""
    weight: float = 1.0
    """How often each document is seen in training."""

    @property
    def bytes(self) -> int:
        """Of its files, as they are stored; 0 for a data set of the Hub."""
        return sum(path.stat().st_size for path in self.files)

    def documents(self, advance: Advance | None, field: str) -> Iterator[Iterator[str]]:
        """Its documents, each as an iterator over pieces of its text; see `read_documents`."""
        if not self.files:
            return _from_the_hub(self.name, field)
        return chain.from_iterable(_read(path, advance, field) for path in self.files)

    def describe(self) -> list[dict[str, Any]]:
        """Names, sizes and digests of its files."""
        if not self.files:
            return [{"name": self.name}]
        return [
            {"name": path.name, "bytes": path.stat().st_size, "sha256": file_digest(path)}
            for path in self.files
        ]


def find_sources(places: Sequence[str | Path], weights: Sequence[float] = ()) -> list[Source]:
    """Look at every place before any work is done.

    Args:
        places: files, directories (all files of known kinds in them, by name), or names of data
            sets of the Hub: hf:org/name, with :configuration and @split where it has several.
        weights: one for each place; none: all 1.

    Raises:
        DataError: a place that is missing, empty or of an unknown kind.
        ConfigError: another number of weights.
    """
    if weights and len(weights) != len(places):
        raise ConfigError(
            f"weights must be as many as the sources ({len(places)}), got {len(weights)}.",
            "weights",
        )
    found = []
    for place in places:
        try:
            found.append(_find(place))
        except OSError as error:
            raise DataError(f"Cannot read {place} ({one_line(error)}).") from None
    if not found:
        check_files([])
    chosen = weights or [1.0] * len(found)
    return [Source(s.name, s.files, w) for s, w in zip(found, chosen, strict=True)]


def _find(place: str | Path) -> Source:
    if isinstance(place, str) and place.startswith(HUB):
        if _HUB_NAME.fullmatch(place) is None:
            raise DataError(f"{place} names no data set: write hf:org/name:configuration@split.")
        return Source(place)
    path = Path(place)
    if not path.is_dir():
        if not path.exists() and re.fullmatch(r"[\w-]+/[\w-]+", str(place)):
            raise DataError(f"{place} does not exist; a data set of the Hub is hf:{place}.")
        if path.suffix not in TABLES:
            check_files([path])
        elif not path.is_file():
            raise DataError(f"{path} does not exist.")
        return Source(str(path), (path,))
    files = tuple(_files(path))
    if not files:
        raise DataError(f"{path} holds no file that can be read; those are {', '.join(KINDS)}.")
    if texts := [file for file in files if file.suffix not in TABLES]:
        check_files(texts)
    return Source(str(path), files)


def _files(directory: Path) -> Iterator[Path]:
    """Files of known kinds in a directory and below, by name; what is hidden is left out.

    Raises:
        DataError: a data set with several splits.
        OSError: a directory that may not be read.
    """
    found = []
    for place, below, names in os.walk(directory, onerror=_raise):
        if "dataset_dict.json" in names:
            raise DataError(
                f"{place} is a data set with the splits {', '.join(sorted(below))}: name one of "
                "these directories."
            )
        below[:] = [name for name in below if not name.startswith(".")]
        if "state.json" in names:  # saved by `datasets`, whose caches repeat rows, or number them
            names = [name for name in names if not name.startswith("cache-")]
        found += [
            Path(place, name)
            for name in names
            if name.endswith(KINDS) and not name.startswith(".") and Path(place, name).is_file()
        ]
    yield from sorted(found)


def _raise(error: OSError) -> None:
    raise error


def _read(path: Path, advance: Advance | None, field: str) -> Iterator[Iterator[str]]:
    if path.suffix in TABLES:
        return (pieces(iter([text])) for text in read_table(path, advance, field))
    return read_documents(path, advance, field=field)


def _from_the_hub(place: str, field: str) -> Iterator[Iterator[str]]:
    """Documents of a data set, streamed: nothing but what is read is downloaded."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"{place} needs the package datasets: pip install 'fsdfm[data]'.") from None
    found = _HUB_NAME.fullmatch(place)
    assert found is not None
    try:
        rows = datasets.load_dataset(
            found["path"], found["name"], split=found["split"] or "train", streaming=True
        )
        for number, row in enumerate(rows, start=1):
            text = row.get(field)
            if text is None and field in row:
                text = ""
            if not isinstance(text, str):
                raise DataError(
                    f'{place}, row {number}: no string under "{field}"; its fields are '
                    f"{', '.join(row)}.",
                    "field",
                )
            yield pieces(iter([text]))
    except DataError:
        raise
    except Exception as error:  # of the library, the network, or the Hub
        raise DataError(
            f"Cannot read {place} ({one_line(error)}): check the name, the configuration, the split"
            " and the network, then run the same command again."
        ) from None
