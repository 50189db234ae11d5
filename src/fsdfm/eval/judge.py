"""An independent autoregressive model that says how likely a text is.

Judge and generator need not share a tokenizer: texts come in decoded, and are encoded again with
the judge's own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fsdfm.core.errors import CheckpointError, ConfigError
from fsdfm.core.files import digest, tensor_bytes
from fsdfm.core.packaged import locate, own_name, reading
from fsdfm.eval.metrics import Score

DOCUMENT_START = "<|endoftext|>"
SEGMENT_TOKENS = 128
"""Judge tokens that one feature vector is the mean of."""
LONGEST_WINDOW = 4096
"""Judge tokens of a window, where the judge's own context is no shorter."""
BATCH_TOKENS = 2048
"""Judge tokens in one forward pass, padding included (at least one window)."""
LOSS_ROWS = 256
"""Rows whose logits are taken to float32 at a time."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a judge makes of one text."""

    score: Score
    features: NDArray[np.float32]
    """Means of the final hidden states over each SEGMENT_TOKENS judge tokens of the text, shape
    (segments, D); a remainder is left out unless it is all there is."""


class Judge(Protocol):
    """Anything that scores texts."""

    @property
    def facts(self) -> dict[str, Any]:
        """What a report says of the judge; facts that are equal but for the names (`name`, `model`)
        mean equal scores."""
        ...

    def judge(self, texts: Sequence[str], prefixes: Sequence[str] | None = None) -> list[Judgement]:
        """Score each text after its prefix; the prefix itself is never scored.

        Scores depend on which texts are judged together only through the rounding of batched
        products: give the same groups to get the same bits.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Window:
    """A piece of one text's ids, of which the last `scored` count."""

    text: int
    ids: list[int]
    scored: int


class CausalJudge:
    """A causal language model of the transformers library.

    A text starts after the token that separates documents (`<|endoftext|>` where the vocabulary has
    it, else the beginning-of-text token), so its first token is scored too. A text longer than the
    window is scored in windows that overlap by half, so a token sees all that comes before it, or
    at least half a window of it.

    Args:
        model: the network, in evaluation mode.
        tokenizer: its tokenizer.
        name: what reports call it.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        # A chat model's beginning-of-text token may open a chat turn, not a document.
        vocabulary = tokenizer.get_vocab()
        names = (DOCUMENT_START, tokenizer.bos_token, tokenizer.eos_token)
        self.start: int | None = next((vocabulary[n] for n in names if n in vocabulary), None)
        self.sha256 = _digest(model, tokenizer)
        config = model.config.get_text_config()
        context = getattr(config, "max_position_embeddings", None) or LONGEST_WINDOW
        self.window = min(int(context), LONGEST_WINDOW)

    @property
    def facts(self) -> dict[str, Any]:
        """Names, size, number format, window, and a digest of weights and tokenizer."""
        return {
            "name": self.name,
            "model": own_name(self.name),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "dtype": str(self.dtype).removeprefix("torch."),
            "window_tokens": self.window,
            "stride_tokens": self.window // 2,
            "start_token": None
            if self.start is None
            else self.tokenizer.convert_ids_to_tokens(self.start),
            "feature_segment_tokens": SEGMENT_TOKENS,
            "sha256": self.sha256,
        }

    @torch.no_grad()
    def judge(self, texts: Sequence[str], prefixes: Sequence[str] | None = None) -> list[Judgement]:
        """See `Judge`.

        Args:
            texts: what to score.
            prefixes: what comes before each; nothing if not given.
        """
        given = [""] * len(texts) if prefixes is None else prefixes
        lengths: list[int] = []
        windows: list[_Window] = []
        for number, (text, prefix) in enumerate(zip(texts, given, strict=True)):
            before = ([] if self.start is None else [self.start]) + self._encode(prefix)
            ids = self._encode(text)
            scored = len(ids) if before else max(0, len(ids) - 1)  # no start token: from the second
            lengths.append(scored)
            windows += _windows(number, before + ids, scored, self.window)
        nats = [0.0] * len(texts)
        hidden: list[list[Tensor]] = [[] for _ in texts]
        for batch in _batches(windows):
            for window, (total, states) in zip(batch, self._run(batch), strict=True):
                nats[window.text] += total
                hidden[window.text].append(states)
        return [
            Judgement(Score(nats[i], lengths[i], len(texts[i].encode())), _segments(hidden[i]))
            for i in range(len(texts))
        ]

    def _encode(self, text: str) -> list[int]:
        if not text:
            return []
        # The name of a control token in a text is text: no document ends there.
        ids: list[int] = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        return ids

    def _run(self, batch: list[_Window]) -> Iterator[tuple[float, Tensor]]:
        """Nats of the scored tokens of each window, and the hidden states that predict them."""
        longest = max(len(window.ids) for window in batch)
        # Padding lies to the right, where a causal model's earlier positions do not see it.
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        for row, window in enumerate(batch):
            ids[row, : len(window.ids)] = torch.tensor(window.ids)
        try:
            logits, hidden = self._forward(ids.to(self.device))
        except torch.OutOfMemoryError:
            raise ConfigError(
                f"{self.device} has not enough memory for the judge: try judge_dtype=bfloat16, a "
                "smaller judge, or the device cpu.",
                "judge_dtype",
                "device",
            ) from None
        for row, window in enumerate(batch):
            end = len(window.ids) - 1
            rows = slice(end - window.scored, end)
            total = 0.0
            targets = ids[row, rows.start + 1 : rows.stop + 1].to(self.device)
            chunks = zip(
                torch.split(logits[row, rows], LOSS_ROWS),
                torch.split(targets, LOSS_ROWS),
                strict=True,
            )
            for some, target in chunks:
                total += float(F.cross_entropy(some.float(), target, reduction="sum"))
            if not math.isfinite(total):
                raise CheckpointError(
                    f"Judge {self.name} gave a value that is not finite: try judge_dtype=float32 "
                    "or another judge.",
                    "judge_dtype",
                )
            yield total, hidden[row, rows].float().cpu()

    def _forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and what the output layer was applied to."""
        caught: list[Tensor] = []
        hook = self.model.get_output_embeddings().register_forward_pre_hook(
            lambda module, inputs: caught.append(inputs[0])
        )
        try:
            logits = self.model(input_ids=ids, use_cache=False).logits
        finally:
            hook.remove()
        return logits, caught[0]


def load_judge(name: str, *, device: torch.device, dtype: torch.dtype) -> CausalJudge:
    """A judge by name.

    Args:
        name: of a packaged judge (PACKAGED); a local directory that transformers can read; a .gguf
            file; or `org/name` on the Hugging Face Hub.
        device: where it runs.
        dtype: number format of its weights and products.

    Raises:
        ConfigError: a library or the package is missing.
        CheckpointError: no such model, or it cannot be read.
        DataError: a packaged judge cannot be put together on the disk.
    """
    place, gguf = locate(name)
    with reading(name):
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        where = {} if gguf is None else {"gguf_file": gguf}
        how = {} if gguf is None else {"quantization_config": GgufConfig(dequantize=True)}
        tokenizer = AutoTokenizer.from_pretrained(place, **where)
        model: Any = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, **where, **how)
        model = model.to(device).eval().requires_grad_(False)
        if model.get_output_embeddings() is None:
            raise ValueError("it has no output layer")
    return CausalJudge(model, tokenizer, name)


def require_judge(name: str) -> None:
    """Refuse a judge that will not load, as far as that is seen without reading its weights.

    Args:
        name: as for `load_judge`, which says what is raised.
    """
    place, gguf = locate(name)
    if gguf is None:
        with reading(name):
            from transformers import AutoConfig

            AutoConfig.from_pretrained(place)


def _windows(text: int, ids: list[int], scored: int, window: int) -> Iterator[_Window]:
    """Cut ids so that each of the last `scored` is counted once, after all the context that fits.

    Each window is full where it can be, and keeps half a window of context for what it scores.
    """
    done = len(ids) - scored
    while done < len(ids):
        end = min(len(ids), max(window, done + window - window // 2))
        yield _Window(text, ids[max(0, end - window) : end], end - done)
        done = end


def _batches(windows: list[_Window]) -> Iterator[list[_Window]]:
    """Windows in order, as many at a time as fit into BATCH_TOKENS with their padding."""
    batch: list[_Window] = []
    for window in windows:
        longest = max(len(w.ids) for w in (*batch, window))
        if batch and longest * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _segments(hidden: list[Tensor]) -> NDArray[np.float32]:
    if not hidden:
        return np.zeros((0, 0), dtype=np.float32)
    states = torch.cat(hidden)
    whole = len(states) // SEGMENT_TOKENS
    if whole:
        states = states[: whole * SEGMENT_TOKENS].view(whole, SEGMENT_TOKENS, -1)
    else:
        states = states[None]
    means: NDArray[np.float32] = states.mean(1).numpy()
    return means


def _digest(model: Any, tokenizer: Any) -> str:
    """Of weights and vocabulary: what makes two judges the same."""
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return digest(chain([vocabulary], tensor_bytes(model.parameters())))
