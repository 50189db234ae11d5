"""What is compared: each side does the same job in its own way, in a process of its own.

A side is a task ("sample", "distill" or "pretrain") and a name. Weights are random, since the speed
of neither side depends on them, and are the same on all sides but the autoregressive one.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fsdfm.bench import autoregressive, reference
from fsdfm.bench.figures import body_flops, head_flops, joint_flops, last_block_flops
from fsdfm.core.errors import ConfigError
from fsdfm.flow.grid import GRIDS, even_grid
from fsdfm.flow.loss import cross_entropy
from fsdfm.flow.path import make_source
from fsdfm.flow.posterior import INDEPENDENT, Grouped
from fsdfm.flow.sampler import Drawing, Noise, sample
from fsdfm.flow.schedule import Polynomial
from fsdfm.flow.step import EXACT, STEP_RULES
from fsdfm.model.causal import CausalConfig
from fsdfm.model.engine import ROWS_AT_ONCE, Engine
from fsdfm.model.io.pretrained import read_config
from fsdfm.model.networks import build_network
from fsdfm.model.transformer import PRESETS, FlowNetwork, ModelConfig
from fsdfm.train.checkpoint import TrainState
from fsdfm.train.ema import Ema
from fsdfm.train.loop import Task, update
from fsdfm.train.objective import Distill, Objective, Pretrain
from fsdfm.train.optim import make_optimizer
from fsdfm.train.settings import TrainSettings

LEARNING_RATE = 1e-4
FEW_TOKENS = 8
NEIGHBOURS, DRAWS = 3, 8
"""Of a joint head, as `fsdfm distill` and `fsdfm generate` have them."""
ENGINE_METHODS = ("hidden", "told", "head")
"""What `split` times; the rest of a run is the draw."""


@dataclass(frozen=True, slots=True)
class Job:
    """What every side is asked to do in one run."""

    batch: int
    """Sequences."""
    length: int
    """Tokens of a sequence."""
    steps: int
    """Model calls of a sampler, or updates of a training run."""
    rule: reference.Rule = "published"
    """Step rule of a sampler."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one run came to."""

    tokens: int
    """Written, or trained on."""
    flops: float | None
    """Of its matrix products and attention; None where they are not counted."""


class Side(Protocol):
    """One way to do a job."""

    def run(self, job: Job, seed: int) -> Cost:
        """Do the job."""
        ...

    def warm_up(self, job: Job) -> Job:
        """The least of the job that compiles and caches all that it needs."""
        ...

    def peak(self, job: Job) -> Job:
        """The least of the job that takes as much memory as all of it."""
        ...


ADAPTED = CausalConfig(
    vocab_size=12_288,
    hidden_size=576,
    blocks=12,
    heads=9,
    cond_size=32,
    source="mask",
    step_embedding="log2",
    kv_heads=3,
    head_size=64,
    mlp_size=1536,
    rotary_base=100_000.0,
    start_id=0,
)
"""The bundled model, made of a causal language model."""
SHAPES = (*PRESETS, "adapted")


def shape(name: str) -> ModelConfig:
    """The network to measure, without a joint head and told of h.

    Args:
        name: one of SHAPES, with the vocabulary that it is used with; or a model directory.

    Raises:
        ConfigError: another name.
        CheckpointError: a directory that holds no model.
    """
    if name == "adapted":
        return ADAPTED
    if name in PRESETS:
        vocab_size = {"tiny": 4096, "small": 8192}.get(name, 50_257)
        sizes: dict[str, Any] = PRESETS[name]
        return ModelConfig(vocab_size, **sizes, step_embedding="log2")
    if not Path(name).is_dir():
        raise ConfigError(
            f"The shape must be one of {', '.join(SHAPES)}, or a model directory, got {name}."
        )
    config, _ = read_config(Path(name))
    return replace(config, step_embedding="log2", neighbours=0)


def random_model(config: ModelConfig) -> FlowNetwork:
    """A network whose every branch does something: fresh ones start with silent blocks."""
    torch.manual_seed(0)
    model = build_network(config)
    for parameter in model.parameters():
        if parameter.ndim == 2 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


# Sampling.


def make_engine(model: FlowNetwork, device: torch.device, dtype: torch.dtype) -> Any:
    """What this project samples with: the one place where benchmarks make it."""
    return Engine(model.to(device), dtype)


class Timed:
    """An engine whose methods in ENGINE_METHODS are timed; all else is passed on."""

    def __init__(self, engine: Any, device: torch.device) -> None:
        self.engine, self.device = engine, device
        self.seconds = dict.fromkeys(ENGINE_METHODS, 0.0)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.engine, name)
        if name not in ENGINE_METHODS:
            return found

        def timed(*args: Any, **kwargs: Any) -> Any:
            synchronise(self.device)
            started = time.perf_counter()
            result = found(*args, **kwargs)
            synchronise(self.device)
            self.seconds[name] += time.perf_counter() - started
            return result

        return timed


class _Sampler:
    """What samplers share: a job's steps repeat, so a part of them will do."""

    def warm_up(self, job: Job) -> Job:
        """One step."""
        return replace(job, steps=1)

    def peak(self, job: Job) -> Job:
        """Two steps: the first with some rows, the last with all."""
        return replace(job, steps=min(2, job.steps))


class OurSampler(_Sampler):
    """This project's sampler, with a network that has no joint head."""

    draws = 1

    def rule(self, job: Job) -> str:
        """Name of its step rule."""
        return job.rule

    def grid(self, steps: int) -> Tensor:
        """Times of its calls."""
        return even_grid(steps)

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.device = config, device
        self.engine = make_engine(random_model(config), device, dtype)

    def run(self, job: Job, seed: int) -> Cost:
        """See `Side`."""
        return self._sample(self.engine, job, seed)

    def split(self, job: Job, seed: int) -> dict[str, float]:
        """Shares of one run's time in each of the engine's methods, and in the draw."""
        timed, started = Timed(self.engine, self.device), time.perf_counter()
        self._sample(timed, job, seed)
        total = time.perf_counter() - started
        shares = {name: seconds / total for name, seconds in timed.seconds.items() if seconds}
        return {**shares, "draw": 1.0 - sum(shares.values())}

    def _sample(self, engine: Any, job: Job, seed: int) -> Cost:
        config = self.config
        noise = Noise(range(seed * job.batch, (seed + 1) * job.batch))
        source = make_source(config.source, config.vocab_size, absorbing=config.absorbing)
        posterior = Grouped(engine, self.draws) if config.neighbours else INDEPENDENT
        states = sample(
            engine,
            noise.start(source, job.length).to(self.device),
            self.grid(job.steps),
            noise,
            source,
            drawing=Drawing(STEP_RULES[self.rule(job)], posterior=posterior),
        )
        (last,) = deque(states, maxlen=1)
        last.x.tolist()
        flops = last.calls * body_flops(config, job.batch, job.length)
        if job.batch == 1 or (job.length > ROWS_AT_ONCE // 2 and self.device.type == "cpu"):
            # A sequence that passes alone leaves the last block with its movers only.
            still = last.calls * last.x.numel() - last.head_rows
            flops -= still * last_block_flops(config, job.length)
        flops += head_flops(config, last.head_rows)
        return Cost(last.x.numel(), flops + joint_flops(config, last.head_rows))


class JointSampler(OurSampler):
    """The same with a joint head, as `fsdfm generate` draws from one: in groups, on its grid."""

    draws = DRAWS

    def rule(self, job: Job) -> str:
        """Exact: the published rule cannot draw in groups."""
        return EXACT.name

    def grid(self, steps: int) -> Tensor:
        """Latest, where more positions move in a call than on an even one; even after masks."""
        return even_grid(steps) if self.config.absorbing else GRIDS["latest"](steps)

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        config = replace(config, neighbours=NEIGHBOURS, step_embedding="none")
        super().__init__(config, device, dtype)


class PlainSampler(_Sampler):
    """The published sampler."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self.model = random_model(config).to(device).eval()

    def run(self, job: Job, seed: int) -> Cost:
        """See `Side`."""
        config, generator = self.config, torch.Generator(self.device).manual_seed(seed)
        source = make_source(config.source, config.vocab_size, absorbing=config.absorbing)
        x_0 = source.draw((job.batch, job.length), generator)
        x = reference.reference_sample(
            self.model,
            x_0,
            job.steps,
            job.rule,
            generator,
            dtype=self.dtype,
            absorbing=source.absorbing,
        )
        x.tolist()
        one_call = body_flops(config, job.batch, job.length) + head_flops(config, x.numel())
        return Cost(x.numel(), job.steps * one_call)


class Autoregressive:
    """GPT-2 or Llama of the same shape: it makes one call a token, whatever a job's steps."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.model = autoregressive.build(config, device, dtype)

    def run(self, job: Job, seed: int) -> Cost:
        """See `Side`."""
        torch.manual_seed(seed)
        tokens = autoregressive.generate(self.model, job.batch, job.length)
        assert tokens.shape == (job.batch, job.length)
        tokens.tolist()
        return Cost(tokens.numel(), None)

    def warm_up(self, job: Job) -> Job:
        """A few tokens."""
        return replace(job, length=min(FEW_TOKENS, job.length))

    def peak(self, job: Job) -> Job:
        """All of it: the cache grows to the last token."""
        return job


# Training.


class _Trainer:
    """A network in training; `update` is the side's own."""

    passes: int | None = None
    """Forward passes whose FLOPs an update takes; None where they depend on chance."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self.source = make_source(config.source, config.vocab_size, absorbing=config.absorbing)
        self.model = random_model(config).to(device)
        self.prepare()
        self.run(Job(1, FEW_TOKENS, 1), seed=0)  # makes the optimizer's moments

    def prepare(self) -> None:
        """Make what an update needs."""
        raise NotImplementedError

    def update(self, x_1: Tensor, seed: int) -> Tensor:
        """One update on data (B, L); returns whether the loss was finite."""
        raise NotImplementedError

    def run(self, job: Job, seed: int) -> Cost:
        """See `Side`."""
        draw = torch.Generator().manual_seed(seed)
        x_1 = torch.randint(self.config.vocab_size, (job.batch, job.length), generator=draw)
        for k in range(job.steps):
            healthy = self.update(x_1, seed * job.steps + k)
        assert bool(healthy)
        flops = None
        if self.passes is not None:
            flops = body_flops(self.config, job.batch, job.length)
            flops += head_flops(self.config, x_1.numel())
            flops *= self.passes * job.steps
        return Cost(job.steps * x_1.numel(), flops)

    def warm_up(self, job: Job) -> Job:
        """One update."""
        return replace(job, steps=1)

    def peak(self, job: Job) -> Job:
        """One update."""
        return replace(job, steps=1)


class PlainDistill(_Trainer):
    """The published distillation recipe."""

    def prepare(self) -> None:
        """See `_Trainer`."""
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.teacher = copy.deepcopy(self.ema)
        self.optimizer = reference.plain_optimizer(self.model, LEARNING_RATE)

    def update(self, x_1: Tensor, seed: int) -> Tensor:
        """See `_Trainer`."""
        generator = torch.Generator(self.device).manual_seed(seed)
        with reference.autocast(self.device, self.dtype):
            loss = reference.reference_distill_loss(
                self.model,
                self.ema,
                self.teacher,
                x_1.to(self.device),
                generator,
                source=self.source,
            )
        reference.plain_update(loss, self.model, self.ema, self.optimizer)
        return loss.isfinite()


class PlainPretrain(_Trainer):
    """A plain pretraining loop."""

    passes = 3

    def prepare(self) -> None:
        """See `_Trainer`."""
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = reference.plain_optimizer(self.model, LEARNING_RATE)

    def update(self, x_1: Tensor, seed: int) -> Tensor:
        """See `_Trainer`."""
        generator = torch.Generator(self.device).manual_seed(seed)
        with reference.autocast(self.device, self.dtype):
            loss = reference.pretrain_loss(
                self.model, x_1.to(self.device), generator, source=self.source
            )
        reference.plain_update(loss, self.model, self.ema, self.optimizer)
        return loss.isfinite()


class _Ours(_Trainer):
    """An update of this project's own loop; subclasses say of which objective."""

    def objective(self) -> Objective:
        """What is minimised."""
        raise NotImplementedError

    def prepare(self) -> None:
        """See `_Trainer`: the one place where benchmarks make our training state."""
        optimizer = make_optimizer(self.model, reference.WEIGHT_DECAY)
        ema = Ema(self.model, reference.EMA_DECAY, warmup=False)
        self.state = TrainState(self.model, ema, optimizer)
        # A step far below the run's length: the learning rate stays at its peak.
        self.settings = TrainSettings(
            steps=10**9, batch_size=1, learning_rate=LEARNING_RATE, warmup_steps=0
        )

    def update(self, x_1: Tensor, seed: int) -> Tensor:
        """See `_Trainer`; the loop makes its own seeds from the updates done so far."""
        task = Task(
            objective=self.objective(),
            source=self.source,
            schedule=Polynomial(),
            batch=lambda _: x_1,
            validation=x_1,
            device=self.device,
            autocast=self.dtype,
        )
        healthy = update(self.state, self.settings, task)
        self.state.pending = {}  # as a line of metrics does
        return healthy


class OurDistill(_Ours):
    """The published distillation recipe: RK-4, published jumps, h with weights 1 / h."""

    def objective(self) -> Objective:
        """See `_Ours`."""
        return Distill(self.source, Polynomial())


class OurPretrain(_Ours):
    """Pretraining with cross-entropy."""

    passes = 3

    def objective(self) -> Objective:
        """See `_Ours`."""
        return Pretrain(self.source, Polynomial(), cross_entropy)


# All of them.

Build = Callable[[ModelConfig, torch.device, torch.dtype], Side]

SIDES: dict[str, dict[str, tuple[Build, torch.dtype | None]]] = {
    "sample": {
        "reference-float32": (PlainSampler, torch.float32),
        "reference-bf16": (PlainSampler, torch.bfloat16),
        "engine": (OurSampler, None),
        "engine-float32": (OurSampler, torch.float32),
        "engine-int8": (OurSampler, torch.int8),
        "engine-joint": (JointSampler, None),
        "engine-joint-int8": (JointSampler, torch.int8),
        "autoregressive-float32": (Autoregressive, torch.float32),
        "autoregressive-bf16": (Autoregressive, torch.bfloat16),
    },
    "distill": {
        "reference-float32": (PlainDistill, torch.float32),
        "reference-bf16": (PlainDistill, torch.bfloat16),
        "ours": (OurDistill, None),
    },
    "pretrain": {
        "plain": (PlainPretrain, None),
        "ours": (OurPretrain, None),
    },
}
"""Task -> side -> how it is built and the format of its products; None: the device's preferred."""


NO_AUTOREGRESSIVE = "No autoregressive side: it needs transformers (pip install 'fsdfm[eval]')."


def sides_for(task: str, preferred: torch.dtype) -> list[str]:
    """Sides of a task that can run and are worth it where `preferred` is the fast format."""
    names = [name for name in SIDES[task] if not name.endswith("int8")]  # on request
    if preferred == torch.float32:  # bf16 would be emulated, and engine is engine-float32
        names = [name for name in names if not name.endswith("bf16") and name != "engine-float32"]
    return runnable(names)


def runnable(names: list[str]) -> list[str]:
    """Without the autoregressive sides where transformers is missing (say NO_AUTOREGRESSIVE)."""
    if autoregressive.available():
        return names
    return [name for name in names if not name.startswith("autoregressive")]


def dtype_of(task: str, name: str, preferred: torch.dtype) -> torch.dtype:
    """Format of a side's matrix products."""
    return SIDES[task][name][1] or preferred


def build_side(
    task: str, name: str, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> Side:
    """The side, its weights loaded."""
    return SIDES[task][name][0](config, device, dtype)


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that a clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
