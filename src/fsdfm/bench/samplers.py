"""Samplers to compare: ours, the formulas written out, and an autoregressive model."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from fsdfm.bench import autoregressive, ctranslate, reference
from fsdfm.bench.jobs import FEW_TOKENS, Cost, Job, random_model, synchronise, with_joint_head
from fsdfm.flow.grid import GRIDS
from fsdfm.flow.path import make_source
from fsdfm.flow.posterior import INDEPENDENT, Grouped, Posterior
from fsdfm.generate.options import DEFAULTS, SamplingOptions
from fsdfm.generate.track import Track, call, start
from fsdfm.model.config import ModelConfig
from fsdfm.model.engine import ROWS_AT_ONCE, Engine
from fsdfm.model.flops import body_flops, head_flops, joint_flops, last_block_flops
from fsdfm.model.transformer import FlowNetwork

DRAWS = 8
"""With a joint head, as `fsdfm generate` has them."""
ENGINE_METHODS = ("hidden", "told", "head")
"""What `split` times; the rest of a run is the draw."""


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
    """What `fsdfm generate` runs (`Track` and `call`), with a network that has no joint head.

    Tokens are not made words: there is no tokenizer.
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.device = config, device
        self.engine = make_engine(random_model(config), device, dtype)

    def sampling(self, job: Job) -> SamplingOptions:
        """How it draws."""
        return SamplingOptions(steps=job.steps, step=job.rule)

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
        config, how = self.config, self.sampling(job)
        asked: Any = _Asked(engine, config, self.device)
        times, free = GRIDS[how.grid](how.steps).tolist(), torch.ones(job.length, dtype=torch.bool)
        tracks = []
        for each in range(seed * job.batch, (seed + 1) * job.batch):
            noise = torch.Generator().manual_seed(each)
            x_0 = start(asked, noise, job.length)
            tracks.append(Track(x_0, free.clone(), list(times), how, how.controls(), noise))
        flops = rows = 0
        # A text of masks alone passes as one row, once for all.
        blank = self.device.type == "cpu" and engine.all_masks_are_one
        while not tracks[0].done:
            if call(asked, tracks):
                moved = sum(track.rows for track in tracks) - rows
                flops += body_flops(config, 1, 1) if blank else self._body_flops(job, moved)
                rows, blank = rows + moved, False
        tokens = job.batch * job.length
        return Cost(tokens, flops + head_flops(config, rows) + joint_flops(config, rows))

    def _body_flops(self, job: Job, moved: int) -> int:
        """One call, in which some of the positions move."""
        flops = body_flops(self.config, job.batch, job.length)
        if job.batch == 1 or (job.length > ROWS_AT_ONCE // 2 and self.device.type == "cpu"):
            # A sequence that passes alone leaves the last block with its movers only.
            still = job.batch * job.length - moved
            flops -= still * last_block_flops(self.config, job.length)
        return flops


class JointSampler(OurSampler):
    """The same with a joint head: what users get who say nothing else."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(with_joint_head(config), device, dtype)

    def sampling(self, job: Job) -> SamplingOptions:
        """What the model's generation.json says; else what `fsdfm distill` writes into one.

        That is the exact rule, since no other can draw in groups, on the latest grid, where more
        positions move in a call than on an even one; on an even one after masks.
        """
        grid = "even" if self.config.absorbing else "latest"
        said = {"grid": grid, "draws": DRAWS} if job.sampling is None else job.sampling
        own: dict[str, Any] = {name: value for name, value in said.items() if name in DEFAULTS}
        return SamplingOptions(**{**own, "steps": job.steps})


@dataclass(frozen=True, slots=True)
class _Asked:
    """What `call` asks of a `Generator`."""

    engine: Any
    config: ModelConfig
    state_device: torch.device

    def posterior(self, how: SamplingOptions) -> Posterior:
        """See `Generator`."""
        return Grouped(self.engine, how.draws) if self.config.neighbours else INDEPENDENT


class PlainSampler(_Sampler):
    """The published sampler."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self.model = random_model(config).to(device).eval()

    def run(self, job: Job, seed: int) -> Cost:
        """See `Side`."""
        config, generator = self.config, torch.Generator(self.device).manual_seed(seed)
        source = make_source(config.source, config.vocab_size)
        x_0 = source.draw((job.batch, job.length), generator)
        x = reference.reference_sample(
            self.model, x_0, job.steps, job.rule, generator, dtype=self.dtype
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


class Translated(Autoregressive):
    """The same in CTranslate2."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.model = ctranslate.build(config, device, dtype)

    def run(self, job: Job, seed: int) -> Cost:
        """See `Side`."""
        tokens = ctranslate.generate(self.model, job.batch, job.length, seed)
        assert tokens.shape == (job.batch, job.length)
        return Cost(tokens.numel(), None)


# Training.
