"""Steering from the command line: what is given, files, batches, and what is refused."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from processes import beside
from steering_fixtures import twin_network
from test_generator import WORDS

import fsdfm
from fsdfm.cli import main
from fsdfm.generate.files import answer_file
from fsdfm.generate.request import Request
from fsdfm.model.io.pretrained import save_pretrained
from fsdfm.text.tokenizer import train_bpe

TEXT = "\ufeffthe quick — über 🦊\r\n jumps over\r\n\r\nthe lazy dog\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tokenizer = train_bpe([WORDS * 20], 300)
    save_pretrained(directory, twin_network(tokenizer), tokenizer_json=tokenizer.to_json())
    return directory


def test_a_template_is_filled_and_told_with_its_spans(run: Run, model: Path) -> None:
    argv = "--template", "The [[3]] was [[?]].", "--steps", 2, "--json", "--logprobs"
    code, out, err = run("generate", "--model", model, *argv, "--num-samples", 2)
    assert (code, err) == (0, "")
    for seed, line in enumerate(out.splitlines()):
        record = json.loads(line)
        (a, b), (c, d) = record["spans"]
        text = record["text"]
        assert (text[:a], text[b:c], text[d:]) == ("The ", " was ", ".")
        assert (record["seed"], record["finish"]) == (seed, "length")
        assert len(record["token_ids"]) == len(record["logprobs"])
        assert sum(x is not None for x in record["logprobs"]) == record["tokens"]


@pytest.mark.parametrize("where", ["stdout", "file", "stdin"])
def test_an_edit_keeps_the_rest_to_the_byte(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    file, out = tmp_path / "text.txt", tmp_path / "out.txt"
    data = TEXT.encode()
    file.write_bytes(data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="latin-1"))
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="latin-1", newline="")
    monkeypatch.setattr(sys, "stdout", stdout)
    argv: list[Any] = ["generate", "--model", model, "--edit", "-" if where == "stdin" else file]
    argv += ["--span", "4:9", *(("--out", out) if where == "file" else ())]
    assert main.main([str(word) for word in argv]) == 0
    stdout.flush()
    edited = out.read_bytes() if where == "file" else stdout.buffer.getvalue()
    before, after = TEXT[:4].encode(), TEXT[9:].encode()
    assert edited.startswith(before) and edited.endswith(after)
    assert edited != data
    assert file.read_bytes() == data


def test_a_draft_is_written_anew(run: Run, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "draft.txt"
    file.write_text(WORDS)
    code, light, err = run("generate", "--model", model, "--initial", file, "--strength", 0.05)
    assert (code, err) == (0, "")
    code, heavy, _ = run("generate", "--model", model, "--initial", file, "--end", "keep")
    same = [SequenceMatcher(None, text, WORDS).ratio() for text in (light, heavy)]
    assert same[0] > 0.7 > 0.5 > same[1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--template a[[3", "--template has [[ at character 1 that no ]] closes"),
        ("--template [[65]]", "--template has 65 tokens, but this model's context is 64"),
        ("--template [[]]", "--template has the gap [[]]"),
        ("--template [[3]] --prompt a", "--template and --prompt are both given: leave one out."),
        ("--prompt a --initial TEXT", "--prompt and --initial are both given: leave one out."),
        ("--prompt a --suffix bcd --length 3", "The prompt and suffix have 4 tokens"),
        ("--edit TEXT", "--edit needs the --span that is written anew."),
        ("--span 1:2", "--span is of a file to --edit: give --edit too."),
        ("--edit TEXT --span 1", "--span must be two numbers as in 120:180, got '1'."),
        ("--edit TEXT --span 4:999", "--span must be two numbers A < B within the text's 49"),
        ("--edit NONE --span 1:2", "none.txt: No such file or directory."),
        ("--edit LATIN --span 1:2", "latin.txt is not UTF-8 (byte 3): convert it first."),
        ("--edit EMPTY --span 1:2", "empty.txt is empty: there is nothing to write anew."),
        ("--strength 0.5", "--strength is of a draft: give --initial or --edit too."),
        ("--temperature nan", "--temperature must be in [0, 1000], got nan."),
        ("--steps otto", "otto"),
        ("--logprobs --length 4", "--logprobs are told in JSON: give --json too."),
        ("--require x --ban x", "--require has 'x', which --ban excludes"),
        ("--requests TEXT", "--requests needs a file for the results: give --out."),
        ("--requests EMPTY --out OUT", "empty.txt is empty: give one request a line."),
        ("--requests NONE --out OUT", "none.txt: No such file or directory."),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(
    run: Run, model: Path, tmp_path: Path, argv: str, message: str
) -> None:
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 creme")
    (tmp_path / "empty.txt").touch()
    before = sorted(tmp_path.iterdir())
    names = {"TEXT": "text.txt", "LATIN": "latin.txt", "EMPTY": "empty.txt", "NONE": "none.txt"}
    names["OUT"] = "out.jsonl"
    words = [str(tmp_path / names[w]) if w in names else w for w in argv.split()]
    code, out, err = run("generate", "--model", model, *words)
    assert (code, out) == (2, "")
    assert message in err
    if "otto" not in argv:
        assert err.count("\n") == 1 and err.startswith("error: ")
    assert sorted(tmp_path.iterdir()) == before


LINES = [
    {"id": "one", "template": "The [[3]] was [[2-3]]."},
    {"prompt": "the quick ", "length": 20, "steps": 3},
    {"id": "three", "length": 9, "seed": 7},
    {"length": 30, "temperature": 0.5},
    {"id": "five", "text": "the lazy dog", "span": [4, 8]},
]


def write_lines(file: Path, *lines: Any) -> None:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    file.write_text("\n".join(texts) + "\n")


def results(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_file_of_requests_is_answered_in_order(run: Run, model: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_lines(source, *LINES)
    argv = "--requests", source, "--out", out, "--batch-size", 3, "--steps", 2, "--logprobs"
    code, told, _ = run("generate", "--model", model, *argv)
    assert (code, told) == (0, "")
    found = results(out)
    assert [r["id"] for r in found] == ["one", "2", "three", "4", "five"]
    generator = fsdfm.load(model)
    for line, record in zip(LINES, found, strict=True):
        (alone,) = generator.answer([Request.from_dict({"steps": 2, **line})])
        assert (record["text"], record["token_ids"]) == (alone.text, alone.token_ids)
        assert record["nfe"] == alone.calls


def test_a_file_of_requests_tells_how_far_and_how_fast_it_is(
    run: Run, model: Path, tmp_path: Path
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_lines(source, *LINES[:2])
    argv = "--requests", source, "--out", out, "--batch-size", 1, "--steps", 2
    assert run("generate", "--model", model, *argv)[0] == 0
    write_lines(source, *LINES)
    _, _, err = run("generate", "--model", model, *argv)
    assert "requests  1/3  " in err and "requests  3/3  " in err  # of those that are left
    assert re.search(r"3/3  [\d.]+/(s|min)  ETA 0.0 min", err)
    assert err.endswith(f"3 results written to {out}, 2 were there\n")


def test_a_bad_line_is_told_with_its_number_and_loses_no_other(
    run: Run, model: Path, tmp_path: Path
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bad: list[Any] = ["{", "[1]", {"promt": "x"}, {"template": "[[99]]"}, {"id": "one"}]
    bad += [{"seed": "x"}, "[" * 200_000, {"id": "\ud800"}]
    write_lines(source, LINES[0], *bad, "", LINES[2])
    code, told, err = run("generate", "--model", model, "--requests", source, "--out", out)
    assert (code, told) == (2, "")
    assert [r["id"] for r in results(out)] == ["one", "three"]
    for number, part in {
        2: "no JSON (",
        3: "a request is an object, got list.",
        4: "A request has no 'promt': did you mean prompt?",
        5: "template has 99 tokens",
        6: "id 'one' is that of line 1 too.",
        7: "seed must be a whole number",
        8: "no JSON (",
        9: "id has half of a surrogate pair",
    }.items():
        assert f"in.jsonl, line {number}: {part}" in err
    assert "8 of the lines" in err
    write_lines(source, LINES[0], {"id": "new", "length": 4}, LINES[2])
    assert run("generate", "--model", model, "--requests", source, "--out", out)[0] == 0
    assert [r["id"] for r in results(out)] == ["one", "three", "new"]


def test_a_killed_batch_goes_on_without_duplicates(model: Path, tmp_path: Path) -> None:
    source, whole, out = (tmp_path / n for n in ("in.jsonl", "whole.jsonl", "out.jsonl"))
    write_lines(source, *LINES)
    generator = fsdfm.load(model)
    assert answer_file(generator, source, whole, logprobs=True).written == 5

    class Killed(BaseException):
        pass

    def kill(_: str, done: int, total: int) -> None:
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        answer_file(generator, source, out, logprobs=True, progress=kill)
    assert len(results(out)) == 2
    with out.open("ab") as file:  # as a kill in the middle of a line leaves it
        file.write(b'{"id": "three", "te')
    done = answer_file(generator, source, out, logprobs=True)
    assert (done.written, done.found, done.refused) == (3, 2, 0)

    def stable(file: Path) -> list[dict[str, Any]]:
        kept = ("id", "text", "token_ids", "nfe", "spans", "finish", "seed")
        return [{name: r[name] for name in kept} for r in results(file)]

    assert stable(out) == stable(whole)
    assert answer_file(generator, source, out).written == 0
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl", "whole.jsonl"]


@pytest.mark.parametrize(
    "text", ["dear diary\n", "dear diary", '{"id": "a", "text": "b"}\nc', "{}"]
)
@pytest.mark.parametrize("parts", [False, True])
def test_results_that_are_none_are_not_gone_on_with(
    run: Run, model: Path, tmp_path: Path, text: str, parts: bool
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_lines(source, *LINES)
    out.write_text(text)
    if parts:
        Path(f"{out}.parts").mkdir()
    code, _, err = run("generate", "--model", model, "--requests", source, "--out", out)
    assert code == 2 and "out.jsonl, line 1 is no result of a request" in err
    assert out.read_text() == text


def test_results_do_not_go_into_the_requests(run: Run, model: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"id": "a", "length": 4}\n{"id": "b", "length": 4}')
    before = source.read_text()
    code, _, err = run("generate", "--model", model, "--requests", source, "--out", source)
    assert code == 2 and "in.jsonl holds the requests: give another place for results." in err
    assert source.read_text() == before


def test_results_in_parts_stay_when_nobody_asks_for_them_any_more(
    run: Run, model: Path, tmp_path: Path
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_lines(source, {"id": "old", "length": 4})
    argv = "generate", "--model", model, "--requests", source, "--out", out
    assert run(*argv)[0] == 0
    Path(f"{out}.parts").mkdir()
    out.rename(Path(f"{out}.parts") / "0.jsonl")  # as a kill of several processes leaves it
    write_lines(source, {"id": "new", "length": 4})
    assert run(*argv)[0] == 0
    assert [r["id"] for r in results(out)] == ["new", "old"]


def test_results_go_to_a_file_alone(run: Run, model: Path, tmp_path: Path) -> None:
    source, pipe = tmp_path / "in.jsonl", tmp_path / "pipe.jsonl"
    source.write_text('{"length": 4}\n')
    os.mkfifo(pipe)
    code, _, err = run(
        "generate", "--model", str(model), "--requests", str(source), "--out", str(pipe)
    )
    assert code == 2 and "pipe.jsonl is no regular file" in err
    assert pipe.is_fifo() and sorted(os.listdir(tmp_path)) == ["in.jsonl", "pipe.jsonl"]


def test_a_long_text_is_streamed_as_it_is_written(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[str] = []
    monkeypatch.setattr("fsdfm.cli.writing.write", pieces.append)
    argv = "--prompt", "the ", "--length", 300, "--end", "never", "--steps", 2
    assert run("generate", "--model", model, *argv)[0] == 0
    request = Request(prompt="the ", length=300, end="never", steps=2)
    (whole,) = fsdfm.load(model).answer([request])
    assert "".join(pieces) == whole.text + "\n"
    assert len([piece for piece in pieces if piece]) > 4


PARTED = ("jsonl", "parquet")


def table(file: Path) -> list[dict[str, Any]]:
    """The records of a file of results, without what differs from run to run."""
    if file.suffix == ".parquet":
        records = pytest.importorskip("pyarrow.parquet").read_table(file).to_pylist()
    else:
        records = results(file)
    return [{k: v for k, v in r.items() if "second" not in k} for r in records]


def test_parquet_holds_what_json_lines_hold(run: Run, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    source, plain, out = (tmp_path / n for n in ("in.jsonl", "out.jsonl", "out.parquet"))
    write_lines(source, *LINES)
    argv = "--requests", source, "--batch-size", 2, "--logprobs"
    assert run("generate", "--model", model, *argv, "--out", plain)[0] == 0
    assert run("generate", "--model", model, *argv, "--out", out)[0] == 0
    assert table(out) == table(plain)
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl", "out.parquet"]
    before = out.read_bytes()
    code, _, err = run("generate", "--model", model, *argv, "--out", out)
    assert code == 0 and "0 results written" in err and "5 were there" in err
    assert out.read_bytes() == before
    write_lines(source, {"id": "new", "length": 4}, *LINES)
    assert run("generate", "--model", model, *argv, "--out", out)[0] == 0
    # A line before the others shifts the numbers that lines without an id are called by.
    assert [r["id"] for r in table(out)] == ["one", "2", "three", "4", "five", "new", "3", "5"]


def test_a_killed_parquet_goes_on_without_duplicates(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    source, whole, out = (tmp_path / n for n in ("in.jsonl", "whole.parquet", "out.parquet"))
    write_lines(source, *LINES)
    generator = fsdfm.load(model)
    assert answer_file(generator, source, whole).written == 5

    class Killed(BaseException):
        pass

    def kill(_: str, done: int, total: int) -> None:
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        answer_file(generator, source, out, progress=kill)
    assert not out.exists()
    (part,) = (tmp_path / "out.parquet.parts").iterdir()
    with part.open("ab") as file:
        file.write(b'{"id": "three", "te')
    done = answer_file(generator, source, out)
    assert (done.written, done.found, done.refused) == (3, 2, 0)
    assert table(out) == table(whole)
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.parquet", "whole.parquet"]


def test_parquet_says_what_it_lacks(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    write_lines(source, *LINES)
    argv = "generate", "--model", model, "--requests", source, "--out", out
    with monkeypatch.context() as patched:
        patched.setattr("importlib.util.find_spec", lambda name: None)
        code, _, err = run(*argv)
    assert code == 2 and "Parquet needs pyarrow: pip install 'fsdfm[data]' brings it." in err
    assert not out.exists()
    pytest.importorskip("pyarrow")
    out.write_text("dear diary")
    code, _, err = run(*argv)
    assert code == 2 and "out.parquet is no parquet file" in err
    assert out.read_text() == "dear diary"


def started_by_torchrun(words: list[Any]) -> str:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*torchrun, "--nproc-per-node", "2", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    ).stderr


def started_here(run: Run, words: list[Any]) -> str:
    with beside(words) as other:
        _, _, err = run(*words[2:])
        return err + other.communicate()[1]


@pytest.mark.parametrize("kind", PARTED)
def test_processes_share_a_file_of_requests(
    run: Run, model: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    source, alone, out = (tmp_path / n for n in ("in.jsonl", f"alone.{kind}", f"out.{kind}"))
    lines = [*LINES, *({"id": f"more {i}", "length": 6 + i} for i in range(6)), {"promt": ""}]
    write_lines(source, *lines)
    assert answer_file(fsdfm.load(model), source, alone).written == 11
    # Two of them are there, of a run with three processes, one of which was killed in a line.
    parts = tmp_path / f"out.{kind}.parts"
    parts.mkdir()
    there = [json.dumps({**r, "seconds": 1.0, "tokens_per_second": 1.0}) for r in table(alone)]
    (parts / "2.jsonl").write_text(f"{there[3]}\n")
    (parts / "1.jsonl").write_text(f"{there[6]}\n{there[7][:20]}")
    argv = ["-m", "fsdfm", "generate", "--model", model, "--requests", source, "--out", out]
    said = started_by_torchrun(argv) if kind == "jsonl" else started_here(run, argv)
    assert "9 results written" in said and "2 were there" in said, said
    assert said.count("did you mean prompt?") == 1
    assert said.count("results written") == 1
    assert table(out) == table(alone)
    names = ["in.jsonl", f"alone.{kind}", f"out.{kind}"]
    assert sorted(os.listdir(tmp_path)) == sorted(names)
