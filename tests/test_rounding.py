"""Rounding by a matrix's inputs: it loses less of the products, and a reader cannot tell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Run
from torch import Tensor

from fsdfm.core.errors import ConfigError
from fsdfm.core.packed import GROUP, bits_of, pack, unpack
from fsdfm.model.causal import CausalConfig, CausalNetwork
from fsdfm.model.config import ModelConfig
from fsdfm.model.io.pretrained import load_pretrained, save_pretrained
from fsdfm.model.rounding import Example, calibrated, compensated
from fsdfm.model.transformer import FlowNetwork, Transformer
from fsdfm.recipes.calibration import examples
from fsdfm.recipes.quantizing import parsed_bits
from fsdfm.text.packing import prepare
from fsdfm.text.settings import PrepareSettings
from fsdfm.text.store import TokenStore
from fsdfm.text.tokenizer import train_bpe

TOKENIZER = train_bpe(["a few words, and a few more"], 300)
TWIN = CausalConfig(
    vocab_size=TOKENIZER.vocab_size,
    hidden_size=64,
    blocks=2,
    heads=4,
    cond_size=64,
    context_length=32,
    source="mask",
    neighbours=2,
    kv_heads=2,
    head_size=16,
    mlp_size=128,
    start_id=0,
)
PUBLISHED = ModelConfig(TOKENIZER.vocab_size, 64, blocks=2, heads=4, cond_size=64)
BITS = {"vocab_embed": 6, "output_layer": 6, "joint": 4, "blocks": 4}


def correlated(rows: int, columns: int, rank: int = 12) -> Tensor:
    """Inputs that live near a few directions, as activations do."""
    draw = torch.Generator().manual_seed(1)
    parts = torch.randn(rows, rank, generator=draw) @ torch.randn(rank, columns, generator=draw)
    return parts + 0.3 * torch.randn(rows, columns, generator=draw)


def random_weight(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))


def lost(weight: Tensor, rounded: Tensor, x: Tensor) -> float:
    """Of the products, as a part of them."""
    return float(((rounded - weight) @ x.T).square().sum() / (weight @ x.T).square().sum())


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_products_lose_less_than_half_of_what_plain_rounding_loses(bits: int) -> None:
    weight, x = random_weight(48, 192), correlated(600, 192)
    gram = x[:400].T @ x[:400]
    plain = unpack(pack(weight, bits), bits, (48, 192))
    ours = unpack(compensated(weight, gram, bits), bits, (48, 192))
    for some in (x[:400], x[400:]):  # those it looked at, and others of the same law
        assert lost(weight, ours, some) < 0.5 * lost(weight, plain, some)


def test_nothing_is_made_up_for_where_inputs_have_nothing_in_common() -> None:
    weight = random_weight(48, 128)
    packed = compensated(weight, torch.eye(128), 4)
    assert torch.equal(unpack(packed, 4, (48, 128)), unpack(pack(weight, 4), 4, (48, 128)))


def test_the_size_of_inputs_does_not_matter_and_dead_ones_do_no_harm() -> None:
    weight, x = random_weight(48, 128), correlated(300, 128)
    x[:, 5] = 0.0
    gram = x.T @ x
    one, other = (compensated(weight, gram * by, 4) for by in (1.0, 1024.0))
    assert torch.equal(one.codes, other.codes) and torch.equal(one.scales, other.scales)
    dead = compensated(weight, torch.zeros(128, 128), 4)
    assert torch.equal(dead.codes, pack(weight, 4).codes)


def network(config: ModelConfig) -> FlowNetwork:
    torch.manual_seed(0)
    model = (CausalNetwork if isinstance(config, CausalConfig) else Transformer)(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    draw = torch.Generator().manual_seed(3)
    words = [f"word{int(i)}" for i in torch.randint(50, (6000,), generator=draw)]
    (folder / "text.txt").write_text(" ".join(words))
    out = folder / "prepared"
    prepare([folder / "text.txt"], out, settings=PrepareSettings(), tokenizer=TOKENIZER)
    return out


def test_a_language_model_is_not_shown_masks(data: Path) -> None:
    with pytest.raises(ConfigError, match="only flow models are pruned or calibrated"):
        examples(TokenStore.open(data).train, replace(TWIN, attention="causal", neighbours=0))


def few(data: Path, config: ModelConfig) -> list[Example]:
    return examples(TokenStore.open(data).train, replace(config, context_length=32), 64)


@pytest.mark.parametrize("config", [TWIN, replace(TWIN, tied=False), PUBLISHED])
def test_a_rounded_network_is_what_is_stored_and_nearer_to_the_exact_one(
    config: ModelConfig, data: Path, tmp_path: Path
) -> None:
    model, batches = network(config), few(data, config)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    packed = calibrated(model, batches, BITS)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), "the network stays as it is"
        assert (name in packed) == (bits_of(name, weight, BITS) is not None)
    text = TOKENIZER.to_json()
    save_pretrained(tmp_path / "plain", model, tokenizer_json=text, bits=BITS)
    save_pretrained(tmp_path / "ours", model, tokenizer_json=text, bits=BITS, packed=packed)
    plain, ours = (load_pretrained(tmp_path / name).model for name in ("plain", "ours"))
    for name, weight in ours.state_dict().items():
        bits = bits_of(name, weight, BITS)
        if bits is not None:
            assert torch.equal(weight, unpack(packed[name], bits, tuple(weight.shape)))
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("plain", "ours")]
    assert sizes[0] == sizes[1]

    def distance(other: FlowNetwork) -> float:
        """Of the logits at the rows that count."""
        with torch.no_grad():
            rows = [
                (other(e.x_t, e.t.float(), e.t.float()) - model(e.x_t, e.t.float(), e.t.float()))
                .flatten(0, 1)[e.rows]
                .square()
                .sum()
                for e in batches
            ]
        return float(torch.stack(rows).sum())

    assert distance(ours) < 0.7 * distance(plain)


def test_the_joint_head_is_rounded_by_what_it_is_told(data: Path) -> None:
    model, batches = network(TWIN), few(data, TWIN)
    bits = {"joint": 3}
    ours, exact = network(TWIN), []
    packed = calibrated(model, batches, bits)
    assert set(packed) == {f"joint.{part}.weight" for part in ("tokens", "row", "out")}
    plain = network(TWIN)
    for name, weight in packed.items():
        shape = tuple(model.state_dict()[name].shape)
        ours.state_dict()[name].copy_(unpack(weight, 3, shape))
        plain.state_dict()[name].copy_(unpack(pack(model.state_dict()[name], 3), 3, shape))
    with torch.no_grad():
        for e in batches:
            at = (~e.known).flatten().nonzero()[:, 0]
            rows = model.body(e.x_t, e.t.float(), e.t.float()).flatten(0, 1)[at]
            told = [net.told(rows, at, e.x_1, e.known) for net in (model, plain, ours)]
            exact.append([float((t - told[0]).square().sum()) for t in told[1:]])
    far = torch.tensor(exact).sum(0)
    assert far[1] < 0.8 * far[0]


def test_examples_are_those_of_training(data: Path) -> None:
    batches = few(data, TWIN)
    mask = TWIN.vocab_size
    assert [len(batch.x_1) for batch in batches] == [8] * 8
    for batch in batches:
        masked = batch.x_t == mask
        assert torch.equal(batch.x_t[~masked], batch.x_1[~masked])
        assert torch.equal(masked.flatten().nonzero()[:, 0], batch.rows)
        assert not (masked & batch.known).all() and batch.known[~masked].all()
    t = torch.cat([batch.t for batch in batches])
    assert abs(float(t.mean()) - 0.5) < 0.05 and float(t.min()) < 0.05 and float(t.max()) > 0.95


def test_inputs_that_are_not_finite_and_no_examples_are_one_line(data: Path) -> None:
    model, batches = network(TWIN), few(data, TWIN)
    with pytest.raises(ConfigError, match="at least one example"):
        calibrated(model, [], BITS)
    with torch.no_grad():
        model.blocks[1].norm2.weight[3] = torch.nan
    with pytest.raises(ConfigError, match=r"inputs of \S+ that are not finite"):
        calibrated(model, batches, BITS)


def saved(where: Path, config: ModelConfig = TWIN) -> Path:
    save_pretrained(
        where,
        network(config),
        tokenizer_json=TOKENIZER.to_json(),
        generation={"steps": 4, "temperature": 0.7},
        ancestors=["SmolLM2-135M"],
    )
    return where


def test_the_command_saves_a_calibrated_model(data: Path, tmp_path: Path, run: Run) -> None:
    model, out = saved(tmp_path / "model"), tmp_path / "out"
    code, said, err = run("quantize", model, out, "--bits", "blocks=4", "--data", data)
    assert code == 0 and "parameters in 0." in said and "ETA" in err
    found = load_pretrained(out)
    assert found.generation == {"steps": 4, "temperature": 0.7}
    assert found.ancestors == ("SmolLM2-135M",)
    ours, exact = found.model.blocks[1].mlp_in.weight, network(TWIN).blocks[1].mlp_in.weight
    nearest = unpack(pack(exact, 4), 4, tuple(exact.shape))
    assert not torch.equal(ours, nearest)
    assert float((ours - exact).norm() / exact.norm()) < 0.3
    assert run("quantize", model, tmp_path / "plain", "--bits", "blocks=4")[0] == 0
    plain = load_pretrained(tmp_path / "plain").model
    assert torch.equal(plain.blocks[1].mlp_in.weight, nearest)
    assert run("generate", "--model", out, "--length", 8)[0] == 0


def test_bits_are_by_the_longest_name_and_a_number_alone_is_for_the_rest() -> None:
    assert list(parsed_bits(["6", "blocks=4", "blocks.1.=8"]).items()) == [
        ("blocks.1.", 8),
        ("blocks", 4),
        ("", 6),
    ]


def test_the_command_refuses_in_one_line(data: Path, tmp_path: Path, run: Run) -> None:
    model, out = saved(tmp_path / "model"), tmp_path / "out"
    other = tmp_path / "other"
    text = train_bpe(["other words"], 290).to_json()
    save_pretrained(other, network(replace(TWIN, vocab_size=290)), tokenizer_json=text)
    plain = tmp_path / "plain"  # without a joint head
    save_pretrained(plain, network(replace(TWIN, neighbours=0)), tokenizer_json=text)
    (going := tmp_path / "run").mkdir()
    (going / "run.json").write_text("{}")
    for argv, what in (
        ((model, model), "is the model itself"),
        ((model, out, "--bits", "blocks"), "--bits must be like blocks=4, from 3 to 8"),
        ((model, out, "--bits", "blocks=9"), "got 'blocks=9'"),
        ((model, out, "--bits", "bricks=4"), "names begin with vocab_embed, "),
        ((plain, out, "--bits", "joint=4"), "joint=4 means no matrix"),
        ((model, out, "--bits", "blocks=4", "vocab_emebd=6"), "vocab_emebd=6 means no matrix"),
        ((model, out, "--data", tmp_path / "none"), "manifest.json is missing"),
        ((other, out, "--data", data), "have different tokenizers"),
        ((model, going, "--data", data), "is the directory of a run"),
        ((model, going), "is the directory of a run"),
        ((tmp_path / "none", out), str(tmp_path / "none")),
    ):
        code, said, err = run("quantize", *argv)
        assert (code, said) == (2, "") and what in err and err.count("\n") == 1, err
    assert not out.exists()


def test_groups_do_not_span_rows_that_are_looked_at() -> None:
    assert all(size % GROUP == 0 for size in (TWIN.hidden_size, TWIN.mlp_size))
