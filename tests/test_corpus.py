"""Documents from files."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from fsdfm.core.errors import DataError
from fsdfm.text.corpus import PIECE_CHARACTERS, READ_BYTES, check_files, read_documents

DOCUMENTS = ["It was the best\n\nof times,\n", "  naïve – 東京\t😀\r\nend", "a\u2028b\u0085c\x1d"]


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


PACKINGS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


def documents(path: Path) -> list[str]:
    return ["".join(pieces) for pieces in read_documents(path)]


def refusal(path: Path) -> str:
    """The message that a file is refused with."""
    with pytest.raises(DataError) as caught:
        check_files([path])
        documents(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_every_kind_of_file_gives_the_same_documents(
    tmp_path: Path, kind: str, packing: str
) -> None:
    if kind == ".txt":
        text = "\f".join(DOCUMENTS)
    else:
        text = "\n".join(json.dumps({"id": 1, "text": d}, ensure_ascii=False) for d in DOCUMENTS)
    path = tmp_path / f"a.b{kind}{packing}"
    path.write_bytes(PACKINGS[packing](text.encode()))
    check_files([path])
    assert documents(path) == DOCUMENTS


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_members_and_frames_are_read_one_after_the_other(tmp_path: Path, packing: str) -> None:
    pack, path = PACKINGS[packing], tmp_path / f"a.txt{packing}"
    data = "é1\f".encode()
    skipped = struct.pack("<II", 0x184D2A50, 3) + b"abc" if packing == ".zst" else b""
    # The second member begins within a character.
    path.write_bytes(pack(data + data[:1]) + skipped + pack(b"") + pack(data[1:] + b"end"))
    assert documents(path) == ["é1", "é1", "end"]


def test_zstd_with_a_long_window_is_read(tmp_path: Path) -> None:
    long = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    packed = io.BytesIO()
    with zstandard.ZstdCompressor(compression_params=long).stream_writer(
        packed, closefd=False
    ) as writer:
        writer.write(b"text")
    path = tmp_path / "a.txt.zst"
    path.write_bytes(packed.getvalue())
    assert documents(path) == ["text"]


def test_form_feeds_part_documents_wherever_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\fone\f\ftwo\n\f", encoding="utf-8")
    assert documents(path) == ["", "one", "", "two\n", ""]


def test_a_document_left_in_the_middle_does_not_run_into_the_next(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n" * PIECE_CHARACTERS + "\ftwo", encoding="utf-8")
    reading = read_documents(path)
    assert next(next(reading)).startswith("one")
    assert list(next(reading)) == ["two"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffa\ufeffb".encode())
    assert documents(path) == ["a\ufeffb"]
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"text": "a"}\r\n\r\n{"text": "b"}'.encode())
    assert documents(path) == ["a", "b"]


@pytest.mark.parametrize("line", ["tell me, Muse\n", "é"])
def test_bounded_pieces_make_up_the_document(tmp_path: Path, line: str) -> None:
    text = line * (5 * PIECE_CHARACTERS // 2 // len(line))
    paths = {name: tmp_path / f"a{name}" for name in (".txt", ".jsonl", ".txt.gz", ".txt.zst")}
    for name, path in paths.items():
        data = json.dumps({"text": text}) if "jsonl" in name else text
        path.write_bytes(PACKINGS[path.suffix if "txt." in name else ""](data.encode()))
    cut = {name: list(next(read_documents(path))) for name, path in paths.items()}
    pieces = cut[".txt"]
    assert len(pieces) == 3
    assert "".join(pieces) == text
    assert all(len(piece) <= PIECE_CHARACTERS for piece in pieces)
    assert all(piece.endswith(line[-1]) for piece in pieces)
    assert all(other == pieces for other in cut.values())


@pytest.mark.parametrize("before", [1, 2, 3])
def test_characters_cross_the_read_border(tmp_path: Path, before: int) -> None:
    path, text = tmp_path / "a.txt", "x" * (READ_BYTES - before) + "😀" + "y"
    path.write_bytes(text.encode())
    assert "".join(documents(path)) == text


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (b"caf", b"\xe9 au lait"),
        ("\ufeffcaf".encode(), b"\xe9 au lait"),
        (b"x" * (READ_BYTES - 2), b"\xf0\x9f!"),
        (b"x" * READ_BYTES + "é".encode(), b"\xff"),
        (b"x", b"\xf0\x9f\x98"),
    ],
)
def test_bytes_that_are_not_utf8_are_refused_with_their_offset(
    tmp_path: Path, good: bytes, bad: bytes, packing: str
) -> None:
    path = tmp_path / f"a.txt{packing}"
    path.write_bytes(PACKINGS[packing](good + bad))
    assert re.search(rf"not UTF-8.*byte {len(good)}\b", refusal(path))


@pytest.mark.parametrize("where", [5, READ_BYTES + 7])
def test_binary_is_refused_with_its_offset(tmp_path: Path, where: int) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * where + b"\0rest")
    assert re.search(rf"binary.*offset {where}\b", refusal(path))


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ('{"text": "cut', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("1" * 5_000, "not JSON"),
        ('{"body": "a"}', '"text"'),
        ('{"text": 7}', '"text"'),
        ('["text"]', '"text"'),
        ('{"id": 7, "body": "a", "ti\\ntle": "b"}', 'fields with a string are "body", "ti\\ntle".'),
        ('{"id": 7}', "fields with a string are none."),
        (json.dumps({f"f{i}": "" for i in range(10)}), '"f6", "f7" and 2 more.'),
        (r'{"text": "a\ud83d"}', "surrogate"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path: Path, line: str, wrong: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "a"}}\n\n{line}\n{{"text": "b"}}\n', encoding="utf-8")
    message = refusal(path)
    assert wrong in message
    assert "line 3:" in message


def test_the_text_may_be_in_another_field(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": 7, "content": "one"}\n{"content": "two"}\n', encoding="utf-8")
    assert ["".join(d) for d in read_documents(path, field="content")] == ["one", "two"]
    with pytest.raises(DataError, match=r'line 1: no string under "body".*are "content"'):
        list(read_documents(path, field="body"))


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_cut_or_foreign_archive_is_refused(tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"a.txt{packing}"
    data = PACKINGS[packing](os.urandom(3000).hex().encode())
    for cut in (3, 12, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        assert f"cut short or not a {packing} file" in refusal(path)
    path.write_bytes(data + data[:20])  # a second one that is cut
    assert "cut short" in refusal(path)
    path.write_bytes(b"plain text, wrongly named")
    assert f"not a {packing} file" in refusal(path)


def test_files_that_cannot_be_read_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No input: name"):
        check_files([])
    assert "does not exist" in refusal(tmp_path / "missing.txt")
    assert "is a directory" in refusal(tmp_path)
    (tmp_path / "empty.txt").touch()
    assert "is empty" in refusal(tmp_path / "empty.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    assert "not a regular file" in refusal(tmp_path / "pipe.txt")
    for name in ("a.pdf", "a", "a.gz", "a.txt.bz2", "txt"):
        (tmp_path / name).write_text("text", encoding="utf-8")
        assert ".txt or .jsonl" in refusal(tmp_path / name)
