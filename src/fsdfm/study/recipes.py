"""Ways to make a few-step student, as named values; what a search settles is not in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fsdfm.flow.loss import POSITION_LOSSES
from fsdfm.flow.path import Source
from fsdfm.flow.schedule import Polynomial
from fsdfm.flow.step import STEP_RULES
from fsdfm.flow.target import TARGETS
from fsdfm.model.student import student_from_teacher
from fsdfm.model.transformer import FlowNetwork
from fsdfm.train.objective import STEP_WEIGHTS, Distill, Joint, Objective

EVALUATIONS = {"rk4": 4.0, "rk2": 2.0, "semigroup": 2.0}
"""Of the network, for a target."""
JOINT = "joint"
JOINT_HEAD_COST = 0.6
"""Of an update of a joint head and the output layer, the body fixed, in whole updates (at the
former bundled shape: 5,800 against 10,100 tokens/s)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One way to make a student; learning rate, average and grid are searched for each alike."""

    target: str = "rk4"
    """One of TARGETS, or joint: a head trained by the path loss."""
    rule: str = "published"
    """Step rule of the jumps inside the target."""
    loss: str = "cross_entropy"
    """Path loss of the rows at the smallest step."""
    embedding: Literal["none", "raw", "log2"] = "log2"
    weights: str = "even"
    """How often each step size is seen."""
    neighbours: int = 0
    """Tokens on each side that a joint head sees."""
    draws: int = 1
    """Groups in which the movers of a call are drawn."""
    sampler: str = "exact"
    """Step rule that its samples are drawn by."""

    @property
    def cost(self) -> float:
        """Forward passes of a batch that an update costs, a backward pass counting 2."""
        if self.target == JOINT:
            return 3.0 * JOINT_HEAD_COST
        return 3.0 + (1.0 - float(self._weights()[-1])) * EVALUATIONS[self.target]

    def updates(self, budget: float) -> int:
        """As many as `budget` forward passes of a batch pay for, at least one."""
        return max(1, round(budget / self.cost))

    def start(self, teacher: FlowNetwork) -> FlowNetwork:
        """The student before its first update; its new layers come from torch's generator."""
        return student_from_teacher(teacher, self.embedding, self.neighbours)

    def objective(self, source: Source) -> Objective:
        """What its updates minimise."""
        if self.target == JOINT:
            return Joint(source, Polynomial())
        return Distill(
            source,
            Polynomial(),
            TARGETS[self.target],
            STEP_RULES[self.rule],
            self._weights(),
            POSITION_LOSSES[self.loss],
        )

    def _weights(self) -> Tensor:
        return STEP_WEIGHTS[self.weights]()


TEACHER = Recipe(embedding="none")
"""How a teacher is drawn from: exact steps, each position alone."""

RECIPES: dict[str, Recipe] = {
    # FS-DFM, arXiv 2509.20624: raw h through fresh fusers, step weights 1 / h, its own step rule.
    "published": Recipe(
        loss="generalized_kl", embedding="raw", weights="published", sampler="published"
    ),
    # Ours: equal to the teacher at the start, big steps seen as often as small ones.
    "step-aware": Recipe(),
    "step-aware, semigroup": Recipe(target="semigroup", rule="exact"),
    # Ours: the positions of a call see each other; no step size.
    "joint head": Recipe(target=JOINT, embedding="none", neighbours=3, draws=8),
}
"""What came of others is in docs/results/study.md."""
