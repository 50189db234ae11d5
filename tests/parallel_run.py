"""The four processes of tests/test_parallel.py: they train in every way that is asked there."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from test_train import SETTINGS, Recorder, Toy, V, batch, distill_objective, make_task, network

from fsdfm.core.errors import FsdfmError
from fsdfm.flow.loss import cross_entropy
from fsdfm.flow.path import MaskSource, UniformSource
from fsdfm.flow.schedule import Polynomial
from fsdfm.flow.target import rk2_target
from fsdfm.model.causal import CausalConfig, CausalNetwork
from fsdfm.model.config import Attention
from fsdfm.model.student import student_from_teacher
from fsdfm.train.loop import Run
from fsdfm.train.next_token import NextToken
from fsdfm.train.objective import Joint, Objective, Pretrain
from fsdfm.train.parallel import ALONE, World, is_sharded, started

STEPS, DIES_AT = 50, 20
FROM_TWO, FROM_ONE, FROM_FOUR, MIXED = 5, 9, 12, 16
"""Updates after which other processes take over some of the trainings; there they end."""


def twin(attention: Attention) -> CausalNetwork:
    """A tiny causal language model's."""
    torch.manual_seed(0)
    return CausalNetwork(
        CausalConfig(
            vocab_size=V,
            hidden_size=16,
            blocks=2,
            heads=2,
            cond_size=8,
            context_length=8,
            source="mask",
            kv_heads=1,
            head_size=8,
            mlp_size=24,
            start_id=3,
            attention=attention,
        )
    )


@dataclass(frozen=True)
class Kind:
    """A training."""

    model: Callable[[], Any]
    objective: Callable[[], Objective | None] = lambda: None
    sharding: str = "none"
    accumulate: int = 1


KINDS = {
    "pretrain": Kind(Toy, accumulate=2),
    "distill": Kind(Toy, distill_objective),
    "fsdp-pretrain": Kind(
        network,
        lambda: Pretrain(UniformSource(V), Polynomial(), cross_entropy),
        sharding="fsdp",
        accumulate=2,
    ),
    "fsdp-distill": Kind(
        lambda: network("log2"),
        lambda: distill_objective(target=rk2_target, position_loss=cross_entropy),
        "fsdp",
    ),
    "fsdp-joint": Kind(
        lambda: student_from_teacher(network(), "none", neighbours=2),
        lambda: Joint(UniformSource(V), Polynomial()),
        "fsdp",
    ),
    "fsdp-adapt": Kind(
        lambda: twin("bidirectional"),
        lambda: Pretrain(MaskSource(V), Polynomial(), frozen_share=0.3),
        "fsdp",
    ),
    "fsdp-next-token": Kind(lambda: twin("causal"), lambda: NextToken(V), "fsdp"),
}


def train(
    out: Path, name: str, world: World, until: int = STEPS, each: Callable[[int], None] = id
) -> bool:
    """Train up to an update, on from what is there; whether the network was sharded."""
    out.mkdir(exist_ok=True)
    kind, part = KINDS[name], world.share(len(batch(0)))
    rows = slice(world.rank * part, (world.rank + 1) * part)
    objective = kind.objective()
    task = make_task(objective, getattr(objective, "source", None))
    likelihood = objective.nats if isinstance(objective, NextToken) else None
    task = replace(task, world=world, batch=lambda i: batch(i)[rows], likelihood=likelihood)
    settings = replace(
        SETTINGS,
        steps=STEPS,
        log_every=1,
        evaluate_every=STEPS,
        checkpoint_every=until,
        sharding=kind.sharding,
        accumulate=kind.accumulate,
    )

    def advanced(step: int) -> None:
        each(step)
        if until < STEPS and step == until - 1 and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)  # one is told: all stop after this update

    Run(out, settings, task, Recorder(advanced)).train(model := kind.model())
    return is_sharded(model)


TAKEN_OVER = ("pretrain", "distill", "fsdp-distill", "fsdp-joint")


def first_two(place: Path, world: World) -> None:
    """Whole trainings of two; and others that one goes on with."""
    for name in KINDS:
        train(place / f"{name}-two", name, world)
    for name in TAKEN_OVER:
        train(place / f"{name}-mixed", name, world, FROM_TWO)
        if world.first:
            train(place / f"{name}-mixed", name, ALONE, FROM_ONE)
        world.wait()


def lone(place: Path, world: World) -> None:
    """One process that torchrun started is sharded, too."""
    assert train(place / "fsdp-pretrain-lone", "fsdp-pretrain", world)


def all_four(place: Path, world: World) -> None:
    """Go on with these."""
    for name in TAKEN_OVER:
        train(place / f"{name}-mixed", name, world, FROM_FOUR)


def last_two(place: Path, world: World) -> None:
    """Go on; then a training in which a process dies."""
    for name in TAKEN_OVER:
        train(place / f"{name}-mixed", name, world, MIXED)

    def dies(step: int) -> None:
        if world.rank == 1 and step == DIES_AT:
            os.kill(os.getpid(), signal.SIGKILL)

    train(place / "dies", "pretrain", world, each=dies)


TURNS = ((first_two, 0, 2), (lone, 3, 1), (all_four, 0, 4), (last_two, 0, 2))
"""What is done, the first process that does it, and how many do."""


def process(number: int, place: Path, port: int) -> None:
    """What one of them does; what it says is in stderr-NUMBER."""
    with (place / f"stderr-{number}").open("w") as file:
        os.dup2(file.fileno(), 2)
    # As torchrun starts processes, and starts them again: all turns meet at one store.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_WORLD_SIZE": "1"}
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for turn, (does, first, size) in enumerate(TURNS):
        if first <= number < first + size:
            rank = str(number - first)
            os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(size)}
            os.environ["TORCHELASTIC_RESTART_COUNT"] = str(turn)
            try:
                with started(torch.device("cpu")) as world:
                    does(place, world)
            except FsdfmError as error:
                sys.exit(f"error: {error}")


def main(place: Path, port: int) -> None:
    """Fork them: to import torch four times costs more than to train."""
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=process, args=(k, place, port)) for k in range(4)]
    for each in processes:
        each.start()
    # After the fork: it starts a thread.
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    for each in processes:
        each.join()
    del store


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
