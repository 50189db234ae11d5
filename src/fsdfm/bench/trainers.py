"""Training to compare: our updates, and the formulas written out."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from fsdfm.bench import reference
from fsdfm.bench.jobs import FEW_TOKENS, Cost, Job, random_model, with_joint_head
from fsdfm.flow.loss import cross_entropy
from fsdfm.flow.path import make_source
from fsdfm.flow.schedule import Polynomial
from fsdfm.model.config import ModelConfig
from fsdfm.model.flops import body_flops, head_flops
from fsdfm.train.checkpoint import TrainState
from fsdfm.train.ema import Ema
from fsdfm.train.loop import Task, update
from fsdfm.train.objective import Distill, Joint, Objective, Pretrain
from fsdfm.train.optim import make_optimizer
from fsdfm.train.settings import TrainSettings

LEARNING_RATE = 1e-4


class _Trainer:
    """A network in training; `update` is the side's own."""

    passes: int | None = None
    """Forward passes whose FLOPs an update takes; None where they depend on chance."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self.source = make_source(config.source, config.vocab_size)
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

    passes: int | None = 3

    def prepare(self) -> None:
        """See `_Trainer`."""
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = reference.plain_optimizer(self.model, LEARNING_RATE)

    def update(self, x_1: Tensor, seed: int) -> Tensor:
        """See `_Trainer`."""
        generator = torch.Generator(self.device).manual_seed(seed)
        with reference.autocast(self.device, self.dtype):
            loss = self.loss(x_1.to(self.device), generator)
        reference.plain_update(loss, self.model, self.ema, self.optimizer)
        return loss.isfinite()

    def loss(self, x_1: Tensor, generator: torch.Generator) -> Tensor:
        """What is minimised, on data (B, L)."""
        return reference.pretrain_loss(self.model, x_1, generator, source=self.source)


class PlainJoint(PlainPretrain):
    """A plain loop that trains a joint head, and the output layer with it."""

    passes = None

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(with_joint_head(config), device, dtype)

    def loss(self, x_1: Tensor, generator: torch.Generator) -> Tensor:
        """See `PlainPretrain`."""
        return reference.joint_loss(self.model, x_1, generator, source=self.source)


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


class OurJoint(_Ours):
    """A joint head, and the output layer with it."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(with_joint_head(config), device, dtype)

    def objective(self) -> Objective:
        """See `_Ours`."""
        return Joint(self.source, Polynomial())
