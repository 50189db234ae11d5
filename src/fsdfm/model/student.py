"""A student that starts from a teacher's weights."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from fsdfm.core.errors import ConfigError
from fsdfm.model.config import StepEmbedding
from fsdfm.model.transformer import FlowNetwork

Network = TypeVar("Network", bound=FlowNetwork)


def student_from_teacher(
    teacher: Network, step_embedding: StepEmbedding, neighbours: int = 0
) -> Network:
    """A step-aware network that starts from a teacher's weights.

    With `log2` it equals the teacher at every h. With `raw` (published) the fusers are fresh, and
    it does not.

    Args:
        teacher: a network with or without a step-size branch.
        step_embedding: the student's branch, `raw` or `log2`; `none` for one that gets a joint head
            instead, whose draws are right at any step size.
        neighbours: R of the student's joint head; 0: none.

    Returns:
        A new network; the teacher is left as it was.

    Raises:
        ConfigError: a branch that would change or be lost, or tensors that do not agree otherwise.
    """
    config = replace(teacher.config, step_embedding=step_embedding, neighbours=neighbours)
    student = type(teacher)(config).to(teacher.vocab_embed.weight.device)
    known = ("none", step_embedding)
    if (step_embedding == "none" and not neighbours) or teacher.config.step_embedding not in known:
        raise ConfigError(
            f"A {step_embedding} student cannot start from a network whose step embedding is "
            f"{teacher.config.step_embedding}."
        )
    if neighbours and teacher.config.neighbours not in (0, neighbours):
        raise ConfigError(
            f"The teacher's joint head sees {teacher.config.neighbours} neighbours, not "
            f"{neighbours}: "
            f"give neighbours={teacher.config.neighbours}, or a teacher without such a head.",
            "neighbours",
        )
    new: set[str] = set()
    if step_embedding != teacher.config.step_embedding:
        new |= {"dt_embedding", "time_condition_fuser", "condition_fuser"}
    if neighbours != teacher.config.neighbours:
        new |= {"joint"}  # or left behind, where the student has none
    found = student.load_state_dict(teacher.state_dict(), strict=False)
    wrong = [n for n in found.missing_keys + found.unexpected_keys if not new & {*n.split(".")}]
    if wrong:
        raise ConfigError(f"Teacher and student do not agree in {', '.join(sorted(wrong))}.")
    # A joint head is trained beside a body that stays: so does an embedding that is the head, too.
    student.vocab_embed.requires_grad_(not neighbours)
    return student
