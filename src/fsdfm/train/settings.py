"""The numbers that the training loop reads."""

from __future__ import annotations

from dataclasses import dataclass

from fsdfm.core.options import (
    AT_LEAST_0,
    AT_LEAST_1,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    Range,
    check,
    option,
)
from fsdfm.core.registry import Names
from fsdfm.train.rate import cooled, learning_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """Numbers of one run. The same settings, data and start give the same weights."""

    steps: int = option(within=AT_LEAST_1)
    """Updates of the whole run."""
    learning_rate: float = option(within=POSITIVE)
    """Peak learning rate, after the warm-up."""
    batch_size: int = option(16, within=AT_LEAST_1)
    """Sequences in one forward pass, of all processes together."""
    accumulate: int = option(1, within=AT_LEAST_1)
    """Forward passes for one update."""
    warmup_steps: int = option(100, within=AT_LEAST_0)
    """Updates of linear warm-up; a cosine down to final_fraction of the peak follows."""
    final_fraction: float = option(0.1, within=Range(0, 1))
    """Learning rate at the end, as a fraction of the peak."""
    decay_steps: int | None = option(None, within=AT_LEAST_1, unset="steps")
    """Updates of the warm-up and the cosine; after them the learning rate stays where it is."""
    cooldown_steps: int = option(0, within=AT_LEAST_0)
    """Last updates of the run, over which the learning rate falls to nothing besides, linearly: so
    that a run can end well at any time (docs/runs.md)."""
    optimizer: str = option("adamw", choices=Names("fsdfm.train.optim.OPTIMIZERS"))
    """muon: on the matrices of the blocks, AdamW on the rest; pays with many tokens an update."""
    weight_decay: float = option(0.03, within=NOT_NEGATIVE)
    """On matrices."""
    clip_norm: float = option(1.0, within=Range(0, above=True))
    """Gradients longer than this are shortened to it."""
    sharding: str = option("none", choices=Names("fsdfm.train.parallel.SHARDINGS"))
    """Of several processes: none, where each holds the whole network; fsdp, where each holds a part
    of weights, gradients, moments and average, for what does not fit (docs/training.md)."""
    recompute: bool = False
    """Compute the activations of the blocks again for their gradients instead of keeping them: a
    fraction of the memory, for a third more work in the blocks."""
    compile: bool = False
    """Compile the blocks (torch.compile), which takes a C++ compiler or a GPU, and a while."""
    ema_decay: float = option(0.9995, within=Range(0, 1, below=True))
    """Decay of the moving average of the weights, which is what is evaluated, saved as the model
    and, in distillation, followed."""
    ema_warmup: bool = True
    """The average forgets its start sooner: right for random weights, not for trained ones."""
    seed: int = option(0, within=SEED)
    """Of weights, batches and noise: the same seed, data and settings give the same model."""
    log_every: int = option(10, within=AT_LEAST_1)
    """Updates between two lines of metrics.jsonl."""
    evaluate_every: int = option(500, within=AT_LEAST_1)
    """Updates between two validations."""
    checkpoint_every: int = option(250, within=AT_LEAST_1)
    """Updates between two checkpoints."""
    keep_checkpoints: int = option(1, within=AT_LEAST_1)
    """How many of the last checkpoints stay; all but the newest are checkpoint-STEP.safetensors."""
    validation_sequences: int = option(32, within=AT_LEAST_1)
    """Sequences for the validation ELBO."""
    peak_tflops: float | None = option(None, within=POSITIVE, unset="the device's, where known")
    """Of a device in the format of its products, in 10^12 a second: what `utilisation` in
    metrics.jsonl is a share of."""

    def __post_init__(self) -> None:
        check(self)

    def learning_rate_at(self, step: int) -> float:
        """Of the update after so many."""
        rate = learning_rate(
            min(step, self.decay_steps or self.steps),
            peak=self.learning_rate,
            warmup_steps=self.warmup_steps,
            steps=self.decay_steps or self.steps,
            final_fraction=self.final_fraction,
        )
        return rate * cooled(step, steps=self.steps, cooldown_steps=self.cooldown_steps)
