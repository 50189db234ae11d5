"""The training loop, shared by every objective."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fsdfm.core.errors import CheckpointError, TrainingError
from fsdfm.core.files import one_line, write_whole
from fsdfm.flow.host import Draws, send
from fsdfm.flow.loss import elbo_nats_per_token
from fsdfm.flow.path import Source
from fsdfm.flow.schedule import Schedule
from fsdfm.train import buckets
from fsdfm.train.blocks import compiling, run_blocks
from fsdfm.train.checkpoint import TrainState, load_checkpoint, save_checkpoint, set_aside
from fsdfm.train.ema import Ema, Module, within
from fsdfm.train.objective import Objective
from fsdfm.train.optim import make_optimizer
from fsdfm.train.outside import Clock, graceful_stop
from fsdfm.train.parallel import ALONE, Pass, World, here, unshared, whole
from fsdfm.train.settings import TrainSettings

LOG = logging.getLogger(__name__)
VALIDATION_TIMES = 20
"""Of the bound, each a forward pass of the validation data. Of text its spread over seeds is about
8 nats / sqrt(times x tokens): just below 0.01 nats with 32 x 1,024 tokens, twice that with 32 x
256. More would cost short runs more than they tell: every validation sees the same noise."""
MOST_SKIPPED = 10
"""Updates in a row that may be skipped before a run gives up."""

Watched = TypeVar("Watched", bound=nn.Module, contravariant=True)


@dataclass(frozen=True, slots=True)
class Task:
    """What is trained on what."""

    objective: Objective
    source: Source
    schedule: Schedule
    batch: Callable[[int], Tensor]
    """Pass number -> this process's part of the data, int64, (batch_size / processes, L), or of the
    same tokens in several times as many shorter sequences: a pure function."""
    validation: Tensor
    """Held-out data, int64, (sequences, L), L as in training."""
    device: torch.device
    autocast: torch.dtype
    """Of matrix products; float32 turns autocast off."""
    likelihood: Callable[[Any, Tensor], Tensor] | None = None
    """(network, x_1) -> nats a token, for a network that can tell; else the ELBO bounds it."""
    world: World = ALONE
    """This process among those that train together; the first one writes."""
    sequence_flops: float | None = None
    """Of training on one sequence, where known."""
    peak_flops: float | None = None
    """A second, of a device, where known."""


class Watcher(Protocol[Watched]):
    """What the outside sees of a run."""

    def advanced(self, step: int, steps: int, loss: float | None) -> None:
        """After every update; a loss only when one was logged."""
        ...

    def evaluated(self, record: dict[str, Any], ema: Watched) -> None:
        """After every validation."""
        ...

    def saved(self, ema: Watched) -> None:
        """Before every checkpoint, so that a finished checkpoint means that all is exported."""
        ...


@dataclass
class Run(Generic[Module]):
    """One training run in a directory: metrics.jsonl and checkpoint.safetensors.

    Args:
        directory: exists and is writable.
        settings: the numbers.
        task: what is trained on what.
        watcher: progress, samples, export.
        told: every line of metrics.jsonl.
    """

    directory: Path
    settings: TrainSettings
    task: Task
    watcher: Watcher[Module]
    told: Callable[[dict[str, Any]], None] = lambda record: None

    @property
    def checkpoint(self) -> Path:
        """The resume state."""
        return self.directory / "checkpoint.safetensors"

    def train(self, model: Module) -> bool:
        """Train, from the checkpoint if there is one.

        SIGINT or SIGTERM ends the run after the update in progress, with a checkpoint.

        Args:
            model: the network at its start; trained in place.

        Returns:
            Whether the run is finished (False: it was interrupted).

        Raises:
            TrainingError: MOST_SKIPPED updates in a row were not finite, where the last good
                checkpoint is kept; or the blocks cannot be compiled.
            CheckpointError: the checkpoint cannot be read or written.
        """
        settings = self.settings
        state, through = self._begin(model)
        if self.checkpoint.exists():
            load_checkpoint(self.checkpoint, state)
        if self.task.world.first:
            self._forget_metrics_after(state.step)
        resumed_at = state.step
        clock = Clock(state)
        with graceful_stop() as stopping:
            # One turn past the end, so that the last update is logged, evaluated and saved too.
            while True:
                step, finished = state.step, state.step >= settings.steps
                # All processes stop after the same update, whichever was told to.
                last = finished or any(self.task.world.totals(stopping.is_set()))
                fresh = step > resumed_at
                loss = None
                if fresh and (step % settings.log_every == 0 or finished):
                    loss = self._log(state, clock)
                if fresh and (step % settings.evaluate_every == 0 or finished):
                    self._check_weights(state)
                    self._evaluate(state)
                # After the metrics: what a checkpoint covers is never done again.
                if fresh and (step % settings.checkpoint_every == 0 or last):
                    self._save(state, clock)
                self.watcher.advanced(step, settings.steps, loss)
                if last:
                    return finished
                with compiling(settings.compile):
                    update(state, settings, self.task, through)

    def _begin(self, model: Module) -> tuple[TrainState[Module], nn.Module]:
        """The state before the first update, and the `Pass` that updates go through."""
        settings, task = self.settings, self.task
        ema = Ema(model, self._decay(), settings.ema_warmup)
        run_blocks(model, recompute=settings.recompute, compiled=settings.compile)
        through = task.world.wrap(
            Pass(task.objective, model), ema.model, settings.sharding, task.device, task.autocast
        )
        optimizer = make_optimizer(model, settings.weight_decay, settings.optimizer)
        return TrainState(model, ema, optimizer), through

    def _decay(self) -> float:
        """Of the average; a shorter one, said in a line, where the run would end at its start."""
        settings = self.settings
        decay = settings.ema_decay
        if not settings.ema_warmup:
            decay = within(decay, settings.decay_steps or settings.steps)
        if decay != settings.ema_decay and self.task.world.first:
            LOG.warning(
                f"After {settings.steps} updates an average of ema_decay {settings.ema_decay:g} is "
                f"still {settings.ema_decay**settings.steps:.0%} of its start: this run takes "
                f"{decay:.4g}, for its targets too."
            )
        return decay

    def _check(self, state: TrainState[Module]) -> None:
        """Give up where no update is finite any more.

        What is skipped changes no weight, so it may be noticed some updates late: this waits for
        the device, and is called where something else does.
        """
        row = state.skipped_in_a_row
        for skipped in _values(state.pending.get("skipped", [])).tolist():
            row = row + 1 if skipped else 0
            if row == MOST_SKIPPED:
                self._give_up(f"in {row} updates in a row, before step {state.step}")

    def _check_weights(self, state: TrainState[Module]) -> None:
        """Give up before weights that are not finite are judged or saved."""
        self._check(state)
        finite = torch.stack([here(p.detach()).isfinite().all() for p in state.model.parameters()])
        if any(self.task.world.totals(not bool(finite.all()))):
            self._give_up(f"enough for the weights before step {state.step}")

    def _give_up(self, where: str) -> None:
        kept = "its last checkpoint is kept" if self.checkpoint.exists() else "nothing was saved"
        raise TrainingError(
            f"The loss or its gradient was not finite {where}; {kept}. Try a lower learning_rate "
            f"or a longer warmup_steps in a new out.",
            "learning_rate",
            "warmup_steps",
            "out",
        )

    def _save(self, state: TrainState[Module], clock: Clock) -> None:
        """The model, then the checkpoint."""
        self._check_weights(state)
        state.elapsed_seconds = clock.total()
        first = self.task.world.first
        with state.ema.whole(torch.device("cpu"), first) as network:
            if first:
                self.watcher.saved(network)
        if first:
            set_aside(self.checkpoint, self.settings.keep_checkpoints - 1)
        save_checkpoint(self.checkpoint if first else None, state)

    def _log(self, state: TrainState[Module], clock: Clock) -> float | None:
        """Write means of what was finite since the last line; this waits for the device."""
        self._check(state)
        pending, state.pending = state.pending, {}
        flags = _values(pending.pop("skipped"))
        good, skipped = (flags == 0.0).nonzero()[:, 0], int(flags.sum())
        last = len(flags) - 1 - int(good[-1]) if len(good) else len(flags) + state.skipped_in_a_row
        state.skipped, state.skipped_in_a_row = state.skipped + skipped, last
        told = {name: _values(values) for name, values in pending.items()}
        means = {n: _mean(values) for n, values in told.items() if not buckets.is_bucket(n)}
        tables = buckets.means((n, v) for n, v in told.items() if buckets.is_bucket(n))
        settings, length = self.settings, self.task.validation.shape[1]
        sequences = settings.batch_size * settings.accumulate
        rate = sequences * clock.updates_per_second(state.step)
        self._write(
            {
                "step": state.step,
                **means,
                **({"skipped": skipped} if skipped else {}),
                "learning_rate": settings.learning_rate_at(state.step - 1),
                "tokens": state.step * sequences * length,
                "tokens_per_second": length * rate,
                **self._utilisation(rate),
                "elapsed_seconds": clock.total(),
                **tables,
            }
        )
        return means["loss"]

    def _utilisation(self, rate: float) -> dict[str, float]:
        """What sequences a second take of the peak of all devices, where that is known."""
        flops, peak = self.task.sequence_flops, self.task.peak_flops
        if flops is None or peak is None:
            return {}
        return {"utilisation": rate * flops / (peak * self.task.world.size)}

    def _evaluate(self, state: TrainState[Module]) -> None:
        """Validation ELBO of the average, to metrics.jsonl and the watcher."""
        rows, total, world = self.task.validation, 0.0, self.task.world
        starts = range(0, len(rows), self.settings.batch_size)
        with state.ema.whole(self.task.device) as network:
            for first in starts[world.rank :: world.size]:
                x_1 = rows[first : first + self.settings.batch_size]
                estimates = self._nats(network, x_1.to(self.task.device), first)
                total += x_1.numel() * sum(estimates) / len(estimates)
            total = float(world.sum(torch.tensor(total, dtype=torch.float64)))
            record = {
                "step": state.step,
                "elbo_nats_per_token": total / self.task.validation.numel(),
            }
            self._write(record)
            self.watcher.evaluated(record, network)

    def _nats(self, model: nn.Module, x_1: Tensor, first: int) -> list[float]:
        """Nats a token of some data: estimates to take the mean of."""
        task = self.task
        with torch.no_grad(), _autocast(task):
            if task.likelihood is not None:
                return [float(task.likelihood(model, x_1))]
            return list(
                elbo_nats_per_token(
                    model,  # type: ignore[arg-type]
                    x_1,
                    task.source,
                    task.schedule,
                    times=VALIDATION_TIMES,
                    first=first,
                )
            )

    def _write(self, record: dict[str, Any]) -> None:
        if not self.task.world.first:
            return
        try:
            with (self.directory / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise CheckpointError(
                f"Cannot write {self.directory / 'metrics.jsonl'} ({one_line(error)}); free some "
                f"space, then run the same command again."
            ) from None
        self.told(record)

    def _forget_metrics_after(self, step: int) -> None:
        """Drop lines that a killed run wrote past its checkpoint: they will come again."""
        path, kept = self.directory / "metrics.jsonl", []
        if not path.exists():
            return
        try:
            text = path.read_text(errors="replace")
        except OSError as error:
            raise CheckpointError(f"Cannot read {path}: {one_line(error)}.") from None
        for line in text.splitlines():
            # The last line may have been cut short.
            with contextlib.suppress(ValueError, TypeError, KeyError):
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        if text != "".join(kept):
            write_whole(path, "".join(kept), error=CheckpointError)


def update(
    state: TrainState[Module],
    settings: TrainSettings,
    task: Task,
    through: nn.Module | None = None,
) -> Tensor:
    """One update of weights and average; nothing waits for the device.

    Where the loss or its gradient is not finite the weights stay as they are, and the average goes
    on towards them.

    Args:
        state: changed in place.
        settings: the numbers.
        task: what is trained on what.
        through: the `Pass` of the network, as the world wraps it; made if not given.

    Returns:
        Whether they were finite: scalar, bool, on the device.
    """
    state.model.train()
    through = through or Pass(task.objective, state.model)
    healthy = torch.ones((), dtype=torch.bool, device=task.device)
    for micro in range(settings.accumulate):
        number = state.step * settings.accumulate + micro
        x_1 = send(task.batch(number), task.device)
        random = _draws(settings.seed, number, len(x_1), task.world)
        summing = micro + 1 < settings.accumulate
        with unshared(through) if summing else contextlib.nullcontext():
            with _autocast(task):
                parts = through(state.ema.model, x_1, random)
            (parts["loss"] / settings.accumulate).backward()
        values = task.world.mean(torch.stack([value.detach() for value in parts.values()]))
        for name, value in zip(parts, values, strict=True):
            state.pending.setdefault(name, []).append(value)
        healthy &= values[0].isfinite()
    norm = whole(nn.utils.clip_grad_norm_(state.model.parameters(), settings.clip_norm).detach())
    healthy &= norm.isfinite()
    state.pending.setdefault("gradient_norm", []).append(norm)
    state.optimizer.set_learning_rate(settings.learning_rate_at(state.step))
    state.pending.setdefault("skipped", []).append((~healthy).float())
    state.optimizer.step(healthy)
    state.optimizer.zero_grad()
    state.ema.update(state.model)
    state.step += 1
    return healthy


def _draws(seed: int, number: int, count: int, world: World) -> Draws:
    """Random numbers of this process's samples of a pass."""
    return Draws(seed, number, world.rows(count), count * world.size, world.totals)


def _values(scalars: list[Tensor]) -> Tensor:
    """Scalars of the device as one tensor on the CPU, shape (N,)."""
    return torch.stack(scalars).cpu() if scalars else torch.zeros(0)


def _mean(values: Tensor) -> float | None:
    """Of those that are finite; None where none is."""
    finite = values[values.isfinite()]
    return float(finite.mean()) if len(finite) else None


def _autocast(task: Task) -> torch.autocast:
    return torch.autocast(
        task.device.type, dtype=task.autocast, enabled=task.autocast != torch.float32
    )
