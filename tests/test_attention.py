"""Attention is attention, whichever way it is computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fsdfm.model import attention
from fsdfm.model.attention import attend


def inputs(batch: int, asking: int, dtype: torch.dtype) -> list[Tensor]:
    """q, and k and v of 50 positions; the heads lie side by side, as projections leave them."""
    draw = torch.Generator().manual_seed(4)
    return [
        torch.randn((batch, length, 3, 16), generator=draw).to(dtype).transpose(1, 2)
        for length in (asking, 50, 50)
    ]


@pytest.mark.parametrize("scores_at_once", [1, 2 * 29 * 50, 2**21])
@pytest.mark.parametrize(("batch", "asking"), [(1, 29), (2, 29), (2, 50)])
@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float32, 20)])
def test_values_and_gradients_are_those_of_the_formula(
    scores_at_once: int,
    batch: int,
    asking: int,
    dtype: torch.dtype,
    bits: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", scores_at_once)
    ours = [x.requires_grad_() for x in inputs(batch, asking, dtype)]
    exact = [x.detach().double().requires_grad_() for x in ours]
    q, k, v = exact
    wanted = ((q @ k.transpose(2, 3) / 4.0).softmax(-1) @ v).transpose(1, 2).flatten(2)
    found = attend(*ours)
    assert found.shape == (batch, asking, 48) and found.dtype == dtype
    upstream = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(6)).to(dtype)
    pairs = [(found, wanted)]
    slopes = torch.autograd.grad(found, ours, upstream)
    truths = torch.autograd.grad(wanted, exact, upstream.double())
    pairs += zip(slopes, truths, strict=True)
    for value, truth in pairs:
        # A handful of roundings in a row; 2 ** -bits each.
        assert (value.double() - truth).norm() < 3 * 2.0**-bits * truth.norm()


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize(("kv_heads", "asking"), [(1, 50), (3, 13)])
def test_without_gradients_it_is_the_same_with_and_without_amx(
    tiles: bool, kv_heads: int, asking: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_has_tiles", lambda: tiles)
    q, k, v = inputs(2, asking, torch.bfloat16)
    k, v = k[:, :kv_heads], v[:, :kv_heads]
    wanted = attend(q.double(), k.double(), v.double())
    used: list[int] = []
    products = attention._probabilities
    monkeypatch.setattr(
        attention, "_probabilities", lambda q, k: (used.append(1), products(q, k))[1]
    )
    with torch.no_grad():
        found = attend(q, k, v)
    assert bool(used) != tiles
    assert found.shape == (2, asking, 48) and found.dtype == torch.bfloat16
    assert (found.double() - wanted).norm() < 3 * 2.0**-8 * wanted.norm()


def test_bfloat16_errs_about_as_much_as_pytorchs_own() -> None:
    ours = inputs(2, 50, torch.bfloat16)
    exact = F.scaled_dot_product_attention(*(x.double() for x in ours)).transpose(1, 2).flatten(2)
    usual = F.scaled_dot_product_attention(*ours).transpose(1, 2).flatten(2)
    error, usual_error = ((y.double() - exact).norm() for y in (attend(*ours), usual))
    assert error < 2.0 * usual_error


def test_probabilities_are_made_a_few_heads_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", 2 * 50 * 50)
    shapes: list[tuple[int, ...]] = []
    probabilities = attention._probabilities

    def watched(q: Tensor, k: Tensor) -> Tensor:
        shapes.append((len(q), q.shape[1], k.shape[1]))
        return probabilities(q, k)

    monkeypatch.setattr(attention, "_probabilities", watched)
    attend(*inputs(1, 50, torch.bfloat16))
    assert shapes == [(2, 50, 50), (1, 50, 50)]


@pytest.mark.parametrize("scores_at_once", [1, 2**21])
@pytest.mark.parametrize(("kv_heads", "asking"), [(1, 50), (2, 50), (2, 13), (6, 13)])
@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float32, 20)])
def test_heads_that_share_keys_are_heads_whose_keys_are_repeated(
    scores_at_once: int,
    kv_heads: int,
    asking: int,
    dtype: torch.dtype,
    bits: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", scores_at_once)
    for causal in (False, True) if asking == 50 else (False,):
        draw = torch.Generator().manual_seed(5)
        ours = [
            torch.randn((2, length, heads, 16), generator=draw).to(dtype).transpose(1, 2)
            for length, heads in ((asking, 6), (50, kv_heads), (50, kv_heads))
        ]
        ours = [x.requires_grad_() for x in ours]
        exact = [x.detach().double().requires_grad_() for x in ours]
        q, k, v = exact[0], *(x.repeat_interleave(6 // kv_heads, 1) for x in exact[1:])
        scores = q @ k.transpose(2, 3) / 4.0
        if causal:
            later = torch.ones(50, 50, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        wanted = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        found = attend(*ours, causal=causal)
        assert found.shape == (2, asking, 96) and found.dtype == dtype
        upstream = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(6)).to(dtype)
        slopes = torch.autograd.grad(found, ours, upstream)
        truths = torch.autograd.grad(wanted, exact, upstream.double())
        for value, truth in [(found, wanted), *zip(slopes, truths, strict=True)]:
            assert value.shape == truth.shape
            assert (value.double() - truth).norm() < 3 * 2.0**-bits * truth.norm()
