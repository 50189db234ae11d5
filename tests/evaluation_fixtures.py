"""A small judge on disk, prose to judge, and a small model to be judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fsdfm.model.config import ModelConfig
from fsdfm.model.io.pretrained import save_pretrained
from fsdfm.model.transformer import Transformer
from fsdfm.text.tokenizer import train_bpe

PROSE = (
    "It was late in the afternoon when the carriage came down the hill, and the whole village"
    " had gone out to see it. The miller stood at his door with flour on his sleeves; the "
    "children ran beside the wheels and shouted; and old Mrs. Grey, who had not left her "
    "chair for a month, was carried to the window so that she might tell her sister what "
    "colour the horses were. Nobody knew who the stranger was. Some said that he had bought "
    "the house by the river, some that he came to marry the parson's daughter, and one man, "
    "who had once been to London, was sure that he had seen that face before, in a place "
    "which he would rather not name. The stranger himself said nothing. He looked straight "
    "ahead, held his hat upon his knee, and smiled a little when the dog began to bark. At "
    "the inn he asked for a room, paid for a week, and went up the stairs without his supper."
    " The lamp in his window burned until morning. In the days that followed he walked alone "
    "along the water, stopped to speak with the fishermen, and wrote long letters that he "
    "never sent. When the first snow fell he was gone, and the landlord found upon the table "
    "a purse of silver, a broken watch, and a map of a country that none of them had heard "
    "of. "
) * 3


def save_judge(directory: Path, context: int, seed: int = 3) -> Path:
    """A random GPT-2-class model of one layer and a byte-level tokenizer, as transformers saves."""
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    tokenizer = train_bpe([PROSE], 320)
    (directory / "bpe.json").write_text(tokenizer.to_json())
    PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "bpe.json"),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
    ).save_pretrained(directory)
    config = GPT2Config(
        vocab_size=tokenizer.vocab_size, n_positions=context, n_embd=32, n_layer=1, n_head=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = GPT2LMHeadModel(config)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
    network.save_pretrained(directory)
    return directory


def save_model(directory: Path, **changes: Any) -> Path:
    """A random flow model of context 48."""
    tokenizer = train_bpe([PROSE], 300)
    shape = {"hidden_size": 32, "blocks": 2, "heads": 2, "cond_size": 16, "context_length": 48}
    seed = changes.pop("seed", 5)
    config = {**shape, "vocab_size": tokenizer.vocab_size, "step_embedding": "log2", **changes}
    network = Transformer(ModelConfig(**config))
    draw = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3, generator=draw)
    save_pretrained(directory, network, tokenizer_json=tokenizer.to_json())
    return directory


def save_heldout(path: Path) -> Path:
    """Prose as documents, one JSON object a line."""
    sentences = [s + "." for s in PROSE.split(". ")]
    documents = [" ".join(sentences[i : i + 4]) for i in range(0, len(sentences), 4)]
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return path
