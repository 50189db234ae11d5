"""One corpus from every kind of place, filtered and weighed; and preparing that goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from fsdfm.core.errors import ConfigError, DataError
from fsdfm.text import shards as shards_module
from fsdfm.text.packing import prepare
from fsdfm.text.settings import PrepareSettings
from fsdfm.text.sources import find_sources
from fsdfm.text.store import TokenStore
from fsdfm.text.tokenizer import EOS, train_bpe

TEXTS = [
    f"Number {i}.\n" + f"  The {i * 7919}th – naïve – line.\n" * (1 + i % 5) for i in range(90)
]
TOKENIZER = train_bpe(TEXTS, 300)
SETTINGS = PrepareSettings(validation_fraction=0.2, seed=1, shard_tokens=700)


def as_jsonl(path: Path, texts: list[Any], field: str = "text") -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({field: text, "id": 7}) + "\n" for text in texts))
    return path


def as_parquet(path: Path, texts: list[Any], field: str = "text") -> Path:
    path.parent.mkdir(exist_ok=True)
    table = pyarrow.table({"id": list(range(len(texts))), field: texts})
    pyarrow.parquet.write_table(table, path, row_group_size=40)
    return path


def jsonl(place: Path) -> Path:
    as_jsonl(place / "a.jsonl", TEXTS[:50])
    as_jsonl(place / "b.jsonl", TEXTS[50:])
    (place / "README.md").write_text("not data")
    return place


def text_files(place: Path) -> Path:
    place.mkdir()
    (place / "a.txt").write_text("\f".join(TEXTS[:50]))
    (place / "b.txt").write_text("\f".join(TEXTS[50:]))
    return place


def parquet(place: Path) -> Path:
    as_parquet(place / "train-00000.parquet", TEXTS[:50])
    as_parquet(place / "train-00001.parquet", TEXTS[50:])
    return place


def saved(place: Path) -> Path:
    """What `datasets` saves: several arrow streams."""
    made = datasets.Dataset.from_dict({"text": TEXTS, "n": list(range(len(TEXTS)))})
    made.save_to_disk(place, num_shards=3)
    return place


def feather(place: Path) -> Path:
    place.mkdir()
    table = pyarrow.table({"text": pyarrow.array(TEXTS, pyarrow.large_string())})
    with pyarrow.ipc.new_file(place / "a.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=32)
    return place


KINDS: dict[str, Callable[[Path], Path]] = {
    "parquet": parquet,
    "datasets": saved,
    "feather": feather,
    "text": text_files,
}


def packed(directory: Path) -> dict[str, bytes]:
    """Everything but the manifest, which names the files."""
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name != "manifest.json"}


def documents(directory: Path, split: str = "train") -> list[str]:
    store = TokenStore.open(directory)
    ids = [int(i) for shard in getattr(store, split).shards for i in shard]
    found, document = [], list[int]()
    for i in ids:
        if i == TOKENIZER.eos_id:
            found.append(TOKENIZER.decode(document))
            document = []
        else:
            document.append(i)
    assert document == []
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_texts_give_the_same_shards_from_every_kind_of_place(
    tmp_path: Path, kind: str
) -> None:
    prepare([jsonl(tmp_path / "jsonl")], tmp_path / "one", settings=SETTINGS)
    prepare([KINDS[kind](tmp_path / kind)], tmp_path / "two", settings=SETTINGS)
    one, two = packed(tmp_path / "one"), packed(tmp_path / "two")
    assert sum(name.endswith(".bin") for name in one) > 3
    assert one == two
    manifests = [json.loads((tmp_path / n / "manifest.json").read_text()) for n in ("one", "two")]
    assert manifests[0]["splits"] == manifests[1]["splits"]


def test_a_data_set_of_the_hub_is_streamed_and_gives_the_same_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def load_dataset(path: str, name: str | None, *, split: str, streaming: bool) -> Any:
        asked.append((path, name, split, streaming))
        return datasets.Dataset.from_dict({"body": TEXTS}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    settings = replace(SETTINGS, field="body")
    manifest = prepare(["hf:org/name:small@train[:1%]"], tmp_path / "two", settings=settings)
    assert set(asked) == {("org/name", "small", "train[:1%]", True)}
    assert manifest["files"] == [{"name": "hf:org/name:small@train[:1%]"}]
    prepare([jsonl(tmp_path / "jsonl")], tmp_path / "one", settings=SETTINGS)
    assert packed(tmp_path / "one") == packed(tmp_path / "two")
    with pytest.raises(DataError, match=r'row 1: no string under "text"; its fields are body'):
        prepare(["hf:org/name"], tmp_path / "three", settings=SETTINGS)
    assert asked[-1] == ("org/name", None, "train", True)

    def offline(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no network\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"Cannot read hf:org/name \(no network\): check the name"):
        prepare(["hf:org/name"], tmp_path / "three", settings=SETTINGS)


def test_what_cannot_be_read_is_told_in_a_line(tmp_path: Path) -> None:
    table = as_parquet(tmp_path / "t.parquet", ["a", "b"], "content")
    whole = as_parquet(tmp_path / "w.parquet", TEXTS).read_bytes()
    (cut := tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (noise := tmp_path / "noise.arrow").write_bytes(b"no arrow at all")
    (empty := tmp_path / "empty").mkdir()
    for place, said in (
        (table, r't.parquet: no column of strings "text"; .* "content"\.'),
        (cut, r"cut.parquet is damaged or no .parquet file"),
        (noise, r"noise.arrow is damaged or no .arrow file"),
        (empty, r"empty holds no file that can be read; those are \.txt, \.txt\.gz"),
        (tmp_path / "missing.parquet", "missing.parquet does not exist"),
        ("org/name", r"org/name does not exist; a data set of the Hub is hf:org/name"),
        ("hf:a/b/c", r"hf:a/b/c names no data set: write hf:org/name"),
    ):
        with pytest.raises(DataError, match=said) as caught:
            prepare([place], tmp_path / "out", settings=SETTINGS, tokenizer=TOKENIZER)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"weights must be as many as the sources \(1\), got 2"):
        find_sources([table], [1.0, 2.0])
    with pytest.raises(ConfigError, match="weights must be positive"):
        PrepareSettings(weights=(1.0, 0.0))


def test_a_directory_that_may_not_be_read_is_told_and_what_is_hidden_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = jsonl(tmp_path / "source")
    as_jsonl(source / "sub" / "c.jsonl", ["c"])
    as_jsonl(source / ".git" / "d.jsonl", ["d"])
    assert [f.name for f in find_sources([source])[0].files] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    walk = os.walk

    def refusing(top: Any, onerror: Any) -> Any:
        onerror(PermissionError(13, "Permission denied", "sub"))
        return walk(top)

    monkeypatch.setattr(os, "walk", refusing)
    with pytest.raises(DataError, match=r"Cannot read .*source \(.*Permission denied"):
        find_sources([source])
    with pytest.raises(DataError, match=r"Cannot read a+"):
        find_sources(["a" * 300])


def test_saved_data_sets_are_read_without_their_caches_one_split_at_a_time(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    rows.save_to_disk(tmp_path / "one")
    (tmp_path / "one" / "cache-0.arrow").write_bytes(b"rows of another order")
    (found,) = find_sources([tmp_path / "one"])
    assert [file.name for file in found.files] == ["data-00000-of-00001.arrow"]
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match=r"is a data set with the splits test, train: name one of"):
        find_sources([tmp_path / "two"])


def test_short_documents_and_those_that_came_before_are_dropped_and_counted(
    tmp_path: Path,
) -> None:
    texts = [*TEXTS, "short", TEXTS[3], " \n", TEXTS[80], TEXTS[3], TEXTS[3] + "!"]
    source = as_jsonl(tmp_path / "a.jsonl", texts)
    settings = replace(SETTINGS, min_length=6)
    manifest = prepare([source, source], tmp_path / "out", settings=settings, tokenizer=TOKENIZER)
    assert manifest["dropped"] == {"blank": 2, "short": 2, "duplicates": 3 + len(TEXTS) + 4}
    found = documents(tmp_path / "out") + documents(tmp_path / "out", "validation")
    assert Counter(found) == Counter([*TEXTS, TEXTS[3] + "!"])
    kept = replace(settings, duplicates="keep", min_length=0)
    manifest = prepare([source], tmp_path / "kept", settings=kept, tokenizer=TOKENIZER)
    assert manifest["dropped"] == {"blank": 1, "short": 0, "duplicates": 0}


def test_a_weight_says_how_often_documents_are_seen_and_what_is_held_out_comes_once(
    tmp_path: Path,
) -> None:
    one = as_parquet(tmp_path / "one" / "a.parquet", [*TEXTS[:45], TEXTS[0]]).parent
    two = as_jsonl(tmp_path / "two" / "a.jsonl", TEXTS[45:]).parent
    settings = replace(SETTINGS, weights=(2.5, 0.5))
    prepare([one, two], tmp_path / "out", settings=settings, tokenizer=TOKENIZER)
    prepare([one, two], tmp_path / "plain", settings=SETTINGS, tokenizer=TOKENIZER)
    seen, plain = Counter(documents(tmp_path / "out")), set(documents(tmp_path / "plain"))
    held_out = Counter(documents(tmp_path / "out", "validation"))
    assert set(held_out.values()) == {1}
    assert not set(held_out) & set(seen)
    assert set(held_out) <= set(documents(tmp_path / "plain", "validation"))
    first = [text for text in TEXTS[:45] if text in plain]
    assert {seen[text] for text in first} == {2, 3}
    often = [sum(seen[text] for text in texts) / len(texts) for texts in (first, TEXTS[45:])]
    # A half of them, by chance: 3 standard errors of 0.5 / 6, and a fifth of the others held out.
    assert abs(often[0] - 2.5) < 0.25
    assert abs(often[1] - 0.4) < 0.22


def test_what_is_held_out_does_not_depend_on_the_weight_or_the_order_of_the_sources(
    tmp_path: Path,
) -> None:
    """In the first source, too, what is chosen and what is held out are drawn apart."""
    texts = [f"Line {i} of {name}." for name in "ab" for i in range(2000)]
    a = as_jsonl(tmp_path / "a.jsonl", texts[:2000])
    b = as_jsonl(tmp_path / "b.jsonl", texts[2000:])
    settings = PrepareSettings(validation_fraction=0.1, seed=0, weights=(0.5, 0.5))
    prepare([a, b], out := tmp_path / "out", settings=settings, tokenizer=TOKENIZER)
    for name in "ab":
        counts = [
            sum(f"of {name}." in text for text in documents(out, split))
            for split in ("train", "validation")
        ]
        share = counts[1] / sum(counts)
        assert abs(share - 0.1) < 4 * (0.09 / 1000) ** 0.5
        assert abs(sum(counts) - 1000) < 4 * 500**0.5


def test_a_text_is_no_duplicate_of_one_that_a_weight_leaves_out(tmp_path: Path) -> None:
    half = as_jsonl(tmp_path / "half.jsonl", TEXTS)
    whole = as_jsonl(tmp_path / "whole.jsonl", TEXTS)
    settings = replace(SETTINGS, weights=(0.5, 1.0), duplicates="drop")
    prepare([half, whole], out := tmp_path / "out", settings=settings, tokenizer=TOKENIZER)
    assert len(documents(out)) + len(documents(out, "validation")) == len(set(TEXTS))


def test_too_few_documents_to_weigh_are_refused(tmp_path: Path) -> None:
    source = as_jsonl(tmp_path / "a.jsonl", TEXTS[:1])
    with pytest.raises(DataError, match="too few documents to hold some out beside weights"):
        prepare([source], tmp_path / "out", settings=replace(SETTINGS, weights=(2.0,)))


def test_any_number_of_workers_writes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = parquet(tmp_path / "parquet")
    monkeypatch.setattr(shards_module, "BATCH_CHARACTERS", 900)
    prepare([source], tmp_path / "one", settings=SETTINGS, tokenizer=TOKENIZER)
    prepare([source], tmp_path / "two", settings=SETTINGS, tokenizer=TOKENIZER, workers=2)
    for name, data in packed(tmp_path / "one").items():
        assert (tmp_path / "two" / name).read_bytes() == data
    assert (tmp_path / "two" / "manifest.json").read_bytes() == (
        tmp_path / "one" / "manifest.json"
    ).read_bytes()


RUN = """
import os, signal, sys
from pathlib import Path
from fsdfm.text import packing, shards
from fsdfm.text.settings import PrepareSettings
shards.BATCH_CHARACTERS = 600
source, out, end, how = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
encoded, write, done = [], shards.Shards.write, 0
def counted(self, pieces, found):
    global done
    if done == int(end):
        if how == "torn":  # in the middle of what the journal does not know of yet
            self.writers[0].write(found[0])
            self.writers[0].sync()
        os.kill(os.getpid(), signal.SIGINT if how == "interrupt" else signal.SIGKILL)
    write(self, pieces, found)
    done += 1
shards.Shards.write = counted
packing.prepare(
    [source], Path(out), settings=PrepareSettings(vocab_size=300, validation_fraction=0.2, seed=1,
    shard_tokens=700, weights=(1.5,))
)
print("encoded", done)
"""


def test_a_killed_run_goes_on_where_it_was_and_writes_the_same_bytes(tmp_path: Path) -> None:
    source, out = jsonl(tmp_path / "jsonl"), tmp_path / "out"
    places: list[int] = []

    def go(end: int, how: str = "kill") -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", RUN, str(source), str(out), str(end), how]
        return subprocess.run(words, check=False, capture_output=True, text=True)

    for end, how in ((4, "torn"), (2, "interrupt")):
        assert go(end, how).returncode != 0
        assert not out.exists()
        journal = json.loads((out.with_name(".out.partial") / "journal.json").read_text())
        places.append(journal["pieces"])
    assert places == sorted(set(places)), "each run went on"
    last = go(10**6)
    assert last.returncode == 0, last.stderr
    batches = int(last.stdout.split()[1])
    again = out.rename(tmp_path / "again")
    whole = go(10**6)
    assert int(whole.stdout.split()[1]) == batches + 4 + 2
    assert packed(out) == packed(again)
    assert (out / "manifest.json").read_bytes() == (again / "manifest.json").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "jsonl", "out"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left"), DataError("The network.")])
def test_a_failure_leaves_what_was_packed_to_go_on_with(
    failure: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = jsonl(tmp_path / "jsonl"), tmp_path / "out"
    prepare([source], whole := tmp_path / "whole", settings=SETTINGS, tokenizer=TOKENIZER)
    monkeypatch.setattr(shards_module, "BATCH_CHARACTERS", 600)
    write, done = shards_module.Shards.write, []

    def failing(self: Any, *what: Any) -> None:
        if len(done) == 4:
            raise failure
        done.append(write(self, *what))

    monkeypatch.setattr(shards_module.Shards, "write", failing)
    with pytest.raises(DataError):
        prepare([source], out, settings=SETTINGS, tokenizer=TOKENIZER)
    journal = json.loads((tmp_path / ".out.partial" / "journal.json").read_text())
    assert journal["pieces"] > 0 and not out.exists()
    monkeypatch.setattr(shards_module.Shards, "write", write)
    prepare([source], out, settings=SETTINGS, tokenizer=TOKENIZER)
    assert packed(out) == packed(whole)


def test_another_job_does_not_go_on_with_what_was_left(tmp_path: Path) -> None:
    source, out = jsonl(tmp_path / "jsonl"), tmp_path / "out"
    words = [sys.executable, "-c", RUN, str(source), str(out), "4", "kill"]
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    prepare([source], out, settings=SETTINGS)
    prepare([source], tmp_path / "other", settings=SETTINGS)
    assert packed(out) == packed(tmp_path / "other")


def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    assert isinstance(resource, types.ModuleType)
    script = (
        "import resource, sys\nfrom pathlib import Path\nfrom fsdfm.text import packing, shards\n"
        "from fsdfm.text.tokenizer import Tokenizer\nshards.BATCH_CHARACTERS = 1 << 16\n"
        "for source in sys.argv[2:]:\n"
        "    model = Tokenizer.from_file(sys.argv[1])\n"
        "    packing.prepare([source], Path(source + '.out'), tokenizer=model)\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    (tokenizer := tmp_path / "tokenizer.json").write_text(TOKENIZER.to_json())
    sources = []
    for times in (10, 50):  # 0.5 MB, and 2.5 MB
        texts = [f"{turn} {text * 4}" for turn in range(times) for text in TEXTS]
        sources.append(as_jsonl(tmp_path / f"{times}.jsonl", texts))
    done = subprocess.run(
        [sys.executable, "-c", script, tokenizer, *sources],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )
    peaks = [int(line) * 1024 / 1e6 for line in done.stdout.split()]
    # Marks of 3,600 more documents are 0.3 MB; the tokens of it all, as lists, above 40 MB.
    assert peaks[1] - peaks[0] < 15, peaks


def test_data_prints_counts_and_samples_and_finds_a_changed_byte(run: Any, tmp_path: Path) -> None:
    source, out = saved(tmp_path / "saved"), tmp_path / "out"
    words = ("prepare", source, "--out", out, "--vocab-size", 300, "--validation-fraction", 0.2)
    code, said, err = run(*words, "--min-length", 40, "--weights", 1)
    assert code == 0, err
    assert "bytes a token" in said
    assert "dropped: " in said
    code, said, err = run("data", out, "--samples", 2, "--sample-tokens", 30)
    assert (code, err) == (0, "")
    counts = json.loads((out / "manifest.json").read_text())["splits"]["train"]
    (row,) = [line.split() for line in said.splitlines() if line.startswith("train ")]
    assert row[1:3] == [f"{counts['documents']:,}", f"{counts['tokens']:,}"]
    assert float(row[3]) == round(counts["text_bytes"] / counts["tokens"], 3)
    assert said.count("--- sample") == 2
    sample = said.split("--- sample 1\n")[1].split("\n\n")[0]
    assert any(sample.strip()[:10] in text for text in TEXTS)
    assert EOS not in said
    path = out / "train-00000.bin"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(bytes(data))
    code, said, err = run("data", out)
    assert code == 2
    assert "train-00000.bin is damaged (its bytes have changed" in err
