"""`fsdfm pretrain` and `fsdfm distill` on tiny data: what they leave, and how they refuse."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fsdfm.cli import main as cli
from fsdfm.cli.training import TrainingConsole
from fsdfm.core.errors import CheckpointError, ConfigError, DataError, FsdfmError, TrainingError
from fsdfm.flow.loss import cross_entropy
from fsdfm.flow.path import MaskSource
from fsdfm.flow.schedule import Polynomial
from fsdfm.generate.loading import load
from fsdfm.model.config import PRESETS, ModelConfig
from fsdfm.model.io import directory as directory_module
from fsdfm.model.io.pretrained import load_pretrained, save_pretrained
from fsdfm.model.transformer import Transformer
from fsdfm.recipes import training
from fsdfm.recipes.cost import sequence_flops, work
from fsdfm.recipes.passes import batches
from fsdfm.recipes.settings import DistillSettings, PretrainSettings, RunSettings, distill_settings
from fsdfm.text.packing import prepare
from fsdfm.text.settings import PrepareSettings
from fsdfm.text.store import TokenSplit, TokenStore
from fsdfm.text.tokenizer import Tokenizer, train_bpe
from fsdfm.train import checkpoint as checkpoint_module
from fsdfm.train import loop as loop_module
from fsdfm.train.ema import Ema
from fsdfm.train.objective import Pretrain
from fsdfm.train.parallel import ALONE

LENGTH = 16
Command = Callable[..., tuple[int, str, str]]
TINY = {"hidden_size": 16, "blocks": 1, "heads": 2, "cond_size": 8}
RUN_FILES = {
    "checkpoint.safetensors",
    "config.json",
    "config.toml",
    "generation.json",
    "metrics.jsonl",
    "model.safetensors",
    "run.json",
    "tokenizer.json",
}


@pytest.fixture(autouse=True)
def _tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", TINY)


def make_data(directory: Path, seed: int = 0, tokenizer: Tokenizer | None = None) -> Path:
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "red", "bird"]
    draw = random.Random(seed)
    lines = [json.dumps({"text": " ".join(draw.choices(words, k=30))}) for _ in range(60)]
    directory.mkdir(exist_ok=True)
    (directory / "text.jsonl").write_text("\n".join(lines) + "\n")
    settings = PrepareSettings(vocab_size=270, validation_fraction=0.2)
    files, out = [directory / "text.jsonl"], directory / "data"
    prepare(files, out, settings=settings, tokenizer=tokenizer)
    return directory / "data"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def teacher(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory whose weights are all at work, as after training."""
    return make_model(data, tmp_path_factory.mktemp("teacher") / "model")


def make_model(data: Path, directory: Path, seed: int = 0, **changes: Any) -> Path:
    store = TokenStore.open(data)
    vocabulary = {"vocab_size": store.manifest["vocab_size"], "context_length": LENGTH}
    model = Transformer(ModelConfig.from_dict({**vocabulary, **TINY, **changes}))
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=draw)
    save_pretrained(directory, model, tokenizer_json=store.tokenizer_json)
    return directory


def pretrain(settings: PretrainSettings) -> bool:
    return training.pretrain(settings, TrainingConsole)


def distill(settings: DistillSettings) -> bool:
    return training.distill(settings, TrainingConsole)


SMALL: dict[str, Any] = {
    "steps": 7,
    "batch_size": 2,
    "accumulate": 2,
    "context_length": LENGTH,
    "warmup_steps": 2,
    "log_every": 2,
    "evaluate_every": 4,
    "checkpoint_every": 3,
    "validation_sequences": 3,
    "sample_every": 0,
    "device": "cpu",
}


def pretrain_args(data: Path, out: Path, **changes: Any) -> PretrainSettings:
    return PretrainSettings(**{**SMALL, "data": data, "out": out, **changes})


def distill_args(data: Path, out: Path, teacher: Path, **changes: Any) -> DistillSettings:
    return distill_settings(**{**SMALL, "data": data, "out": out, "teacher": teacher, **changes})


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def metrics(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    hidden = ("elapsed_seconds", "tokens_per_second", "utilisation")
    return [{k: v for k, v in json.loads(line).items() if k not in hidden} for line in lines]


def weights(directory: Path) -> tuple[Any, bytes]:
    """Header and tensors of model.safetensors; the library writes metadata in random order."""
    data = (directory / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def assert_same_runs(a: Path, b: Path) -> None:
    for name in ("config.json", "tokenizer.json", "generation.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert weights(a) == weights(b)
    one, two = (load_file(d / "checkpoint.safetensors") for d in (a, b))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert metrics(a) == metrics(b)
    assert {p.name for p in a.iterdir()} == {p.name for p in b.iterdir()} == RUN_FILES


def refusal(kind: type[FsdfmError], command: Callable[[Any], bool], args: RunSettings) -> str:
    """The message of the error that a command gives: one line."""
    with pytest.raises(kind) as caught:
        command(args)
    message = str(caught.value)
    assert "\n" not in message and message
    return message


# ------------------------------------------------------------------------------ what comes out


def test_a_run_is_a_model_directory_with_the_average_of_the_last_update(
    data: Path, tmp_path: Path
) -> None:
    assert pretrain(pretrain_args(data, tmp_path / "run"))
    assert {p.name for p in (tmp_path / "run").iterdir()} == RUN_FILES
    found = load_pretrained(tmp_path / "run")
    checkpoint = load_file(tmp_path / "run/checkpoint.safetensors")
    for name, parameter in found.model.named_parameters():
        assert torch.equal(parameter, checkpoint[f"ema.{name}"])
        assert not torch.equal(parameter, checkpoint[f"model.{name}"])
    assert found.generation == {"steps": 64, "step": "exact"}
    assert [m["step"] for m in metrics(tmp_path / "run")] == [2, 4, 4, 6, 7, 7]
    last = metrics(tmp_path / "run")[-2:]
    assert last[0]["tokens"] == 7 * 2 * 2 * LENGTH and math.isfinite(last[1]["elbo_nats_per_token"])


def test_a_student_starts_from_its_teacher_and_remembers_how_to_be_sampled(
    data: Path, teacher: Path, tmp_path: Path
) -> None:
    changes = {"learning_rate": 1e-9, "target": "rk4", "target_rule": "euler"}
    assert distill(distill_args(data, tmp_path / "run", teacher, **changes))
    student, start = load_pretrained(tmp_path / "run"), load_pretrained(teacher)
    assert student.generation == {"steps": 8, "step": "euler", "grid": "late"}
    assert student.model.config.step_embedding == "log2"
    x = torch.arange(LENGTH)[None]
    t, h = torch.tensor([0.3]), torch.tensor([0.5])
    with torch.no_grad():
        torch.testing.assert_close(
            student.model(x, t, h), start.model(x, t, h), rtol=1e-3, atol=1e-3
        )


def test_a_run_that_goes_on_from_another_sees_other_batches(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    batch = TokenSplit.batch

    def watched(self: TokenSplit, step: int, **how: Any) -> Tensor:
        seen.append(batch(self, step, **how))
        return seen[-1]

    monkeypatch.setattr(TokenSplit, "batch", watched)
    assert pretrain(pretrain_args(data, tmp_path / "first", steps=4))
    first, seen[:] = seen[:], []
    assert pretrain(pretrain_args(data, tmp_path / "again", steps=4))
    again, seen[:] = seen[:], []
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert pretrain(pretrain_args(data, tmp_path / "second", steps=4, init=tmp_path / "first"))
    assert not any(torch.equal(*pair) for pair in zip(first, seen, strict=True))


def test_a_share_of_the_passes_has_its_sequences_cut_in_four(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    loss = Pretrain.loss

    def watched(self: Pretrain, model: Any, ema: Any, x_1: Tensor, generator: Any) -> Any:
        if x_1.numel() == 2 * LENGTH:  # else its work is being counted
            seen.append(x_1)
        return loss(self, model, ema, x_1, generator)

    monkeypatch.setattr(Pretrain, "loss", watched)
    numbers: dict[str, Any] = {"steps": 8, "accumulate": 1, "peak_tflops": 1.0}
    assert pretrain(pretrain_args(data, tmp_path / "whole", **numbers))
    whole, seen[:] = seen[:], []
    assert {tuple(x_1.shape) for x_1 in whole} == {(2, LENGTH)}
    args = pretrain_args(data, tmp_path / "some", short_share=0.75, **numbers)
    assert pretrain(args)
    short = [len(x_1) == 8 for x_1 in seen]
    assert short == [False, True, True, True] * 2
    for cut, x_1 in zip(seen, whole, strict=True):
        assert torch.equal(cut.reshape(2, LENGTH), x_1)
    # What a sequence costs is the mean of both kinds, and the bound is that of whole ones.
    rates = []
    for out in ("whole", "some"):
        line = json.loads((tmp_path / out / "metrics.jsonl").read_text().splitlines()[0])
        rates.append(line["utilisation"] * 1e12 * LENGTH / line["tokens_per_second"])
        assert line["tokens"] == 2 * 2 * LENGTH
    config = load_pretrained(tmp_path / "some").model.config
    done = work(Pretrain(MaskSource(config.vocab_size), Polynomial(), cross_entropy))
    whole_costs, short_costs = (sequence_flops(config, done, n) for n in (LENGTH, LENGTH // 4))
    assert rates == pytest.approx([whole_costs, whole_costs / 4 + 3 * short_costs])
    assert config.context_length == LENGTH


def test_processes_share_out_the_short_sequences_of_a_pass(data: Path, tmp_path: Path) -> None:
    store, settings = TokenStore.open(data), pretrain_args(data, tmp_path / "none", short_share=0.5)
    alone, *both = (
        batches(store, settings, LENGTH, 5, replace(ALONE, rank=rank, size=size))
        for rank, size in ((0, 1), (0, 2), (1, 2))
    )
    for index in range(4):
        assert torch.equal(torch.cat([part(index) for part in both]), alone(index))


def test_sequences_that_cannot_be_cut_in_four_are_refused(data: Path, tmp_path: Path) -> None:
    args = pretrain_args(data, tmp_path / "run", context_length=14, short_share=0.5)
    with pytest.raises(ConfigError, match="multiple of it, got 14"):
        pretrain(args)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("source", ["uniform", "mask"])
def test_a_student_gets_a_joint_head_and_keeps_its_teachers_body(
    source: str, data: Path, tmp_path: Path, run: Command
) -> None:
    start = make_model(data, tmp_path / "teacher", source=source)
    out = tmp_path / "run"
    assert distill(distill_args(data, out, start, steps=6, learning_rate=0.1, ema_decay=0.0))
    student, teacher = load_pretrained(out), load_pretrained(start)
    grid = "even" if source == "mask" else "latest"
    drawn = {"steps": 8, "step": "exact", "grid": grid, "draws": 8, "seams": "random"}
    assert student.generation == drawn
    assert student.model.config == replace(teacher.model.config, neighbours=3)
    before, after = teacher.model.state_dict(), student.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"output_layer.linear.weight", "output_layer.linear.bias"}
    assert after["joint.out.weight"].abs().sum() > 0
    generator = load(out)
    assert generator.generate(length=LENGTH, steps=2).samples[0].nfe == 2
    few, many = (generator.generate(length=LENGTH, steps=1, draws=k).texts for k in (1, 4))
    assert few != many
    for draws in (8, None):  # asked for, or the directory's default
        with pytest.raises(ConfigError, match=r"step=published .* draws=8.*Take draws=1") as caught:
            generator.generate(length=LENGTH, step="published", draws=draws)
        assert "\n" not in str(caught.value)
    assert generator.generate(length=LENGTH, step="published", draws=1).texts
    run()  # what the training said
    code, printed, said = run("generate", "--model", out, "--step", "published", "--draws", 8)
    assert (
        code == 2 and not printed and said.count("\n") == 1 and "cannot go with --draws 8" in said
    )
    # Trained on, it keeps its head, and how it draws.
    assert pretrain(pretrain_args(data, tmp_path / "on", init=out, source=source, steps=1))
    assert load_pretrained(tmp_path / "on").generation == drawn


@pytest.mark.parametrize(("target", "warms_up"), [("joint", True), ("rk4", False)])
def test_only_the_average_of_a_joint_head_forgets_its_start_sooner(
    target: str,
    warms_up: bool,
    data: Path,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Ema[Transformer]] = []

    def noted(*args: Any) -> Ema[Transformer]:
        made.append(Ema(*args))
        return made[0]

    monkeypatch.setattr(loop_module, "Ema", noted)
    out = tmp_path / "run"
    assert distill(distill_args(data, out, teacher, steps=4, target=target, ema_decay=0.9999))
    assert made[0].warmup == warms_up
    assert made[0].decay == (0.9999 if warms_up else 0.1**0.25)  # or its start would be judged


def test_a_joint_head_needs_neighbours_and_draws_need_a_joint_head(
    data: Path, teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="neighbours must be a whole number >= 1, got 0"):
        distill(distill_args(data, tmp_path / "run", teacher, neighbours=0))
    with pytest.raises(ConfigError, match="target=joint does not read step_embedding: leave it"):
        distill_args(data, tmp_path / "run", teacher, step_embedding="raw")
    with pytest.raises(ConfigError, match="target=rk4 does not read neighbours: leave it out"):
        distill_args(data, tmp_path / "run", teacher, target="rk4", neighbours=2)
    assert distill_args(data, tmp_path / "run", teacher, step_embedding="log2")  # as it is
    with pytest.raises(ConfigError, match=r"no joint head.*leave draws=4 out"):
        load(teacher).generate(draws=4)


@pytest.mark.parametrize("source", ["uniform", "mask"])
def test_every_kind_of_student_runs(source: str, data: Path, tmp_path: Path) -> None:
    start = make_model(data, tmp_path / "teacher", source=source, schedule_power=2.0)
    kinds = [("raw", "rk4", "published"), ("log2", "rk2", "euler"), ("log2", "semigroup", "exact")]
    for embedding, target, rule in kinds:
        out = tmp_path / f"{embedding}-{target}"
        changes = {"step_embedding": embedding, "target": target, "target_rule": rule}
        weights = "published" if embedding == "raw" else "even"
        assert distill(distill_args(data, out, start, steps=2, step_weights=weights, **changes))
        config = load_pretrained(out).model.config
        assert (config.source, config.schedule_power) == (source, 2.0)
        assert config.step_embedding == embedding
        assert all(math.isfinite(m.get("loss", 0.0)) for m in metrics(out))


@pytest.mark.parametrize("loss", ["generalized_kl", "cross_entropy"])
@pytest.mark.parametrize("source", ["uniform", "mask"])
def test_every_kind_of_teacher_runs(source: str, loss: str, data: Path, tmp_path: Path) -> None:
    args = pretrain_args(data, tmp_path / "run", steps=2, source=source, loss=loss)
    assert pretrain(args)
    assert load_pretrained(tmp_path / "run").model.config.source == source


def test_a_fresh_teacher_starts_from_masks_and_a_later_one_from_its_models_source(
    data: Path, tmp_path: Path
) -> None:
    noise = make_model(data, tmp_path / "noise", source="uniform")
    short = {"steps": 1, "validation_sequences": 1}
    for name, init, source in (("fresh", None, "mask"), ("later", noise, "uniform")):
        assert pretrain(pretrain_args(data, tmp_path / name, init=init, **short))
        assert load_pretrained(tmp_path / name).model.config.source == source
        # A run says its source, as those before did: whatever the default, it goes on.
        assert f'source = "{source}"\n' in (tmp_path / name / "config.toml").read_text()
        for said in (None, source):
            assert pretrain(pretrain_args(data, tmp_path / name, init=init, source=said, **short))
    with pytest.raises(
        ConfigError, match=r"noise was made with source=uniform: add source=uniform\."
    ):
        pretrain(pretrain_args(data, tmp_path / "other", init=noise, source="mask", **short))


def test_pretraining_can_go_on_from_a_model_with_longer_sequences(
    data: Path, teacher: Path, tmp_path: Path
) -> None:
    args = pretrain_args(data, tmp_path / "run", init=teacher, learning_rate=1e-9)
    assert pretrain(replace(args, context_length=2 * LENGTH))
    grown, start = load_pretrained(tmp_path / "run"), load_pretrained(teacher)
    assert grown.model.config == replace(start.model.config, context_length=2 * LENGTH)
    for a, b in zip(grown.model.parameters(), start.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.0, atol=1e-6)


def test_what_a_model_descends_from_goes_with_it(data: Path, teacher: Path, tmp_path: Path) -> None:
    start = load_pretrained(teacher)
    names = ("SmolLM2-135M", "Another-1B")
    save_pretrained(
        tmp_path / "start", start.model, tokenizer_json=start.tokenizer_json, ancestors=names
    )
    changes = {"steps": 1, "validation_sequences": 1}
    assert pretrain(pretrain_args(data, tmp_path / "p", init=tmp_path / "start", **changes))
    assert distill(distill_args(data, tmp_path / "d", tmp_path / "p", **changes))
    assert load_pretrained(tmp_path / "p").ancestors == names
    assert load_pretrained(tmp_path / "d").ancestors == names
    assert load(tmp_path / "d").ancestors == names
    assert pretrain(pretrain_args(data, tmp_path / "fresh", **changes))
    assert load_pretrained(tmp_path / "fresh").ancestors == ()


def test_training_learns_a_text_that_repeats_itself(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abcdefgh" * 400)
    tokenizer = train_bpe(["x y"], 257)
    prepare([tmp_path / "text.txt"], tmp_path / "data", tokenizer=tokenizer)
    PRESETS["tiny"] = {"hidden_size": 32, "blocks": 2, "heads": 2, "cond_size": 16}
    numbers = {"steps": 120, "batch_size": 8, "accumulate": 1, "learning_rate": 0.01}
    rhythm = {"log_every": 30, "evaluate_every": 120, "checkpoint_every": 120, "ema_decay": 0.9}
    args = pretrain_args(tmp_path / "data", tmp_path / "run", **numbers, **rhythm)
    assert pretrain(args)
    elbo = metrics(tmp_path / "run")[-1]["elbo_nats_per_token"]
    losses = [m["loss"] for m in metrics(tmp_path / "run") if "loss" in m]
    # Nothing known: ln 257 = 5.5 nats a token. Letters known, not their order: ln 8 = 2.1.
    assert losses[-1] < 0.6 * losses[0] and elbo < 2.0


def test_the_same_seed_gives_the_same_model_and_another_seed_another(
    data: Path, tmp_path: Path
) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert pretrain(pretrain_args(data, tmp_path / name, steps=2, seed=seed))
    a, b, c = (weights(tmp_path / name)[1] for name in "abc")
    assert a == b != c


def test_samples_are_printed_with_validations_and_leave_the_run_as_it_was(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    previews: list[int] = []
    monkeypatch.setattr(
        TrainingConsole, "_preview", lambda self, ema: previews.append(1) or "\x1b[2J[bold]words"
    )
    changes = {"evaluate_every": 2, "sample_every": 3}
    assert pretrain(pretrain_args(data, tmp_path / "a", **changes))
    printed = capsys.readouterr().err
    assert len(previews) == 3  # with the validations at 4, 6 and 7
    assert "[bold]words" in printed and "\x1b" not in printed
    monkeypatch.undo()
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    assert pretrain(pretrain_args(data, tmp_path / "b", **changes))
    assert "validation ELBO" in capsys.readouterr().err
    assert_same_runs(tmp_path / "a", tmp_path / "b")


# --------------------------------------------------------------------------- death and revival

KILL = """
import dataclasses, json, os, pathlib, signal, sys, time
import torch
torch.set_num_threads(1)
torch.optim.AdamW([torch.zeros(1, requires_grad=True)]).zero_grad()  # its imports are slow
from fsdfm.recipes import settings, training
from fsdfm.model.config import PRESETS
from fsdfm.train import loop

for name, values, lines_at_death in json.loads(sys.argv[1]):
    PRESETS["tiny"] = json.loads(sys.argv[2])
    kind = getattr(settings, name.capitalize() + "Settings")
    places = {k: pathlib.Path(v) for k, v in values.items() if k in ("data", "out", "teacher")}
    args = kind(**{**values, **places})
    metrics = args.out / "metrics.jsonl"
    child = os.fork()
    if child == 0:
        update = loop.update
        loop.update = lambda *a: (time.sleep(0.03), update(*a))[1]  # time to be killed in
        getattr(training, name)(args)
        os._exit(0)
    while not metrics.exists() or len(metrics.read_text().splitlines()) < lines_at_death:
        time.sleep(0.002)
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "ended by itself"
    time.sleep(0.02 * (lines_at_death % 3))
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
"""


def test_runs_killed_twice_end_bit_identical_to_runs_never_stopped(
    data: Path, teacher: Path, tmp_path: Path
) -> None:
    changes = {"steps": 20, "log_every": 2, "checkpoint_every": 5, "evaluate_every": 6}
    runs: dict[str, tuple[Callable[[Any], bool], Any]] = {
        "pretrain": (pretrain, pretrain_args(data, tmp_path / "p", **changes)),
        "distill": (distill, distill_args(data, tmp_path / "d", teacher, **changes)),
    }
    plan = [
        (name, {k: str(v) if isinstance(v, Path) else v for k, v in asdict(args).items()}, lines)
        for name, (_, args) in runs.items()
        for lines in (5, 10)  # after updates 8 and 16, some time past checkpoints 5 and 15
    ]
    command = [sys.executable, "-c", KILL, json.dumps(plan), json.dumps(TINY)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for run, args in runs.values():
        assert run(args)
        whole = replace(args, out=args.out.with_suffix(".whole"))
        assert run(whole)
        assert_same_runs(args.out, whole.out)


class Died(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize(
    "where", ["recipes.training.save_pretrained", "train.loop.save_checkpoint"]
)
def test_death_at_the_last_export_or_checkpoint_is_harmless(
    where: str, data: Path, tmp_path: Path
) -> None:
    assert pretrain(pretrain_args(data, tmp_path / "whole"))
    args, calls = pretrain_args(data, tmp_path / "run"), itertools.count(1)
    real = save_pretrained if where.startswith("recipes") else checkpoint_module.save_checkpoint

    def die_third(*a: Any, **k: Any) -> None:
        if next(calls) == 3:
            raise Died
        real(*a, **k)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"fsdfm.{where}", die_third)
        with pytest.raises(Died):
            pretrain(args)
    load_pretrained(args.out)
    assert pretrain(args)
    assert_same_runs(args.out, tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_command_with_130_and_the_same_command_goes_on(
    number: int,
    data: Path,
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def argv(out: str) -> list[str]:
        flags = {**SMALL, "data": data, "out": tmp_path / out, "teacher": teacher}
        pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in flags.items()]
        return ["distill", *(part for pair in pairs for part in pair)]

    def interrupt(self: Any, step: int, steps: int, loss: float | None) -> None:
        advanced(self, step, steps, loss)
        if step == 4:
            os.kill(os.getpid(), number)

    advanced = TrainingConsole.advanced
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingConsole, "advanced", interrupt)
        assert cli.main(argv("run")) == 130
    printed = capsys.readouterr()
    assert "Stopped at step 5 of 7" in printed.err and "same command" in printed.err
    assert "Traceback" not in printed.err and not printed.out
    load_pretrained(tmp_path / "run")
    assert cli.main(argv("run")) == 0
    assert "Resumed at step 5 of 7" in capsys.readouterr().err
    assert cli.main(argv("whole")) == 0
    assert_same_runs(tmp_path / "run", tmp_path / "whole")


def test_a_finished_run_does_nothing_again_and_says_so(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = pretrain_args(data, tmp_path / "run")
    assert pretrain(args)
    assert "Done" in capsys.readouterr().err
    before = contents(args.out)
    assert pretrain(args)
    assert contents(args.out) == before
    printed = capsys.readouterr().err
    assert "Finished already" in printed and str(args.out) in printed.replace("\n", "")


def test_places_may_change_when_a_run_goes_on(data: Path, teacher: Path, tmp_path: Path) -> None:
    args = distill_args(data, tmp_path / "run", teacher)
    assert distill(args)
    for name, old in (("moved", tmp_path / "run"), ("data", data), ("teacher", teacher)):
        shutil.copytree(old, tmp_path / name)
    moved = {name: tmp_path / place for name, place in (("data", "data"), ("out", "moved"))}
    assert distill(replace(args, teacher=tmp_path / "teacher", device=None, **moved))


def test_a_run_of_an_older_fsdfm_goes_on_though_settings_have_come(
    data: Path, tmp_path: Path
) -> None:
    args = pretrain_args(data, tmp_path / "run")
    assert pretrain(args)
    facts = json.loads((args.out / "run.json").read_text())
    for name in ("final_fraction", "ema_warmup", "cooldown_steps"):
        del facts["settings"][name]
    (args.out / "run.json").write_text(json.dumps(facts))
    for changes in ({"final_fraction": 0.5}, {"ema_warmup": False}):
        message = refusal(ConfigError, pretrain, replace(args, **changes))
        assert next(iter(changes)) in message and message.count("->") == 1
    assert pretrain(args)


def test_python_trains_without_a_console(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert training.pretrain(pretrain_args(data, tmp_path / "a"))
    assert capsys.readouterr() == ("", "")
    assert pretrain(pretrain_args(data, tmp_path / "b"))
    assert_same_runs(tmp_path / "a", tmp_path / "b")


# -------------------------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def finished(
    data: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PretrainSettings, DistillSettings]:
    place = tmp_path_factory.mktemp("finished")
    args = pretrain_args(data, place / "p", init=teacher, steps=1, warmup_steps=0)
    student = distill_args(data, place / "d", teacher, steps=1)
    assert pretrain(args) and distill(student)
    return args, student


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"decay_steps": 9}, ["decay_steps 1 -> 9"]),
        ({"seed": 1, "learning_rate": 0.5}, ["seed 0 -> 1", "learning_rate 0.0003 -> 0.5"]),
        ({"context_length": 8}, ["context_length 16 -> 8"]),
        ({"ema_decay": 0.5}, ["ema_decay 0.9995 -> 0.5"]),
        ({"loss": "generalized_kl"}, ["loss cross_entropy -> generalized_kl"]),
    ],
)
def test_another_run_in_the_same_place_is_refused_with_what_differs(
    changes: dict[str, Any],
    named: list[str],
    finished: tuple[PretrainSettings, DistillSettings],
) -> None:
    args, _ = finished
    before = contents(args.out)
    message = refusal(ConfigError, pretrain, replace(args, **changes))
    assert all(part in message for part in named) and "another out" in message
    assert message.count("->") == len(named) and "other " not in message.split("(")[1].split(")")[0]
    assert contents(args.out) == before


def test_other_data_other_weights_and_another_command_are_refused(
    finished: tuple[PretrainSettings, DistillSettings], data: Path, tmp_path: Path
) -> None:
    args, student = finished
    tokenizer = Tokenizer.from_json(TokenStore.open(data).tokenizer_json)
    other_data = make_data(tmp_path / "other-data", seed=1, tokenizer=tokenizer)
    other = make_model(data, tmp_path / "other", seed=1)
    message = refusal(ConfigError, pretrain, replace(args, data=other_data))
    assert "(other data)" in message
    message = refusal(ConfigError, pretrain, replace(args, init=other))
    assert "(other starting weights)" in message
    message = refusal(ConfigError, distill, replace(student, teacher=other))
    assert "(other starting weights)" in message
    assert "other command" in refusal(ConfigError, distill, replace(student, out=args.out))


def test_a_teacher_with_another_tokenizer_is_refused_with_the_flag_that_helps(
    data: Path, teacher: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("quite another text, with other letters in it. " * 90)
    settings = PrepareSettings(vocab_size=265)
    prepare([tmp_path / "text.txt"], tmp_path / "data", settings=settings)
    for run, args in (
        (distill, distill_args(tmp_path / "data", tmp_path / "run", teacher)),
        (pretrain, pretrain_args(tmp_path / "data", tmp_path / "run", init=teacher)),
    ):
        message = refusal(ConfigError, run, args)
        assert f"tokenizer={teacher}/tokenizer.json" in message
    assert not (tmp_path / "run").exists()


def test_settings_that_contradict_the_starting_model_are_refused(
    data: Path, teacher: Path, tmp_path: Path
) -> None:
    args = pretrain_args(data, tmp_path / "run", init=teacher)
    assert "source=uniform" in refusal(ConfigError, pretrain, replace(args, source="mask"))
    message = refusal(ConfigError, pretrain, replace(args, schedule_power=2.0))
    assert "schedule_power=1.0" in message
    student = distill_args(data, tmp_path / "run", teacher)
    message = refusal(ConfigError, distill, replace(student, context_length=LENGTH + 1))
    assert "context_length=17" in message
    message = refusal(ConfigError, lambda _: replace(student, target="semigroup"), student)
    assert "target_rule=exact" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("warmup_steps", -1),
        ("clip_norm", 0.0),
        ("weight_decay", -0.1),
        ("learning_rate", math.nan),
        ("short_share", 1.5),
        ("context_length", 0),
        ("context_length", -4),
        ("sample_every", -1),
        ("seed", -1),
        ("device", "abacus"),
    ],
)
def test_bad_numbers_are_refused_before_anything_is_made(
    name: str, value: Any, data: Path, teacher: Path, tmp_path: Path
) -> None:
    runs: list[tuple[Callable[[Any], bool], Any]] = [
        (pretrain, pretrain_args(data, tmp_path / "run", init=teacher)),
        (distill, distill_args(data, tmp_path / "run", teacher)),
    ]
    for run, args in runs:
        message = refusal(ConfigError, lambda a, run=run: run(replace(a, **{name: value})), args)
        assert name in message and str(value).removesuffix(".0") in message
    assert not (tmp_path / "run").exists()


def test_a_corpus_shorter_than_one_block_is_refused(data: Path, tmp_path: Path) -> None:
    store = TokenStore.open(data)
    assert store.validation.tokens < store.train.tokens
    for length, split in (
        (store.train.tokens + 1, "train"),
        (store.validation.tokens + 1, "validation"),
    ):
        args = pretrain_args(data, tmp_path / "run", context_length=length)
        message = refusal(DataError, pretrain, args)
        assert split in message and "context_length" in message
    assert not (tmp_path / "run").exists()


def test_missing_data_and_missing_models_are_refused(
    data: Path, teacher: Path, tmp_path: Path
) -> None:
    out, nowhere = tmp_path / "run", tmp_path / "nowhere"
    assert "fsdfm prepare" in refusal(DataError, pretrain, pretrain_args(nowhere, out))
    assert str(nowhere) in refusal(CheckpointError, distill, distill_args(data, out, nowhere))
    args = pretrain_args(data, out, init=nowhere)
    assert str(nowhere) in refusal(CheckpointError, pretrain, args)
    assert not out.exists()


def test_a_place_that_is_not_a_run_or_cannot_be_one_is_refused(data: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    message = refusal(ConfigError, pretrain, pretrain_args(data, foreign))
    assert "not empty" in message and [p.name for p in foreign.iterdir()] == ["thesis.tex"]
    file = foreign / "thesis.tex"
    for out in (file, file / "below", Path("/proc/fsdfm-run")):
        assert "another out" in refusal(CheckpointError, pretrain, pretrain_args(data, out))
    assert file.read_text() == "years of work"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"a": 1}', '{"format": "fsdfm-run"}', "\0\xff"]
)
def test_a_run_json_that_is_none_is_refused(text: str, data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_bytes(text.encode("latin-1"))
    message = refusal(CheckpointError, pretrain, pretrain_args(data, tmp_path / "run"))
    assert "run.json" in message


@pytest.mark.parametrize("command", ["pretrain", "distill"])
def test_two_trainings_do_not_share_a_directory(
    data: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    args: Any = pretrain_args(data, tmp_path / "run")
    run: Callable[[Any], bool] = pretrain
    if command == "distill":
        run, args = distill, distill_args(data, tmp_path / "run", teacher)
    refused: list[str] = []
    validated = TrainingConsole.evaluated

    def second(self: Any, *a: Any) -> None:
        if not refused:
            before = contents(args.out)
            refused.append(refusal(ConfigError, run, args))
            assert contents(args.out) == before
        validated(self, *a)

    monkeypatch.setattr(TrainingConsole, "evaluated", second)
    assert run(args)
    said = f"{args.out} is being written by process {os.getpid()}: wait for it to end"
    assert len(refused) == 1 and refused[0].startswith(said)
    assert [m["step"] for m in metrics(args.out)] == [2, 4, 4, 6, 7, 7]
    assert {p.name for p in args.out.iterdir()} == RUN_FILES


def test_an_empty_directory_and_one_left_by_a_death_at_birth_are_taken(
    data: Path, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b/.run.json.partial").write_text('{"form')
    assert pretrain(pretrain_args(data, tmp_path / "a", steps=1))
    assert pretrain(pretrain_args(data, tmp_path / "b", steps=1))
    assert_same_runs(tmp_path / "a", tmp_path / "b")


def test_a_damaged_checkpoint_is_refused_in_one_line(data: Path, tmp_path: Path) -> None:
    args = pretrain_args(data, tmp_path / "run")
    assert pretrain(args)
    path = args.out / "checkpoint.safetensors"
    whole = path.read_bytes()
    for part in (whole[:-9], whole[:50], b"", b"not a checkpoint"):
        path.write_bytes(part)
        message = refusal(CheckpointError, pretrain, args)
        assert str(path) in message and "delete it" in message
    path.unlink()
    assert pretrain(args)  # anew, as the message said
    assert len(metrics(args.out)) == 6


@pytest.mark.parametrize("what", ["checkpoint", "model", "run"])
def test_a_full_disk_is_told_in_one_line_and_the_run_can_go_on(
    what: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pretrain(pretrain_args(data, tmp_path / "whole"))
    args = pretrain_args(data, tmp_path / "run")
    seen: list[bytes] = []

    def full(real: Callable[..., Any], good: int) -> Callable[..., Any]:
        calls: list[int] = []

        def call(*a: Any, **k: Any) -> Any:
            calls.append(1)
            if len(calls) <= good:
                return real(*a, **k)
            if (path := args.out / "checkpoint.safetensors").exists():
                seen.append(path.read_bytes())
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return call

    with pytest.MonkeyPatch.context() as patch:
        if what == "checkpoint":
            written = full(checkpoint_module.write_tensors, 1)
            patch.setattr(checkpoint_module, "write_tensors", written)
        elif what == "model":
            patch.setattr(directory_module, "save_file", full(directory_module.save_file, 1))
        else:
            patch.setattr(os, "fsync", full(os.fsync, 0))
        message = refusal(CheckpointError, pretrain, args)
    assert "No space left" in message
    left = {p.name for p in args.out.iterdir()}
    if what == "run":
        assert left == set()
    else:
        assert left == RUN_FILES
        assert (args.out / "checkpoint.safetensors").read_bytes() == seen[0]
        load_pretrained(args.out)
    assert pretrain(args)
    assert_same_runs(args.out, tmp_path / "whole")


def test_a_loss_that_is_not_finite_keeps_the_last_good_model_and_checkpoint(
    data: Path, tmp_path: Path
) -> None:
    args = pretrain_args(data, tmp_path / "run", steps=20)
    real, passes = Pretrain.loss, []

    def explode(self: Any, *a: Any) -> dict[str, torch.Tensor]:
        passes.append(1)
        parts = real(self, *a)
        if len(passes) >= 9:  # from update 5 on
            parts["loss"] = parts["loss"] * math.nan
        return parts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pretrain, "loss", explode)
        message = refusal(TrainingError, pretrain, args)
    assert "checkpoint is kept" in message and "learning_rate" in message
    assert contents(args.out).keys() == RUN_FILES
    load_pretrained(args.out)
    assert len(passes) < 2 * 20
    assert pretrain(args)


@pytest.mark.parametrize("changes", [{"optimizer": "muon"}, {"lora": 2}])
def test_what_sharding_would_cut_and_must_be_whole_is_refused_in_a_line(
    changes: dict[str, Any], data: Path, teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        pretrain_args(data, tmp_path / "run", sharding="fsdp", init=teacher, **changes)
    message = str(caught.value)
    assert next(iter(changes)) in message and "sharding=none" in message and "\n" not in message
