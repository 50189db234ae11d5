"""Text from a model: one engine for the command line and for Python users.

Shapes: B sequences of a batch, L positions.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch
from torch import Tensor

from fsdfm.core.device import pick_device
from fsdfm.core.errors import ConfigError
from fsdfm.flow.grid import GRIDS
from fsdfm.flow.posterior import INDEPENDENT, Grouped, Posterior
from fsdfm.flow.sampler import State
from fsdfm.flow.step import STEP_RULES
from fsdfm.generate.layout import LONGEST_DEFAULT
from fsdfm.generate.options import BATCH, DEFAULTS, Options, SamplingOptions, split
from fsdfm.generate.precision import pick_dtype
from fsdfm.generate.request import LARGEST_SEED, Request, Result
from fsdfm.generate.results import Generation, Sample, Snapshot
from fsdfm.generate.rows import Rows, given_rows
from fsdfm.generate.running import Cancelled, OnStep, answer
from fsdfm.generate.track import Track, call, start
from fsdfm.model.engine import Engine
from fsdfm.model.transformer import FlowNetwork
from fsdfm.text.tokenizer import DOCUMENT_SEPARATOR, Tokenizer


@dataclass(frozen=True, slots=True)
class _Request:
    """A request in which every value is known and possible."""

    steps: int
    length: int
    num_samples: int
    seed: int
    batch_size: int
    sampling: SamplingOptions
    grid: Tensor
    """Times of the calls, float64, shape (steps + 1,)."""
    fixed: Tensor
    """Tokens of the frozen positions, int64, shape (num_samples, L); the others are not read."""
    frozen: Tensor
    """Positions that are given and never move, bool, shape (num_samples, L)."""


class Generator:
    """A model ready to generate text.

    Args:
        model: the network; its weights must not change afterwards. It is not kept: the engine has
            what it needs of it, once, in its format.
        tokenizer: the tokenizer it was trained with.
        defaults: what `generate` uses where its caller says nothing (see DEFAULTS).
        device: where to run; cuda if there is one, else mps, else cpu.
        precision: float32, bfloat16 or int8, of the products; see `pick_dtype` for the default.
        ancestors: names of the models that it descends from.
    """

    def __init__(
        self,
        model: FlowNetwork,
        tokenizer: Tokenizer,
        *,
        defaults: Mapping[str, Any] | None = None,
        device: str | torch.device | None = None,
        precision: str | None = None,
        ancestors: tuple[str, ...] = (),
    ) -> None:
        self.ancestors = ancestors
        self.device = pick_device(device)
        self.config = model.config
        self.tokenizer = tokenizer
        known = {name: value for name, value in (defaults or {}).items() if name in DEFAULTS}
        self.defaults: dict[str, Any] = {**DEFAULTS, **known}
        self.dtype = pick_dtype(precision, self.device, model.config)
        self.engine = Engine(model.to(self.device).eval(), self.dtype)
        # The sampler draws in float64, which MPS lacks.
        self.state_device = torch.device("cpu") if self.device.type == "mps" else self.device
        self._pieces: dict[int, str] = {}
        self._texts: list[str] | None = None

    def generate(self, **options: Unpack[Options]) -> Generation:
        """Generate texts.

        The k-th text has the noise of seed + k, so alone it is the same. A batch_size above 1 pays
        on a GPU, and for short texts; where several texts share a product (on a CPU: texts of 256
        tokens or fewer) it rounds otherwise, so a text may differ from the one made alone.

        Args:
            options: those of `SamplingOptions`, where None takes the default of the model
                directory, else of DEFAULTS; and those of `RequestOptions`.

        Returns:
            The texts, with their cost.

        Raises:
            ConfigError: an option that there is not, a value out of range, or a prompt that does
                not fit.
        """
        return Generation([sample for batch in self.batches(**options) for sample in batch])

    def fill(
        self,
        token_ids: Rows[int],
        frozen: Rows[bool],
        **options: Unpack[Options],
    ) -> Generation:
        """Infill: generate the positions that are not frozen, seeing those that are on both sides.

        Args:
            token_ids: tokens of each sample, all of one length L, as integers of any kind; those of
                positions that are not frozen are not read.
            frozen: which positions are given, shaped as token_ids; bools, or 0 and 1.
            options: those of `generate`, without length, num_samples and prompt.

        Returns:
            One sample for each row, the k-th with the noise of seed + k.

        Raises:
            ConfigError: rows that are no integers, or do not fit each other, the model's context or
                its vocabulary; an option that there is not, or out of range.
        """
        if excess := sorted({"length", "num_samples", "prompt"} & options.keys()):
            raise ConfigError(f"fill takes no {', '.join(excess)}: the rows of token_ids say it.")
        fixed, mask = given_rows(token_ids, frozen, self.config.vocab_size)
        shape: Options = {"length": fixed.shape[1], "num_samples": len(fixed)}
        request = self._request({**options, **shape})
        request = replace(request, fixed=fixed, frozen=mask)
        return Generation([sample for batch in self._batches(request) for sample in batch])

    def answer(
        self,
        requests: Sequence[Request],
        *,
        batch_size: int = BATCH,
        on_step: OnStep | None = None,
        cancelled: Cancelled | None = None,
    ) -> list[Result]:
        """Answer requests of any kind, length and number of steps.

        Texts share calls, whatever their lengths and times; another step rule, number of draws or
        seams needs a call of its own. A result does not depend on what it shared a call with, but
        for the rounding of products of another size, which may change a text (with batch_size 1
        there is none).

        Args:
            requests: what is wanted.
            batch_size: sequences that share a call, at most.
            on_step: told after every call: steps done, steps planned, and every text as it stands.
            cancelled: asked before every call, of every request by its number, whether it is given
                up; its result is then what there is, with finish "cancelled".

        Returns:
            One result for each, in order. See `Running` for admission between calls.

        Raises:
            ConfigError: a request that this model cannot do; nothing was begun.
        """
        return answer(self, requests, batch_size=batch_size, on_step=on_step, cancelled=cancelled)

    def batches(self, **options: Unpack[Options]) -> Iterator[list[Sample]]:
        """As `generate`, but each batch is handed out as soon as it is done.

        Args:
            options: those of `generate`.

        Raises:
            ConfigError: as `generate`, at once and not at the first batch; or an option that there
                is not.
        """
        return self._batches(self._request(options))

    def stream(self, **options: Unpack[Options]) -> Iterator[Snapshot]:
        """One text while it is made.

        Args:
            options: those of `generate`; one sample only.

        Returns:
            steps + 1 snapshots: the noise, then the text after every step. The last one is what
            `generate` gives.

        Raises:
            ConfigError: as `generate`, at once and not at the first snapshot; or an option that
                there is not.
        """
        if options.get("num_samples", 1) != 1:
            raise ConfigError("Only one sample can be streamed: leave num_samples out.")
        return self._snapshots(self._request(options))

    def _batches(self, request: _Request) -> Iterator[list[Sample]]:
        seeds = range(request.seed, request.seed + request.num_samples)
        for first in range(0, len(seeds), request.batch_size):
            batch = seeds[first : first + request.batch_size]
            began = time.perf_counter()
            ((_, last),) = deque(self._states(request, first, len(batch)), maxlen=1)
            rows: list[list[int]] = last.x.tolist()
            seconds = time.perf_counter() - began
            free = (~request.frozen[first : first + len(batch)]).sum(1).tolist()
            yield [
                Sample(
                    text=self.decode(ids),
                    token_ids=ids,
                    tokens=tokens,
                    nfe=last.calls,
                    seed=seed,
                    seconds=seconds,
                    tokens_per_second=sum(free) / seconds,
                )
                for ids, seed, tokens in zip(rows, batch, free, strict=True)
            ]

    def _snapshots(self, request: _Request) -> Iterator[Snapshot]:
        began = time.perf_counter()
        frozen: list[bool] = request.frozen[0].tolist()
        for tracks, state in self._states(request, 0, 1):
            ids: list[int] = state.x[0].tolist()
            yield Snapshot(
                step=state.step,
                steps=request.steps,
                calls=state.calls,
                seconds=time.perf_counter() - began,
                tokens=request.length - sum(frozen),
                frozen=frozen,
                token_ids=ids,
                text=self.decode(ids),
                pieces=[self.piece(i) for i in ids],
                moved=tracks[0].drawn_in.tolist(),
            )

    def _states(
        self, request: _Request, first: int, count: int
    ) -> Iterator[tuple[list[Track], State]]:
        """Samples first, ..., first + count - 1 from call to call."""
        tracks = []
        for number in range(first, first + count):
            noise = torch.Generator().manual_seed(request.seed + number)
            frozen, fixed = request.frozen[number], request.fixed[number]
            x = torch.where(frozen, fixed, start(self, noise, request.length))
            how, controls = request.sampling, request.sampling.controls()
            tracks.append(Track(x, ~frozen, request.grid.tolist(), how, controls, noise))
        calls = 0
        try:
            yield tracks, self._state(tracks, calls)
            while not tracks[0].done:
                calls += call(self, tracks)
                yield tracks, self._state(tracks, calls)
        except torch.OutOfMemoryError:
            raise ConfigError(
                f"{self.device} has not enough memory for {count} x {request.length} tokens: "
                "take a smaller batch_size or length, or the device cpu.",
                "batch_size",
                "length",
                "device",
            ) from None

    def _state(self, tracks: Sequence[Track], calls: int) -> State:
        """Where the tracks are together."""
        one, x = tracks[0], torch.stack([track.x for track in tracks])
        return State(x, one.step, one.times[one.step], calls, sum(t.rows for t in tracks))

    def autocast(self) -> torch.autocast:
        """For calls of the network itself: products in the engine's format beside int8."""
        dtype = self.engine.dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids as text; a mask, or a row that pads the network's vocabulary, is no text."""
        return self.tokenizer.decode(i for i in ids if i < self.tokenizer.vocab_size)

    def piece(self, token: int) -> str:
        """The text of a token on its own; of EOS what is put between documents."""
        if token not in self._pieces:
            end = token == self.tokenizer.eos_id
            self._pieces[token] = DOCUMENT_SEPARATOR if end else self.decode([token])
        return self._pieces[token]

    def _request(self, options: Options) -> _Request:
        """Fill in the defaults and refuse what cannot work."""
        sampling, wanted = split(options, self.defaults)
        context = self.config.context_length
        length = min(LONGEST_DEFAULT, context) if wanted.length is None else wanted.length
        if length > context:
            raise ConfigError(
                f"length={length} is more than this model's context of {context} tokens: "
                f"ask for {context} at most, or give a Request of this length to answer, which "
                "makes it in windows.",
                "length",
            )
        num_samples, seed = wanted.num_samples, wanted.seed
        if seed + num_samples - 1 > LARGEST_SEED:
            raise ConfigError(
                f"seed must be at most {LARGEST_SEED}, and sample k takes seed + k: "
                f"got seed={seed} for {num_samples} samples.",
                "seed",
            )
        self.posterior(sampling)
        prompt, shape = self._encode(wanted.prompt, length), (num_samples, length)
        return _Request(
            steps=sampling.steps,
            grid=GRIDS[sampling.grid](sampling.steps),
            length=length,
            num_samples=num_samples,
            seed=seed,
            batch_size=wanted.batch_size,
            sampling=sampling,
            fixed=torch.cat((prompt, prompt.new_zeros(length - len(prompt)))).expand(*shape),
            frozen=(torch.arange(length) < len(prompt)).expand(*shape),
        )

    def posterior(self, sampling: SamplingOptions) -> Posterior:
        """How the movers of a call are drawn.

        Raises:
            ConfigError: several draws a call of a model without a joint head, or of a step rule
                that cannot go with them.
        """
        if sampling.draws > 1 and not self.config.neighbours:
            raise ConfigError(
                f"This model has no joint head, so its positions are drawn on their own: leave "
                f"draws={sampling.draws} out, or use a model that was distilled to one.",
                "draws",
            )
        found: Posterior = INDEPENDENT
        if self.config.neighbours:
            found = Grouped(self.engine, sampling.draws, sampling.seams)
        found.check(STEP_RULES[sampling.step])
        return found

    def pieces(self) -> list[str]:
        """The text of every token of the network on its own; of EOS and of masks there is none."""
        if self._texts is None:
            self._texts = [self.decode([token]) for token in range(self.config.vocab_size)]
        return self._texts

    def _encode(self, prompt: Any, length: int) -> Tensor:
        """The prompt's tokens, int64, at least one fewer than length."""
        if prompt is None:
            prompt = ""
        if not isinstance(prompt, str):
            raise ConfigError(
                f"prompt must be a str, got {type(prompt).__name__}: decode bytes, and give token "
                "ids to fill."
            )
        ids = self.tokenizer.encode(prompt) if prompt else []
        if len(ids) >= length:
            raise ConfigError(
                f"The prompt has {len(ids)} tokens, but with length={length} only {length - 1} "
                "fit: shorten it or raise the length.",
                "length",
            )
        return torch.tensor(ids, dtype=torch.int64)
