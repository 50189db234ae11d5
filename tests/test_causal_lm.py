"""What becomes of a language model: all that it said, where nothing is cut, or one line."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language_models import FAMILIES, make_lm, save_lm, save_tokenizer, tokenizer
from safetensors.torch import load, save_file
from torch import Tensor

from fsdfm.core.errors import CheckpointError, ConfigError
from fsdfm.model.causal import CausalNetwork
from fsdfm.model.io.causal_lm import (
    CausalLm,
    adapt,
    asked_layers,
    load_causal_lm,
    load_tokenizer_json,
)

V, START = 320, 5


def whole(lm: CausalLm, **changes: Any) -> CausalNetwork:
    """Nothing cut, attention as it was."""
    usual = {
        "token_ids": range(V),
        "start_id": START,
        "layers": range(3),
        "source": "mask",
        "context_length": 16,
        "attention": "causal",
    }
    return adapt(lm, **{**usual, **changes})


def tokens(seed: int = 1) -> Tensor:
    return torch.randint(V, (2, 11), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def ours(network: CausalNetwork, x: Tensor) -> Tensor:
    """Logits of the tokens, at times that a fresh network must not hear."""
    return network(x, torch.tensor([0.2, 0.9]), torch.tensor([0.5, 0.01]))[..., :V]


@torch.no_grad()
def theirs(model: Any, x: Tensor) -> Tensor:
    """Row i is what they say after a start token and the tokens before i."""
    before = torch.cat((torch.full((len(x), 1), START), x), 1)
    logits: Tensor = model(before, use_cache=False).logits[:, :-1]
    return logits


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_language_model(family: str, tied: bool, tmp_path: Path) -> None:
    place = save_lm(tmp_path / "lm", family, tie_word_embeddings=tied)
    lm = load_causal_lm(str(place))
    model = make_lm(family, tie_word_embeddings=tied)
    network = whole(lm)
    assert network.config.tied == tied
    assert network.config.qkv_bias == (family == "qwen2")
    assert network.config.qk_norm == (family == "qwen3")
    wanted = theirs(model, tokens())
    assert wanted.std() > 0.3 and (wanted.argmax(-1)[:, :-1] != tokens()[:, 1:]).any()
    torch.testing.assert_close(ours(network, tokens()), wanted, rtol=0, atol=1e-5)
    assert lm.name == "lm" and lm.tokenizer_json == load_tokenizer_json(str(place))


def test_the_bidirectional_twin_says_something_else_but_not_at_the_end(tmp_path: Path) -> None:
    lm = load_causal_lm(str(save_lm(tmp_path / "lm", num_hidden_layers=1)))
    x, changes = tokens(), {"layers": (0,)}
    twin = whole(lm, attention="bidirectional", **changes)
    difference = (ours(twin, x) - theirs(lm.model, x)).abs().amax(-1)
    assert (difference > 1e-3).all()
    # In one layer the last row that passes saw everything before it either way: the row of a
    # token that is not there is the one after the last.
    longer = torch.cat((x, x[:, :1]), 1)
    causal = theirs(lm.model, longer)[:, -1]
    times = torch.full((2,), 0.5)
    with torch.no_grad():
        rows = twin.shifted(x)
        c = twin.condition(times, times)
        hidden = twin.vocab_embed(rows)
        hidden = twin.blocks[0](hidden, c, *twin.rotary_emb.tables(rows.shape[1]))
        logits = twin.head(twin.output_layer.final(hidden, c))[:, -1, :V]
    torch.testing.assert_close(logits, causal, rtol=0, atol=1e-5)


def test_without_a_shift_the_row_of_a_token_is_its_own() -> None:
    model = make_lm()
    network = whole(CausalLm("lm", model, ""), start_id=None)
    with torch.no_grad():
        wanted = model(tokens()).logits
    torch.testing.assert_close(ours(network, tokens()), wanted, rtol=0, atol=1e-5)


def test_chosen_layers_are_the_models_own_in_their_order() -> None:
    model = make_lm(num_hidden_layers=5)
    network = whole(CausalLm("lm", model, ""), layers=(0, 3, 4))
    kept = [model.model.layers[i] for i in (0, 3, 4)]
    model.model.layers = torch.nn.ModuleList(kept)
    model.config.num_hidden_layers = 3
    model.config.layer_types = None
    torch.testing.assert_close(ours(network, tokens()), theirs(model, tokens()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_rows_follow_their_tokens_and_new_ones_are_the_mean(tied: bool) -> None:
    model = make_lm(tie_word_embeddings=tied)
    ids = [7, None, 300, 0, V + 3]  # the last has no row
    network = whole(CausalLm("lm", model, ""), token_ids=ids, start_id=0)
    assert (network.config.vocab_size, network.config.mask_id) == (5, 5)
    pairs = [(network.vocab_embed.weight, model.model.embed_tokens.weight)]
    pairs += [(network.head_parameters()[0], model.lm_head.weight)]
    for found, given in pairs:
        assert torch.equal(found[[0, 2, 3]], given[[7, 300, 0]])
        torch.testing.assert_close(found[[1, 4, 5]], given[[7, 300, 0]].mean(0).expand(3, -1))
    uniform = whole(CausalLm("lm", make_lm(), ""), token_ids=ids, start_id=0, source="uniform")
    assert len(uniform.vocab_embed.weight) == 5 and not uniform.config.absorbing


def gguf_of(model: Any, path: Path) -> Path:
    """A llama as a .gguf file, in float32: its rotary pairs lie side by side there."""
    import gguf

    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(V)
    spec = json.loads(tokenizer(V).to_json())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(spec["vocab"], key=spec["vocab"].get))
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (V - 1))
    writer.add_token_merges([" ".join(pair) for pair in spec["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in state.items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        values = tensor.numpy()
        if count := next((n for part, n in heads.items() if part in name), None):
            halves = values.reshape(count, 2, -1, values.shape[-1])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_gguf_file_is_read_as_what_it_holds(tied: bool, tmp_path: Path) -> None:
    model = make_lm(tie_word_embeddings=tied)
    lm = load_causal_lm(str(gguf_of(model, tmp_path / "some.gguf")))
    assert lm.name == "some"
    torch.testing.assert_close(
        ours(whole(lm), tokens()), theirs(model, tokens()), rtol=0, atol=1e-5
    )
    spec = json.loads(lm.tokenizer_json)["model"]
    assert spec["vocab"] == json.loads(tokenizer(V).to_json())["model"]["vocab"]


# Which layers.


def test_layers_are_a_number_a_list_or_all() -> None:
    assert asked_layers(4, None) == asked_layers(4, "4") == (0, 1, 2, 3)
    assert asked_layers(4, "3,0") == (0, 3)
    assert asked_layers(4, "3") == 3 and asked_layers(4, "3,") == (3,)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ("0", "from 1 to 4.*got 0"),
        ("99", "from 1 to 4.*got 99"),
        ("-1", "from 1 to 4.*got -1"),
        ("x", "number of layers or a list like 0,1,5, got 'x'"),
        ("1,,", "list like 0,1,5"),
        ("4,", "from 0 to 3, got '4,'"),
        ("", "list like 0,1,5"),
        ("0,4", "from 0 to 3, got '0,4'"),
        ("1,1", "different numbers"),
    ],
)
def test_layers_that_there_are_not_give_one_line(layers: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        asked_layers(4, layers)


# Refusals.


def refusal(kind: type[Exception], place: Path | str) -> str:
    with pytest.raises(kind) as caught:
        load_causal_lm(str(place))
    message = str(caught.value)
    assert message and "\n" not in message and len(message) < 500
    return message


@pytest.mark.parametrize("kind", ["gpt2", "bert", "gemma3_text"])
def test_another_architecture_is_named_beside_those_that_are_supported(
    kind: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    message = refusal(ConfigError, tmp_path)
    assert f"is a {kind} model" in message
    assert all(family in message for family in FAMILIES)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "gelu"}, "activation gelu"),
        ({"mlp_bias": True}, "a bias in its MLP"),
        ({"attention_bias": True}, "a bias after attention"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "scaled rotary"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "scaled rotary"),
    ],
)
def test_what_a_block_cannot_hold_is_named(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **changes}))
    assert said in refusal(ConfigError, tmp_path)


def test_a_window_that_is_shorter_than_the_context_is_refused(tmp_path: Path) -> None:
    def read(kind: str, **changes: Any) -> CausalLm:
        return load_causal_lm(str(save_lm(tmp_path / str(changes), kind, **changes)))

    lm = read("mistral", sliding_window=4)
    with pytest.raises(ConfigError, match="see the last 4 tokens: context_length must be 4 or les"):
        whole(lm, context_length=5)
    assert whole(lm, context_length=4)
    with pytest.raises(ConfigError, match="see the last 4 tokens"):
        whole(read("qwen3", use_sliding_window=True, sliding_window=4, max_window_layers=0))
    assert whole(read("qwen3", use_sliding_window=False, sliding_window=4))


def test_a_place_that_holds_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.gguf").write_text("no model")
    (tmp_path / "notes.txt").write_text("no model")
    for place in ("nowhere", "empty", "text.gguf", "missing.gguf", "notes.txt", "a/b/c"):
        message = refusal(CheckpointError, tmp_path / place)
        assert str(tmp_path / place) in message
    assert "nowhere" in refusal(CheckpointError, "nowhere")
    with pytest.raises(CheckpointError, match="empty"):
        load_tokenizer_json(str(tmp_path / "empty"))


def test_weights_that_are_damaged_or_in_part_are_refused(tmp_path: Path) -> None:
    path = save_lm(tmp_path / "lm") / "model.safetensors"
    whole_file = path.read_bytes()
    state = load(whole_file)  # not mapped: the file is written over
    for data in (whole_file[: len(whole_file) // 2], b"", b"nonsense" * 9):
        path.write_bytes(data)
        assert str(tmp_path / "lm") in refusal(CheckpointError, tmp_path / "lm")
    dropped = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in state.items() if k != dropped}, path, {"format": "pt"})
    assert f"lack {dropped}" in refusal(CheckpointError, tmp_path / "lm")
    save_file({**state, dropped: state[dropped][:7]}, path, {"format": "pt"})
    refusal(CheckpointError, tmp_path / "lm")


class Bomb:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_pickled_weights_are_refused_and_not_unpickled(tmp_path: Path) -> None:
    place, mark = save_lm(tmp_path / "lm"), tmp_path / "went off"
    (place / "model.safetensors").unlink()
    (place / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    assert "safetensors" in refusal(CheckpointError, place)
    assert not mark.exists()
    pickle.loads((place / "pytorch_model.bin").read_bytes())
    assert mark.exists()


def test_code_beside_a_model_is_not_run_nor_asked_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "ran"
    save_tokenizer(tmp_path, tokenizer().to_json())
    (tmp_path / "own.py").write_text(
        "import pathlib\nfrom transformers import PretrainedConfig\n"
        f"pathlib.Path({str(mark)!r}).touch()\n"
        "class Own(PretrainedConfig):\n    model_type = 'own'\n"
    )
    values = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    began = time.monotonic()
    refusal(CheckpointError, tmp_path)
    assert time.monotonic() - began < 5.0 and not mark.exists()
    assert "[y/N]" not in "".join(capsys.readouterr())
