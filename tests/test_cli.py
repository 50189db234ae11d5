"""The command line: what is printed, where, and with which exit code."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import fsdfm
from fsdfm.cli import main as cli
from fsdfm.cli.main import COMMANDS
from fsdfm.generate.live import frame, printable, show
from fsdfm.generate.results import Snapshot
from fsdfm.model.config import ModelConfig
from fsdfm.model.io.pretrained import save_pretrained
from fsdfm.model.transformer import Transformer
from fsdfm.text.tokenizer import train_bpe

PUBLISHED = Path(__file__).parent / "fixtures" / "published"
WORDS = "the quick brown fox jumps over the lazy dog and runs into the deep dark forest again "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny random model of context 48."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = train_bpe([WORDS * 20], 300)
    network = Transformer(
        ModelConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=32,
            blocks=2,
            heads=2,
            cond_size=16,
            context_length=48,
            step_embedding="log2",
        )
    )
    draw = torch.Generator().manual_seed(5)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3, generator=draw)
    save_pretrained(directory, network, tokenizer_json=tokenizer.to_json())
    return directory


Run = Callable[..., tuple[int, str, str]]


HELP = """
import sys
from fsdfm.cli.main import COMMANDS, main

def ask(*argv):
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code
    heavy = {"torch", "transformers"} & set(sys.modules)
    assert not heavy, (argv, heavy)
    return code

assert [ask("--help"), ask("--version"), ask("rewrite")] == [0, 0, 2]
assert "numpy" not in sys.modules
for command in (*COMMANDS, "baseline ngram", "baseline ar"):
    assert ask(*command.split(), "--help") == 0, command
    assert ask(*command.split(), "--no-such-flag") == 2, command
assert ask("distill", "--data", "d", "--teacher", "t", "--out", "o", "--grid", "evn") == 2
assert ask("pretrain", "--data", "d", "--out", "o", "--steps", "0") == 2
"""


def test_help_and_wrong_flags_need_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for command in COMMANDS:
        assert f"fsdfm {command}" in done.stdout


def test_the_module_runs_as_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fsdfm", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"fsdfm {fsdfm.__version__}\n", "")


@pytest.mark.parametrize(
    "command", ["prepare", "pretrain", "distill", "generate", "convert", "bench", "serve"]
)
def test_every_command_explains_itself(run: Run, command: str) -> None:
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert f"usage: fsdfm {command}" in out
    if command == "generate":
        flags = "steps length num-samples seed model temperature top-p step movers grid prompt"
        for flag in (flags + " precision json").split():
            assert f"--{flag} " in out


def test_json_is_one_object_per_line_and_sample(run: Run, model: Path) -> None:
    argv = "--json", "--num-samples", 3, "--seed", 7, "--steps", 5, "--prompt", "the über "
    code, out, err = run("generate", "--model", model, "--end", "keep", *argv)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 3
    texts = fsdfm.load(model).generate(num_samples=3, seed=7, steps=5, prompt="the über ").texts
    prompt_tokens = len(fsdfm.load(model).tokenizer.encode("the über "))
    for k, line in enumerate(lines):
        assert "über" in line, "ensure_ascii is off"
        record = json.loads(line)
        names = ["text", "tokens", "nfe", "seed", "seconds", "tokens_per_second"]
        assert list(record) == [*names, "spans", "finish"]
        assert record["spans"] == [[len("the über "), len(record["text"])]]
        assert record["text"] == texts[k]
        assert (record["tokens"], record["nfe"]) == (48 - prompt_tokens, 5)
        assert record["seed"] == 7 + k
        rate = record["tokens"] / record["seconds"]
        assert record["tokens_per_second"] == pytest.approx(rate)


def test_all_flags_reach_the_sampler(run: Run, model: Path) -> None:
    options: dict[str, Any] = {
        "steps": 3,
        "length": 20,
        "num_samples": 2,
        "seed": 5,
        "temperature": 0.8,
        "top_p": 0.9,
        "step": "published",
        "movers": "systematic",
        "prompt": "the ",
        "batch_size": 2,
    }
    argv = [word for name, value in options.items() for word in (f"--{name}", value)]
    argv = [str(word).replace("_", "-") for word in argv]
    argv += ["--end", "keep"]
    code, out, _ = run("generate", "--model", model, "--device", "cpu", "--json", *argv)
    assert code == 0
    texts = [json.loads(line)["text"] for line in out.splitlines()]
    assert texts == fsdfm.load(model, device="cpu").generate(**options).texts


def test_texts_in_a_pipe_are_plain(run: Run, model: Path) -> None:
    one, two = fsdfm.load(model).generate(num_samples=2, seed=1).texts
    assert run("generate", "--model", model, "--seed", 1) == (0, f"{one}\n", "")
    assert run("generate", "--model", model, "--seed", 1, "--num-samples", 2) == (
        0,
        f"{one}\n---\n{two}\n",
        "",
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--steps 0", "--steps must be a whole number from 1 to 1000000, or auto, got 0."),
        ("--length 0", "--length must be a whole number from 1 to 10000000, got 0."),
        ("--num-samples 0", "--num-samples must be a whole number >= 1, got 0."),
        ("--batch-size -2", "--batch-size must be a whole number >= 1, got -2."),
        ("--seed -1", "--seed must be a whole number from 0 to 4294967295, got -1."),
        (
            "--seed 4294967295 --num-samples 2",
            "--seed must be a whole number from 0 to 4294967295, got 4294967296.",
        ),
        ("--temperature -1", "--temperature must be in [0, 1000], got -1."),
        ("--top-p 0", "--top-p must be above 0 and at most 1, got 0."),
        ("--device tpu", "--device must be cpu, cuda, cuda:N or mps, got 'tpu'."),
        (
            "--length 2 --prompt zzz",
            "The prompt has 3 tokens, but with --length 2 only 1 fit: "
            "shorten it or raise the --length.",
        ),
    ],
)
def test_bad_values_are_one_line_on_stderr(run: Run, model: Path, argv: str, message: str) -> None:
    assert run("generate", "--model", model, *argv.split()) == (2, "", f"error: {message}\n")


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
@pytest.mark.parametrize("place", ["file", "stdin"])
def test_a_prompt_is_read_from_a_file(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, end: bytes
) -> None:
    data = "\ufeffthe über\n".encode() + end
    (tmp_path / "prompt.txt").write_bytes(data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="latin-1"))
    argv = "generate", "--model", model, "--num-samples", 2, "--steps", 2
    file = tmp_path / "prompt.txt" if place == "file" else "-"
    code, out, err = run(*argv, "--prompt-file", file)
    assert (code, err) == (0, "")
    prompt = "the über" + "\n" * bool(end)
    assert out == run(*argv, "--prompt", prompt)[1]


def test_a_prompt_file_that_cannot_be_used_is_one_line(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "good.txt").write_text("the")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    for words, says in (
        (("latin.txt",), "latin.txt is not UTF-8 (byte 3)"),
        (("none.txt",), "none.txt: No such file or directory."),
        ((".",), "Is a directory."),
        (("good.txt", "--prompt", "the"), "both given"),
        (("-",), "Standard input is not UTF-8"),
    ):
        file = words[0] if words[0] == "-" else tmp_path / words[0]
        # Before a model is loaded.
        code, out, err = run("generate", "--model", "/no", "--prompt-file", file, *words[1:])
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert says in err


def test_a_missing_model_is_one_line_on_stderr(run: Run, tmp_path: Path) -> None:
    missing = tmp_path / "none"
    assert run("generate", "--model", missing) == (
        2,
        "",
        f"error: There is no model directory {missing}.\n",
    )


def test_a_command_is_needed(run: Run) -> None:
    names = ", ".join(COMMANDS)
    choices = f"choose {names}, or see fsdfm --help."
    assert run() == (2, "", f"error: a command is missing: {choices}\n")
    assert run("train") == (2, "", f"error: there is no command 'train': {choices}\n")


@pytest.mark.parametrize(
    "argv", ["--stepz 3", "--steps three", "--step heun", "extra"], ids=lambda a: str(a)
)
def test_wrong_flags_exit_with_2(run: Run, model: Path, argv: str) -> None:
    code, out, err = run("generate", "--model", model, *argv.split())
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert argv.split()[0] in err


def test_an_interrupt_is_one_line(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fsdfm.cli.writing.load", interrupted)
    assert run("generate") == (130, "", "interrupted\n")


def test_a_reader_that_goes_away_ends_it_quietly(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main(["generate", "--model", str(model), "--num-samples", "2"]) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_line(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main(["generate", "--model", str(model)]) == 2
    error = capsys.readouterr().err
    assert error == "error: Cannot write the output: No space left on device.\n"


def test_a_published_checkpoint_converts_and_generates(run: Run, tmp_path: Path) -> None:
    vocab = {"<|endoftext|>": 0, **{f"w{i}": i for i in range(1, 97)}}
    backend = {"type": "WordLevel", "vocab": vocab, "unk_token": "w1"}
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": backend}))
    out = tmp_path / "model"
    for weights in ("student", "teacher"):
        code, told, err = run(
            *("convert", PUBLISHED / "fsdfm_uniform.pth", out / weights),
            *("--tokenizer", tokenizer, "--weights", weights),
        )
        branch = "step-aware" if weights == "student" else "no step size"
        facts = f"2 blocks of width 64, 97 tokens, uniform source, {branch}"
        assert (code, told, err) == (0, f"{out / weights}: {facts}\n", "")
        code, told, err = run("generate", "--model", out / weights, "--length", 30, "--json")
        assert (code, err) == (0, "")
        assert json.loads(told)["nfe"] == 8
    missing = tmp_path / "none.pth"
    assert run("convert", missing, out / "x", "--tokenizer", tokenizer) == (
        2,
        "",
        f"error: There is no file {missing}.\n",
    )
    assert not (out / "x").exists()


@pytest.mark.parametrize("command", ["pretrain", "distill"])
@pytest.mark.parametrize(("finished", "expected"), [(True, 0), (False, 130)])
def test_training_commands_pass_their_flags_on(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str, finished: bool, expected: int
) -> None:
    training = importlib.import_module("fsdfm.recipes.training")
    given: list[Any] = []

    def train(settings: Any, watch: Any) -> bool:
        given.append(settings)
        return finished

    monkeypatch.setattr(training, command, train)
    teacher = ["--teacher", "T"] if command == "distill" else []
    code, out, err = run(command, "--data", "D", "--out", "R", "--steps", 12, *teacher)
    assert (code, out, err) == (expected, "", "")
    (args,) = given
    assert (args.data, args.out, args.steps) == (Path("D"), Path("R"), 12)


def test_prepare_tells_what_came_out(run: Run, tmp_path: Path) -> None:
    documents = [{"text": f"{WORDS}number {i}"} for i in range(50)]
    source = tmp_path / "docs.jsonl"
    source.write_text("\n".join(json.dumps(document) for document in documents))
    out = tmp_path / "data"
    code, told, err = run("prepare", source, "--out", out, "--vocab-size", 300, "--seed", 1)
    assert (code, err) == (0, "")
    manifest = json.loads((out / "manifest.json").read_text())
    train, validation = (manifest["splits"][name] for name in ("train", "validation"))
    tokens = train["tokens"] + validation["tokens"]
    size = sum(len(document["text"].encode()) for document in documents)
    a_token = size / tokens  # the ends of documents count
    assert told == (
        f"{out}: {train['tokens']:,} training and {validation['tokens']:,} validation tokens "
        f"of 50 documents, {a_token:.2f} bytes a token, vocabulary {manifest['vocab_size']}\n"
    )


def test_prepare_tells_that_a_long_document_was_split(run: Run, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(WORDS * 20)
    code, told, err = run("prepare", tmp_path / "book.txt", "--out", tmp_path / "data")
    assert (code, err) == (0, "")
    assert " of 1 document, one of them split (its end is for validation), " in told


def test_prepare_reads_the_field_asked_for(run: Run, tmp_path: Path) -> None:
    source = tmp_path / "docs.jsonl"
    source.write_text("\n".join(json.dumps({"content": f"{WORDS}{i}", "id": i}) for i in range(50)))
    code, out, err = run("prepare", source, "--out", tmp_path / "data")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert 'line 1: no string under "text"; the fields with a string are "content".' in err
    argv = "--out", tmp_path / "data", "--field", "content", "--vocab-size", 300
    code, out, err = run("prepare", source, *argv)
    assert (code, err) == (0, "")
    assert " of 50 documents, " in out
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert manifest["settings"]["field"] == "content"


def test_prepare_refuses_an_empty_file_in_one_line(run: Run, tmp_path: Path) -> None:
    source = tmp_path / "empty.txt"
    source.touch()
    code, out, err = run("prepare", source, "--out", tmp_path / "data")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {source} is empty") and err.count("\n") == 1
    assert not (tmp_path / "data").exists()


def on_terminal(monkeypatch: pytest.MonkeyPatch, *argv: object) -> tuple[int, str]:
    """Run a command with stdout on a pseudo-terminal of 24 rows; gives exit code and its output."""
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    shown = bytearray()

    def drain() -> None:
        try:
            while data := os.read(master, 65536):
                shown.extend(data)
        except OSError:  # Linux: the other end was closed
            pass

    reader = threading.Thread(target=drain)
    reader.start()
    with os.fdopen(slave, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        code = cli.main([str(word) for word in argv])
    monkeypatch.undo()
    reader.join(timeout=10)
    os.close(master)
    return code, shown.decode().replace("\r\n", "\n")


def test_a_terminal_shows_one_text_settle(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, shown = on_terminal(monkeypatch, "generate", "--model", model, "--steps", 3, "--seed", 4)
    assert code == 0
    assert "step 0/3  0 model calls" in shown
    assert "step 3/3  3 model calls" in shown
    (text,) = fsdfm.load(model).generate(steps=3, seed=4).texts
    assert shown.endswith(f"{printable(text)}\n")


def test_a_terminal_gets_several_texts_plain_and_json_bare(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = map(printable, fsdfm.load(model).generate(num_samples=2).texts)
    argv = "generate", "--model", model, "--num-samples", 2
    code, shown = on_terminal(monkeypatch, *argv)
    assert (code, shown) == (0, f"{one}\n---\n{two}\n")
    code, shown = on_terminal(monkeypatch, *argv, "--json")
    assert code == 0
    assert len([json.loads(line) for line in shown.splitlines()]) == 2


def snapshot(step: int, moved: list[int], pieces: list[str], frozen: int = 0) -> Snapshot:
    given = [index < frozen for index in range(len(pieces))]
    ids, text = list(range(len(pieces))), "".join(pieces)
    return Snapshot(step, 4, step, 0.5 * step, 100, given, ids, text, pieces, moved)


def terminal(width: int, height: int) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, _environ={})


def drawn(console: Console, now: Snapshot) -> str:
    with console.capture() as captured:
        console.print(frame(now, console))
    return captured.get()


def test_the_view_fits_the_terminal() -> None:
    pieces = ["word " * 3] * 500
    start = snapshot(0, [0] * 500, pieces)
    lines = drawn(terminal(40, 12), start).splitlines()
    assert len(lines) == 10
    whole = drawn(terminal(40, 2000), start)
    assert whole.count("word") == 1500


def test_the_view_obeys_no_control_characters_of_tokens() -> None:
    start = snapshot(0, [0, 0, 0], ["\x1b[2J", "a\nb", ""])
    text = drawn(terminal(40, 12), start)
    assert "\x1b[2J" not in text
    assert "\ufffd[2J" in text
    assert "a b" in text, "line ends of noise are spaces"
    assert "░" in text, "a mask is shown as one"


def test_the_view_colours_tokens_by_the_step_that_drew_them_last() -> None:
    names = ["prompt", "noise", "first", "second"]
    text = drawn(terminal(100, 12), snapshot(2, [0, 0, 1, 2], names, frozen=1))
    plain, dim, first, second = re.findall(r"(?:\x1b\[([\d;]+)m)?([a-z]+)(?:\x1b\[0m)?", text)[-4:]
    assert (plain, dim) == (("", "prompt"), ("2", "noise"))
    assert first[1] == "first" and first[0] not in ("", "2")
    assert second[1] == "second" and second[0].startswith("1;") and second[0] != f"1;{first[0]}"
    assert "step 2/4  2 model calls  1.0 s  50 tokens/s" in text


def test_the_view_returns_the_last_snapshot() -> None:
    states = [snapshot(step, [0], ["x"]) for step in range(5)]
    assert show(iter(states), terminal(40, 12)) is states[-1]
