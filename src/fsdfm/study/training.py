"""The networks of a study: its teacher on the known law, and students, each trained once."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fsdfm.core.errors import ConfigError, FsdfmError
from fsdfm.core.files import digest, replacing, tensor_bytes, write_whole
from fsdfm.flow.loss import cross_entropy
from fsdfm.flow.path import Source
from fsdfm.flow.schedule import Polynomial
from fsdfm.model.config import ModelConfig
from fsdfm.model.transformer import FlowNetwork, Transformer
from fsdfm.study.languages import KnownLaw, Language, Row
from fsdfm.study.recipes import Recipe
from fsdfm.train.checkpoint import load_average, load_last
from fsdfm.train.loop import Run, Task
from fsdfm.train.objective import Objective, Pretrain
from fsdfm.train.settings import TrainSettings

LOG = logging.getLogger(__name__)
WEIGHTS = ("start", "last", "average")
"""What is judged of a run: update 0, the last weights, their average."""


class Stopped(FsdfmError):
    """A run was interrupted; what it has done is kept."""

    def __init__(self) -> None:
        super().__init__("Stopped: run the same command again to go on.")


@dataclass(frozen=True, slots=True)
class Choice:
    """What a search settles, for every recipe alike."""

    learning_rate: float
    """Peak."""
    window: float
    """Of the average, in shares of the run; its decay is 1 - 1 / (window * updates), so that at
    most exp(-1 / window) of it is the start."""
    power: float = 1.0
    """Of the grid that samples are drawn on; 1 is even."""

    def decay(self, updates: int) -> float:
        """Of the average over a run of so many updates."""
        return max(0.0, 1.0 - 1.0 / max(1.0, self.window * updates))


class Watch:
    """Says the loss now and then, and keeps snapshots.

    Args:
        name: of the run, in what is said.
        directory: where snapshots go.
        model: the network in training.
        wanted: updates after which one is kept; multiples of those between two checkpoints.
    """

    def __init__(
        self, name: str, directory: Path, model: FlowNetwork, wanted: Collection[int] = ()
    ) -> None:
        self.name, self.directory, self.model, self.wanted = name, directory, model, wanted
        self.started = time.perf_counter()
        self.average: FlowNetwork | None = None

    def advanced(self, step: int, steps: int, loss: float | None) -> None:
        """See `Watcher`; the average was seen just before."""
        if loss is not None and step % 50 == 0:
            seconds = time.perf_counter() - self.started
            LOG.info(f"{self.name}: {step}/{steps} loss {loss:.4f} ({seconds:.0f} s)")
        if step in self.wanted and self.average is not None:
            for kind, network in (("average", self.average), ("last", self.model)):
                tensors = {k: v.detach().contiguous() for k, v in network.state_dict().items()}
                with replacing(snapshot(self.directory, step, kind)) as partial:
                    save_file(tensors, partial)

    def evaluated(self, record: dict[str, Any], ema: FlowNetwork) -> None:
        """See `Watcher`."""
        LOG.info(f"{self.name}: ELBO {record['elbo_nats_per_token']:.4f} nats a token")

    def saved(self, ema: FlowNetwork) -> None:
        """See `Watcher`."""
        self.average = ema


def snapshot(directory: Path, step: int, kind: str) -> Path:
    """File of the weights after some updates."""
    return directory / f"{step} {kind}.safetensors"


def known_law(run: Path, source: str = "uniform", steps: int | None = None) -> KnownLaw:
    """The known law with its teacher, trained now or before.

    Args:
        run: directory of the teacher's run.
        source: where its path starts.
        steps: updates of 256 texts; none where the run is to be taken as it is.

    Raises:
        Stopped: the training was interrupted.
        ConfigError: the directory has a run of other settings.
    """
    config = ModelConfig.from_dict(
        {
            "vocab_size": 4,
            "hidden_size": 64,
            "blocks": 2,
            "heads": 4,
            "cond_size": 64,
            "context_length": KnownLaw.length,
            "source": source,
        }
    )
    torch.manual_seed(0)
    model = Transformer(config)
    language = KnownLaw(model)
    if steps is not None:
        settings = replace(
            language.settings,
            steps=steps,
            learning_rate=2e-3,
            ema_decay=0.999,
            checkpoint_every=100,
        )
        objective = Pretrain(language.source, Polynomial(), cross_entropy)
        task = task_of(objective, language.source, language, seed=0)
        trained(run, settings, task, Watch("teacher", run, model), {"source": source})
    load_average(run / "checkpoint.safetensors", model)
    return language


def task_of(objective: Objective, source: Source, language: Language, seed: int) -> Task:
    """Training on a language's text."""

    def batch(index: int) -> Tensor:
        return language.batch(seed, index)

    cpu = torch.device("cpu")
    return Task(objective, source, Polynomial(), batch, language.validation(), cpu, language.dtype)


def trained(run: Path, settings: TrainSettings, task: Task, watch: Watch, facts: Row) -> None:
    """Train the watched network to the end of its run, or go on with it.

    Args:
        run: directory.
        settings: the numbers.
        task: what is trained on what.
        watch: with the network.
        facts: what else tells the run from others; kept with the settings in its directory.

    Raises:
        Stopped: it was interrupted.
        ConfigError: the directory has a run of other settings or facts.
    """
    kept = run / "settings.json"
    asked = json.dumps({"settings": asdict(settings), **facts}, indent=1) + "\n"
    known = kept.read_text("utf-8") if kept.exists() else None
    if known != asked and (run / "checkpoint.safetensors").exists():
        raise ConfigError(f"{run} has a run of other or unknown settings: give another out.", "out")
    run.mkdir(parents=True, exist_ok=True)
    write_whole(kept, asked)
    if not Run(run, settings, task, watch).train(watch.model):
        raise Stopped


def student(
    recipe: Recipe,
    choice: Choice,
    language: Language,
    run: Path,
    updates: int,
    seed: int,
) -> Callable[[str], FlowNetwork]:
    """Train a student, or go on with it.

    Args:
        recipe, choice: how.
        language: of what, and from which teacher.
        run: directory; of one recipe, choice, number of updates and seed.
        updates: of the whole run.
        seed: of new layers, batches and noise.

    Returns:
        The network by its weights, one of WEIGHTS.

    Raises:
        Stopped: the training was interrupted.
        ConfigError: the directory has a run of other settings, recipe or teacher.
    """
    settings = replace(
        language.settings,
        steps=updates,
        learning_rate=choice.learning_rate,
        warmup_steps=min(language.settings.warmup_steps, updates // 10),
        ema_decay=choice.decay(updates),
        seed=seed,
    )
    task = task_of(recipe.objective(language.source), language.source, language, seed)
    model = started(recipe, language, seed)
    trained(run, settings, task, Watch(run.name, run, model), origin(recipe, language))

    def weights(kind: str) -> FlowNetwork:
        fresh = started(recipe, language, seed)
        if kind != "start":
            load = load_average if kind == "average" else load_last
            load(run / "checkpoint.safetensors", fresh)
        return fresh.eval()

    return weights


def origin(recipe: Recipe, language: Language) -> Row:
    """How a student is made, and of which teacher."""
    return {"recipe": asdict(recipe), "teacher": weights_sha256(language.teacher)}


def weights_sha256(model: FlowNetwork) -> str:
    """Of a network's weights."""
    return digest(tensor_bytes(model.parameters()))


def started(recipe: Recipe, language: Language, seed: int) -> FlowNetwork:
    """A student before its first update."""
    torch.manual_seed(seed)
    return recipe.start(language.teacher)


def at_snapshot(model: FlowNetwork, directory: Path, step: int, kind: str) -> FlowNetwork:
    """A network with the weights of a snapshot."""
    model.load_state_dict(load_file(snapshot(directory, step, kind)))
    return model.eval()
