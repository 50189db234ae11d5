"""`fsdfm pretrain` and `fsdfm distill`: where text, flow, model and training meet."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fsdfm.cli.training import TrainingConsole
from fsdfm.core.device import pick_device, preferred_dtype
from fsdfm.core.errors import CheckpointError, ConfigError
from fsdfm.core.files import digest, one_line, tensor_bytes, write_whole
from fsdfm.core.lock import locked
from fsdfm.flow.loss import POSITION_LOSSES
from fsdfm.flow.path import make_source
from fsdfm.flow.schedule import Polynomial
from fsdfm.flow.step import STEP_RULES
from fsdfm.flow.target import TARGETS
from fsdfm.model.io.causal_lm import adapt as adapt_causal_lm
from fsdfm.model.io.causal_lm import chosen_layers, load_causal_lm
from fsdfm.model.io.pretrained import Pretrained, load_pretrained, save_pretrained
from fsdfm.model.networks import config_to_dict
from fsdfm.model.transformer import (
    PRESETS,
    FlowNetwork,
    ModelConfig,
    Transformer,
    student_from_teacher,
)
from fsdfm.recipes.settings import AdaptArgs, DistillArgs, PretrainArgs, TrainArgs
from fsdfm.text.packing import TokenStore
from fsdfm.text.tokenizer import Tokenizer
from fsdfm.text.vocabulary import tokens_within
from fsdfm.train.loop import Run, Task, TrainSettings
from fsdfm.train.objective import STEP_WEIGHTS, Distill, Joint, Objective, Pretrain

CHANGEABLE = ("out", "device", "data", "teacher", "init", "model")
"""Settings that may differ when a run goes on: places, which are compared by content instead."""


ADAPT_LENGTH = 256
"""Tokens of a sequence where adapting is told no length."""
LOCK = ".lock"

DRAWS = 8
"""Groups in which a model with a joint head draws the positions of a call by default."""


def pretrain(args: PretrainArgs) -> bool:
    """Train a flow model; returns whether the run is finished (False: interrupted).

    Raises:
        FsdfmError: settings, data, checkpoint or training went wrong.
    """
    settings = args.settings()
    store = TokenStore.open(args.data)
    torch.manual_seed(args.seed)
    ancestors: tuple[str, ...] = ()
    if args.init is not None:
        start = load_pretrained(args.init)
        _same_tokenizer(start, args.init, store, args.data)
        model, ancestors = start.model, start.ancestors
        if model.config.source != args.source:
            raise ConfigError(
                f"{args.init} has a {model.config.source} source: add "
                f"--source {model.config.source}."
            )
        if model.config.schedule_power != args.schedule_power:
            power = model.config.schedule_power
            raise ConfigError(
                f"{args.init} has schedule power {power}: add --schedule-power {power}."
            )
        length = args.context_length or model.config.context_length
    else:
        length = args.context_length or 1024
        model = Transformer(
            ModelConfig.from_dict(
                {
                    "vocab_size": Tokenizer.from_json(store.tokenizer_json).vocab_size,
                    "context_length": length,
                    "source": args.source,
                    "schedule_power": args.schedule_power,
                    **PRESETS[args.preset],
                }
            )
        )
    if length > model.config.context_length:
        model = _with_context(model, length)
    config = model.config
    objective = Pretrain(
        make_source(config.source, config.vocab_size, absorbing=config.absorbing),
        Polynomial(config.schedule_power),
        POSITION_LOSSES[args.loss],
        args.frozen_share,
    )
    defaults = {"steps": 64, "step": "exact"}
    return _train(args, settings, store, model, objective, length, defaults, ancestors)


def adapt(args: AdaptArgs) -> bool:
    """Make a flow model of a causal language model; returns whether the run is finished.

    Raises:
        FsdfmError: settings, model, data, checkpoint or training went wrong.
    """
    settings = args.settings()
    store = TokenStore.open(args.data)
    tokenizer = Tokenizer.from_json(store.tokenizer_json)
    lm = load_causal_lm(args.model)
    token_ids = tokens_within(tokenizer, Tokenizer.from_json(lm.tokenizer_json, name=args.model))
    if token_ids is None:
        raise ConfigError(
            f"{args.data} was not prepared with the tokenizer of {args.model} or a cut of it: "
            f"prepare it again with --tokenizer {args.model}."
        )
    torch.manual_seed(args.seed)
    length = args.context_length or ADAPT_LENGTH
    model = adapt_causal_lm(
        lm,
        token_ids=token_ids,
        start_id=tokenizer.eos_id if args.shift == "left" else None,
        layers=chosen_layers(len(lm.model.model.layers), args.layers),
        source=args.source,
        context_length=length,
        attention=args.attention,
        schedule_power=args.schedule_power,
    )
    ancestors = (lm.name,)
    del lm
    source, schedule = objective_parts(model.config)
    position_loss = POSITION_LOSSES[args.loss]
    objective: Objective = Pretrain(source, schedule, position_loss, args.frozen_share)
    defaults = {"steps": 64, "step": "exact"}
    return _train(args, settings, store, model, objective, length, defaults, ancestors)


def distill(args: DistillArgs) -> bool:
    """Train a few-step student; returns whether the run is finished (False: interrupted).

    Raises:
        FsdfmError: settings, data, checkpoint or training went wrong.
    """
    # Where targets come from the average there is no warm-up: a quick one sharpens its own targets
    # (LOG.md). A joint head starts at zero, and its average must forget that.
    settings = replace(args.settings(), ema_warmup=args.target == "joint")
    if args.target == "semigroup" and args.target_rule != "exact":
        raise ConfigError("--target semigroup presumes the exact rule: add --target-rule exact.")
    if args.target == "joint" and args.neighbours < 1:
        raise ConfigError(f"--neighbours must be at least 1, got {args.neighbours}.")
    store = TokenStore.open(args.data)
    teacher = load_pretrained(args.teacher)
    _same_tokenizer(teacher, args.teacher, store, args.data)
    torch.manual_seed(args.seed)
    joint = args.target == "joint"
    embedding = teacher.model.config.step_embedding if joint else args.step_embedding
    model = student_from_teacher(teacher.model, embedding, args.neighbours if joint else 0)
    config = model.config
    source, schedule = objective_parts(config)
    objective: Objective
    if joint:
        objective = Joint(source, schedule, POSITION_LOSSES[args.loss])
    else:
        objective = Distill(
            source,
            schedule,
            TARGETS[args.target],
            STEP_RULES[args.target_rule],
            STEP_WEIGHTS[args.step_weights](),
            POSITION_LOSSES[args.loss],
        )
    length = args.context_length or config.context_length
    if length > config.context_length:
        raise ConfigError(
            f"--context-length {length} is more than the teacher's {config.context_length}."
        )
    # Late: 14 to 23 % less perplexity at 2 to 8 steps, 4 to 12 % of it at equal entropy (LOG.md).
    defaults = {"steps": 8, "step": args.target_rule, "grid": "late"}
    if joint:
        defaults |= {"step": "exact", "grid": "latest", "draws": DRAWS}
    return _train(args, settings, store, model, objective, length, defaults, teacher.ancestors)


def _train(
    args: TrainArgs,
    settings: TrainSettings,
    store: TokenStore,
    model: FlowNetwork,
    objective: Objective,
    length: int,
    generation: dict[str, Any],
    ancestors: tuple[str, ...],
) -> bool:
    """Claim the run directory, then run the loop with a console that shows and exports."""
    store.train.require(length)
    store.validation.require(length)
    device = pick_device(args.device)
    facts = {
        "format": "fsdfm-run",
        "command": type(args).__name__.removesuffix("Args").lower(),
        "settings": {k: v for k, v in asdict(args).items() if k not in CHANGEABLE},
        "model": config_to_dict(model.config),
        "data_sha256": digest([json.dumps(store.manifest, sort_keys=True, default=str)]),
        "start_sha256": digest(tensor_bytes(model.parameters())),
    }
    tokenizer = Tokenizer.from_json(store.tokenizer_json)
    config = model.config
    source, schedule = objective_parts(config)
    count = min(settings.validation_sequences, store.validation.blocks(length))
    task = Task(
        objective=objective,
        source=source,
        schedule=schedule,
        batch=_batches(store, settings.batch_size, length, settings.seed),
        validation=torch.stack([store.validation.block(i, length) for i in range(count)]),
        device=device,
        autocast=preferred_dtype(device),
    )

    def export(ema: FlowNetwork) -> None:
        save_pretrained(
            args.out,
            ema,
            tokenizer_json=store.tokenizer_json,
            generation=generation,
            ancestors=ancestors,
        )

    tokens_per_step = settings.batch_size * args.accumulate * length
    with (
        _claimed(args.out, facts),
        TrainingConsole(args, tokenizer, generation, tokens_per_step) as console,
    ):
        console.export = export
        finished = Run(args.out, settings, task, console).train(model.to(device))
    console.summary(finished)
    return finished


def objective_parts(config: ModelConfig) -> tuple[Any, Polynomial]:
    """The source and schedule that a network was built for."""
    return make_source(config.source, config.vocab_size, absorbing=config.absorbing), Polynomial(
        config.schedule_power
    )


def _batches(store: TokenStore, batch_size: int, length: int, seed: int) -> Callable[[int], Tensor]:
    def batch(index: int) -> Tensor:
        return store.train.batch(index, batch_size=batch_size, length=length, seed=seed)

    return batch


def _with_context(model: FlowNetwork, length: int) -> FlowNetwork:
    """The same weights, for longer sequences; rotary positions need no new ones."""
    longer = type(model)(replace(model.config, context_length=length))
    longer.load_state_dict(model.state_dict())
    return longer


@contextmanager
def _claimed(out: Path, facts: dict[str, Any]) -> Iterator[None]:
    """Hold the run directory for this process alone.

    Raises:
        ConfigError: it holds another run, or another process trains in it.
        CheckpointError: it cannot be written, or holds something else.
    """
    with ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(out / LOCK, out))
        except OSError as error:
            raise CheckpointError(
                f"Cannot write run directory {out} ({one_line(error)}): choose another --out."
            ) from None
        _claim(out, facts)
        yield


def _claim(out: Path, facts: dict[str, Any]) -> None:
    """Write what the run is, or check that the directory holds this very run.

    Raises:
        ConfigError: it holds another run.
        CheckpointError: it cannot be written, or holds something else.
    """
    path = out / "run.json"
    facts = json.loads(json.dumps(facts, default=str))
    try:
        if path.exists():
            _same_run(out, json.loads(path.read_text()), facts)
            return
        if {other.name for other in out.iterdir()} - {LOCK, ".run.json.partial"}:
            raise ConfigError(f"--out {out} is not empty and holds no run: choose another.")
        write_whole(path, json.dumps(facts, indent=2) + "\n", error=CheckpointError)
    except OSError as error:
        raise CheckpointError(
            f"Cannot write run directory {out} ({one_line(error)}): choose another --out."
        ) from None
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path} is not a run's settings: choose another --out.") from None


def _same_run(out: Path, old: Any, new: dict[str, Any]) -> None:
    if not isinstance(old, dict) or old.get("format") != "fsdfm-run":
        raise ValueError("foreign")
    # Settings last: --context-length is not the network's, and must not hide behind it.
    differences = {
        key: f"{key} {was.get(key)} -> {now.get(key)}"
        for was, now in ((dict(old[part]), new[part]) for part in ("model", "settings"))
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
    }
    for key, what in (
        ("command", "command"),
        ("data_sha256", "data"),
        ("start_sha256", "starting weights"),
    ):
        if old.get(key) != new[key]:
            differences[key] = f"other {what}"
    if differences:
        raise ConfigError(
            f"--out {out} holds another run ({'; '.join(differences.values())}): "
            f"give the same settings to go on with it, or choose another --out."
        )


def _same_tokenizer(start: Pretrained, where: Path, store: TokenStore, data: Path) -> None:
    """Raises ConfigError unless a model and a data directory speak the same token ids."""
    ours, theirs = (
        Tokenizer.from_json(text).fingerprint
        for text in (start.tokenizer_json, store.tokenizer_json)
    )
    if ours != theirs:
        raise ConfigError(
            f"{where} and {data} have different tokenizers: prepare the data again with "
            f"--tokenizer {where}/tokenizer.json."
        )
