"""What the training commands can be told; field docstrings are the help texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fsdfm.errors import ConfigError
from fsdfm.train.loop import TrainSettings

Preset = Literal["tiny", "small", "0.17B", "1.3B", "1.7B"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainArgs:
    """What pretraining and distillation share; the numbers not here are explained in the README."""

    data: Path
    """Directory that `fsdfm prepare` wrote."""
    out: Path
    """Run directory. If it holds this very run, unfinished, the run goes on where it stopped."""
    steps: int
    """Updates of the whole run."""
    learning_rate: float
    """Peak learning rate, after the warm-up."""
    loss: Literal["cross_entropy", "generalized_kl"] = "cross_entropy"
    """Path loss of one position: generalized KL is the published one, but its weight 1 / (1 - t)
    made it learn to copy far more slowly (LOG.md)."""
    batch_size: int = 16
    """Sequences in one forward pass."""
    accumulate: int = 1
    """Forward passes for one update."""
    context_length: int | None = None
    """Tokens of a training sequence; default: the model's."""
    warmup_steps: int = 100
    """Updates of linear warm-up; a cosine down to a tenth of the peak follows."""
    weight_decay: float = 0.03
    """Of AdamW, on matrices."""
    clip_norm: float = 1.0
    """Gradients longer than this are shortened to it."""
    ema_decay: float = 0.9995
    """Decay of the moving average of the weights, which is what is saved as the model."""
    seed: int = 0
    """Of weights, batches and noise: the same seed, data and settings give the same model."""
    log_every: int = 10
    """Updates between two lines of metrics.jsonl."""
    evaluate_every: int = 500
    """Updates between two validations."""
    sample_every: int = 500
    """Updates between two printed samples, which come with a validation; 0 prints none."""
    checkpoint_every: int = 250
    """Updates between two checkpoints."""
    validation_sequences: int = 32
    """Sequences for the validation ELBO."""
    device: str | None = None
    """cuda, mps or cpu; default: the best that there is."""

    def settings(self) -> TrainSettings:
        """The part that the loop needs."""
        if self.sample_every < 0:
            raise ConfigError(f"--sample-every must be at least 0, got {self.sample_every}.")
        if self.context_length is not None and self.context_length < 1:
            raise ConfigError(f"--context-length must be at least 1, got {self.context_length}.")
        return TrainSettings(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            accumulate=self.accumulate,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
            ema_decay=self.ema_decay,
            seed=self.seed,
            log_every=self.log_every,
            evaluate_every=self.evaluate_every,
            checkpoint_every=self.checkpoint_every,
            validation_sequences=self.validation_sequences,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainArgs(TrainArgs):
    """Train a flow model (the teacher) on prepared text."""

    steps: int = 20_000
    """Updates of the whole run."""
    learning_rate: float = 3e-4
    """Peak learning rate, after the warm-up."""
    preset: Preset = "tiny"
    """Shape of the network."""
    init: Path | None = None
    """Model or run to start from, instead of a fresh network of the preset's shape."""
    source: Literal["uniform", "mask"] = "uniform"
    """Where x_0 comes from."""
    schedule_power: float = 1.0
    """n in kappa_t = t ** n."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillArgs(TrainArgs):
    """Distil a few-step student from a teacher, by default with the published target.

    The published recipe to the letter is --step-embedding raw --step-weights published.
    """

    teacher: Path
    """Model or run to start from."""
    steps: int = 5_000
    """Updates of the whole run."""
    learning_rate: float = 1e-4
    """Peak learning rate, after the warm-up."""
    step_embedding: Literal["log2", "raw"] = "log2"
    """How the network is told h: ours (log2 h, starts at zero), or as published (raw h)."""
    step_weights: Literal["even", "published"] = "even"
    """How often each step size is seen: a quarter on the smallest and the rest even, or 1 / h."""
    target: Literal["rk4", "rk2", "semigroup"] = "rk4"
    """What a big step should land on."""
    target_rule: Literal["published", "exact", "euler"] = "published"
    """Step rule of the jumps inside the target; the semigroup target presumes the exact one."""
