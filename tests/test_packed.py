"""Weights in few bits: what rounding costs, and that files come back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fsdfm.core.errors import CheckpointError, ConfigError
from fsdfm.core.packed import GROUP, Packed, best_levels, even_levels, pack, packable, unpack
from fsdfm.model.config import ModelConfig
from fsdfm.model.io.pretrained import load_pretrained, save_pretrained
from fsdfm.model.transformer import Transformer
from fsdfm.text.tokenizer import train_bpe

TOKENIZER = train_bpe(["a few words, and a few more"], 300)
CONFIG = ModelConfig(TOKENIZER.vocab_size, 64, blocks=2, heads=2, cond_size=64, context_length=32)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", range(3, 9))
def test_a_weight_comes_back_as_the_nearest_level_of_its_scale(bits: int) -> None:
    weight = normal(96, 128)
    packed = pack(weight, bits)
    assert packed.codes.numel() * 8 == weight.numel() * bits
    back = unpack(packed, bits, (96, 128)).view(-1, GROUP, 1)
    places = packed.scales.float()[:, None, None] * packed.levels
    nearest = (weight.view(-1, GROUP, 1) - places).abs().amin(-1, keepdim=True)
    torch.testing.assert_close((weight.view(-1, GROUP, 1) - back).abs(), nearest)


@pytest.mark.parametrize("bits", range(3, 9))
def test_levels_lose_less_of_normal_numbers_than_even_ones(bits: int) -> None:
    levels = best_levels(bits)
    assert levels.shape == (2**bits,) and (levels.diff() > 0).all()
    assert levels[0] == -1.0 and levels[-1] == 1.0 and (levels == 0.0).sum() == 1
    weight = normal(96, 128)
    error = float((unpack(pack(weight, bits), bits, (96, 128)) - weight).norm())
    # As before: whole numbers, the best of some scales.
    top, groups = 2 ** (bits - 1) - 1, weight.view(-1, GROUP)
    tried = []
    for part in (1.0 - 0.04 * k for k in range(9)):
        scale = part * groups.abs().amax(1, keepdim=True) / top
        codes = (groups / scale).round().clamp(-top, top)
        tried.append((codes * scale - groups).square().sum(1))
    assert error < (0.9 if bits <= 6 else 1.0) * float(torch.stack(tried).amin(0).sum().sqrt())


@pytest.mark.parametrize("bits", [3, 5, 8])
def test_what_is_on_the_levels_is_kept_exactly(bits: int) -> None:
    codes = torch.arange(64 * GROUP).remainder(2**bits).view(64, GROUP)
    codes[:, 0] = 2**bits - 1  # the largest of its group, so that the scale is found
    weight = best_levels(bits)[codes] * 0.25
    assert torch.equal(unpack(pack(weight, bits), bits, (64, GROUP)), weight)


@pytest.mark.parametrize("size", [1.0, 1e-3])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_what_comes_back_is_near_and_comes_back_again(bits: int, size: float) -> None:
    weight, shape = size * normal(4200, 128), (4200, 128)  # more groups than are rounded at once
    back = unpack(pack(weight, bits), bits, shape)
    assert float((back - weight).norm() / weight.norm()) < 1.4 * 0.1 * 2.0 ** (4 - bits)
    assert torch.equal(unpack(pack(back, bits), bits, shape), back)


def test_zeros_and_outliers_stay_finite() -> None:
    weight = torch.zeros(64, GROUP)
    weight[3, 5] = 60_000.0
    back = unpack(pack(weight, 4), 4, (64, GROUP))
    assert back.isfinite().all() and torch.equal(back[0], weight[0])
    assert back[3, 5] == pytest.approx(60_000.0, rel=0.01)


def test_small_and_uneven_tensors_are_left_alone() -> None:
    assert packable(normal(64, 64))
    assert not packable(normal(63, 64)) and not packable(normal(64 * 64))
    assert not packable(normal(101, 101))


def test_codes_that_do_not_fill_the_shape_are_refused() -> None:
    packed = pack(normal(64, 64), 5)
    with pytest.raises(ValueError, match="do not fill"):
        unpack(packed, 6, (64, 64))
    with pytest.raises(ValueError, match="do not fill"):
        unpack(Packed(packed.codes, packed.scales[:-1], packed.levels), 5, (64, 64))
    with pytest.raises(ValueError, match="do not fill"):
        unpack(Packed(packed.codes, packed.scales, packed.levels[:-1]), 5, (64, 64))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_in_few_bits_loads_as_any_other(tmp_path: Path, bits: int) -> None:
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    save_pretrained(tmp_path, model, tokenizer_json=TOKENIZER.to_json(), bits={"": bits})
    assert json.loads((tmp_path / "config.json").read_text())["format_version"] == 3
    loaded = load_pretrained(tmp_path).model
    assert loaded.config == CONFIG
    for name, weight in model.state_dict().items():
        back = loaded.state_dict()[name]
        worst = 0.13 if bits == 4 else 0.01
        assert (back - weight).norm() <= worst * weight.norm() + 1e-7
    size = (tmp_path / "model.safetensors").stat().st_size
    numbers = sum(p.numel() for p in model.parameters())
    assert size < numbers * (bits + 0.25) / 8 * 1.25
    # Saved again as it is, it is the same model to the bit.
    save_pretrained(tmp_path / "again", loaded, tokenizer_json=TOKENIZER.to_json())
    again = load_pretrained(tmp_path / "again").model
    pairs = zip(again.parameters(), loaded.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_codes_of_version_2_are_whole_numbers(tmp_path: Path) -> None:
    save_pretrained(tmp_path, Transformer(CONFIG), tokenizer_json=TOKENIZER.to_json(), bits={"": 4})
    config, path = tmp_path / "config.json", tmp_path / "model.safetensors"
    config.write_text(config.read_text().replace('"format_version": 3', '"format_version": 2'))
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del metadata["levels"]
    save_file(tensors, path, metadata)
    name = "blocks.0.attn_out.weight"
    codes, scales = tensors[f"{name}.codes"], tensors[f"{name}.scales"].float()
    halves = torch.stack((codes & 15, codes >> 4), 1).view(-1, GROUP)  # eight codes, lowest first
    found = load_pretrained(tmp_path).model.state_dict()[name]
    assert torch.equal(found, ((halves.float() - 7.0) * scales[:, None]).view(found.shape))
    assert even_levels(4).tolist() == list(range(-7, 9))


def test_only_what_is_named_is_packed(tmp_path: Path) -> None:
    model = Transformer(CONFIG)
    bits = {"vocab_embed": 8, "blocks": 4}
    save_pretrained(tmp_path, model, tokenizer_json=TOKENIZER.to_json(), bits=bits)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        packed = json.loads(file.metadata()["packed"])
        assert file.get_tensor("output_layer.linear.weight").dtype == torch.float16
    assert {name.partition(".")[0]: facts["bits"] for name, facts in packed.items()} == bits


def test_bits_out_of_range_and_damaged_files_are_one_line(tmp_path: Path) -> None:
    model = Transformer(CONFIG)
    with pytest.raises(ConfigError, match="bits must be from 3 to 8, got 2 for blocks"):
        save_pretrained(tmp_path, model, tokenizer_json=TOKENIZER.to_json(), bits={"blocks": 2})
    save_pretrained(tmp_path, model, tokenizer_json=TOKENIZER.to_json(), bits={"": 4})
    path = tmp_path / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = next(n for n in tensors if n.endswith(".codes"))
    save_file({**tensors, name: tensors[name][:-1].clone()}, path, metadata)
    with pytest.raises(CheckpointError, match=r"truncated or corrupt: \d+ bytes do not fill"):
        load_pretrained(tmp_path)
    save_file({n: t for n, t in tensors.items() if n != name}, path, metadata)
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        load_pretrained(tmp_path)
    facts = {"bits": 4, "shape": [8, 8]}
    for wrong in ({"bits": 60}, {"bits": 1e9}, {"shape": [-64, -64]}, {"shape": "x"}):
        packed = {n.removesuffix(".codes"): facts | wrong for n in tensors if n.endswith(".codes")}
        save_file(tensors, path, metadata | {"packed": json.dumps(packed)})
        with pytest.raises(CheckpointError, match="truncated or corrupt"):
            load_pretrained(tmp_path)
    save_file(tensors, path, metadata | {"levels": "[" * 10_000})
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        load_pretrained(tmp_path)
