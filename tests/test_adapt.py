"""`fsdfm prepare --tokenizer MODEL` and `fsdfm adapt` from end to end, with a tiny random llama."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from evaluation_fixtures import save_judge
from language_models import make_lm, save_lm, save_tokenizer, tokenizer
from safetensors.torch import load_file
from test_vocabulary import byte_fallback, without_some_bytes
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from fsdfm.cli.training import PREVIEW_TOKENS, TrainingConsole
from fsdfm.core.errors import ConfigError
from fsdfm.eval.heldout import Blocks, HeldOut
from fsdfm.eval.report import load_report
from fsdfm.flow.loss import elbo_nats_per_token
from fsdfm.generate.live import printable
from fsdfm.generate.loading import load, load_with_network
from fsdfm.generate.source import BOUND_TIMES
from fsdfm.model.causal import CausalNetwork
from fsdfm.model.io.causal_lm import load_causal_lm
from fsdfm.model.io.directory import bundled
from fsdfm.model.io.pretrained import load_pretrained
from fsdfm.recipes.settings import AdaptSettings
from fsdfm.recipes.training import adapt, objective_parts
from fsdfm.study.autoregressive import Autoregressive
from fsdfm.text.store import TokenStore
from fsdfm.text.tokenizer import EOS, Tokenizer
from fsdfm.text.vocabulary import tokens_within
from fsdfm.train.objective import Pretrain

LENGTH = 16
SMALL = {
    "steps": 3,
    "batch_size": 2,
    "context_length": LENGTH,
    "warmup_steps": 1,
    "log_every": 1,
    "evaluate_every": 2,
    "checkpoint_every": 2,
    "validation_sequences": 2,
    "sample_every": 2,
    "device": "cpu",
}
RUN_FILES = {
    "checkpoint.safetensors",
    "config.json",
    "generation.json",
    "metrics.jsonl",
    "model.safetensors",
    "run.json",
    "config.toml",
    "tokenizer.json",
}


def flags(**changes: Any) -> list[str]:
    pairs = [(f"--{name.replace('_', '-')}", str(v)) for name, v in {**SMALL, **changes}.items()]
    return [part for pair in pairs for part in pair]


def write_text(directory: Path, seed: int = 0) -> Path:
    words = ["the", "miller", "saw", "a", "stranger", "at", "his", "door", "and", "ran", "off"]
    draw = random.Random(seed)
    lines = [json.dumps({"text": " ".join(draw.choices(words, k=30))}) for _ in range(60)]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "text.jsonl").write_text("\n".join(lines) + "\n")
    return directory / "text.jsonl"


def prepared(run: Run, text: Path, out: Path, model: Path, *more: object) -> Path:
    usual = ("--validation-fraction", "0.2", "--out", out)
    code, said, wrong = run("prepare", text, "--tokenizer", model, *usual, *more)
    assert (code, wrong) == (0, ""), wrong
    assert said.startswith(f"{out}: ")
    return out


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model (lm), text, and data with the whole vocabulary (data) and a cut (cut)."""
    from fsdfm.cli import main as cli

    directory = tmp_path_factory.mktemp("adapt")
    save_lm(directory / "lm")
    text = write_text(directory)
    for out, more in (("data", []), ("cut", ["--vocab-size", "270"])):
        argv = ["prepare", text, "--tokenizer", directory / "lm", "--out", directory / out, *more]
        assert cli.main([str(word) for word in [*argv, "--validation-fraction", 0.2]]) == 0
    return directory


@pytest.fixture(scope="module")
def twin(place: Path) -> Path:
    """A finished run of two of the three layers, on the cut vocabulary."""
    values: dict[str, Any] = {**SMALL, "layers": "2", "learning_rate": 0.01, "ema_decay": 0.5}
    args = AdaptSettings(model=str(place / "lm"), data=place / "cut", out=place / "twin", **values)
    assert adapt(args)
    return place / "twin"


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def metrics(directory: Path) -> list[dict[str, Any]]:
    hidden = ("elapsed_seconds", "tokens_per_second")
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in hidden} for line in lines]


def assert_same_runs(a: Path, b: Path) -> None:
    for name in ("config.json", "tokenizer.json", "generation.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    for name in ("model.safetensors", "checkpoint.safetensors"):
        one, two = (load_file(d / name) for d in (a, b))
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one), name
    assert metrics(a) == metrics(b)
    assert {p.name for p in a.iterdir()} == {p.name for p in b.iterdir()} == RUN_FILES


# Preparing.


def test_data_has_the_models_tokenizer_whole_or_cut(place: Path) -> None:
    large = tokenizer()
    for name, size in (("data", 320), ("cut", 270)):
        store = TokenStore.open(place / name)
        small = Tokenizer.from_json(store.tokenizer_json)
        assert store.manifest["vocab_size"] == small.vocab_size == size
        assert not store.manifest["tokenizer_trained_here"]
        assert tokens_within(small, large) is not None
        text = small.decode(store.train.block(0, store.train.tokens).tolist())
        given = [json.loads(line)["text"] for line in (place / "text.jsonl").open()]
        assert set(text.split("\n\n")) <= set(given)


def test_more_than_there_is_cuts_nothing(run: Run, place: Path, tmp_path: Path) -> None:
    out = prepared(run, place / "text.jsonl", tmp_path / "d", place / "lm", "--vocab-size", 5000)
    assert contents(out)["tokenizer.json"] == contents(place / "data")["tokenizer.json"]


def test_data_for_a_model_of_ours_has_its_tokenizer_as_it_is(
    run: Run, place: Path, twin: Path, tmp_path: Path
) -> None:
    for name, model in ((twin, twin), (Path("bundled"), bundled())):
        data = prepared(run, place / "text.jsonl", tmp_path / model.name, name)
        assert (data / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("kind", ["bytes missing", "byte fallback"])
def test_any_text_survives_a_models_tokenizer(
    kind: str, run: Run, place: Path, tmp_path: Path
) -> None:
    if kind == "bytes missing":
        save_tokenizer(tmp_path / "lm", without_some_bytes(tokenizer()).to_json())
    else:
        save_tokenizer(tmp_path / "lm", byte_fallback().to_json(), eos="</s>")
    (tmp_path / "text.txt").write_text("naïve façade, 日本語 😀 and the miller\n" * 40)
    sizes = {"bytes missing": 258, "byte fallback": 269}
    for out, more in (("whole", ()), ("cut", ("--vocab-size", sizes[kind]))):
        store = TokenStore.open(
            prepared(run, tmp_path / "text.txt", tmp_path / out, tmp_path / "lm", *more)
        )
        ids = store.train.block(0, store.train.tokens).tolist()
        assert "naïve façade, 日本語 😀 and" in Tokenizer.from_json(store.tokenizer_json).decode(
            ids
        )
        assert not more or store.manifest["vocab_size"] == sizes[kind]


def test_a_cut_without_room_is_refused_and_nothing_is_left(
    run: Run, place: Path, tmp_path: Path
) -> None:
    argv = ("prepare", place / "text.jsonl", "--tokenizer", place / "lm", "--out", tmp_path / "d")
    code, out, err = run(*argv, "--vocab-size", 100)
    assert code == 2 and not out and err.count("\n") == 1
    assert "--vocab-size must be a whole number >= 257" in err and "got 100" in err
    assert not list(tmp_path.iterdir())


def save_word_piece(directory: Path) -> None:
    backend = Backend(models.WordPiece({EOS: 0, "[UNK]": 1, "the": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    save_tokenizer(directory, backend.to_str())


def test_tokenizers_that_would_lose_text_or_are_not_there_give_one_line(
    run: Run, place: Path, tmp_path: Path
) -> None:
    save_word_piece(tmp_path / "wordpiece")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text("{")
    before = sorted(tmp_path.iterdir())
    for name, said in (
        ("wordpiece", "knows no bytes"),
        ("empty", "empty"),
        ("nowhere", "There is no directory"),
        ("nowhere.gguf", "There is no file"),
        ("bad.json", "not a Hugging Face tokenizer.json"),
    ):
        argv = ("prepare", place / "text.jsonl", "--tokenizer", tmp_path / name)
        code, out, err = run(*argv, "--out", tmp_path / "d")
        assert code == 2 and not out and err.count("\n") == 1 and said in err, (name, err)
    assert sorted(tmp_path.iterdir()) == before


# Adapting.


def test_the_command_makes_an_ordinary_model_directory(
    run: Run, place: Path, tmp_path: Path
) -> None:
    out = tmp_path / "twin"
    argv = ("adapt", place / "lm", "--data", place / "cut", "--out", out, "--layers", 2)
    code, said, err = run(*argv, *flags())
    assert code == 0 and not said and "Done: try  fsdfm generate --model" in err
    assert {p.name for p in out.iterdir()} == RUN_FILES
    found = load_pretrained(out)
    assert isinstance(found.model, CausalNetwork)
    config = found.model.config
    assert (config.blocks, config.vocab_size, config.context_length) == (2, 270, LENGTH)
    assert (config.source, config.attention) == ("mask", "bidirectional")
    assert config.start_id == Tokenizer.from_json(found.tokenizer_json).eos_id
    assert found.generation == {"steps": 64, "step": "exact"}
    assert [m["step"] for m in metrics(out) if "loss" in m] == [1, 2, 3]
    code, _, err = run(*argv, *flags())
    assert code == 0 and "Finished already" in err


def test_it_starts_as_the_language_model_with_the_rows_of_the_cut(
    place: Path, tmp_path: Path
) -> None:
    values: dict[str, Any] = {**SMALL, "steps": 1, "learning_rate": 1e-12, "attention": "causal"}
    args = AdaptSettings(
        model=str(place / "lm"), data=place / "cut", out=tmp_path / "run", **values
    )
    assert adapt(args)
    network = load_pretrained(tmp_path / "run").model
    small = Tokenizer.from_json(TokenStore.open(place / "cut").tokenizer_json)
    ids = tokens_within(small, tokenizer())
    assert ids is not None
    old = torch.tensor([-1 if i is None else i for i in ids])
    x = torch.randint(270, (2, 9), generator=torch.Generator().manual_seed(1))
    before = torch.cat((torch.full((2, 1), small.eos_id), x), 1)
    with torch.no_grad():
        found = network(x, torch.tensor([0.1, 0.9]), torch.ones(2))[..., :270]
        wanted = make_lm()(old[before]).logits[:, :-1, old]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_a_language_model_says_what_it_is_for_and_is_no_flow_model(
    run: Run, place: Path, tmp_path: Path
) -> None:
    out, data = tmp_path / "rival", place / "cut"
    argv = ("adapt", place / "lm", "--data", data, "--out", out, "--attention", "causal")
    code, _, err = run(*argv, *flags(sample_every=3))
    assert code == 0 and f"Done: try  fsdfm baseline ar --model {out} --data {data}" in err
    assert "generate" not in err
    # The text that it printed is one that it draws token by token.
    (text,) = Autoregressive(load_pretrained(out).model).samples(PREVIEW_TOKENS, [0])
    shown = printable(Tokenizer.from_json(load_pretrained(out).tokenizer_json).decode(text))
    assert shown.split() == err.split("nats/token")[-1].split("Done:")[0].split()
    (tmp_path / "judge").mkdir()
    judge = save_judge(tmp_path / "judge", 64)
    judged = ("evaluate", "--judge", judge, "--out", tmp_path / "report")
    for words in (("generate",), judged):
        code, said, err = run(*words, "--model", out)
        assert code == 2 and not said and err.count("\n") == 1
        assert "attention=causal" in err and "fsdfm baseline ar" in err
    student = ("distill", "--teacher", out, "--data", data, "--out", tmp_path / "student")
    further = ("pretrain", "--init", out, "--data", data, "--out", tmp_path / "further")
    for words in (student, further):
        code, said, err = run(*words)
        assert code == 2 and not said and err.count("\n") == 1
        assert "predicts the next token alone" in err and "bidirectional" in err
        assert not Path(words[-1]).exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"source": "uniform"}, {"source": "uniform", "start_id": 0}),
        ({"shift": "none"}, {"start_id": None}),
        ({"layers": "2,0", "attention": "causal"}, {"blocks": 2, "attention": "causal"}),
        ({"loss": "generalized_kl", "schedule_power": 2.0}, {"schedule_power": 2.0}),
        ({"frozen_share": 0.0, "context_length": 12}, {"context_length": 12}),
    ],
)
def test_options_reach_the_network(
    changes: dict[str, Any], expected: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    values: dict[str, Any] = {**SMALL, "steps": 1, **changes}
    values |= {"model": str(place / "lm"), "data": place / "data", "out": tmp_path / "r"}
    args = AdaptSettings(**values)
    assert adapt(args)
    config = load_pretrained(tmp_path / "r").model.config
    assert {name: getattr(config, name) for name in expected} == expected


def test_layers_are_those_that_were_named(place: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {**SMALL, "steps": 1, "learning_rate": 1e-12, "layers": "2,0"}
    values |= {"model": str(place / "lm"), "data": place / "data", "out": tmp_path / "r"}
    args = AdaptSettings(**values)
    assert adapt(args)
    blocks, theirs = load_pretrained(tmp_path / "r").model.blocks, make_lm().model.layers
    for block, number in zip(blocks, (0, 2), strict=True):
        down = theirs[number].mlp.down_proj.weight
        torch.testing.assert_close(block.mlp_out.weight, down, rtol=0, atol=1e-6)


# What it is good for.


def test_text_comes_out_of_it_with_a_prompt_or_a_gap(run: Run, twin: Path) -> None:
    for precision in ("float32", "bfloat16"):
        argv = ("generate", "--model", twin, "--length", 12, "--seed", 3, "--device", "cpu")
        code, out, err = run(*argv, "--steps", 4, "--precision", precision, "--json")
        assert (code, err) == (0, "")
        sample = json.loads(out)
        assert sample["tokens"] == 12 and 1 <= sample["nfe"] <= 4
        code, out, _ = run(*argv, "--steps", 4, "--precision", precision, "--prompt", "the mill")
        assert code == 0 and out.startswith("the mill")
    generator = load(twin, device="cpu")
    small, vocab_size = generator.tokenizer, generator.config.vocab_size
    ids = (small.encode("the miller saw a stranger at his door") * 9)[:LENGTH]
    frozen = [i < 5 or i > 11 for i in range(LENGTH)]
    for movers in ("independent", "systematic"):
        for step in ("exact", "published", "euler"):
            options: Any = {"steps": 3, "movers": movers, "step": step}
            samples = generator.fill([ids, ids], [frozen, frozen], **options).samples
            for sample in samples:
                pairs = zip(sample.token_ids, ids, frozen, strict=True)
                assert all(new == old for new, old, given in pairs if given)
                assert max(sample.token_ids) < vocab_size and sample.tokens == 7
    shown = [snapshot.token_ids for snapshot in generator.stream(steps=8, length=LENGTH)]
    assert set(shown[0]) == {vocab_size} and max(shown[-1]) < vocab_size
    for before, after in itertools.pairwise(shown):  # what is revealed stays
        assert all(a in (b, vocab_size) for a, b in zip(before, after, strict=True))


def test_its_bound_is_evaluated(run: Run, twin: Path, place: Path, tmp_path: Path) -> None:
    (tmp_path / "judge").mkdir()
    judge = save_judge(tmp_path / "judge", 64)
    argv = ("evaluate", "--model", twin, "--judge", judge, "--heldout", place / "text.jsonl")
    numbers = ("--num-samples", 2, "--length", 16, "--steps", 2, "--device", "cpu")
    code, _, err = run(*argv, *numbers, "--out", tmp_path / "report")
    assert code == 0, err
    rows = load_report(tmp_path / "report").rows
    (row,) = (r for r in rows if r.task == "likelihood")
    (generator, found), record = load_with_network(twin, device="cpu"), row.records[0]
    blocks = Blocks.cut(HeldOut.open(place / "text.jsonl"), generator.tokenizer, 16, 0).human
    source, schedule = objective_parts(generator.config)
    with generator.autocast():
        x_1 = torch.tensor([blocks[0]])
        nats = list(elbo_nats_per_token(found.model, x_1, source, schedule, times=BOUND_TIMES))
    assert record["elbo_nats"] / 16 == pytest.approx(sum(nats) / len(nats), rel=0.005)


def test_pretraining_goes_on_from_it(run: Run, twin: Path, place: Path, tmp_path: Path) -> None:
    argv = ("pretrain", "--init", twin, "--data", place / "cut", "--out", tmp_path / "r")
    numbers = flags(context_length=24, frozen_share=0.5)
    code, _, err = run(*argv, "--source", "uniform", *numbers)
    assert code == 2 and "add --source mask" in err and not (tmp_path / "r").exists()
    code, _, err = run(*argv, *numbers)
    assert code == 0, err
    grown, start = load_pretrained(tmp_path / "r").model, load_pretrained(twin).model
    assert grown.config == replace(start.config, context_length=24)
    moved = [
        not torch.equal(a, b) for a, b in zip(grown.parameters(), start.parameters(), strict=True)
    ]
    assert all(moved)


@pytest.mark.parametrize("target", ["rk4", "rk2", "semigroup", "joint"])
def test_every_kind_of_student_comes_of_it(
    target: str, run: Run, twin: Path, place: Path, tmp_path: Path
) -> None:
    argv = ("distill", "--teacher", twin, "--data", place / "cut", "--out", tmp_path / "r")
    more = ["--target", target]
    more += ["--target-rule", "exact"] if target == "semigroup" else []
    more += ["--step-embedding", "raw"] if target == "rk2" else []
    code, _, err = run(*argv, *more, *flags(ema_decay=0.0, learning_rate=0.01, batch_size=8))
    assert code == 0, err
    student, teacher = load_pretrained(tmp_path / "r").model, load_pretrained(twin).model
    embedding = {"joint": "none", "rk2": "raw"}.get(target, "log2")
    neighbours = 3 if target == "joint" else 0
    expected = replace(teacher.config, step_embedding=embedding, neighbours=neighbours)
    assert student.config == expected
    before, after = teacher.state_dict(), student.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not changed if target == "joint" else changed == before.keys()
    if target == "joint":
        assert after["joint.out.weight"].any()
    generation = json.loads((tmp_path / "r" / "generation.json").read_text())
    assert generation["grid"] == "even"  # a late one would reveal most of a text in its first call
    sample = load(tmp_path / "r", device="cpu").generate(length=LENGTH, steps=3).samples[0]
    assert max(sample.token_ids) < 270


# Death and revival.

KILL = """
import json, os, pathlib, signal, sys, time
import torch
torch.set_num_threads(1)
from fsdfm.recipes import settings, training
from fsdfm.train import loop

values = json.loads(sys.argv[1])
args = settings.AdaptSettings(**{k: pathlib.Path(v) if k in ("data", "out") else v
                           for k, v in values.items()})
from transformers import LlamaForCausalLM  # slow: once for all children
metrics = args.out / "metrics.jsonl"
for lines_at_death in (5, 10):
    child = os.fork()
    if child == 0:
        update = loop.update
        loop.update = lambda *a: (time.sleep(0.03), update(*a))[1]  # time to be killed in
        training.adapt(args)
        os._exit(0)
    while not metrics.exists() or len(metrics.read_text().splitlines()) < lines_at_death:
        time.sleep(0.002)
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "ended by itself"
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
"""


def test_a_run_killed_twice_ends_bit_identical_to_one_never_stopped(
    place: Path, tmp_path: Path
) -> None:
    rhythm = {"steps": 16, "log_every": 2, "checkpoint_every": 3, "evaluate_every": 6}
    values: dict[str, Any] = {**SMALL, **rhythm, "layers": "2", "sample_every": 0}
    args = AdaptSettings(
        model=str(place / "lm"), data=place / "cut", out=tmp_path / "run", **values
    )
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(args).items()}
    done = subprocess.run(
        [sys.executable, "-c", KILL, json.dumps(plain)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert adapt(args)
    whole = replace(args, out=tmp_path / "whole")
    assert adapt(whole)
    assert_same_runs(args.out, whole.out)


def test_a_signal_stops_it_and_the_same_command_goes_on_from_another_place(
    run: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advanced = TrainingConsole.advanced

    def interrupt(self: Any, step: int, steps: int, loss: float | None) -> None:
        advanced(self, step, steps, loss)
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    more = ("--data", place / "cut", "--layers", 2, *flags())
    with monkeypatch.context() as patch:
        patch.setattr(TrainingConsole, "advanced", interrupt)
        code, _, err = run("adapt", place / "lm", "--out", tmp_path / "run", *more)
    assert code == 130 and "Stopped at step 2 of 3" in err
    (tmp_path / "moved").mkdir()
    moved = tmp_path / "moved" / "lm"  # a directory's name is the ancestor's
    shutil.copytree(place / "lm", moved)
    code, _, err = run("adapt", moved, "--out", tmp_path / "run", *more)
    assert code == 0 and "Resumed at step 2 of 3" in err
    assert run("adapt", place / "lm", "--out", tmp_path / "whole", *more)[0] == 0
    assert_same_runs(tmp_path / "run", tmp_path / "whole")


# Refusals.


def refused(run: Run, *argv: object) -> str:
    code, out, err = run("adapt", *argv)
    assert code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("layers", ["0", "99", "x", "0,3", "1,1"])
def test_layers_that_there_are_not_are_refused(
    layers: str, run: Run, place: Path, tmp_path: Path
) -> None:
    argv = (place / "lm", "--data", place / "data", "--out", tmp_path / "r", "--layers", layers)
    err = refused(run, *argv, *flags())
    assert "layers must be" in err and layers in err
    assert not list(tmp_path.iterdir())


def gpt2(directory: Path) -> None:
    save_judge(directory, 32)


def bert(directory: Path) -> None:
    save_word_piece(directory)
    make_lm("bert", intermediate_size=32, rope_parameters=None).save_pretrained(directory)


def pickled(directory: Path) -> None:
    save_lm(directory)
    (directory / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, directory / "pytorch_model.bin")


def truncated(directory: Path) -> None:
    path = save_lm(directory) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def nothing(directory: Path) -> None:
    """An empty directory."""


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (gpt2, "is a gpt2 model: adapting supports llama, mistral, qwen2, qwen3"),
        (bert, "is a bert model: adapting supports llama, mistral, qwen2, qwen3"),
        (pickled, "safetensors"),
        (truncated, "Cannot load"),
        (nothing, "Cannot load"),
    ],
)
def test_models_that_cannot_be_adapted_give_one_line(
    make: Any, said: str, run: Run, place: Path, tmp_path: Path
) -> None:
    (tmp_path / "lm").mkdir()
    make(tmp_path / "lm")
    argv = (tmp_path / "lm", "--data", place / "data", "--out", tmp_path / "r", *flags())
    err = refused(run, *argv)
    assert said in err and str(tmp_path / "lm") in err
    assert [p.name for p in tmp_path.iterdir()] == ["lm"]


def test_a_flow_model_is_no_language_model(
    run: Run, twin: Path, place: Path, tmp_path: Path
) -> None:
    argv = (twin, "--data", place / "cut", "--out", tmp_path / "r", *flags())
    assert str(twin) in refused(run, *argv)
    assert not list(tmp_path.iterdir())


def test_what_is_not_there_is_named(run: Run, place: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "r")
    err = refused(run, tmp_path / "nowhere", "--data", place / "data", *out, *flags())
    assert "There is no directory" in err and "nowhere" in err
    err = refused(run, place / "lm", "--data", tmp_path / "nowhere", *out, *flags())
    assert "fsdfm prepare" in err
    assert not list(tmp_path.iterdir())
    code, _, err = run("adapt", "--data", place / "data", *out)
    assert code == 2 and "MODEL" in err


def test_data_of_another_tokenizer_is_refused_with_the_flag_that_helps(
    run: Run, place: Path, tmp_path: Path
) -> None:
    text, argv = place / "text.jsonl", ("--validation-fraction", 0.2, "--vocab-size", 275)
    assert run("prepare", text, "--out", tmp_path / "own", *argv)[0] == 0
    err = refused(run, place / "lm", "--data", tmp_path / "own", "--out", tmp_path / "r", *flags())
    assert f"prepare it again with --tokenizer {place / 'lm'}" in err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("flag", "value"),
    [("steps", 0), ("frozen_share", 1.5), ("frozen_share", -0.1), ("context_length", 0)],
)
def test_numbers_out_of_range_are_refused(
    flag: str, value: float, run: Run, place: Path, tmp_path: Path
) -> None:
    argv = (place / "lm", "--data", place / "data", "--out", tmp_path / "r")
    assert flag.replace("_", "-") in refused(run, *argv, *flags(**{flag: value}))
    assert not list(tmp_path.iterdir())


def test_text_shorter_than_a_block_is_refused(run: Run, place: Path, tmp_path: Path) -> None:
    argv = (place / "lm", "--data", place / "data", "--out", tmp_path / "r")
    assert "--context-length" in refused(run, *argv, *flags(context_length=100_000))
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_taken_is_left_as_it_is(
    run: Run, twin: Path, place: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    argv = (place / "lm", "--data", place / "cut", "--layers", 2)
    assert "is not empty and holds no run" in refused(run, *argv, "--out", tmp_path, *flags())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    before = contents(twin)
    err = refused(run, *argv, "--out", twin, *flags(learning_rate=0.02, ema_decay=0.5))
    assert "learning_rate 0.01 -> 0.02" in err
    other = save_lm(tmp_path / "other", seed=1)
    more = ("--data", place / "cut", "--layers", 2, "--out", twin)
    err = refused(run, other, *more, *flags(learning_rate=0.01, ema_decay=0.5))
    assert "other starting weights" in err
    assert contents(twin) == before


def test_a_language_model_that_is_not_finite_leaves_no_model(
    place: Path, tmp_path: Path, run: Run
) -> None:
    save_lm(tmp_path / "lm")
    model = load_causal_lm(str(tmp_path / "lm")).model
    model.model.norm.weight.data = torch.full((32,), float("nan"))
    model.save_pretrained(tmp_path / "broken")
    shutil.copy(tmp_path / "lm" / "tokenizer.json", tmp_path / "broken")
    argv = (tmp_path / "broken", "--data", place / "data", "--out", tmp_path / "r", *flags())
    err = refused(run, *argv)
    assert "not finite" in err
    assert not (tmp_path / "r" / "model.safetensors").exists()


def test_adapting_freezes_a_third_of_the_rows_and_pretraining_none(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[float] = []
    loss = Pretrain.loss

    def watched(self: Pretrain, *args: Any) -> dict[str, torch.Tensor]:
        shares.append(self.frozen_share)
        assert self.source.absorbing
        return loss(self, *args)

    monkeypatch.setattr(Pretrain, "loss", watched)
    values: dict[str, Any] = {**SMALL, "steps": 1}
    values |= {"model": str(place / "lm"), "data": place / "data", "out": tmp_path / "r"}
    args = AdaptSettings(**values)
    assert adapt(args)
    assert shares == [1 / 3]
    with pytest.raises(ConfigError, match="frozen_share"):
        replace(args, frozen_share=2.0).settings()
