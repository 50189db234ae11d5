"""Documents to shards, and shards to batches."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fsdfm.core.errors import ConfigError, DataError
from fsdfm.text import corpus, shards
from fsdfm.text import store as store_module
from fsdfm.text.packing import prepare
from fsdfm.text.settings import PrepareSettings
from fsdfm.text.store import TokenSplit, TokenStore
from fsdfm.text.tokenizer import EOS, Tokenizer, train_bpe

TEXTS = [
    f"Chapter {i}.\n\n" + f"  It was the {i * 7919} of times – naïve.\n" * (1 + i % 5)
    for i in range(60)
]
TEXTS[7] += f"{EOS} is spelled here"
TOKENIZER = train_bpe(TEXTS, 300)
SETTINGS = PrepareSettings(vocab_size=300, validation_fraction=0.2, seed=1, shard_tokens=500)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": text}) for text in (*TEXTS[:30], " \n ", *TEXTS[30:])]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "data"


def stream(split: TokenSplit) -> list[int]:
    return [int(token) for shard in split.shards for token in shard]


def documents(ids: list[int], eos_id: int) -> list[list[int]]:
    """What the EOS at the end of each document parts."""
    assert ids[-1] == eos_id
    parts: list[list[int]] = [[]]
    for token in ids[:-1]:
        if token == eos_id:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- what is written


def test_shards_hold_every_document_once_and_an_eos_after_each(source: Path, out: Path) -> None:
    prepare([source], out, settings=SETTINGS, tokenizer=TOKENIZER)
    store = TokenStore.open(out)
    assert len(store.train.shards) > 2
    assert {len(shard) for shard in store.train.shards[:-1]} == {500}
    held_out = [tuple(ids) for ids in documents(stream(store.validation), store.manifest["eos_id"])]
    kept = [tuple(ids) for ids in documents(stream(store.train), store.manifest["eos_id"])]
    expected = [tuple(TOKENIZER.encode(text)) for text in TEXTS]
    assert sorted(held_out + kept) == sorted(expected)
    assert not set(held_out) & set(kept)
    assert 4 < len(held_out) < 24  # 12 expected; 2.3 standard errors of 3.1 either way
    # Each split keeps the order of the files.
    assert held_out == [ids for ids in expected if ids in set(held_out)]
    assert kept == [ids for ids in expected if ids in set(kept)]


def test_the_manifest_counts_right(source: Path, out: Path) -> None:
    returned = prepare([source], out, settings=SETTINGS, tokenizer=TOKENIZER)
    store = TokenStore.open(out)
    manifest = store.manifest
    assert manifest == returned
    assert store.tokenizer_json == TOKENIZER.to_json()
    assert manifest["tokenizer_sha256"] == TOKENIZER.fingerprint
    assert (manifest["vocab_size"], manifest["eos_id"]) == (300, TOKENIZER.eos_id)
    assert manifest["tokenizer_trained_here"] is False
    assert manifest["settings"] == {**dataclasses.asdict(SETTINGS), "weights": []}
    assert manifest["split_documents"] == 0
    data = source.read_bytes()
    assert manifest["files"] == [
        {"name": source.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    ]
    for split in (store.train, store.validation):
        counts = manifest["splits"][split.name]
        parts = documents(stream(split), manifest["eos_id"])
        assert counts["documents"] == len(parts)
        assert counts["tokens"] == split.tokens == len(stream(split))
        assert counts["text_bytes"] == sum(len(TOKENIZER.decode(p).encode()) for p in parts)
        for shard in counts["shards"]:
            data = (out / shard["file"]).read_bytes()
            assert shard["sha256"] == hashlib.sha256(data).hexdigest()
            assert shard["tokens"] * 2 == len(data)
    names = {shard["file"] for split in manifest["splits"].values() for shard in split["shards"]}
    assert set(files(out)) == names | {"manifest.json", "tokenizer.json"}


def test_a_tokenizer_is_trained_on_the_files_if_none_is_given(source: Path, out: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    manifest = prepare([source], out, settings=SETTINGS, progress=lambda *call: calls.append(call))
    assert manifest["tokenizer_trained_here"] is True
    store = TokenStore.open(out)
    assert Tokenizer.from_json(store.tokenizer_json).vocab_size == manifest["vocab_size"] == 300
    size = source.stat().st_size
    assert {phase for phase, _, _ in calls} == {"split", "tokenizer", "tokens"}
    assert calls[-1] == ("tokens", size, size)


def test_the_tokenizer_is_trained_on_no_more_than_it_should(tmp_path: Path, out: Path) -> None:
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("é" * 50, encoding="utf-8")
    two.write_text("zq " * 50, encoding="utf-8")
    for most, known in ((100, False), (101, True)):
        settings = dataclasses.replace(SETTINGS, tokenizer_bytes=most)
        prepare([one, two], out, settings=settings)
        tokenizer = Tokenizer.from_json(TokenStore.open(out).tokenizer_json)
        assert (len(tokenizer.encode("zq")) == 1) == known
        shutil.rmtree(out)


def test_documents_of_several_pieces_and_batches_are_kept_whole(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BATCH_CHARACTERS", 100)
    monkeypatch.setattr(corpus, "PIECE_CHARACTERS", 50)
    monkeypatch.setattr(corpus, "READ_BYTES", 70)
    # The first piece is white space alone, and belongs to the text all the same.
    long = " " * 120 + "the end"
    path = tmp_path / "a.txt"
    path.write_text("\f".join(["\n" * 120, long, "", *TEXTS]), encoding="utf-8")
    prepare([path], out, settings=SETTINGS, tokenizer=TOKENIZER)
    store = TokenStore.open(out)
    found = [
        TOKENIZER.decode(ids)
        for split in (store.train, store.validation)
        for ids in documents(stream(split), TOKENIZER.eos_id)
    ]
    assert sorted(found) == sorted([long, *TEXTS])


@pytest.mark.parametrize("seed", [0, 1])  # the document falls into train, or into validation
def test_a_single_document_has_its_tail_held_out(tmp_path: Path, out: Path, seed: int) -> None:
    path = tmp_path / "book.txt"
    path.write_text(text := "".join(TEXTS), encoding="utf-8")
    settings = PrepareSettings(validation_fraction=0.6, seed=seed, shard_tokens=500)
    manifest = prepare([path], out, settings=settings, tokenizer=TOKENIZER)
    store = TokenStore.open(out)
    cut = len(text) + 1 - (len(text) + 1) // 2  # the end counts as a character; at most half
    assert stream(store.train) == TOKENIZER.encode(text[:cut])
    assert stream(store.validation) == [*TOKENIZER.encode(text[cut:]), TOKENIZER.eos_id]
    counts = manifest["splits"].values()
    assert [split["documents"] for split in counts] == [1, 1]
    assert manifest["split_documents"] == 1  # and the same one
    assert sum(split["text_bytes"] for split in counts) == len(text.encode())
    assert len(files(out)) == 2 + sum(len(split["shards"]) for split in counts)


def test_the_tail_is_the_fraction_asked_for(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(text := "".join(TEXTS), encoding="utf-8")
    prepare([path], out, settings=PrepareSettings(seed=3), tokenizer=TOKENIZER)
    store = TokenStore.open(out)
    assert len(TOKENIZER.decode(stream(store.validation))) == round(0.02 * (len(text) + 1)) - 1


@pytest.mark.parametrize("fraction", [0.05, 0.9])  # chance holds out no document, or all of them
def test_a_tail_may_hold_several_documents_and_begin_within_one(
    tmp_path: Path, out: Path, fraction: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "PIECE_CHARACTERS", 50)
    texts = ["one é " * 40, " \n ", "two " * 20, "three " * 10]
    path = tmp_path / "texts.txt"
    path.write_text("\f".join(texts), encoding="utf-8")
    assert len(set(np.random.default_rng(3).random(4)[[0, 2, 3]] < fraction)) == 1
    settings = PrepareSettings(validation_fraction=fraction, seed=3)
    manifest = prepare([path], out, settings=settings, tokenizer=TOKENIZER)
    store = TokenStore.open(out)
    kept, held_out = (
        TOKENIZER.decode(stream(split)).replace("\n\n", "\f")
        for split in (store.train, store.validation)
    )
    # Of 383 characters and ends 19 are held out (a twentieth), or 191 (half).
    whole = "\f".join((texts[0], texts[2], texts[3]))
    assert kept + held_out == whole
    assert len(kept) == 383 - (19 if fraction == 0.05 else 191)
    counts = manifest["splits"].values()
    assert sum(split["text_bytes"] for split in counts) == 420
    assert [split["documents"] for split in counts] == ([3, 1] if fraction == 0.05 else [1, 3])
    assert manifest["split_documents"] == 1


def test_a_document_that_is_split_between_two_pieces_is_counted(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "PIECE_CHARACTERS", 50)
    path = tmp_path / "book.txt"
    path.write_text("x" * 99, encoding="utf-8")  # 100 with its end; half is held out
    settings = PrepareSettings(validation_fraction=0.5)
    manifest = prepare([path], out, settings=settings, tokenizer=TOKENIZER)
    assert [split["documents"] for split in manifest["splits"].values()] == [1, 1]
    assert manifest["split_documents"] == 1


@pytest.mark.parametrize("kind", ["documents", "one document"])
def test_the_tokenizer_is_not_trained_on_what_is_held_out(
    tmp_path: Path, out: Path, kind: str
) -> None:
    """ "zq" is frequent in the held-out text and nowhere else: no token spells it."""
    chance = np.random.default_rng(SETTINGS.seed)
    words = ["zq " if chance.random() < 0.2 else "ab " for _ in range(60)]
    path = tmp_path / "a.txt"
    if kind == "documents":
        path.write_text("\f".join(word * 20 for word in words))
    else:
        path.write_text("ab " * 960 + "zq " * 240)  # a fifth of 3601: 720 units
    prepare([path], out, settings=SETTINGS)
    store = TokenStore.open(out)
    tokenizer = Tokenizer.from_json(store.tokenizer_json)
    assert "zq" in tokenizer.decode(stream(store.validation))
    assert "zq" not in tokenizer.decode(stream(store.train))
    assert len(tokenizer.encode("zq")) == 2
    assert len(tokenizer.encode("ab")) == 1


def test_the_shortest_text_is_still_two_splits(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a", encoding="utf-8")
    prepare([path], out, tokenizer=TOKENIZER)
    store = TokenStore.open(out)
    assert stream(store.train) == TOKENIZER.encode("a")
    assert stream(store.validation) == [TOKENIZER.eos_id]


@pytest.mark.parametrize(("size", "name", "width"), [(1 << 16, "uint16", 2), (65537, "uint32", 4)])
def test_ids_take_two_bytes_where_they_fit(
    source: Path, out: Path, size: int, name: str, width: int
) -> None:
    tokenizer = Tokenizer.from_json(TOKENIZER.to_json())
    tokenizer.vocab_size = size
    manifest = prepare(
        [source], out, settings=dataclasses.replace(SETTINGS, vocab_size=size), tokenizer=tokenizer
    )
    assert manifest["dtype"] == name
    store = TokenStore.open(out)
    shard = manifest["splits"]["train"]["shards"][0]
    assert (out / shard["file"]).stat().st_size == width * shard["tokens"]
    assert documents(stream(store.train), TOKENIZER.eos_id)[0] in map(TOKENIZER.encode, TEXTS)


def test_the_seed_chooses_what_is_held_out(source: Path, tmp_path: Path) -> None:
    held_out = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        settings = dataclasses.replace(SETTINGS, seed=seed)
        prepare([source], tmp_path / name, settings=settings, tokenizer=TOKENIZER)
        held_out.append(stream(TokenStore.open(tmp_path / name).validation))
    assert held_out[0] == held_out[1] != held_out[2]


@pytest.mark.parametrize(
    "wrong",
    [
        {"vocab_size": 256},
        {"validation_fraction": 0.0},
        {"validation_fraction": 1.0},
        {"validation_fraction": float("nan")},
        {"shard_tokens": 0},
        {"tokenizer_bytes": 0},
        {"seed": -1},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} must be"):
        PrepareSettings(**wrong)


# ---------------------------------------------------------------- what is read


@pytest.fixture
def counting() -> TokenSplit:
    """0, 1, 2 ... 22 in shards of 5, 1, 14 and 3."""
    parts = np.split(np.arange(23, dtype="<u2"), [5, 6, 20])
    return TokenSplit("train", tuple(parts), 23, tuple(Path(f"{i}.bin") for i in range(4)))


def test_blocks_cross_shard_borders(counting: TokenSplit) -> None:
    assert (counting.tokens, counting.blocks(4), counting.blocks(23)) == (23, 5, 1)
    for index in range(5):
        block = counting.block(index, 4)
        assert block.dtype == torch.int64
        assert block.tolist() == list(range(4 * index, 4 * index + 4))
    assert counting.block(0, 23).tolist() == list(range(23))


def test_every_epoch_visits_each_block_once_in_an_order_and_a_shift_of_its_own(
    counting: TokenSplit,
) -> None:
    seen = set()
    for epoch in range(40):
        rows = [
            counting.batch(5 * epoch + step, batch_size=1, length=4, seed=3)[0].tolist()
            for step in range(5)
        ]
        starts = [row[0] for row in rows]
        assert rows == [list(range(start, start + 4)) for start in starts]
        shift = min(starts)
        assert 0 <= shift <= 3
        assert sorted(starts) == [shift + 4 * i for i in range(5)]
        seen.add(tuple(starts))
    assert {min(starts) for starts in seen} == {0, 1, 2, 3}  # missed with chance 4 * .75 ** 40
    assert len(seen) > 30


def test_a_batch_is_a_pure_function_of_seed_and_step(counting: TokenSplit) -> None:
    def batch(step: int, seed: int) -> torch.Tensor:
        return counting.batch(step, batch_size=3, length=4, seed=seed)

    steps = [7, 0, 3, 7, 100, 0]
    once = {step: batch(step, 3) for step in steps}
    store_module._epoch.cache_clear()
    for step in reversed(steps):
        assert torch.equal(batch(step, 3), once[step])
    assert once[0].shape == (3, 4)
    assert once[0].dtype == torch.int64
    assert any(not torch.equal(batch(step, 4), once[step]) for step in steps)
    # The size of a batch only groups the blocks.
    ones = [counting.batch(step, batch_size=1, length=4, seed=3) for step in range(12)]
    threes = [batch(step, 3) for step in range(4)]
    assert torch.equal(torch.cat(ones), torch.cat(threes))


def test_a_batch_may_be_larger_than_the_split(counting: TokenSplit) -> None:
    batch = counting.batch(0, batch_size=12, length=23, seed=0)
    assert torch.equal(batch, torch.arange(23).expand(12, 23))


def test_a_split_shorter_than_a_block_is_refused(counting: TokenSplit) -> None:
    counting.require(23)
    for call in (
        lambda: counting.require(24),
        lambda: counting.batch(0, batch_size=1, length=24, seed=0),
    ):
        message = refusal(call)
        assert "train split has 23 tokens" in message
        assert "24" in message
        assert "context_length" in message


def test_an_id_past_the_vocabulary_is_refused_where_it_is_read(counting: TokenSplit) -> None:
    damaged = dataclasses.replace(counting, vocab_size=22)  # 22 is in the last shard
    for call in (
        lambda: damaged.block(4, 5),
        lambda: damaged.batch(0, batch_size=1, length=23, seed=0),
    ):
        assert "3.bin is damaged (a token has id 22" in refusal(call)
    assert damaged.block(3, 5).tolist() == [15, 16, 17, 18, 19]


# ---------------------------------------------------------------- what goes wrong


def nothing_left(out: Path, before: set[str]) -> bool:
    return {path.name for path in out.parent.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("blank.txt", b" \n\f\t "),
        ("latin.txt", b"caf\xe9"),
        ("zero.txt", b"a\0"),
        ("c.jsonl", b"{"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(
    tmp_path: Path, source: Path, out: Path, name: str, data: bytes
) -> None:
    (path := tmp_path / name).write_bytes(data)
    before = {source.name, name}
    for tokenizer in (TOKENIZER, None):
        sources = [path] if name == "blank.txt" else [source, path]
        message = refusal(lambda s=sources, t=tokenizer: prepare(s, out, tokenizer=t))
        assert (name if name != "blank.txt" else "white space only") in message
        assert nothing_left(out, before)


def test_an_output_that_exists_is_left_alone(source: Path, out: Path) -> None:
    out.mkdir()
    (out / "mine").touch()
    assert "exists already" in refusal(lambda: prepare([source], out, tokenizer=TOKENIZER))
    assert list(files(out)) == ["mine"]
    assert "exists already" in refusal(lambda: prepare([source], source, tokenizer=TOKENIZER))


@pytest.mark.parametrize("how", ["empty", "here", "link", "deep"])
def test_an_empty_output_directory_is_filled(
    source: Path, out: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = out
    if how == "deep":
        target = out / "a" / "b"
    else:
        out.mkdir()
    if how == "here":
        monkeypatch.chdir(out)
        target = Path(".")
    elif how == "link":
        (target := out.with_name("link")).symlink_to(out)
    prepare([source], target, settings=SETTINGS, tokenizer=TOKENIZER)
    assert TokenStore.open(out / "a" / "b" if how == "deep" else out).train.tokens > 0


def test_an_output_that_cannot_be_made_is_refused(source: Path) -> None:
    message = refusal(lambda: prepare([source], source / "below", tokenizer=TOKENIZER))
    assert f"Cannot write {source / 'below'}" in message


@pytest.mark.parametrize("nth", [1, 3])
def test_a_full_disk_is_told_and_leaves_nothing(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    calls = 0

    def fsync(_: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= nth:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards.os, "fsync", fsync)
    message = refusal(lambda: prepare([source], out, settings=SETTINGS, tokenizer=TOKENIZER))
    assert "No space left on device" in message
    assert str(out) in message
    assert nothing_left(out, {source.name})


def test_a_really_full_device_is_told(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (full := Path("/dev/full")).exists():
        pytest.skip("no /dev/full")
    real = Path.open

    def open_full(self: Path, *args: Any, **kwargs: Any) -> Any:
        return real(full if self.suffix == ".bin" else self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_full)
    message = refusal(lambda: prepare([source], out, settings=SETTINGS, tokenizer=TOKENIZER))
    assert "No space left on device" in message
    assert nothing_left(out, {source.name})


def test_an_interrupt_leaves_nothing(source: Path, out: Path) -> None:
    def interrupt(phase: str, done: int, total: int) -> None:
        if phase == "tokens":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([source], out, settings=SETTINGS, progress=interrupt)
    assert nothing_left(out, {source.name})


def test_two_runs_do_not_write_the_same_output(source: Path, out: Path) -> None:
    refused: list[str] = []

    def second(phase: str, done: int, total: int) -> None:
        if phase == "tokens" and not refused:
            with pytest.raises(ConfigError) as caught:
                prepare([source], out, settings=SETTINGS)
            refused.append(str(caught.value))

    prepare([source], out, settings=SETTINGS, progress=second)
    assert refused[0].startswith(f"{out} is being written by process ")
    TokenStore.open(out)
    assert nothing_left(out, {source.name, "data"})


KILLED = """
import os, signal, sys
from pathlib import Path
from fsdfm.text import packing, shards
from fsdfm.text.settings import PrepareSettings
shards.BATCH_CHARACTERS = 1000
def kill(phase, done, total):
    if phase == "tokens" and list(out.parent.glob(".data.partial/train-00001.bin")):
        os.kill(os.getpid(), signal.SIGKILL)
source, out = map(Path, sys.argv[1:])
# The first file is packed by the time that the second is read.
settings = PrepareSettings(
    vocab_size=300, validation_fraction=0.2, seed=1, shard_tokens=500
)
packing.prepare([source, source], out, settings=settings, progress=kill)
"""


def test_a_killed_run_can_be_repeated_and_gives_the_same_bytes(source: Path, out: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, source, out], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    partial = out.with_name(".data.partial")
    assert (partial / "train-00001.bin").exists()
    prepare([source, source], out, settings=SETTINGS)
    assert not partial.exists()
    prepare([source, source], whole := out.with_name("whole"), settings=SETTINGS)
    assert files(out) == files(whole)
    assert nothing_left(out, {source.name, "data", "whole"})


def test_what_is_not_prepared_data_is_refused(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare([source], out, settings=SETTINGS, tokenizer=TOKENIZER)
    good = files(out)

    def with_manifest(**changes: Any) -> None:
        manifest = json.loads(good["manifest.json"])
        (out / "manifest.json").write_text(json.dumps(manifest | changes), encoding="utf-8")

    def write(name: str, data: bytes) -> None:
        (out / name).write_bytes(data)

    splits = json.loads(good["manifest.json"])["splits"]
    empty_shard = {"file": "train-00000.bin", "tokens": 0}
    other = train_bpe(TEXTS, 290).to_json().encode()
    damages: list[tuple[str, Callable[[], object]]] = [
        ("manifest.json is missing", lambda: (out / "manifest.json").unlink()),
        ("tokenizer.json is missing", lambda: (out / "tokenizer.json").unlink()),
        ("is not prepared data", lambda: write("manifest.json", b'{"format":\n')),
        ("is not prepared data", lambda: write("manifest.json", b"\xff\xfe")),
        ("is not prepared data", lambda: write("manifest.json", b"[]")),
        ("is not prepared data", lambda: with_manifest(format="other")),
        ("has data format 2", lambda: with_manifest(format_version=2)),
        ("is damaged", lambda: with_manifest(splits={})),
        ("is damaged", lambda: with_manifest(splits=None)),
        ("is damaged", lambda: with_manifest(dtype="float16")),
        ("is damaged", lambda: with_manifest(dtype=["uint16"])),
        ("wrong size", lambda: with_manifest(splits=splits | {"train": {"shards": [empty_shard]}})),
        ("train-00001.bin is missing", lambda: (out / "train-00001.bin").unlink()),
        ("wrong size", lambda: write("train-00000.bin", good["train-00000.bin"][:-1])),
        ("is not the one of its tokens", lambda: write("tokenizer.json", other)),
        ("is not the one of its tokens", lambda: write("tokenizer.json", b"{}")),
    ]
    for expected, damage in damages:
        damage()
        message = refusal(lambda: TokenStore.open(out))
        assert expected in message
        assert str(out) in message
        for name, data in good.items():
            write(name, data)
    store = TokenStore.open(out)
    assert store.train.vocab_size == 300
    changed = bytearray(good["train-00001.bin"])
    changed[100:102] = b"\xff\xff"
    write("train-00001.bin", bytes(changed))
    path = out / "train-00001.bin"
    assert f"{path} is damaged (its bytes have changed" in refusal(lambda: TokenStore.open(out))
    monkeypatch.setattr(store_module, "VERIFIED_BYTES", 1000)  # too much to read at each start
    store = TokenStore.open(out)
    message = refusal(lambda: store.train.block(0, store.train.tokens))
    assert message.startswith(
        f"{path} is damaged (a token has id 65535, the vocabulary ends at 299)"
    )
    monkeypatch.undo()
    write("train-00000.bin", b"")
    with_manifest(splits=splits | {"train": {"shards": [empty_shard]}})
    assert "is damaged" in refusal(lambda: TokenStore.open(out))
    assert "is missing" in refusal(lambda: TokenStore.open(out / "nowhere"))
    assert "is not prepared data" in refusal(lambda: TokenStore.open(source))
