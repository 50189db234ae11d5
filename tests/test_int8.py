"""Products in 8 bits: within the bounds of their rounding, and refused where they would not run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fsdfm.core.errors import ConfigError
from fsdfm.generate import precision
from fsdfm.generate.precision import pick_dtype
from fsdfm.model import int8, prepared, smoothing
from fsdfm.model.causal import CausalConfig, CausalNetwork
from fsdfm.model.config import ModelConfig
from fsdfm.model.engine import Engine
from fsdfm.model.int8 import has_int8, int8_linear
from fsdfm.model.transformer import Transformer

needs_int8 = pytest.mark.skipif(not has_int8(), reason="this CPU has no fast 8-bit products")


TWIN = CausalConfig(
    vocab_size=83,
    hidden_size=48,
    blocks=2,
    heads=4,
    cond_size=16,
    kv_heads=2,
    head_size=12,
    mlp_size=64,
    start_id=0,
    source="mask",
)


def random_twin(seed: int, config: CausalConfig = TWIN) -> CausalNetwork:
    """With every branch doing something."""
    torch.manual_seed(seed)
    model = CausalNetwork(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


def case(rows: int, inputs: int, outputs: int, shift: float = 0.0) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn((rows, inputs), generator=draw) + shift
    weight = torch.randn((outputs, inputs), generator=draw) * torch.rand(outputs, 1, generator=draw)
    return x, weight, torch.randn(outputs, generator=draw)


@needs_int8
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 16, 5), (70, 48, 33), (9, 200, 64)])
@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
@pytest.mark.parametrize("at_once", [1, 400, 2**18])
def test_products_err_no_more_than_their_rounding(
    rows: int,
    inputs: int,
    outputs: int,
    shift: float,
    at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(int8, "NUMBERS_AT_ONCE", at_once)
    x, weight, bias = case(rows, inputs, outputs, shift)
    found = int8_linear(weight, bias, torch.float32)(x).double()
    # Each input is off by half a step of its row at most, and each weight by half of its output's.
    step_x = x.double().abs().amax(1, keepdim=True) * (1.0 + 2.0**-8) / int8.LEVELS
    step_w = weight.abs().amax(1).double() / int8.LEVELS
    bound = step_x / 2 * weight.double().abs().sum(1)
    bound = bound + step_w / 2 * (x.double().abs() + step_x / 2).sum(1, keepdim=True)
    error = (found - F.linear(x.double(), weight.double(), bias.double())).abs()
    assert (error <= 1.001 * bound + 1e-5).all()
    assert error.max() > 1e-4  # it did round


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_product_alone_and_among_others(dtype: torch.dtype) -> None:
    x, weight, bias = case(70, 48, 33)
    x = (x * torch.logspace(-3, 3, 70)[:, None]).to(dtype)
    product = int8_linear(weight, bias, dtype)
    together = product(x)
    for i in range(0, 70, 7):
        assert torch.equal(product(x[i : i + 1])[0], together[i])


@needs_int8
@pytest.mark.parametrize("shift", [0.0, 5.0, -5.0])
def test_gelu_inside_errs_no_more_than_rounding_and_gelu(shift: float) -> None:
    x, weight, bias = case(20, 48, 33, shift)
    exact = F.linear(x.double(), weight.double(), bias.double())
    found = int8_linear(weight, bias, torch.float32, gelu=True)(x).double()
    # All rows have one step, from the least to the most.
    step_x = (max(float(x.max()), 0.0) - min(float(x.min()), 0.0)) / int8.STEPS
    step_w = weight.abs().amax(1).double() / int8.LEVELS
    bound = step_x / 2 * weight.double().abs().sum(1)
    bound = bound + step_w / 2 * (x.double().abs() + step_x / 2).sum(1, keepdim=True)
    error = (found - F.gelu(exact, approximate="tanh")).abs()
    assert (error <= 1.14 * bound + 1e-3).all()  # GELU is nowhere steeper than 1.13
    assert error.max() > 1e-4  # it did round


@needs_int8
def test_odd_inputs_are_no_trouble() -> None:
    _, weight, bias = case(1, 16, 5)
    product = int8_linear(weight, bias, torch.float32)
    torch.testing.assert_close(product(torch.zeros(3, 16)), bias.expand(3, 5))
    assert product(torch.ones(2, 3, 16)).shape == (2, 3, 5)
    torch.testing.assert_close(
        product(torch.ones(1, 16))[0], weight.sum(1) + bias, rtol=0.1, atol=0.1
    )
    small = torch.full((1, 16), 1e-35)  # far below the others, and below what has a scale
    torch.testing.assert_close(product(torch.cat((small, torch.ones(1, 16))))[0], bias)
    assert product(torch.full((1, 16), float("nan"))).isnan().all()
    curved = int8_linear(weight, bias, torch.float32, gelu=True)(torch.zeros(3, 16))
    expected = F.gelu(bias, approximate="tanh").expand(3, 5)
    torch.testing.assert_close(curved, expected, rtol=1e-3, atol=1e-4)
    silent = int8_linear(torch.zeros(5, 16), bias, torch.float32)
    torch.testing.assert_close(silent(torch.ones(2, 16)), bias.expand(2, 5))


@needs_int8
@pytest.mark.parametrize("batch", [1, 3])
def test_an_engine_in_8_bits_says_nearly_what_the_network_says(batch: int) -> None:
    config = ModelConfig(83, 48, 3, 3, cond_size=16, step_embedding="log2", neighbours=2)
    torch.manual_seed(2)
    model = Transformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    x = torch.randint(83, (batch, 40))
    rows = torch.arange(0, x.numel(), 3)
    exact, ours = Engine(model, torch.float32), Engine(model, torch.int8)
    known = torch.rand(x.shape) < 0.5
    truth = exact.head(exact.told(exact.hidden(x, 0.3, 0.125, rows), rows, x, known))
    found = ours.head(ours.told(ours.hidden(x, 0.3, 0.125, rows), rows, x, known))
    assert found.dtype == torch.bfloat16
    error = (found.float() - truth).norm() / truth.norm()
    assert 0.001 < error < 0.05


@needs_int8
def test_outliers_behind_a_gate_do_not_drown_the_rest() -> None:
    """One inner number of adapted networks is a hundred times as large as the others."""
    model = random_twin(2)
    for block in model.blocks:
        block.mlp_in.weight.data[[0, 64]] *= 30.0  # a gate and what it lets through
        block.mlp_out.weight.data *= 8.0
        block.mlp_out.weight.data[:, 0] /= 8000.0
    x, rows = torch.randint(83, (1, 40)), torch.arange(40)
    truth, found = (
        engine.head(engine.hidden(x, 0.3, 0.125, rows)).float()
        for engine in (Engine(model, torch.float32), Engine(model, torch.int8))
    )
    assert 0.001 < (found - truth).norm() / truth.norm() < 0.02


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_int8_is_for_cpus(kind: str) -> None:
    with pytest.raises(ConfigError, match="precision int8 needs a CPU"):
        pick_dtype("int8", torch.device(kind), TWIN)


def test_int8_is_refused_where_it_would_not_be_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_int8", lambda: False)
    with pytest.raises(ConfigError, match="precision int8 needs a CPU"):
        pick_dtype("int8", torch.device("cpu"), TWIN)


@pytest.mark.parametrize("features", [{}, {"avx512_bf16": True}])
def test_a_cpu_without_vnni_or_amx_has_no_int8(
    features: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert not has_int8()


def test_a_pytorch_without_the_operators_has_no_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True})

    def missing(*_: object) -> Tensor:
        raise RuntimeError("qlinear: not available")

    monkeypatch.setattr(int8, "int8_linear", missing)
    assert not has_int8()


def test_precisions_by_name() -> None:
    cpu = torch.device("cpu")
    assert pick_dtype("float32", cpu, TWIN) == torch.float32
    assert pick_dtype("bfloat16", cpu, TWIN) == torch.bfloat16
    with pytest.raises(ConfigError, match="precision must be one of float32, bfloat16, int8, got"):
        pick_dtype("fp8", cpu, TWIN)


@pytest.mark.parametrize(
    ("features", "adapted", "published"),
    [
        ({"avx512_vnni": True, "avx512_bf16": True}, torch.int8, torch.bfloat16),
        ({"avx_vnni": True}, torch.int8, torch.float32),
        ({"amx_bf16": True, "amx_int8": True, "avx512_vnni": True}, torch.bfloat16, torch.bfloat16),
        ({}, torch.float32, torch.float32),
    ],
)
def test_adapted_models_run_in_8_bits_where_it_pays(
    features: dict[str, bool],
    adapted: torch.dtype,
    published: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(precision, "has_int8", lambda: "avx_vnni" in features or len(features) > 1)
    cpu = torch.device("cpu")
    assert pick_dtype(None, cpu, TWIN) == adapted
    assert pick_dtype(None, cpu, ModelConfig(83, 48, 3, 3, cond_size=16)) == published


@needs_int8
@pytest.mark.parametrize("bias", [False, True])
def test_hidden_numbers_that_are_always_large_are_evened_out(
    bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in language models, where a few of them leave the others no levels."""
    model = random_twin(3, replace(TWIN, qkv_bias=bias, step_embedding="log2"))
    for block in model.blocks:
        for norm, product in ((block.norm1, block.qkv), (block.norm2, block.mlp_in)):
            norm.weight.data[:] = 1.0
            norm.weight.data[5] = 200.0
            product.weight.data[:, 5] /= 200.0
    x, rows = torch.randint(83, (1, 40)), torch.arange(40)
    truth = Engine(model, torch.float32).hidden(x, 0.3, 0.125, rows)

    def error() -> float:
        found = Engine(model, torch.int8).hidden(x, 0.3, 0.125, rows).float()
        return float((found - truth).norm() / truth.norm())

    evened = error()
    monkeypatch.setattr(prepared, "smoothing", lambda model: [None] * len(model.blocks))
    assert evened < 0.03
    assert error() > 4.0 * evened


def test_what_was_silent_at_loading_may_be_loud_later() -> None:
    """Its factor is small, but not so small that it drowns its row when it wakes."""
    model = random_twin(3)
    for block in model.blocks:
        block.norm1.weight.data[7] = 0.0
        block.modulation.weight.data[:] = block.modulation.bias.data[:] = 0.0
    for factors in smoothing.smoothing(model):
        assert factors.attention.min() == factors.attention[7] == smoothing.LEAST
        assert 0.9 < factors.attention.mean() < 1.1
        assert factors.mlp.min() > smoothing.LEAST
    assert model.blocks[0].qkv._forward_pre_hooks == {}
