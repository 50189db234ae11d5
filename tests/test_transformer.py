"""Truths of the network: parity with the published one, its halves, its start, its students."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from fsdfm.core.errors import ConfigError
from fsdfm.model.config import PRESETS, ModelConfig
from fsdfm.model.rotary import Rotary, rotate
from fsdfm.model.student import student_from_teacher
from fsdfm.model.transformer import Transformer

PUBLISHED = Path(__file__).parent / "fixtures" / "published"
NETWORKS = [
    # name, file, key, source, step embedding
    ("dfm_uniform", "dfm_uniform.pth", "model", "uniform", "none"),
    ("fsdfm_uniform.student", "fsdfm_uniform.pth", "student_model", "uniform", "raw"),
    ("fsdfm_uniform.student_ema", "fsdfm_uniform.pth", "student_ema_model", "uniform", "raw"),
    ("fsdfm_uniform.teacher", "fsdfm_uniform.pth", "teacher_model", "uniform", "none"),
    ("fsdfm_mask.student", "fsdfm_mask.pth", "student_model", "mask", "raw"),
]
STEP_SIZES = [2.0**-k for k in range(11)]


def published(name: str, file: str, key: str, source: Any, step_embedding: Any) -> Transformer:
    """A fixture's network, loaded by hand: the converter has tests of its own."""
    state = torch.load(PUBLISHED / file, weights_only=True)[key]
    state.pop("rotary_emb.inv_freq")
    shape = {"vocab_size": 97, "hidden_size": 64, "blocks": 2, "heads": 4, "cond_size": 16}
    model = Transformer(ModelConfig(**shape, source=source, step_embedding=step_embedding))
    model.load_state_dict(state)
    return model.eval()


def teacher() -> Transformer:
    return published(*NETWORKS[3])


def small(**changes: Any) -> ModelConfig:
    shape = {"vocab_size": 11, "hidden_size": 32, "blocks": 2, "heads": 4, "cond_size": 8}
    return ModelConfig(**{**shape, **changes})


def inputs(vocab_size: int, sequences: int = 3, length: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x_t = torch.randint(vocab_size, (sequences, length), generator=generator)
    t = torch.rand(sequences, generator=generator) * 0.9
    h = torch.tensor([0.25, 0.03125, 0.5])[:sequences]
    return x_t, t, h


def randomise(model: Transformer) -> Transformer:
    """Give every parameter a value, so that nothing is silent."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network[0])
@torch.no_grad()
def test_logits_are_those_of_the_published_network(network: tuple[str, ...]) -> None:
    expected = load_file(PUBLISHED / "expected.safetensors")
    x_t, t, h, logits = (expected[f"{network[0]}.{k}"] for k in ("x_t", "t", "h", "logits"))
    torch.testing.assert_close(published(*network)(x_t, t, h), logits, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("step_embedding", ["none", "raw", "log2"])
@pytest.mark.parametrize("source", ["uniform", "mask"])
@torch.no_grad()
def test_forward_is_the_head_of_the_body_and_the_head_takes_any_rows(
    source: Any, step_embedding: Any
) -> None:
    model = randomise(Transformer(small(source=source, step_embedding=step_embedding)))
    x_t, t, h = inputs(model.config.embedding_rows)
    hidden = model.body(x_t, t, h)
    logits = model(x_t, t, h)
    assert hidden.shape == (3, 7, 32)
    assert logits.shape == (3, 7, 11 + (source == "mask"))
    assert torch.equal(logits, model.head(hidden))
    chosen = torch.tensor([True, False, False, True, True, False, True]).expand(3, 7)
    torch.testing.assert_close(model.head(hidden[chosen]), logits[chosen], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_log2_student_starts_equal_to_its_teacher_at_every_step_size() -> None:
    model = teacher()
    student = student_from_teacher(model, "log2").eval()
    x_t, t, h = inputs(97)
    expected = model(x_t, t, h)
    for size in STEP_SIZES:
        assert torch.equal(student(x_t, t, torch.full((3,), size)), expected)


@torch.no_grad()
def test_raw_student_does_not_start_equal_to_its_teacher() -> None:
    model = teacher()
    student = student_from_teacher(model, "raw").eval()
    assert (student(*inputs(97)) - model(*inputs(97))).abs().max() > 1e-2


@torch.no_grad()
def test_student_of_a_student_keeps_its_step_size_branch() -> None:
    model = randomise(Transformer(small(step_embedding="log2")))
    again = student_from_teacher(model, "log2").eval()
    assert torch.equal(again(*inputs(11)), model(*inputs(11)))


@torch.no_grad()
def test_student_owns_its_weights() -> None:
    model = teacher()
    before = model(*inputs(97))
    randomise(student_from_teacher(model, "log2"))
    assert torch.equal(model(*inputs(97)), before)


@pytest.mark.parametrize(
    ("own", "asked"), [("none", "none"), ("raw", "log2"), ("log2", "raw"), ("raw", "none")]
)
def test_student_cannot_change_or_lose_a_step_size_branch(own: Any, asked: Any) -> None:
    with pytest.raises(ConfigError, match=f"{asked} student .* {own}"):
        student_from_teacher(Transformer(small(step_embedding=own)), asked)


@pytest.mark.parametrize("joint", [0, 2])
@pytest.mark.parametrize("change", ["lacks", "has more"])
def test_student_takes_every_tensor_of_its_teacher_or_says_which_not(
    joint: int, change: str
) -> None:
    model = Transformer(small())
    if change == "lacks":
        del model.blocks[0].qw
    else:
        model.more = nn.Linear(2, 2, bias=False)
    name = "blocks.0.qw.weight" if change == "lacks" else "more.weight"
    with pytest.raises(ConfigError, match=f"do not agree in {name}\\.$"):
        student_from_teacher(model, "none" if joint else "log2", joint)


@torch.no_grad()
def test_only_students_see_the_step_size() -> None:
    x_t, t, h = inputs(11)
    for kind, sees in (("none", False), ("raw", True), ("log2", True)):
        model = randomise(Transformer(small(step_embedding=kind)))
        difference = (model(x_t, t, h) - model(x_t, t, h / 4)).abs().max()
        assert (difference > 1e-3) if sees else (difference == 0.0), kind


@pytest.mark.parametrize("step_embedding", ["none", "raw", "log2"])
@torch.no_grad()
def test_fresh_network_gives_the_present_token_about_half_of_the_mass(step_embedding: Any) -> None:
    """Logit ln V + 1 against V - 1 logits near 0: e V / (e V + V) is .73, less their spread."""
    torch.manual_seed(0)
    config = ModelConfig(4096, 192, 1, 6, 16, step_embedding=step_embedding)
    x_t = torch.randint(4096, (2, 50))
    p = Transformer(config)(x_t, torch.rand(2), torch.rand(2)).softmax(-1)
    present = p.gather(-1, x_t[..., None]).mean()
    assert 0.4 < present < 0.8
    others = (1 - p.gather(-1, x_t[..., None])[..., 0]) / 4095
    assert (p.median(-1).values / others).log().abs().max() < 0.7  # no other token stands out


@pytest.mark.parametrize("step_embedding", ["none", "raw", "log2"])
def test_gradients_reach_every_parameter(step_embedding: Any) -> None:
    """Zeroed layers wake one after another: head, modulations, time, then the step-size branch."""
    torch.manual_seed(3)
    model = Transformer(small(vocab_size=5, step_embedding=step_embedding))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x_t, t, h = inputs(5)
    reached: set[str] = set()
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(x_t, t, h).flatten(0, 1), x_t.flip(1).flatten()).backward()
        reached |= {
            name
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and parameter.grad.abs().max() > 0
        }
        optimizer.step()
    assert reached == dict(model.named_parameters()).keys()


@torch.no_grad()
def test_every_position_sees_every_other() -> None:
    model = randomise(Transformer(small()))
    x_t, t, h = inputs(11, sequences=1)
    logits = model(x_t, t, h)
    for position in range(7):
        changed = x_t.clone()
        changed[0, position] = (changed[0, position] + 3) % 11
        moved = (model(changed, t, h) - logits).abs().amax(-1)[0]
        assert (moved > 1e-6).all(), position


@torch.no_grad()
def test_sequences_of_a_batch_do_not_see_each_other() -> None:
    model = randomise(Transformer(small(step_embedding="log2")))
    x_t, t, h = inputs(11)
    alone = torch.cat([model(x_t[i : i + 1], t[i : i + 1], h[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, model(x_t, t, h), rtol=1e-5, atol=1e-5)


def test_rotary_scores_depend_on_the_distance_alone() -> None:
    generator = torch.Generator().manual_seed(7)
    q, k = torch.randn(2, 16, generator=generator)
    cos, sin = Rotary(16).tables(60)

    def score(i: int, j: int) -> float:
        rotated_q = rotate(q.view(1, 1, 1, 16), cos[i : i + 1], sin[i : i + 1])
        rotated_k = rotate(k.view(1, 1, 1, 16), cos[j : j + 1], sin[j : j + 1])
        return float((rotated_q * rotated_k).sum())

    assert score(3, 10) == pytest.approx(score(40, 47), abs=1e-4)
    assert score(3, 10) != pytest.approx(score(3, 17), abs=1e-2)
    assert score(0, 0) == pytest.approx(float(q @ k), abs=1e-5)


def test_rotary_tables_do_not_depend_on_the_lengths_seen_before() -> None:
    grown, fresh = Rotary(8), Rotary(8)
    grown.tables(5)
    long = grown.tables(90)
    for a, b, c in zip(long, fresh.tables(90), grown.tables(5), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(c, b[:5])


def parameters(config: ModelConfig) -> int:
    """Count by hand: embedding and head, time branch, blocks, final layer."""
    d, c, rows = config.hidden_size, config.cond_size, config.embedding_rows
    scalar = 256 * c + c + c * c + c
    raw, step = config.step_embedding == "raw", config.step_embedding != "none"
    fuser = raw * (2 * c * c + c)
    block = 2 * d + 4 * d * d + (8 * d * d + 5 * d) + 6 * (c * d + d) + fuser
    final = d + 2 * (c * d + d) + fuser
    tokens = rows * d + (d * rows + rows)
    return tokens + (1 + step) * scalar + raw * (4 * c * c + 2 * c) + config.blocks * block + final


@pytest.mark.parametrize("step_embedding", ["none", "raw", "log2"])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_parameters_of_the_formula(preset: str, step_embedding: Any) -> None:
    config = ModelConfig(vocab_size=50_257, step_embedding=step_embedding, **PRESETS[preset])
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == parameters(config)


@pytest.mark.parametrize(("preset", "billions"), [("0.17B", 0.17), ("1.3B", 1.3), ("1.7B", 1.7)])
def test_published_presets_are_as_large_as_their_names(preset: str, billions: float) -> None:
    config = ModelConfig(vocab_size=50_257, step_embedding="raw", **PRESETS[preset])
    assert parameters(config) == pytest.approx(billions * 1e9, rel=0.06)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"blocks": True}, "blocks"),
        ({"cond_size": 2.0}, "cond_size"),
        ({"heads": 3}, "multiple of twice heads"),
        ({"heads": 32}, "multiple of twice heads"),
        ({"source": "noise"}, "uniform or mask"),
        ({"step_embedding": "log"}, "none, raw or log2"),
        ({"schedule_power": 0.9}, "schedule_power"),
        ({"schedule_power": float("nan")}, "schedule_power"),
        ({"schedule_power": "2"}, "schedule_power"),
    ],
)
def test_config_refuses_values_that_cannot_work(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        small(**changes)


def test_config_survives_its_dict() -> None:
    config = small(source="mask", step_embedding="log2", schedule_power=2.0, context_length=77)
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_config_from_dict_names_unknown_and_missing_fields() -> None:
    values = small().to_dict()
    with pytest.raises(ConfigError, match="unknown fields dropout"):
        ModelConfig.from_dict({**values, "dropout": 0.1})
    del values["heads"]
    with pytest.raises(ConfigError, match="heads"):
        ModelConfig.from_dict(values)


def test_mask_source_adds_one_id() -> None:
    assert (small().embedding_rows, small().mask_id) == (11, None)
    assert (small(source="mask").embedding_rows, small(source="mask").mask_id) == (12, 11)


def test_fusers_start_as_pytorch_makes_them_and_pass_time_on() -> None:
    """Published: uniform within 1 / sqrt(fan_in); matrices of std 0.02 would hide time."""
    torch.manual_seed(0)
    shape = {"vocab_size": 5, "hidden_size": 16, "blocks": 2, "heads": 2, "cond_size": 32}
    model = Transformer(ModelConfig.from_dict({**shape, "step_embedding": "raw"}))
    fusers = [block.condition_fuser for block in model.blocks]
    fusers += [model.output_layer.condition_fuser, model.time_condition_fuser]
    bound = 64**-0.5
    for fuser in fusers:
        assert fuser.weight.abs().max() <= bound
        assert float(fuser.weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.1)
        assert fuser.bias.any()
