"""Pretraining, adapting, distilling: where text, flow, model and training meet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fsdfm.core.device import peak_tflops, pick_device, preferred_dtype
from fsdfm.core.errors import ConfigError, FsdfmError, WorkerError
from fsdfm.core.files import digest
from fsdfm.core.options import defaults
from fsdfm.core.progress import Work, untold
from fsdfm.core.workers import own_device
from fsdfm.flow.loss import POSITION_LOSSES
from fsdfm.flow.path import make_source
from fsdfm.flow.schedule import Polynomial
from fsdfm.flow.step import STEP_RULES
from fsdfm.flow.target import TARGETS
from fsdfm.model.config import PRESETS, ModelConfig
from fsdfm.model.io.adapter import base_digest, save_adapter
from fsdfm.model.io.causal_lm import adapt as adapt_causal_lm
from fsdfm.model.io.causal_lm import load_causal_lm
from fsdfm.model.io.pretrained import Pretrained, load_pretrained, save_pretrained
from fsdfm.model.lora import add_lora
from fsdfm.model.networks import config_to_dict
from fsdfm.model.student import student_from_teacher
from fsdfm.model.transformer import FlowNetwork, Transformer
from fsdfm.recipes.depth import chosen_layers
from fsdfm.recipes.directory import claimed, going_on
from fsdfm.recipes.passes import batches, check_length, mean_flops, order_of
from fsdfm.recipes.settings import (
    ADAPT_LENGTH,
    BASE,
    JOINT,
    AdaptSettings,
    DistillSettings,
    FlowSettings,
    PretrainSettings,
    RunSettings,
)
from fsdfm.recipes.watch import Exporting, Plan, Watch, unwatched
from fsdfm.text.store import TokenStore
from fsdfm.text.tokenizer import Tokenizer
from fsdfm.text.vocabulary import tokens_within
from fsdfm.train.loop import Run, Task
from fsdfm.train.next_token import NextToken
from fsdfm.train.objective import STEP_WEIGHTS, Distill, Joint, Objective, Pretrain
from fsdfm.train.parallel import World, started
from fsdfm.train.tracking import tracked

CHANGEABLE = (
    "out",
    "device",
    "data",
    "teacher",
    "init",
    "model",
    "peak_tflops",
    "track",
    "keep_checkpoints",
    "sharding",
    "recompute",
    "compile",
)
"""Settings that may differ when a run goes on: places, which are compared by content instead, and
what changes no weight."""
PLAIN = {"steps": 64, "step": "exact"}
"""How a model that was not distilled is sampled."""


def pretrain(settings: PretrainSettings, watch: Watch = unwatched) -> bool:
    """Train a flow model.

    Args:
        settings: the numbers.
        watch: who is told of it.

    Returns:
        Whether the run is finished (False: interrupted, and saved).

    Raises:
        FsdfmError: settings, data, checkpoint or training went wrong.
    """
    store = TokenStore.open(settings.data)
    torch.manual_seed(settings.seed)
    ancestors: tuple[str, ...] = ()
    drawn = PLAIN
    if settings.init is not None:
        start = _start(settings, settings.init, store)
        model, ancestors = start.model, start.ancestors
        if model.config.neighbours:  # a joint head stays, and so does how it draws
            drawn = start.generation
        length = settings.context_length or model.config.context_length
    else:
        length = settings.context_length or 1024
        model = _fresh(settings, store, length)
    if length > model.config.context_length:
        model = _with_context(model, length)
    settings = replace(settings, source=model.config.source)  # what the run keeps
    source, schedule = objective_parts(model.config)
    loss = POSITION_LOSSES[settings.loss]
    objective = Pretrain(source, schedule, loss, settings.frozen_share)
    return _train(settings, store, model, objective, length, drawn, ancestors, watch)


def _fresh(settings: PretrainSettings, store: TokenStore, length: int) -> FlowNetwork:
    """A network of the preset's shape."""
    return Transformer(
        ModelConfig.from_dict(
            {
                "vocab_size": Tokenizer.from_json(store.tokenizer_json).vocab_size,
                "context_length": length,
                "source": settings.source or "mask",
                "schedule_power": settings.schedule_power,
                **PRESETS[settings.preset],
            }
        )
    )


def _start(settings: PretrainSettings, init: Path, store: TokenStore) -> Pretrained:
    """The model to go on from.

    Raises:
        ConfigError: settings or data that contradict it.
    """
    start = load_pretrained(init)
    same_tokenizer(start, init, store, settings.data)
    _refuse_language_model(start, init, "init")
    config = start.model.config
    if settings.source not in (None, config.source):
        raise ConfigError(
            f"{init} was made with source={config.source}: add source={config.source}.", "source"
        )
    if config.schedule_power != settings.schedule_power:
        power = config.schedule_power
        raise ConfigError(
            f"{init} has schedule power {power}: add schedule_power={power}.", "schedule_power"
        )
    return start


def _refuse_language_model(start: Pretrained, where: Path, field: str) -> None:
    """Raises ConfigError for what was adapted with attention=causal, to compare with."""
    if start.model.config.left_to_right:
        raise ConfigError(
            f"{where} predicts the next token alone (attention=causal): adapt its language model "
            f"with attention=bidirectional, and start from that.",
            field,
        )


def adapt(settings: AdaptSettings, watch: Watch = unwatched, work: Work = untold) -> bool:
    """Make a flow model of a causal language model; see `pretrain`.

    Args:
        settings: the numbers.
        watch: who is told of the training.
        work: who is told while layers are chosen.

    Raises:
        FsdfmError: settings, model, data, checkpoint or training went wrong.
    """
    with started(pick_device(own_device(settings.device))) as world:
        return _adapt(settings, watch, work, world)


def _adapt(settings: AdaptSettings, watch: Watch, work: Work, world: World) -> bool:
    store = TokenStore.open(settings.data)
    tokenizer = Tokenizer.from_json(store.tokenizer_json)
    lm = load_causal_lm(settings.model)
    theirs = Tokenizer.from_json(lm.tokenizer_json, name=settings.model)
    token_ids = tokens_within(tokenizer, theirs)
    if token_ids is None:
        raise ConfigError(
            f"{settings.data} was not prepared with the tokenizer of {settings.model} or a cut of "
            f"it: prepare it again with tokenizer={settings.model}.",
            "tokenizer",
        )
    start_id = tokenizer.eos_id
    layers = chosen_layers(settings, lm, token_ids, start_id, store.train, world, work)
    if settings.layers is not None:
        # What the run keeps: a list, which ends with a comma where it would be a number.
        kept = ",".join(map(str, layers)) + "," * (len(layers) == 1)
        settings = replace(settings, layers=kept)
    torch.manual_seed(settings.seed)
    length = settings.context_length or ADAPT_LENGTH
    model = adapt_causal_lm(
        lm,
        token_ids=token_ids,
        start_id=start_id if settings.shift == "left" else None,
        layers=layers,
        source=settings.source,
        context_length=length,
        attention=settings.attention,
        schedule_power=settings.schedule_power,
    )
    ancestors = (lm.name,)
    del lm
    source, schedule = objective_parts(model.config)
    loss = POSITION_LOSSES[settings.loss]
    objective: Objective = Pretrain(source, schedule, loss, settings.frozen_share)
    if settings.attention == "causal":
        objective = NextToken(model.config.vocab_size)
    return _train(settings, store, model, objective, length, PLAIN, ancestors, watch)


def distill(settings: DistillSettings, watch: Watch = unwatched) -> bool:
    """Train a few-step student; see `pretrain`.

    Raises:
        FsdfmError: settings, data, checkpoint or training went wrong.
    """
    store = TokenStore.open(settings.data)
    teacher = load_pretrained(settings.teacher)
    same_tokenizer(teacher, settings.teacher, store, settings.data)
    _refuse_language_model(teacher, settings.teacher, "teacher")
    torch.manual_seed(settings.seed)
    joint = settings.target == JOINT
    embedding = teacher.model.config.step_embedding if joint else settings.step_embedding
    model = student_from_teacher(teacher.model, embedding, settings.neighbours if joint else 0)
    config = model.config
    length = settings.context_length or config.context_length
    if length > config.context_length:
        raise ConfigError(
            f"context_length={length} is more than the teacher's {config.context_length}.",
            "context_length",
        )
    usual = "even" if config.absorbing else "latest" if joint else "late"
    generation: dict[str, Any] = {
        "steps": 8,
        "step": settings.target_rule,
        "grid": settings.grid or usual,
    }
    if joint:
        generation |= {"step": "exact", "draws": settings.draws, "seams": "random"}
    objective = _student_objective(settings, config)
    return _train(settings, store, model, objective, length, generation, teacher.ancestors, watch)


def _student_objective(settings: DistillSettings, config: ModelConfig) -> Objective:
    source, schedule = objective_parts(config)
    loss = POSITION_LOSSES[settings.loss]
    if settings.target == JOINT:
        return Joint(source, schedule, loss)
    return Distill(
        source,
        schedule,
        TARGETS[settings.target],
        STEP_RULES[settings.target_rule],
        STEP_WEIGHTS[settings.step_weights](),
        loss,
    )


def _train(
    settings: RunSettings,
    store: TokenStore,
    model: FlowNetwork,
    objective: Objective,
    length: int,
    generation: dict[str, Any],
    ancestors: tuple[str, ...],
    watch: Watch,
) -> bool:
    """Claim the run directory, then run the loop; the model is exported before every checkpoint."""
    check_length(store, settings, length)
    device = pick_device(own_device(settings.device))
    with started(device) as world:
        settings = going_on(settings, speaks=world.first)
        start = base_digest(model)
        facts = {
            "format": "fsdfm-run",
            "command": type(settings).__name__.removesuffix("Settings").lower(),
            "settings": {k: v for k, v in asdict(settings).items() if k not in CHANGEABLE},
            "places": {k: v for k, v in asdict(settings).items() if k in CHANGEABLE},
            "model": config_to_dict(model.config),
            "data_sha256": digest([json.dumps(store.manifest, sort_keys=True, default=str)]),
            "start_sha256": start,
        }
        order = order_of(settings.seed, start)
        task = _task(settings, store, model.config, objective, length, order, device, world)
        per_update = settings.batch_size * settings.accumulate * length
        plan = Plan(settings, Tokenizer.from_json(store.tokenizer_json), generation, per_update)

        keep = partial(
            save_pretrained,
            tokenizer_json=store.tokenizer_json,
            generation=generation,
            ancestors=ancestors,
        )

        def export(ema: FlowNetwork) -> None:
            if rank is None:
                keep(settings.out, ema)
            else:
                save_adapter(settings.out, ema, start)

        rank = settings.lora if isinstance(settings, FlowSettings) else None
        told = watch if world.first else unwatched
        with _claimed(world, settings, facts), told(plan) as watcher:
            if not world.shards(settings.sharding):  # else it goes there in parts
                model = model.to(device)
            if rank is not None:
                base = settings.out / BASE
                own = isinstance(settings, AdaptSettings) and world.first
                if own and not (base / "config.json").exists():
                    keep(base, model)
                add_lora(model, rank, settings.seed)
            track = settings.track if world.first else None
            with tracked(track, settings.out, asdict(settings)) as tell:
                exporting = Exporting(export, watcher)
                return Run(settings.out, settings, task, exporting, tell).train(model)


def _task(
    settings: RunSettings,
    store: TokenStore,
    config: ModelConfig,
    objective: Objective,
    length: int,
    order: int,
    device: torch.device,
    world: World,
) -> Task:
    """What the loop trains on, and how."""
    source, schedule = objective_parts(config)
    count = min(settings.validation_sequences, store.validation.blocks(length))
    adapter = isinstance(settings, FlowSettings) and settings.lora is not None
    peak = settings.peak_tflops or peak_tflops(device)
    return Task(
        objective=objective,
        source=source,
        schedule=schedule,
        batch=batches(store, settings, length, order, world),
        validation=torch.stack([store.validation.block(i, length) for i in range(count)]),
        device=device,
        autocast=preferred_dtype(device),
        likelihood=objective.nats if isinstance(objective, NextToken) else None,
        world=world,
        # What an adapter's gradients cost has no formula here.
        sequence_flops=None
        if adapter or peak is None
        else mean_flops(config, objective, length, settings.short_share),
        peak_flops=None if peak is None else peak * 1e12,
    )


@contextmanager
def _claimed(world: World, settings: RunSettings, facts: dict[str, Any]) -> Iterator[None]:
    """Hold the run directory: the first process does, and all go on only if it can."""
    with ExitStack() as stack:
        refusal = None
        if world.first:
            try:
                stack.enter_context(claimed(settings.out, facts, defaults(type(settings))))
            except FsdfmError as error:
                refusal = error
        (refused,) = world.totals(refusal is not None)
        if refusal is not None:
            raise refusal
        if refused:
            raise WorkerError("The first process of this run refused to start: see its message.")
        yield


def objective_parts(config: ModelConfig) -> tuple[Any, Polynomial]:
    """The source and schedule that a network was built for."""
    return make_source(config.source, config.vocab_size), Polynomial(config.schedule_power)


def _with_context(model: FlowNetwork, length: int) -> FlowNetwork:
    """The same weights, for longer sequences; rotary positions need no new ones."""
    longer = type(model)(replace(model.config, context_length=length))
    longer.load_state_dict(model.state_dict())
    return longer


def same_tokenizer(start: Pretrained, where: Path, store: TokenStore, data: Path) -> None:
    """Raises ConfigError unless a model and a data directory speak the same token ids."""
    ours, theirs = (
        Tokenizer.from_json(text).fingerprint
        for text in (start.tokenizer_json, store.tokenizer_json)
    )
    if ours != theirs:
        raise ConfigError(
            f"{where} and {data} have different tokenizers: prepare the data again with "
            f"tokenizer={where}/tokenizer.json.",
            "tokenizer",
        )
