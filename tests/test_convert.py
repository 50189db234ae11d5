"""Truths of the converter: published files give published logits; others are refused by name."""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fsdfm.core.errors import CheckpointError, ConfigError, FsdfmError
from fsdfm.model.config import ModelConfig
from fsdfm.model.io.convert import GENERATION, convert_published, infer_config
from fsdfm.model.io.pretrained import load_pretrained

PUBLISHED = Path(__file__).parent / "fixtures" / "published"
DFM, FSDFM, MASK = (
    PUBLISHED / f"{name}.pth" for name in ("dfm_uniform", "fsdfm_uniform", "fsdfm_mask")
)
NETWORKS = [
    # name in expected.safetensors, file, weights, source, step embedding
    ("dfm_uniform", DFM, "model", "uniform", "none"),
    ("fsdfm_uniform.student", FSDFM, "student", "uniform", "raw"),
    ("fsdfm_uniform.student_ema", FSDFM, "student_ema", "uniform", "raw"),
    ("fsdfm_uniform.teacher", FSDFM, "teacher", "uniform", "none"),
    ("fsdfm_mask.student", MASK, "student", "mask", "raw"),
]


def tokenizer_json(size: int = 97) -> str:
    vocab = {f"w{i}": i for i in range(size)}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}
    return json.dumps({"version": "1.0", "added_tokens": [], "model": model})


def expected_of(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = load_file(PUBLISHED / "expected.safetensors")
    x_t, t, h, logits = (tensors[f"{name}.{key}"] for key in ("x_t", "t", "h", "logits"))
    return x_t, t, h, logits


@torch.no_grad()
def assert_gives(directory: Path, name: str, atol: float = 1e-5) -> None:
    x_t, t, h, logits = expected_of(name)
    found = load_pretrained(directory).model(x_t, t, h)
    torch.testing.assert_close(found, logits, rtol=0.0, atol=atol)


def state() -> dict[str, Tensor]:
    """The tensors of the mask student, to tamper with."""
    return dict(torch.load(MASK, weights_only=True)["student_model"])


def refused(path: Path, out: Path, kind: type[FsdfmError], *said: str, **options: Any) -> None:
    """Converting gives one line that says all this, and writes nothing."""
    with pytest.raises(kind) as caught:
        convert_published(path, out, **{"tokenizer_json": tokenizer_json(), **options})
    message = str(caught.value)
    assert "\n" not in message
    for text in said:
        assert text in message, message
    assert not out.exists()


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network[0])
def test_converted_network_gives_the_published_logits(
    tmp_path: Path, network: tuple[str, Path, str, Any, Any]
) -> None:
    name, path, weights, source, step_embedding = network
    config = convert_published(path, tmp_path, weights=weights, tokenizer_json=tokenizer_json())
    assert config == ModelConfig(
        vocab_size=97,
        hidden_size=64,
        blocks=2,
        heads=4,
        cond_size=16,
        context_length=1024,
        source=source,
        step_embedding=step_embedding,
    )
    back = load_pretrained(tmp_path)
    assert back.model.config == config
    assert back.tokenizer_json == tokenizer_json()
    assert back.generation == GENERATION
    assert_gives(tmp_path, name)


@pytest.mark.parametrize("what", ["model", "run", "file", "link"])
def test_what_is_there_already_is_left_alone(tmp_path: Path, what: str) -> None:
    out, file = tmp_path / "out", tmp_path / "kept" / "run.json"
    file.parent.mkdir()
    file.write_text("years of work")
    if what == "model":
        convert_published(DFM, out, tokenizer_json=tokenizer_json())
    elif what == "file":
        out.write_text("years of work")
    elif what == "link":
        out.symlink_to(file.parent)
    else:
        file.parent.rename(out)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError) as caught:
        convert_published(MASK, out, tokenizer_json=tokenizer_json())
    assert str(caught.value).startswith(f"{out} exists already: choose another")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("path", "best"),
    [(DFM, "dfm_uniform"), (FSDFM, "fsdfm_uniform.student_ema"), (MASK, "fsdfm_mask.student")],
    ids=["dfm", "fsdfm", "mask"],
)
def test_best_network_of_the_file_is_the_default(tmp_path: Path, path: Path, best: str) -> None:
    convert_published(path, tmp_path, tokenizer_json=tokenizer_json())
    assert_gives(tmp_path, best)


def test_options_reach_the_directory(tmp_path: Path) -> None:
    convert_published(
        DFM,
        tmp_path,
        tokenizer_json=tokenizer_json(),
        context_length=40,
        generation={"step": "published"},
    )
    back = load_pretrained(tmp_path)
    assert back.model.config.context_length == 40
    assert back.generation == {"step": "published"}


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrapped_names_are_unwrapped(tmp_path: Path, wrapper: str) -> None:
    wrapped = {wrapper + name: tensor for name, tensor in state().items()}
    torch.save({"student_model": wrapped}, tmp_path / "wrapped.pth")
    convert_published(tmp_path / "wrapped.pth", tmp_path / "out", tokenizer_json=tokenizer_json())
    assert_gives(tmp_path / "out", "fsdfm_mask.student")


def test_bfloat16_tensors_become_float32(tmp_path: Path) -> None:
    half = {name: tensor.bfloat16() for name, tensor in state().items()}
    torch.save({"student_model": half}, tmp_path / "half.pth")
    convert_published(tmp_path / "half.pth", tmp_path / "out", tokenizer_json=tokenizer_json())
    back = load_pretrained(tmp_path / "out").model.state_dict()
    assert {tensor.dtype for tensor in back.values()} == {torch.float32}
    assert all(torch.equal(back[name], half[name].float()) for name in back)


def test_old_pickle_files_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({"student_model": state()}, path, _use_new_zipfile_serialization=False)
    convert_published(path, tmp_path / "out", tokenizer_json=tokenizer_json())
    assert_gives(tmp_path / "out", "fsdfm_mask.student")


def test_weights_that_the_file_lacks_are_answered_with_those_it_holds(tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(DFM, out, ConfigError, "no weights 'student'", "holds model", weights="student")
    refused(FSDFM, out, ConfigError, "holds student_ema, student, teacher", weights="best")


@pytest.mark.parametrize("size", [95, 98, 50_257])
def test_tokenizer_of_the_wrong_size_is_explained(tmp_path: Path, size: int) -> None:
    said = ("97 embedding rows", f"{size} ids", f"{size + 1}")
    refused(DFM, tmp_path / "out", ConfigError, *said, tokenizer_json=tokenizer_json(size))


def test_one_row_more_than_ids_is_a_mask_source(tmp_path: Path) -> None:
    config = convert_published(DFM, tmp_path, tokenizer_json=tokenizer_json(96))
    assert (config.source, config.vocab_size) == ("mask", 96)


def test_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    said = "The tokenizer is not a tokenizer"
    refused(DFM, tmp_path / "out", CheckpointError, said, tokenizer_json="{}")


@pytest.mark.parametrize(
    "name",
    [
        "vocab_embed.weight",
        "time_embedding.mlp.2.weight",
        "time_embedding.mlp.2.bias",
        "blocks.0.qw.weight",
        "blocks.1.condition_fuser.bias",
        "time_condition_fuser.weight",
        "output_layer.linear.bias",
    ],
)
def test_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    tensors = state()
    del tensors[name]
    torch.save({"student_model": tensors}, tmp_path / "bad.pth")
    refused(tmp_path / "bad.pth", tmp_path / "out", CheckpointError, f"missing {name}", "(student)")


def test_extra_and_misshaped_tensors_are_named_together(tmp_path: Path) -> None:
    tensors = state()
    tensors["blocks.0.gate.weight"] = torch.zeros(3)
    tensors["blocks.1.kw.weight"] = torch.zeros(64, 63)
    tensors["output_layer.linear.weight"] = torch.zeros(97, 64)
    torch.save({"student_model": tensors}, tmp_path / "bad.pth")
    refused(
        tmp_path / "bad.pth",
        tmp_path / "out",
        CheckpointError,
        "unknown blocks.0.gate.weight",
        "blocks.1.kw.weight [64, 63] for [64, 64]",
        "output_layer.linear.weight [97, 64] for [98, 64]",
    )


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("vocab_embed.weight", torch.zeros(98), "mis-shaped vocab_embed.weight [98]"),
        ("rotary_emb.inv_freq", torch.zeros(7), "7 rotary frequencies do not divide"),
        ("rotary_emb.inv_freq", torch.zeros(0), "0 rotary frequencies do not divide"),
        ("rotary_emb.inv_freq", 5e5 ** (-torch.arange(8) / 8), "another base than 10,000"),
        ("blocks.0.qw.weight", torch.full((64, 64), torch.nan), "not finite in blocks.0.qw"),
        ("blocks.0.qw.weight", 3, "no tensors: blocks.0.qw.weight"),
        ("blocks.0.qw.weight", torch.eye(12).to_sparse(), "qw.weight is no plain tensor of"),
        ("blocks.0.qw.weight", torch.eye(12).bool(), "qw.weight is no plain tensor of floating"),
    ],
)
def test_tensor_that_cannot_be_is_named(tmp_path: Path, name: str, tensor: Any, said: str) -> None:
    torch.save({"student_model": {**state(), name: tensor}}, tmp_path / "bad.pth")
    refused(tmp_path / "bad.pth", tmp_path / "out", CheckpointError, said)


def test_network_without_blocks_is_refused(tmp_path: Path) -> None:
    tensors = {k: v for k, v in state().items() if not k.startswith("blocks.")}
    torch.save({"student_model": tensors}, tmp_path / "bad.pth")
    refused(tmp_path / "bad.pth", tmp_path / "out", CheckpointError, "no tensors of blocks")


class Malicious:
    """Unpickled without care, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
@pytest.mark.parametrize("kind", ["bare", "state_dict", "model_state_dict", "safetensors"])
def test_a_file_with_one_network_needs_no_name_for_it(
    tmp_path: Path, kind: str, prefix: str
) -> None:
    tensors = {prefix + name: tensor.clone() for name, tensor in state().items()}
    path = tmp_path / ("in.safetensors" if kind == "safetensors" else "in.pt")
    if kind == "safetensors":
        save_file(tensors, path)
    elif kind == "bare":
        torch.save(OrderedDict(tensors), path)
    else:
        torch.save({kind: tensors, "epoch": 3, "optimizer": {"lr": 0.1}}, path)
    convert_published(path, tmp_path / "out", tokenizer_json=tokenizer_json())
    assert_gives(tmp_path / "out", "fsdfm_mask.student")
    said = "no weights 'student': it holds one network without a name"
    refused(path, tmp_path / "other", ConfigError, said, weights="student")


def test_a_network_with_a_name_is_preferred_to_one_without(tmp_path: Path) -> None:
    broken = {"vocab_embed.weight": torch.zeros(3)}
    torch.save({"student_model": state(), "state_dict": broken}, tmp_path / "in.pth")
    convert_published(tmp_path / "in.pth", tmp_path / "out", tokenizer_json=tokenizer_json())
    assert_gives(tmp_path / "out", "fsdfm_mask.student")


def test_entries_beside_the_tensors_of_a_bare_state_dict_are_named(tmp_path: Path) -> None:
    torch.save({**state(), "step": 3}, tmp_path / "in.pth")
    said = "in.pth has entries that are no tensors: step."
    refused(tmp_path / "in.pth", tmp_path / "out", CheckpointError, said)


def test_rotary_frequencies_are_computed_where_the_file_lacks_them(tmp_path: Path) -> None:
    tensors = state()
    del tensors["rotary_emb.inv_freq"]
    torch.save({"student_model": tensors}, tmp_path / "in.pth")
    options: Any = {"tokenizer_json": tokenizer_json()}
    convert_published(tmp_path / "in.pth", tmp_path / "out", heads=4, **options)
    assert_gives(tmp_path / "out", "fsdfm_mask.student")
    said = ("(student) has no rotary_emb.inv_freq", "half its width of 64")
    for heads in (None, 0, 5, 64):  # no published network has this shape
        refused(tmp_path / "in.pth", tmp_path / "no", ConfigError, *said, heads=heads)
    refused(MASK, tmp_path / "no", ConfigError, "has 4 heads, not 8", heads=8)


def test_a_published_shape_tells_its_heads() -> None:
    names = "vocab_embed.weight", "time_embedding.mlp.2.weight", "blocks.11.qw.weight"
    tensors = {names[0]: (98, 768), names[1]: (128, 128), names[2]: (768, 768)}
    shapes = {name: torch.zeros(shape, device="meta") for name, shape in tensors.items()}
    assert infer_config(shapes, 97, "x").heads == 12


@pytest.mark.parametrize("data", [b"", b"hello there", b"cut"])
def test_safetensors_that_are_none_are_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "in.safetensors"
    save_file({name: tensor.clone() for name, tensor in state().items()}, path)
    path.write_bytes(path.read_bytes()[:-9] if data == b"cut" else data)
    said = "in.safetensors is truncated, corrupt, or no safetensors file"
    refused(path, tmp_path / "out", CheckpointError, said)


@pytest.mark.parametrize("container", ["zip", "old", "pickle"])
def test_pickle_that_would_run_code_is_refused_and_does_not_run(
    tmp_path: Path, container: str
) -> None:
    trap, path = tmp_path / "trap", tmp_path / "evil.pth"
    data = {"student_model": state(), "step": Malicious(trap)}
    if container == "pickle":
        path.write_bytes(pickle.dumps(data, protocol=2))
    else:
        torch.save(data, path, _use_new_zipfile_serialization=container == "zip")
    refused(path, tmp_path / "out", CheckpointError, "evil.pth")
    assert not trap.exists()
    if container != "pickle":
        refused(path, tmp_path / "out", CheckpointError, "mkdir", "could run code")
        torch.load(path, weights_only=False)
        assert trap.exists(), "the trap works"


@pytest.mark.parametrize("kept", [0, 3, 1000, 200_000])
def test_truncated_file_is_named(tmp_path: Path, kept: int) -> None:
    (tmp_path / "cut.pth").write_bytes(DFM.read_bytes()[:kept])
    refused(tmp_path / "cut.pth", tmp_path / "out", CheckpointError, "cut.pth is truncated")


def test_file_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("hello there")
    refused(tmp_path / "text.pth", tmp_path / "out", CheckpointError, "no PyTorch checkpoint")


def test_missing_file_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "none.pth", tmp_path / "out", CheckpointError, "no file", "none.pth")
    refused(tmp_path, tmp_path / "out", CheckpointError, "no file")


def test_checkpoint_without_networks_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    refused(tmp_path / "other.pth", tmp_path / "out", CheckpointError, "holds no network")
    torch.save({"model": {"conv.weight": torch.zeros(3)}}, tmp_path / "other.pth")
    refused(tmp_path / "other.pth", tmp_path / "out", CheckpointError, "missing vocab_embed.weight")
    torch.save([1, 2], tmp_path / "list.pth")
    refused(tmp_path / "list.pth", tmp_path / "out", CheckpointError, "holds a list")
