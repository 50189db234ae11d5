"""Fused pieces of a block are the formulas that they stand for, in values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fsdfm.model.fused import modulated_rms, product_dtype, swiglu, turned
from fsdfm.model.rotary import Rotary

BATCH, LENGTH, WIDTH = 3, 7, 20
EPSILON = 0.03
"""Large enough to be seen."""
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2.0**-8}
"""Relative error of one rounding, or a little more."""


def drawn(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rounded to the format first, so that both sides are given the same numbers."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype)


def assert_equal_with_gradients(
    found: Tensor, inputs: list[Tensor], wanted: Tensor, exact: list[Tensor], error: float
) -> None:
    """Values and gradients, as relative errors of whole tensors."""
    assert found.shape == wanted.shape
    upstream = drawn(*wanted.shape, seed=9).to(found.dtype)
    slopes = torch.autograd.grad(found, inputs, upstream)
    truths = torch.autograd.grad(wanted, exact, upstream.double())
    for value, truth in [(found, wanted), *zip(slopes, truths, strict=True)]:
        assert value.shape == truth.shape
        assert (value.double() - truth).norm() < error * truth.norm()


def leaves(*tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors to differentiate, and the same in float64 for the formula."""
    ours = [x.detach().requires_grad_() for x in tensors]
    return ours, [x.detach().double().requires_grad_() for x in tensors]


@pytest.mark.parametrize("rows", [1, BATCH])
@pytest.mark.parametrize(
    ("dtype", "out"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
)
def test_the_modulated_norm_is_its_formula(rows: int, dtype: torch.dtype, out: torch.dtype) -> None:
    ours, exact = leaves(
        drawn(BATCH, LENGTH, WIDTH, dtype=dtype),
        drawn(rows, WIDTH, seed=2, dtype=dtype),
        drawn(rows, WIDTH, seed=3, dtype=dtype),
    )
    found = modulated_rms(*ours, EPSILON, out)
    assert found.dtype == out
    x, weight, bias = exact
    normed = x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt()
    wanted = normed * weight[:, None] + bias[:, None]
    assert_equal_with_gradients(found, ours, wanted, exact, 3 * ROUNDING[out])


def test_the_modulated_norm_without_epsilon_in_its_formula_would_be_seen() -> None:
    x, one = drawn(1, 4, WIDTH), torch.ones(1, WIDTH, dtype=torch.float64)
    found = modulated_rms(x, one, 0 * one, EPSILON, torch.float64)
    assert (found - F.rms_norm(x, (WIDTH,))).norm() > 100 * ROUNDING[torch.float32] * found.norm()


def test_a_row_of_zeros_stays_finite() -> None:
    x = torch.zeros(1, 2, WIDTH, requires_grad=True)
    y = modulated_rms(x, torch.ones(1, WIDTH), torch.ones(1, WIDTH), 1e-5, torch.float32)
    assert torch.equal(y, torch.ones(1, 2, WIDTH))
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert slope.isfinite().all()


@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_gated_unit_is_its_formula(dtype: torch.dtype) -> None:
    ours, exact = leaves(2.0 * drawn(BATCH, LENGTH, 2 * WIDTH, dtype=dtype))
    gate, up = exact[0].chunk(2, -1)
    found, wanted = swiglu(ours[0]), gate * gate.sigmoid() * up
    assert found.dtype == dtype
    assert_equal_with_gradients(found, ours, wanted, exact, 3 * ROUNDING[dtype])


@pytest.mark.parametrize("dtype", ROUNDING)
def test_turning_is_its_formula_and_puts_heads_first(dtype: torch.dtype) -> None:
    heads, size = 3, 8
    # Rows as a projection of queries, keys and values leaves them: with gaps between.
    wide, exact = leaves(drawn(BATCH, LENGTH, heads + 2, size, dtype=dtype))
    cos, sin = (table.double() for table in Rotary(size, 100.0).tables(LENGTH))
    found = turned(wide[0][:, :, :heads], cos, sin)
    assert found.dtype == dtype and found.is_contiguous()
    x = exact[0][:, :, :heads].transpose(1, 2)
    first, second = x.chunk(2, -1)
    wanted = x * cos + torch.cat((-second, first), -1) * sin
    assert_equal_with_gradients(found, wide, wanted, exact, 3 * ROUNDING[dtype])


def test_products_are_in_autocasts_format_or_in_their_own() -> None:
    assert product_dtype(torch.zeros(1)) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert product_dtype(torch.zeros(1)) == torch.bfloat16
