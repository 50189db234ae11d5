"""Truths of the model directory: what is saved comes back, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fsdfm.core.errors import CheckpointError, ConfigError
from fsdfm.model.config import ModelConfig
from fsdfm.model.io import directory as directory_of_files
from fsdfm.model.io import pretrained
from fsdfm.model.io.directory import FILES, bundled, resolve
from fsdfm.model.io.pretrained import load_pretrained, save_pretrained
from fsdfm.model.transformer import Transformer

GENERATION = {"step": "exact", "temperature": 0.9, "top_p": 1.0, "steps": 8}


def tokenizer_json(size: int = 11, word: str = "w") -> str:
    vocab = {f"{word}{i}": i for i in range(size)}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": f"{word}0"}
    return json.dumps({"version": "1.0", "added_tokens": [], "model": model})


def network(seed: int = 0, **changes: Any) -> Transformer:
    shape = {"vocab_size": 11, "hidden_size": 16, "blocks": 2, "heads": 2, "cond_size": 8}
    model = Transformer(ModelConfig(**{**shape, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def logits(model: Transformer) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randint(11, (2, 9), generator=generator)
    return model(x_t, torch.tensor([0.3, 0.8]), torch.tensor([0.25, 0.125]))


def save(directory: Path, seed: int = 0, **changes: Any) -> Transformer:
    model = network(seed, **changes)
    save_pretrained(directory, model, tokenizer_json=tokenizer_json(), generation=GENERATION)
    return model


def refused(directory: str | Path, *said: str) -> None:
    """Loading gives one line that says all this."""
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(directory)
    message = str(caught.value)
    assert "\n" not in message
    for text in said:
        assert text in message, message


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("step_embedding", ["none", "raw", "log2"])
@pytest.mark.parametrize("source", ["uniform", "mask"])
def test_what_is_saved_comes_back_bit_for_bit(
    tmp_path: Path, source: Any, step_embedding: Any
) -> None:
    model = save(tmp_path, source=source, step_embedding=step_embedding, context_length=33)
    back = load_pretrained(tmp_path)
    assert back.model.config == model.config
    assert torch.equal(logits(back.model), logits(model))
    assert back.tokenizer_json == tokenizer_json()
    assert back.generation == GENERATION
    assert not back.model.training
    assert all(p.requires_grad and p.is_leaf for p in back.model.parameters())


def test_directory_holds_four_files_and_says_what_it_is(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == sorted(FILES)
    config = json.loads((saved / "config.json").read_text())
    assert config == {"format": "fsdfm", "format_version": 1, **network().config.to_dict()}
    modes = {stat.S_IMODE(p.stat().st_mode) for p in saved.iterdir()}
    assert len(modes) == 1, "all files are as readable as the umask lets them be"


def test_a_model_says_what_it_descends_from(tmp_path: Path) -> None:
    names = ("SmolLM2-135M", "Mistral-7B", "SmolLM2-135M")
    save_pretrained(tmp_path, network(), tokenizer_json=tokenizer_json(), ancestors=names)
    assert json.loads((tmp_path / "config.json").read_text())["ancestors"] == list(names[:2])
    back = load_pretrained(tmp_path)
    assert back.ancestors == names[:2]
    assert back.model.config == network().config


def test_a_directory_that_names_no_ancestor_has_none(saved: Path) -> None:
    assert "ancestors" not in json.loads((saved / "config.json").read_text())
    assert load_pretrained(saved).ancestors == ()


@pytest.mark.parametrize("names", ["SmolLM2-135M", ["a", ""], [1], None])
def test_ancestors_are_names(saved: Path, names: Any) -> None:
    with pytest.raises(ConfigError, match="ancestors must be a sequence of names"):
        save_pretrained(saved, network(), tokenizer_json=tokenizer_json(), ancestors=names)
    edit_config(saved, ancestors=names)
    refused(saved, "config.json", "ancestors must be a list of names")


def test_ancestors_are_not_lost_by_an_edit(tmp_path: Path) -> None:
    save_pretrained(tmp_path, network(), tokenizer_json=tokenizer_json(), ancestors=["a"])
    edit_config(tmp_path, ancestors=[])
    refused(tmp_path, "config.json and model.safetensors", "different models")


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.float16, 10), (torch.bfloat16, 7)], ids=["float16", "bfloat16"]
)
def test_half_precision_on_disk_is_float32_in_memory(
    tmp_path: Path, dtype: torch.dtype, bits: int
) -> None:
    model = network()
    save_pretrained(tmp_path, model, tokenizer_json=tokenizer_json(), dtype=dtype)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    back = load_pretrained(tmp_path).model.state_dict()
    for name, tensor in model.state_dict().items():
        assert back[name].dtype == torch.float32
        # Rounding to nearest; the absolute part is for float16 numbers below its normal range.
        torch.testing.assert_close(back[name], tensor, rtol=2.0 ** -(bits + 1), atol=2.0**-25)


def test_loading_draws_no_random_numbers(saved: Path) -> None:
    before = torch.get_rng_state()
    load_pretrained(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_loaded_weights_outlive_their_file(saved: Path) -> None:
    back = load_pretrained(saved).model
    before = logits(back)
    (saved / "model.safetensors").write_bytes(b"")
    assert torch.equal(logits(back), before)


def test_loaded_network_handles_longer_sequences_than_it_was_saved_with(saved: Path) -> None:
    x_t = torch.zeros(1, 50, dtype=torch.int64)
    half = torch.tensor([0.5])
    assert torch.equal(load_pretrained(saved).model(x_t, half, half), network()(x_t, half, half))


def test_saving_over_a_model_replaces_it_and_keeps_other_files(saved: Path) -> None:
    (saved / "metrics.jsonl").write_text("{}\n")
    model = save(saved, seed=2, blocks=3)
    assert torch.equal(logits(load_pretrained(saved).model), logits(model))
    assert sorted(p.name for p in saved.iterdir()) == sorted([*FILES, "metrics.jsonl"])


class Killed(BaseException):
    """The process dies: no handler of the package may run on it."""


def dying(function: Callable[..., Any], countdown: list[int]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        countdown[0] -= 1
        if countdown[0] < 0:
            raise Killed
        return function(*arguments, **named)

    return call


def save_and_die(directory: Path, step: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Save, dying at the given system call; whether it died."""
    countdown = [step]
    with monkeypatch.context() as patch:
        patch.setattr(directory_of_files, "save_file", dying(save_file, countdown))
        patch.setattr(os, "fsync", dying(os.fsync, countdown))
        patch.setattr(os, "replace", dying(os.replace, countdown))
        for name in ("write_text", "rename", "mkdir", "rmdir"):
            patch.setattr(Path, name, dying(getattr(Path, name), countdown))
        try:
            save(directory, seed=seed, blocks=1 + seed)
        except Killed:
            return True
    return False


def test_dying_at_any_moment_of_a_save_leaves_one_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {seed: logits(network(seed, blocks=1 + seed)) for seed in (1, 2, 3)}
    found = []
    step = 0
    while True:
        directory = tmp_path / str(step)
        save(directory, seed=1, blocks=2)
        died = save_and_die(directory, step, 2, monkeypatch)
        back = load_pretrained(directory).model
        seed = back.config.blocks - 1
        assert torch.equal(logits(back), expected[seed])
        found.append(seed)
        save(directory, seed=3, blocks=4)
        assert torch.equal(logits(load_pretrained(directory).model), expected[3])
        assert sorted(p.name for p in directory.iterdir()) == sorted(FILES)
        if not died:
            break
        step += 1
    # Old up to the commit, new from there on.
    assert found == sorted(found)
    assert {1, 2} == set(found)
    assert found.count(2) > len(FILES), "some deaths were between the moves of the files"


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: disk full")],
    ids=["os", "safetensors"],
)
def test_full_disk_is_one_line_and_leaves_the_old_model(
    saved: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    before = logits(load_pretrained(saved).model)

    def fail(*_: Any) -> None:
        (saved / ".saving" / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(directory_of_files, "save_file", fail)
    with pytest.raises(CheckpointError, match=f"Cannot save .*{saved.name}: .*([Nn]o space|full)"):
        save(saved, seed=2)
    assert torch.equal(logits(load_pretrained(saved).model), before)
    assert sorted(p.name for p in saved.iterdir()) == sorted(FILES)


def test_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for directory in (tmp_path / "file", tmp_path / "file" / "model"):
        with pytest.raises(CheckpointError, match="Cannot save a model in"):
            save(directory)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(saved: Path, bad: float) -> None:
    model = network()
    with torch.no_grad():
        model.blocks[1].qw.weight[3, 2] = bad
    with pytest.raises(CheckpointError, match=r"not finite in blocks\.1\.qw\.weight"):
        save_pretrained(saved, model, tokenizer_json=tokenizer_json())
    assert torch.equal(logits(load_pretrained(saved).model), logits(network()))
    tamper(saved, {**model.state_dict()})
    refused(saved, "not finite", "blocks.1.qw.weight")


def test_float16_refuses_weights_beyond_its_range(tmp_path: Path) -> None:
    model = network()
    with torch.no_grad():
        model.vocab_embed.weight[0, 0] = 70_000.0
    with pytest.raises(ConfigError, match=r"bfloat16 .* vocab_embed\.weight"):
        save_pretrained(tmp_path, model, tokenizer_json=tokenizer_json(), dtype=torch.float16)
    save_pretrained(tmp_path, model, tokenizer_json=tokenizer_json(), dtype=torch.bfloat16)


def test_weights_are_not_saved_as_integers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="float32, float16 or bfloat16"):
        save_pretrained(tmp_path, network(), tokenizer_json=tokenizer_json(), dtype=torch.int8)


def tamper(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Write other tensors under the metadata of the saved ones."""
    _, metadata = pretrained._read_weights(directory / "model.safetensors")
    save_file(tensors, directory / "model.safetensors", metadata)


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_missing_path_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "no model directory", "nothing")
    refused(str(tmp_path / "nothing"), "no model directory", "nothing")


def test_file_is_no_directory(saved: Path) -> None:
    refused(saved / "model.safetensors", "is a file: give the directory")


def test_empty_directory_has_no_config(tmp_path: Path) -> None:
    refused(tmp_path, "not a model directory", "no config.json")


@pytest.mark.parametrize("text", ["{", "", "\x00\x01", "[" * 100_000])
def test_broken_config_is_named(saved: Path, text: str) -> None:
    (saved / "config.json").write_text(text)
    refused(saved, "config.json is not valid JSON")


def test_config_that_is_not_text_is_named(saved: Path) -> None:
    (saved / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(saved, "Cannot read", "config.json")


def test_config_must_be_an_object(saved: Path) -> None:
    (saved / "config.json").write_text("[]")
    refused(saved, "config.json must hold a JSON object")


def test_foreign_model_is_called_so(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 12}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"wte.weight": torch.zeros(3, 2)}, tmp_path / "model.safetensors", {"format": "pt"})
    refused(tmp_path, "config.json is not of an fsdfm model", "'gpt2'")


def test_newer_format_asks_for_an_upgrade(saved: Path) -> None:
    edit_config(saved, format_version=4, new_field=True)
    refused(saved, "format version 4", "upgrade fsdfm")


@pytest.mark.parametrize("version", [None, "1", 0, 1.5])
def test_format_version_must_be_a_number(saved: Path, version: Any) -> None:
    edit_config(saved, format_version=version)
    refused(saved, "no valid format_version")


def test_config_field_errors_name_the_file(saved: Path) -> None:
    edit_config(saved, dropout=0.1)
    refused(saved, "config.json", "unknown fields dropout")


@pytest.mark.parametrize(
    ("field", "value"), [("network", ["x"]), ("network", {}), ("schedule_power", float("inf"))]
)
def test_config_values_of_another_kind_are_named(saved: Path, field: str, value: Any) -> None:
    edit_config(saved, **{field: value})
    refused(saved, "config.json", f"{field} must be")


def test_config_of_another_model_is_refused(saved: Path) -> None:
    """Same shapes, so that only the record in the weights can tell."""
    edit_config(saved, schedule_power=2.0)
    refused(saved, "config.json and model.safetensors", "different models")


def test_missing_weights_are_named(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    refused(saved, "model.safetensors is missing")


@pytest.mark.parametrize("kept", [0, 4, 300, -1], ids=["empty", "length", "header", "data"])
def test_truncated_weights_are_named(saved: Path, kept: int) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(saved, "model.safetensors is truncated or corrupt")


def test_weights_that_are_no_safetensors_are_named(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 9)
    refused(saved, "model.safetensors is truncated or corrupt")


def test_weights_of_another_program_are_refused(saved: Path) -> None:
    save_file(load_file(saved / "model.safetensors"), saved / "model.safetensors")
    refused(saved, "model.safetensors was not saved by fsdfm")
    save_file(
        load_file(saved / "model.safetensors"),
        saved / "model.safetensors",
        {"format": "fsdfm", "config": "{"},
    )
    refused(saved, "model.safetensors names no readable config")


def test_tensors_that_do_not_fit_are_listed_but_not_all(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    del tensors["blocks.0.norm2.weight"]
    tensors["blocks.0.norm3.weight"] = torch.ones(16)
    tensors["blocks.1.kw.weight"] = torch.ones(16, 15)
    tamper(saved, tensors)
    refused(
        saved,
        "missing blocks.0.norm2.weight",
        "unknown blocks.0.norm3.weight",
        "mis-shaped blocks.1.kw.weight [16, 15] for [16, 16]",
    )
    tamper(saved, {"vocab_embed.weight": tensors["vocab_embed.weight"]})
    refused(saved, "and 29 more")  # 34 tensors, 1 there, 4 shown


def test_missing_tokenizer_is_named(saved: Path) -> None:
    (saved / "tokenizer.json").unlink()
    refused(saved, "tokenizer.json is missing")


@pytest.mark.parametrize("text", ["{", "", "{}", "[]", '{"model": {"type": "Nothing"}}'])
def test_broken_tokenizer_is_named(saved: Path, text: str) -> None:
    (saved / "tokenizer.json").write_text(text)
    refused(saved, "tokenizer.json is not a tokenizer")


def test_tokenizer_with_more_ids_than_the_network_is_refused(saved: Path) -> None:
    (saved / "tokenizer.json").write_text(tokenizer_json(12))
    refused(saved, "tokenizer.json has 12 ids but the network has 11")
    with pytest.raises(CheckpointError, match="12 ids but the network has 11"):
        save_pretrained(saved, network(), tokenizer_json=tokenizer_json(12))


def test_tokenizer_may_have_fewer_ids_than_the_network(tmp_path: Path) -> None:
    save_pretrained(tmp_path, network(), tokenizer_json=tokenizer_json(9))
    assert load_pretrained(tmp_path).tokenizer_json == tokenizer_json(9)


def test_tokenizer_of_another_model_is_refused_and_reformatting_is_not(saved: Path) -> None:
    path = saved / "tokenizer.json"
    path.write_text(json.dumps(json.loads(tokenizer_json()), indent=2))
    load_pretrained(saved)
    path.write_text(tokenizer_json(word="v"))
    refused(saved, "tokenizer.json is not the tokenizer")


def test_generation_defaults_are_the_users_to_edit_or_drop(saved: Path) -> None:
    (saved / "generation.json").write_text('{"steps": 3}')
    assert load_pretrained(saved).generation == {"steps": 3}
    (saved / "generation.json").write_text("{")
    refused(saved, "generation.json is not valid JSON")
    (saved / "generation.json").unlink()
    assert load_pretrained(saved).generation == {}


def test_unusable_device_is_one_line(saved: Path) -> None:
    with pytest.raises(ConfigError, match="Cannot use device 'nowhere'"):
        load_pretrained(saved, device="nowhere")


def test_hub_name_is_fetched_with_our_files_only(
    saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Any] = []

    def snapshot(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, sorted(allow_patterns)))
        return str(saved)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    back = load_pretrained("some-org/fs.dfm_small")
    assert asked == [("some-org/fs.dfm_small", sorted(FILES))]
    assert torch.equal(logits(back.model), logits(network()))


def test_hub_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def snapshot(*_: Any, **__: Any) -> str:
        raise RuntimeError("401 Client Error.\nRepository Not Found for url")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    refused("org/name", "no directory org/name", "Hugging Face Hub", "401 Client Error")


@pytest.mark.parametrize("name", ["runs/tiny", "./a/b", "a/b/c", "tiny", "../x", "/nowhere/x"])
def test_mistyped_path_never_asks_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    def snapshot(*_: Any, **__: Any) -> str:
        raise AssertionError("asked the Hub")

    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    refused(name, "no model directory")


def test_local_directory_wins_over_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert load_pretrained("org/name").generation == GENERATION


def test_bundled_is_the_packages_model_unless_there_is_such_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve("bundled") == resolve(Path("bundled")) == bundled()
    with pytest.raises(CheckpointError, match="no model directory"):
        resolve("./bundled")
    Path("bundled").mkdir()
    assert resolve("bundled") == Path("bundled")
