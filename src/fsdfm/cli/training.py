"""What a training run shows in the terminal."""

from __future__ import annotations

import time
from functools import partial
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fsdfm.flow.grid import GRIDS
from fsdfm.flow.path import make_source
from fsdfm.flow.posterior import Grouped, Sequences
from fsdfm.flow.sampler import Drawing, Noise, sample
from fsdfm.flow.schedule import Polynomial
from fsdfm.flow.step import STEP_RULES
from fsdfm.generate.live import printable
from fsdfm.model.transformer import FlowNetwork
from fsdfm.recipes.settings import BASE, AdaptSettings, FlowSettings, PretrainSettings
from fsdfm.recipes.watch import Plan
from fsdfm.study.autoregressive import Autoregressive

PREVIEW_TOKENS = 96


class TrainingConsole:
    """A progress bar with rate and ETA on a terminal, plain lines elsewhere.

    Args:
        plan: of the run; printed samples are drawn as generation.json will say.
    """

    def __init__(self, plan: Plan) -> None:
        self.args, self.tokenizer, self.generation = plan.settings, plan.tokenizer, plan.generation
        self.tokens_per_step = plan.tokens_per_update
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}  ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.bar = self.progress.add_task("loss ...", total=self.args.steps, rate="")
        self.first_step: int | None = None
        self.started = 0.0
        self.step = 0
        # Soft wrap: a path or a line of figures is not to be broken at 80 columns in a file.
        self.say = partial(self.console.print, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> TrainingConsole:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()
        if error is None:
            self.summary(self.step >= self.args.steps)

    def advanced(self, step: int, steps: int, loss: float | None) -> None:
        """Move the bar; without a terminal, print a line with every tenth logged loss."""
        if self.first_step is None:
            self.first_step, self.started = step, time.perf_counter()
            if 0 < step < steps:
                self.say(f"Resumed at step {step} of {steps}.")
        self.step = step
        elapsed = time.perf_counter() - self.started
        rate = self.tokens_per_step * (step - self.first_step) / max(elapsed, 1e-9)
        text = f"{rate:,.0f} tokens/s" if step > self.first_step else ""
        self.progress.update(self.bar, completed=step, rate=text)
        if loss is None:
            return
        self.progress.update(self.bar, description=f"loss {loss:.3f}")
        if not self.console.is_terminal and step % (10 * self.args.log_every) == 0:
            left = (steps - step) * elapsed / max(1, step - self.first_step)
            self.say(f"step {step}/{steps}  loss {loss:.4f}  {text}  ETA {left / 60:.1f} min")

    def evaluated(self, record: dict[str, Any], ema: FlowNetwork) -> None:
        """Print the validation figure and, now and then, a sample."""
        step, nats, every = record["step"], record["elbo_nats_per_token"], self.args.sample_every
        self.say(f"step {step}  validation ELBO {nats:.4f} nats/token")
        before = max(0, step - self.args.evaluate_every)
        if every and (step // every > before // every or step == self.args.steps):
            self.say(printable(self._preview(ema)), style="dim")

    def saved(self, ema: FlowNetwork) -> None:
        """Nothing to say."""

    def summary(self, finished: bool) -> None:
        """Say what there is now and how to go on."""
        out = self.args.out
        if not finished:
            self.say(
                f"Stopped at step {self.step} of {self.args.steps}, saved in {out}: run the same "
                f"command again to go on."
            )
        elif self.first_step == self.step:
            self.say(f"Finished already, nothing to do: try  {self._use()}")
        else:
            self.say(f"Done: try  {self._use()}")

    def _use(self) -> str:
        """The command that writes with what was trained."""
        args = self.args
        if isinstance(args, AdaptSettings) and args.attention == "causal":
            texts = args.out.with_name(f"{args.out.name}.jsonl")
            return f"fsdfm baseline ar --model {args.out} --data {args.data} --out {texts}"
        return f"fsdfm generate {self._model()}"

    def _model(self) -> str:
        """Flags that name what was trained."""
        args = self.args
        if not isinstance(args, FlowSettings) or args.lora is None:
            return f"--model {args.out}"
        base = args.init if isinstance(args, PretrainSettings) else args.out / BASE
        return f"--model {base} --adapter {args.out}"

    def _preview(self, ema: FlowNetwork) -> str:
        """A short sample from the moving average; it draws from its own noise."""
        config, noise = ema.config, Noise([self.args.seed % 2**32])
        if config.left_to_right:
            ids = Autoregressive(ema).sample(PREVIEW_TOKENS, self.args.seed % 2**32)
            return self.tokenizer.decode(ids)
        network = Sequences(ema, next(ema.parameters()).device)
        draws, seams = self.generation.get("draws", 1), self.generation.get("seams", "fixed")
        source = make_source(config.source, config.vocab_size)
        states = sample(
            network,
            noise.start(source, min(PREVIEW_TOKENS, config.context_length)),
            GRIDS[self.generation.get("grid", "even")](self.generation["steps"]),
            noise,
            source,
            schedule=Polynomial(config.schedule_power),
            drawing=Drawing(
                STEP_RULES[self.generation["step"]],
                posterior=Grouped(network, draws, seams),
            ),
        )
        *_, last = states
        with torch.no_grad():
            return self.tokenizer.decode(last.x[0].tolist())
