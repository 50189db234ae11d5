"""The bench room: the references are right, and the figures are what they say."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fsdfm
from fsdfm.bench import (
    autoregressive,
    benchmark,
    ctranslate,
    harness,
    jobs,
    limits,
    reference,
    samplers,
    sides,
    trainers,
)
from fsdfm.bench.figures import (
    Row,
    markdown,
    per_step,
)
from fsdfm.bench.harness import Spec, measure, plan, specs_for, started
from fsdfm.bench.jobs import Job, shape
from fsdfm.bench.samplers import OurSampler, make_engine
from fsdfm.bench.sides import SIDES, build_side, runnable, sides_for
from fsdfm.bench.worker import Bench
from fsdfm.core.errors import BenchError, CheckpointError, ConfigError
from fsdfm.flow.grid import even_grid
from fsdfm.flow.loss import cross_entropy, path_loss
from fsdfm.flow.path import Batch, MaskSource, UniformSource, make_source
from fsdfm.flow.sampler import Drawing, Noise, sample
from fsdfm.flow.schedule import Polynomial
from fsdfm.flow.step import STEP_RULES, transition
from fsdfm.model import causal, transformer
from fsdfm.model.causal import CausalConfig
from fsdfm.model.config import PRESETS, ModelConfig
from fsdfm.model.flops import body_flops, head_flops, joint_flops, last_block_flops
from fsdfm.model.int8 import has_int8
from fsdfm.model.networks import build_network, config_to_dict
from fsdfm.model.transformer import Transformer
from fsdfm.train.objective import Distill, Pretrain, published_weights

CPU = torch.device("cpu")
LINEAR = Polynomial()
TOY = ModelConfig(67, 32, 2, 2, 16, context_length=64, step_embedding="log2")
TWIN = CausalConfig(
    vocab_size=67,
    hidden_size=32,
    blocks=2,
    heads=4,
    cond_size=16,
    context_length=64,
    source="mask",
    step_embedding="log2",
    kv_heads=2,
    head_size=6,
    mlp_size=48,
    start_id=0,
)
LLAMA = replace(TWIN, head_size=8)
"""Heads as wide together as the network: CTranslate2 knows no others."""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def one_thread_in_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As here."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def random_network(vocab_size: int, source: Any = "uniform", seed: int = 3) -> Transformer:
    """A tiny network whose posterior depends on state, neighbours, time and step size.

    It is in two minds, between the token that is there and the next one: that tells rules apart.
    """
    config = ModelConfig(vocab_size, 16, 1, 2, 8, source=source, step_embedding="log2")
    network, draw = Transformer(config), torch.Generator().manual_seed(seed)
    tokens = torch.eye(16)[: config.embedding_rows]
    with torch.no_grad():
        network.vocab_embed.weight.copy_(tokens)
        network.output_layer.linear.weight.copy_(0.7 * (tokens + tokens.roll(1, 0)))
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return network


# The reference sampler.

SYMBOLS, LENGTH, SAMPLES = 4, 2, 40_000


class BatchNoise(Noise):
    """The same numbers from one generator: as many generators as samples take longer than all."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(11)

    def uniform(self, length: int) -> Tensor:
        return torch.rand((SAMPLES, length), dtype=torch.float64, generator=self.generator)


def start(source: str) -> Tensor:
    """One x_0 for all samples: how many still show it in the end depends on the rule."""
    x_0 = [SYMBOLS] * LENGTH if source == "mask" else list(range(LENGTH))
    return torch.tensor(x_0).expand(SAMPLES, LENGTH)


def engine_texts(network: Transformer, rule: str, steps: int, source: str) -> Tensor:
    *_, last = sample(
        make_engine(network, CPU, torch.float32),
        start(source),
        even_grid(steps),
        BatchNoise(),
        make_source(source, SYMBOLS),
        drawing=Drawing(STEP_RULES[rule]),
    )
    return last.x


def reference_texts(network: Transformer, rule: Any, steps: int, source: str) -> Tensor:
    draw = torch.Generator().manual_seed(23)
    return reference.reference_sample(network, start(source), steps, rule, draw)


def chi_square_z(one: Tensor, other: Tensor) -> float:
    """Normal score of the two-sample chi-square over whole texts (Wilson and Hilferty)."""
    radix = SYMBOLS ** torch.arange(LENGTH)
    counts = torch.stack(
        [torch.bincount((x * radix).sum(1), minlength=SYMBOLS**LENGTH) for x in (one, other)]
    ).double()
    cells = counts[:, counts.sum(0) >= 10]
    k = cells.shape[1] - 1
    statistic = float(((cells[0] - cells[1]) ** 2 / cells.sum(0)).sum())
    return ((statistic / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))


@pytest.mark.parametrize(
    ("rule", "steps", "source"),
    [("exact", 1, "uniform"), ("published", 3, "mask"), *((r, 3, "uniform") for r in STEP_RULES)],
)
def test_reference_and_engine_write_the_same_texts(rule: str, steps: int, source: str) -> None:
    network = random_network(SYMBOLS, source)
    mine, theirs = (draw(network, rule, steps, source) for draw in (engine_texts, reference_texts))
    assert int(theirs.max()) < SYMBOLS
    assert chi_square_z(mine, theirs) < 4.5


def test_the_comparison_tells_the_nearest_two_rules_apart() -> None:
    network = random_network(SYMBOLS)
    mine = engine_texts(network, "exact", 3, "uniform")
    assert chi_square_z(mine, reference_texts(network, "published", 3, "uniform")) > 6.0


@pytest.mark.parametrize("a", [0.37, 1.0])
@pytest.mark.parametrize("rule", STEP_RULES)
def test_a_reference_jump_draws_what_the_rule_says(rule: Any, a: float) -> None:
    count = 20_000
    states = torch.arange(SYMBOLS + 1)  # the last one is a mask id
    logits = torch.randn(SYMBOLS + 1, SYMBOLS, generator=torch.Generator().manual_seed(9))
    # kappa goes from 0 to a in this step; Euler's chance of a step from 0 is 1 - exp(-a) or 1.
    t, then = torch.zeros(1, dtype=torch.float64), torch.tensor([a], dtype=torch.float64)
    x = states[:, None].expand(-1, count).reshape(1, -1)
    draw = torch.Generator().manual_seed(3)
    after = reference.jump(
        rule, logits.repeat_interleave(count, 0)[None], x, t, then, LINEAR, draw
    ).view(SYMBOLS + 1, count)
    chance = STEP_RULES[rule].mover_probability(LINEAR, t, then)
    expected = transition(
        STEP_RULES[rule], logits.softmax(-1).double(), states, chance.expand(SYMBOLS + 1)
    )
    seen = torch.stack([(after == token).double().mean(1) for token in range(SYMBOLS)], 1)
    error = (expected * (1.0 - expected) / count).sqrt()
    assert ((seen - expected).abs() <= 4.5 * error + 1e-12).all()


def test_the_network_is_told_where_on_the_grid_it_is() -> None:
    network, asked = random_network(SYMBOLS), []
    network.register_forward_pre_hook(lambda _, args: asked.append(torch.stack(args[1:])))
    reference_texts(network, "exact", 4, "uniform")
    expected = torch.tensor([[0.0, 0.25], [0.25, 0.25], [0.5, 0.25], [0.75, 0.25]])
    assert torch.equal(torch.stack(asked), expected[..., None].expand(4, 2, SAMPLES))


def test_a_certain_posterior_never_leaves_its_token_and_draws_no_error() -> None:
    x = torch.tensor([[0, 1, 2]])
    logits = 1e3 * torch.eye(4)[x]
    t, then = torch.tensor([0.2], dtype=torch.float64), torch.tensor([0.9], dtype=torch.float64)
    draw = torch.Generator().manual_seed(1)
    assert torch.equal(reference.jump("published", logits, x, t, then, LINEAR, draw), x)


# The reference losses.


@dataclass(frozen=True)
class FixedSource:
    """x_0 is given: with t = 0 so is x_t."""

    x_0: Tensor
    vocab_size: int
    absorbing: bool = False

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return self.x_0


def only(exponent: int) -> Tensor:
    """Every row at h = 2 ** -exponent."""
    weights = torch.zeros(11, dtype=torch.float64)
    weights[exponent] = 1.0
    return weights


def gradient(loss: Tensor, network: Transformer) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])


def test_path_loss_is_that_of_the_flow_room() -> None:
    network = random_network(7)
    draw = torch.Generator().manual_seed(2)
    x_t, x_1 = torch.randint(7, (2, 4, 6), generator=draw)
    t = torch.tensor([0.0, 0.31, 0.73, 0.998], dtype=torch.float64)
    h = torch.full_like(t, 2.0**-10)
    ours = path_loss(network, Batch(x_t, x_1, t, h), 7, LINEAR)
    log_p = reference.whole_logits(network, x_t, t, h).log_softmax(-1)
    theirs = reference.generalized_kl(log_p, x_t, x_1, LINEAR.rate(t).float()).mean()
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        gradient(theirs, network), gradient(ours, network), rtol=1e-4, atol=1e-4
    )


def deaf(network: Transformer) -> Transformer:
    """The same, but all tokens look alike to it: it knows t and h only, so no jump matters."""
    found = copy.deepcopy(network)
    with torch.no_grad():
        found.vocab_embed.weight[:] = found.vocab_embed.weight[0]
    return found


def test_distillation_is_ours_where_chance_has_no_say() -> None:
    # h = 1, so t = 0 and x_t = x_0; and the target does not depend on the jumps.
    student, teacher = random_network(7), random_network(7, seed=8)
    average = deaf(random_network(7, seed=5))
    x_0, x_1 = torch.randint(7, (2, 3, 6), generator=torch.Generator().manual_seed(4))
    source = FixedSource(x_0, 7)
    draw = torch.Generator().manual_seed(6)
    ours = Distill(source, LINEAR, weights=only(0)).loss(student, average, x_1, draw)["loss"]
    theirs = reference.reference_distill_loss(
        student, average, teacher, x_1, draw, source=source, weights=only(0)
    )
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        gradient(theirs, student), gradient(ours, student), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
    ("weights", "resolution"),
    [(only(0), 0.01), (only(1), 0.01), (None, 0.1)],
    ids=["1", "1/2", "published"],
)
def test_distillation_has_the_mean_of_ours(weights: Tensor | None, resolution: float) -> None:
    student, average = random_network(7), random_network(7, seed=5)
    x_1 = torch.randint(7, (400, 6), generator=torch.Generator().manual_seed(4))
    source, draw = UniformSource(7), torch.Generator().manual_seed(6)
    distill = Distill(source, LINEAR, weights=published_weights() if weights is None else weights)
    losses = torch.empty(2, 24, dtype=torch.float64)
    with torch.no_grad():
        for k in range(losses.shape[1]):
            losses[0, k] = distill.loss(student, average, x_1, draw)["loss"]
            losses[1, k] = reference.reference_distill_loss(
                student, average, average, x_1, draw, source=source, weights=weights
            )
    error = (losses.var(1).sum() / losses.shape[1]).sqrt()
    assert abs(losses[0].mean() - losses[1].mean()) < 4.5 * error
    assert error < resolution * losses.mean(), "or it would not tell much"


# The autoregressive side.


def test_autoregressive_side_writes_exactly_so_many_tokens() -> None:
    model = autoregressive.build(TOY, CPU, torch.float32)
    tokens = autoregressive.generate(model, 3, 64)
    assert tokens.shape == (3, 64)
    assert int(tokens.max()) < TOY.vocab_size
    assert len(set(map(tuple, tokens.tolist()))) == 3, "drawn, not greedy"
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes["transformer.wte.weight"] == (67, 32)
    assert shapes["transformer.h.1.mlp.c_fc.weight"] == (32, 128)


def test_without_transformers_the_sides_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sides.missing() is None
    monkeypatch.setattr(autoregressive, "available", lambda: False)
    assert runnable(["engine", "autoregressive-bf16", "ctranslate2-int8"]) == ["engine"]
    assert "autoregressive-float32" not in sides_for("sample", torch.float32)
    assert str(sides.missing()).startswith("Sides left out: autoregressive, ctranslate2.")


@pytest.mark.parametrize("config", [TOY, LLAMA], ids=["published", "twin"])
def test_ctranslate2_writes_exactly_so_many_tokens_of_the_same_network(config: ModelConfig) -> None:
    model = ctranslate.build(config, CPU, torch.float32)
    tokens = ctranslate.generate(model, 3, 40, seed=1)
    assert tokens.shape == (3, 40)
    assert len(set(map(tuple, tokens.tolist()))) == 3, "drawn, not greedy"
    # The law is that of transformers' network: it was drawn from the same seed.
    torch.manual_seed(0)
    twin = autoregressive.build(config, CPU, torch.float32)
    with torch.no_grad():
        p = twin(torch.tensor([[autoregressive.FIRST_TOKEN]])).logits[0, 0].softmax(-1)
    p[int(ctranslate._Words.eos_token)] = 0.0  # nothing ends a text early
    firsts = ctranslate.generate(model, 4000, 1, seed=2)[:, 0]
    seen, expected = torch.bincount(firsts, minlength=67), 4000 * p.double() / p.sum()
    chi_square = float((((seen - expected) ** 2) / expected)[expected > 0].sum())
    assert chi_square < 65 + 4.5 * math.sqrt(2 * 65)
    assert not set(firsts.tolist()) - set(range(67))


def test_ctranslate2_says_which_heads_it_cannot_have() -> None:
    with pytest.raises(ConfigError, match="heads of 8 numbers, not 6"):
        ctranslate.build(TWIN, CPU, torch.float32)


# Figures.


@pytest.mark.parametrize("kind", ["none", "raw", "log2"])
def test_flops_are_those_that_torch_counts(kind: Any) -> None:
    config = ModelConfig(11, 32, 2, 2, 16, source="mask", step_embedding=kind)
    network, x, t = Transformer(config), torch.zeros(3, 7, dtype=torch.int64), torch.ones(3)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counted:
            hidden = network.body(x, t, t)
        assert body_flops(config, 3, 7) == counted.get_total_flops()
        with FlopCounterMode(display=False) as counted:
            network.head(hidden.flatten(0, 1))
        assert head_flops(config, 21) == counted.get_total_flops()


@pytest.mark.parametrize("start_id", [None, 3])
def test_flops_of_a_twin_are_those_that_torch_counts(start_id: int | None) -> None:
    config = replace(TWIN, start_id=start_id)
    network, x, t = build_network(config), torch.zeros(3, 7, dtype=torch.int64), torch.ones(3)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counted:
            hidden = network.body(x, t, t)
        assert body_flops(config, 3, 7) == counted.get_total_flops()
        with FlopCounterMode(display=False) as counted:
            network.head(hidden.flatten(0, 1))
        assert head_flops(config, 21) == counted.get_total_flops()


def test_flops_of_a_twins_last_block_are_those_that_torch_counts() -> None:
    network, x = build_network(TWIN), torch.zeros(1, 9, dtype=torch.int64)
    engine = make_engine(network, CPU, torch.float32)
    engine.hidden(x, 0.3, 0.5, torch.arange(9))  # the condition is computed once
    counts = []
    for rows in (torch.arange(9), torch.tensor([2, 7])):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
            engine.hidden(x, 0.3, 0.5, rows)
        counts.append(counted.get_total_flops())
    assert counts[0] - counts[1] == 7 * last_block_flops(TWIN, 9)
    assert last_block_flops(replace(TWIN, attention="causal"), 9) == 0


def test_flops_of_a_joint_head_are_those_that_torch_counts() -> None:
    config = ModelConfig(11, 32, 2, 2, 16, neighbours=3)
    network, at, x = Transformer(config), torch.arange(5), torch.zeros(3, 7, dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        network.told(torch.zeros(5, 32), at, x, x.bool())
    assert joint_flops(config, 5) == counted.get_total_flops()
    assert joint_flops(replace(config, neighbours=0), 5) == 0


def test_a_shape_is_a_preset_with_its_vocabulary_and_a_step_embedding() -> None:
    config = shape("0.17B")
    sizes = {name: getattr(config, name) for name in PRESETS["0.17B"]}
    assert sizes == PRESETS["0.17B"]
    assert (config.vocab_size, config.step_embedding, config.neighbours) == (50_257, "log2", 0)
    assert config.source == "mask"  # as `fsdfm pretrain` makes it


def test_a_shape_can_be_that_of_a_model_directory_whose_weights_are_not_read(
    tmp_path: Path,
) -> None:
    config = replace(TWIN, step_embedding="none", neighbours=2)
    header = {"format": "fsdfm", "format_version": 2, **config_to_dict(config)}
    (tmp_path / "config.json").write_text(json.dumps(header))
    assert shape(str(tmp_path)) == TWIN
    with pytest.raises(CheckpointError, match=r"not a model directory: it has no config.json"):
        shape(str(tmp_path.parent))
    with pytest.raises(ConfigError, match=r"one of tiny, .*, bundled, or a model directory, got x"):
        shape("x")


def test_bundled_is_the_shape_of_the_bundled_model() -> None:
    bundled = Path(fsdfm.__file__).parent / "assets" / "bundled"
    assert shape("bundled") == shape(str(bundled))
    header = json.loads((bundled / "config.json").read_text())
    assert shape("bundled").blocks == header["blocks"]


def row(**values: Any) -> Row:
    known: dict[str, Any] = dict.fromkeys(Row.__dataclass_fields__)
    known.update(task="sample", side="engine", shape="toy", batch=1, length=64, steps=8)
    return Row(**{**known, "malloc": "default", "dtype": "float32", "runs": [], **values})


def test_steps_that_grow_cheaper_are_told() -> None:
    rows = [row(seconds=2.0), row(steps=1024, seconds=192.0), row(side="x", seconds=1.0)]
    (line,) = per_step(rows)
    assert line.endswith("1,024 steps take 96.00 x as long as 8: 0.75 of 128")


def test_a_table_has_every_side_and_says_who_failed() -> None:
    rows = [
        row(seconds=2.0, speedup=1.0, tokens_per_second=1234.5, memory_bytes=2**21, over_floor=3.0),
        row(side="other", error="other was killed by SIGKILL (out of memory?)"),
    ]
    text = markdown(rows)
    assert "| engine | 2.000 | - | 1.00 | 1,234 | - | 2 MiB | 3.00 |" in text
    assert "| other | failed | - | - | - | - | - | - |" in text
    assert "other: other was killed" in text


def test_limits_are_rates_of_what_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "COPIED_BYTES", 2**20)
    monkeypatch.setattr(limits, "WIDTH", 64)
    found = limits.limits(CPU)
    assert {"float32 GFLOP/s", "copy GB/s"} <= set(found)
    assert ("int8 GOP/s" in found) == has_int8()
    assert all(0.01 < rate < 1e6 for rate in found.values())


def test_the_joint_sampler_draws_as_the_model_says(tmp_path: Path) -> None:
    joint = samplers.JointSampler(TOY, CPU, torch.float32)
    (tmp_path / "generation.json").write_text('{"steps": 64, "temperature": 0.5, "draws": 2}')
    said = jobs.sampling(str(tmp_path))
    how = joint.sampling(Job(1, 16, 4, sampling=said))
    assert (how.steps, how.temperature, how.draws, how.grid) == (4, 0.5, 2, "even")
    how = joint.sampling(Job(1, 16, 4, sampling=jobs.sampling("tiny")))
    assert (how.temperature, how.draws, how.grid) == (1.0, samplers.DRAWS, "latest")
    bundled = json.loads(
        (Path(fsdfm.__file__).parent / "assets/bundled/generation.json").read_text()
    )
    assert jobs.sampling("adapted") == jobs.sampling("bundled") == bundled


# The harness.


def test_sides_take_turns() -> None:
    assert plan({"a": 3, "engine": 2}) == [
        ("warm_up", "a"),
        ("warm_up", "engine"),
        ("memory", "a"),
        ("memory", "engine"),
        ("time", "a"),
        ("time", "engine"),
        ("time", "a"),
        ("time", "engine"),
        ("time", "a"),
        ("split", "engine"),
    ]


class FakeWorker:
    """Answers from a script."""

    loaded_bytes = 7

    def __init__(self, side: str, seconds: list[float], told: list[tuple[str, str, int]]) -> None:
        dtype = "float32" if side.endswith("float32") else "bfloat16"
        self.spec = Spec("sample", side, "toy", TOY, "cpu", dtype)
        self.seconds, self.told = iter(seconds), told

    def ask(self, do: str, job: Job, seed: int) -> dict[str, Any]:
        self.told.append((do, self.spec.side, seed))
        if do == "memory":
            return {"memory_bytes": 5}
        if do != "time":
            return {}
        seconds = next(self.seconds)
        if seconds < 0.0:
            raise BenchError("it died")
        # The machine is as slow at this moment for the bare product as for the run.
        figures = {"seconds": seconds, "cpu_seconds": seconds / 4, "rate": 100.0 / seconds}
        return {**figures, "tokens": 64, "flops": 50.0}


def test_figures_are_medians_and_ratios_of_runs_in_turn() -> None:
    told: list[tuple[str, str, int]] = []
    fakes: Any = [
        FakeWorker("reference-float32", [8.0, 9.0, 40.0], told),
        FakeWorker("engine", [3.0, 30.0, 2.0], told),
        FakeWorker("broken", [1.0, -1.0, 1.0], told),
    ]
    slow, fast, broken = measure(fakes, Job(1, 64, 8), 3, peak_tflops=1e-9)
    assert (slow.seconds, fast.seconds) == (9.0, 3.0)
    assert (slow.cpu_seconds, fast.cpu_seconds) == (2.25, 0.75)
    assert (slow.speedup, fast.speedup) == (1.0, 3.0)
    assert fast.runs == [3.0, 30.0, 2.0]
    assert fast.tokens_per_second == pytest.approx(64 / 3)
    assert fast.over_floor == pytest.approx(2.0), "time and rate belong to the same moment"
    assert fast.of_peak == pytest.approx(50 / 3 / 1e3)
    assert slow.of_peak is None, "the peak is that of bfloat16"
    assert (fast.loaded_bytes, fast.memory_bytes) == (7, 5)
    assert (fast.error, broken.error) == (None, "it died")
    timed = [(side, seed) for do, side, seed in told if do == "time" and side != "broken"]
    assert timed == [(side, seed) for seed in (1, 2, 3) for side in ("reference-float32", "engine")]
    assert sum(side == "broken" and do == "time" for do, side, _ in told) == 2, "then left alone"


needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")


MEASURE = """
import torch
from fsdfm.bench.worker import memory_before, memory_kept, memory_since
cpu = torch.device("cpu")
for megabytes in (192, 64):  # the smaller one second: what malloc kept must not hide it
    before = memory_before(cpu)
    kept, gone = (torch.ones(megabytes // 2, 2**18) for _ in range(2))
    del gone
    print(memory_since(before, cpu), memory_kept(before, cpu))
    del kept
"""


@needs_proc
@pytest.mark.parametrize("malloc", harness.MALLOC)
def test_memory_is_the_peak_of_a_run_whatever_malloc_keeps(malloc: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        capture_output=True,
        text=True,
        env={**os.environ, **harness.MALLOC[malloc]},
        check=True,
    )
    figures = [[int(word) / 2**20 for word in line.split()] for line in done.stdout.splitlines()]
    assert figures == [pytest.approx([192, 96], abs=4), pytest.approx([64, 32], abs=4)]


def toy_specs(task: str, names: list[str]) -> list[Spec]:
    return specs_for(task, names, "toy", TOY, "cpu", torch.float32)


def test_a_side_that_cannot_be_built_is_told_with_its_last_words_and_the_others_go_on() -> None:
    bad = Spec("sample", "engine", "toy", TOY, "nowhere", "float32")
    with started([bad, *toy_specs("sample", ["engine-float32"])]) as workers:
        failed, fine = measure(workers, Job(1, 8, 1), 1)
    assert failed.error is not None and failed.seconds is None
    assert failed.error.startswith("engine ended with exit code 1; it said: ")
    assert "nowhere" in failed.error
    assert fine.error is None and fine.seconds is not None


def test_the_reference_has_pytorchs_attention_and_leaves_the_networks_own_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unwanted(*_: Tensor) -> Tensor:
        raise AssertionError("the project's own attention")

    monkeypatch.setattr(transformer, "attend", unwanted)
    model, x, t = Transformer(TOY), torch.zeros(1, 8, dtype=torch.int64), torch.full((1,), 0.5)
    assert reference.whole_logits(model, x, t, t).shape == (1, 8, TOY.vocab_size)
    assert transformer.attend is unwanted


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_the_reference_computes_the_twin_with_pytorchs_own_pieces(
    monkeypatch: pytest.MonkeyPatch, attention: Any
) -> None:
    model = jobs.random_model(replace(TWIN, attention=attention))
    x = torch.randint(67, (3, 16), generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.1, 0.5, 0.9])
    ours = model(x, t, t)[..., : TWIN.vocab_size]

    def unwanted(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("the project's own piece")

    for name in ("attend", "modulated_rms", "swiglu", "turned"):
        monkeypatch.setattr(causal, name, unwanted)
    theirs = reference.whole_logits(model, x, t, t)
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert causal.swiglu is unwanted


def rows_asked_for(engine: Any) -> list[int]:
    """Grows by the number of rows of each call from now on."""
    moved: list[int] = []
    hidden = engine.hidden

    def noted(x: Tensor, t: Any, h: Any, rows: Tensor, *rest: Any) -> Tensor:
        moved.append(len(rows))
        found: Tensor = hidden(x, t, h, rows, *rest)
        return found

    engine.hidden = noted
    return moved


def test_a_sequence_that_passes_alone_is_charged_for_its_movers_in_the_last_block() -> None:
    config = replace(TOY, context_length=300)
    ours = OurSampler(config, torch.device("cpu"), torch.float32)
    alone, together = Job(1, 300, 4), Job(2, 30, 4)
    moved = rows_asked_for(ours.engine)
    for job in (alone, together):
        moved.clear()
        cost = ours.run(job, seed=1)
        whole = 4 * body_flops(config, job.batch, job.length) + head_flops(config, sum(moved))
        still = 4 * job.batch * job.length - sum(moved)
        width = config.hidden_size
        skipped = still * (2 * width**2 * 9 + 4 * job.length * width) * (job is alone)
        assert cost.flops == whole - skipped


@pytest.mark.parametrize("job", [Job(1, 300, 4), Job(2, 30, 4)], ids=["alone", "together"])
def test_a_first_call_from_masks_is_charged_for_one_row(job: Job) -> None:
    config = replace(TOY, context_length=300, source="mask")
    ours, width = OurSampler(config, torch.device("cpu"), torch.float32), config.hidden_size
    moved = rows_asked_for(ours.engine)
    cost = ours.run(job, seed=1)
    whole = 3 * body_flops(config, job.batch, job.length) + body_flops(config, 1, 1)
    still = (3 * job.length - sum(moved[1:])) * (job.batch == 1)
    whole -= still * (2 * width**2 * 9 + 4 * job.length * width)
    assert cost.flops == whole + head_flops(config, job.batch * job.length)


def test_a_killed_or_stuck_worker_leaves_the_others_and_its_error_stays() -> None:
    with started(toy_specs("sample", ["engine-float32", "reference-float32"])) as workers:
        engine, plain = (worker._process for worker in workers)
        os.kill(plain.pid, signal.SIGKILL)
        for _ in range(2):
            fine, dead = measure(workers, Job(1, 8, 2), 2)
            assert fine.error is None and len(fine.runs) == 2
            assert dead.seconds is None and dead.error is not None
            assert dead.error.startswith("reference-float32 was killed by SIGKILL (out of memory?)")
        os.kill(engine.pid, signal.SIGSTOP)
        workers[0].patience_seconds = 0.2
        with pytest.raises(BenchError, match=r"gave no answer within 0.2 s and was stopped"):
            workers[0].ask("time", Job(1, 8, 2), 0)
        assert engine.wait(5) == -signal.SIGKILL


@pytest.fixture
def heeding_interrupts() -> Iterator[None]:
    """What a shell starts in the background ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeding_interrupts")
def test_an_interruption_leaves_no_process() -> None:
    with pytest.raises(KeyboardInterrupt), started(toy_specs("pretrain", ["plain"])) as workers:
        pids = [worker._process.pid for worker in workers]
        for _ in range(10):  # an interrupt is lost where it meets a finalizer
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            until = time.monotonic() + 5.0
            while time.monotonic() < until:
                measure(workers, Job(1, 8, 1), 1)
                time.sleep(0.01)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("config", [TOY, LLAMA], ids=["published", "twin"])
@pytest.mark.parametrize("task", SIDES)
def test_every_side_does_its_job(task: str, config: ModelConfig) -> None:
    job = Job(2, 16, 2)
    for name in runnable(list(SIDES[task])):
        dtype = sides.dtype_of(task, name, torch.float32)
        side = build_side(task, name, config, CPU, dtype)
        cost = side.run(job, seed=1)
        assert cost.tokens == 2 * 16 * (1 if task == "sample" else 2)
        uncounted = name.startswith(("autoregressive", "ctranslate2"))
        assert (cost.flops is None) == (task in ("distill", "joint") or uncounted)
        side.run(side.warm_up(job), seed=1)
        side.run(side.peak(job), seed=1)


def test_a_reference_and_the_engine_are_charged_for_what_they_do() -> None:
    plain = samplers.PlainSampler(TOY, CPU, torch.float32).run(Job(2, 16, 4), 1)
    once = body_flops(TOY, 2, 16)
    assert plain.flops == 4 * (once + head_flops(TOY, 2 * 16))
    engine = samplers.OurSampler(TOY, CPU, torch.float32)
    ours = engine.run(Job(2, 16, 4), 1)
    assert ours.flops is not None
    rows, rest = divmod(ours.flops - 4 * once, head_flops(TOY, 1))
    assert rest == 0 and 32 <= rows < 4 * 32
    split = engine.split(Job(2, 16, 4), 1)
    assert sum(split.values()) == pytest.approx(1.0)
    assert set(split) == {"hidden", "head", "draw"} and min(split.values()) > 0.0
    joint = samplers.JointSampler(TOY, CPU, torch.float32)
    told = joint.run(Job(2, 16, 4), 1)
    assert told.flops is not None
    each = head_flops(TOY, 1) + joint_flops(joint.config, 1)
    rows, rest = divmod(told.flops - 4 * body_flops(joint.config, 2, 16), each)
    assert rest == 0 and 32 <= rows <= 4 * 32
    assert set(joint.split(Job(2, 16, 4), 1)) == {"hidden", "told", "head", "draw"}


def test_what_libraries_print_is_no_answer(capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "import os, sys; from fsdfm.bench import worker\n"
        "init = worker.Bench.__init__\n"
        "def noisy(self, spec): print('hello'); os.system('echo hello'); init(self, spec)\n"
        "worker.Bench.__init__ = noisy; worker.main()"
    )
    line = json.dumps(toy_specs("pretrain", ["plain"])[0].first_line())
    done = subprocess.run([sys.executable, "-c", code], input=line, capture_output=True, text=True)
    assert list(json.loads(done.stdout)) == ["loaded_bytes"]
    assert done.stderr.count("hello") == 2


@pytest.mark.parametrize("rule", ["exact", "published"])
def test_reference_and_engine_write_the_same_texts_from_masks_that_absorb(
    rule: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SAMPLES", 10_000)  # a twin norms one at a time
    sizes = {"hidden_size": 8, "blocks": 1, "heads": 2, "kv_heads": 1, "mlp_size": 8}
    config = replace(TWIN, vocab_size=SYMBOLS, context_length=LENGTH, **sizes)
    network, draw = jobs.random_model(config), torch.Generator().manual_seed(23)
    x_0 = start("mask")
    *_, last = sample(
        make_engine(network, CPU, torch.float32),
        x_0,
        even_grid(3),
        BatchNoise(),
        make_source("mask", SYMBOLS),
        drawing=Drawing(STEP_RULES[rule]),
    )
    theirs = reference.reference_sample(network, x_0, 3, rule, draw)
    assert chi_square_z(last.x, theirs) < 4.5


def test_a_plain_joint_head_learns_what_ours_learns() -> None:
    """From the same start, on one text: a body that stands still, and a loss that falls."""
    config = jobs.with_joint_head(replace(TWIN, blocks=1))
    x_1 = torch.randint(67, (1, 16), generator=torch.Generator().manual_seed(4)).expand(8, -1)
    for build in (trainers.PlainJoint, trainers.OurJoint):
        side = build(config, CPU, torch.float32)
        before = {name: value.clone() for name, value in side.model.state_dict().items()}
        losses = []
        for seed in range(30):
            draw = torch.Generator().manual_seed(99)
            with torch.no_grad():
                losses.append(
                    float(reference.joint_loss(side.model, x_1, draw, source=side.source))
                )
            side.update(x_1, seed)
        moved = {
            n for n, value in side.model.state_dict().items() if not torch.equal(value, before[n])
        }
        assert losses[-1] < losses[0]
        assert any(name.startswith("joint.") for name in moved)
        assert not any(name.startswith("blocks.") for name in moved)


def test_pretraining_on_masks_counts_what_ours_counts() -> None:
    network = jobs.random_model(TWIN)
    x_1 = torch.randint(67, (64, 16), generator=torch.Generator().manual_seed(4))
    source, draw = MaskSource(67), torch.Generator().manual_seed(6)
    losses = torch.empty(2, 24, dtype=torch.float64)
    with torch.no_grad():
        for k in range(losses.shape[1]):
            ours = Pretrain(source, LINEAR, cross_entropy).loss(network, network, x_1, draw)
            losses[0, k] = ours["loss"]
            losses[1, k] = reference.pretrain_loss(network, x_1, draw, source=source)
    error = (losses.var(1).sum() / losses.shape[1]).sqrt()
    assert abs(losses[0].mean() - losses[1].mean()) < 4.5 * error < 0.05 * losses.mean()


# The command.


def test_bench_measures_the_shape_of_a_model(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    header = {"format": "fsdfm", "format_version": 1, **config_to_dict(TWIN)}
    (tmp_path / "twin").mkdir()
    (tmp_path / "twin" / "config.json").write_text(json.dumps(header))
    monkeypatch.setattr(benchmark, "preferred_dtype", lambda device: torch.float32)
    # Two of the sides: all of them run on a twin in test_every_side_does_its_job.
    monkeypatch.setattr(benchmark, "TASKS", ("sample", "pretrain"))
    monkeypatch.setattr(benchmark, "sides_for", lambda *asked: sides_for(*asked)[:1])
    monkeypatch.setattr(limits, "COPIED_BYTES", 2**20)
    monkeypatch.setattr(limits, "WIDTH", 64)
    argv = ("--model", tmp_path / "twin", "--steps", 2, "--length", 16, "--repeats", 1)
    code, out, _ = run("bench", *argv, "--device", "cpu")
    assert code == 0 and "failed" not in out
    assert "sample, twin, 1 x 16 tokens, 2 steps" in out
    code, out, err = run("bench", "--model", tmp_path)
    assert (code, out) == (2, "") and err.endswith("it has no config.json.\n")


class Here:
    """A worker in this process: starting one for every side takes longer than all that they do."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.bench = spec, Bench(spec.first_line())
        self.loaded_bytes = self.bench.loaded_bytes

    def ask(self, do: str, job: Job, seed: int) -> dict[str, Any]:
        asked = {"do": do, "job": asdict(job), "seed": seed}
        answer: dict[str, Any] = json.loads(json.dumps(self.bench.answer(asked)))
        return answer


def test_bench_prints_every_side(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """With real workers, two of them, in the test before this one."""
    monkeypatch.setattr(benchmark, "shape", lambda name: TOY)
    monkeypatch.setattr(benchmark, "preferred_dtype", lambda device: torch.float32)
    monkeypatch.setattr(benchmark, "machine", lambda device, name: {"machine": name})
    monkeypatch.setattr(benchmark, "started", lambda specs: nullcontext(list(map(Here, specs))))
    argv = ("--steps", 2, "--length", 16, "--repeats", 1, "--device", "cpu")
    code, out, err = run("bench", *argv)
    assert code == 0
    firsts = Counter(line.split()[0] for line in out.splitlines() if line.strip())
    expected = Counter(name for task in benchmark.TASKS for name in sides_for(task, torch.float32))
    assert {name: firsts[name] for name in expected} == expected
    assert "failed" not in out
    for title in ("sample, tiny, 1 x 16 tokens, 2 steps", "speed-up", "held", "extra memory"):
        assert title in out
    assert "engine: time" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--steps 0", "--steps must be a whole number >= 1, got 0."),
        ("--repeats 0", "--repeats must be a whole number >= 1, got 0."),
        ("--length 1025", "--length must be at most 1024, got 1025."),
        ("--device tpu", "--device must be cpu, cuda, cuda:N or mps, got 'tpu'."),
    ],
)
def test_bad_values_are_one_line(run: Run, argv: str, message: str) -> None:
    code, out, err = run("bench", *argv.split())
    assert (code, out) == (2, "")
    assert err.endswith(f"error: {message}\n")


def test_json_has_all_rows_and_a_failure_is_an_error(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(seconds=1.0), row(side="other", error="other ended with exit code 1")]
    monkeypatch.setattr(benchmark, "bench", lambda args, progress: ({"machine": "m"}, rows))
    code, out, err = run("bench", "--json")
    assert (code, err) == (2, "error: other ended with exit code 1\n")
    found = json.loads(out)
    assert found["machine"] == "m"
    assert [r["side"] for r in found["rows"]] == ["engine", "other"]
    assert found["rows"][0]["seconds"] == 1.0
