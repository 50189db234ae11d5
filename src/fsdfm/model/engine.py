"""A network made ready to sample: what is the same for every row is computed once.

A condition is one row, kept for the next sequence at its time; a norm, its weight and the
modulation after it are one norm; weights are in the format of the products from the start; the
last block, once it has its keys and values, runs on the rows that may move (where a sequence passes
alone); a text of masks is one row, where no start token tells its positions apart. Sequences of
several times and lengths lie behind each other: they share every product but those of attention.

Shapes: B sequences, L positions of the longest, N rows (some of the B L positions), D hidden, H
heads of width d. Sequences that are computed together are (S, P, D): of one length each has its
place, S of them; else they lie behind each other in one, S = 1.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fsdfm.flow.grid import SMALLEST_STEP
from fsdfm.flow.host import send
from fsdfm.model.causal import CausalNetwork
from fsdfm.model.fused import modulated_rms, turned
from fsdfm.model.int8 import beside_int8
from fsdfm.model.joint import known_around, neighbourhood
from fsdfm.model.layers import fuse
from fsdfm.model.prepared import Joint, Layer, PublishedLayer, leave_out, twin_layers
from fsdfm.model.products import linear
from fsdfm.model.together import Condition, NormWeights, Pack, norms_of, side_by_side
from fsdfm.model.transformer import FlowNetwork, Transformer

ROWS_AT_ONCE = 512
"""Positions that pass the blocks together on a CPU: more are no faster, and take more memory."""

CONDITIONS = 64
"""Times and step sizes whose conditions are kept."""


class Engine:
    """p(. given x, t, h) at the rows that a sampler asks for.

    It equals `Transformer` under autocast but for rounding. Of the matrices it holds only what the
    products read; the network itself stays as it is, and is no longer held when its owner lets go.

    Args:
        model: the network, on the device to run on; its weights must not change afterwards.
        dtype: of the matrix products; int8 (on a CPU with `has_int8`) rounds what goes into most
            linear layers to 8 bits, and does the rest in the format `beside_int8`.
    """

    def __init__(self, model: FlowNetwork, dtype: torch.dtype) -> None:
        self.model = model = _other_tree(model)
        self.device = model.vocab_embed.weight.device
        self.dtype = beside_int8() if dtype == torch.int8 else dtype
        self.kind: _Published | _Twin
        if isinstance(model, CausalNetwork):
            self.kind = _Twin(model)
            self.layers: list[Layer] = twin_layers(model, dtype)
            # Rounding what the heads read to 8 bits costs more than all the rest, and gains little.
            dtype = self.dtype
        else:
            assert isinstance(model, Transformer)
            self.kind = _Published(model)
            self.layers = [PublishedLayer(block, dtype) for block in model.blocks]
        self._head = linear(*model.head_parameters(), dtype)
        self._joint = Joint(model.joint, dtype) if model.config.neighbours else None
        # From here on a matrix is held by its product alone, in the format of the products; so is
        # the embedding, whose rows are rounded anyway on their way into the first.
        leave_out(model, "joint")
        leave_out(model.output_layer, "linear")
        embedding = model.vocab_embed.weight.detach().to(self.dtype)
        model.vocab_embed.weight = nn.Parameter(embedding, requires_grad=False)
        # A CPU takes as many sequences at a time as pay; any other device all of them.
        self.rows_at_once = ROWS_AT_ONCE if self.device.type == "cpu" else None
        self.all_masks_are_one = model.config.absorbing and not self.kind.tells_positions
        self._modulations = functools.lru_cache(CONDITIONS)(self._new_modulations)
        self._blank_row = functools.lru_cache(CONDITIONS)(self._new_blank_row)

    @torch.no_grad()
    def hidden(
        self,
        x: Tensor,
        t: float | Sequence[float],
        h: float | Sequence[float],
        rows: Tensor,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """Final hidden rows.

        Args:
            x: token ids, int64, shape (B, L).
            t: time of all sequences, or of each, in [0, 1].
            h: step size, likewise; less than SMALLEST_STEP is told as that.
            rows: which of the B L positions, ascending, int64, shape (N,).
            lengths: of each sequence, whose other positions are not looked at; L if not given.

        Returns:
            (N, D), for `head`.
        """
        x, rows = x.to(self.device), rows.to(self.device)
        sizes = [x.shape[1]] * len(x) if lengths is None else list(lengths)
        all_t, all_h = (e if isinstance(e, Sequence) else [e] * len(x) for e in (t, h))
        blank = self._blank(x, sizes)
        groups = list(self._groups(sizes, blank))
        if len(groups) == 1 and not blank[0]:
            return self._rows(x, rows, sizes, self._told_times(all_t, all_h))
        starts = torch.tensor([first * x.shape[1] for first, _ in groups] + [x.numel()])
        edges, parts = torch.searchsorted(rows, starts.to(rows.device)).tolist(), []
        for i, (first, last) in enumerate(groups):
            wanted = rows[edges[i] : edges[i + 1]] - first * x.shape[1]
            if len(wanted) and blank[first]:
                parts.append(self._blank_row(all_t[first], all_h[first]).expand(len(wanted), -1))
            elif len(wanted):
                told = self._told_times(all_t[first:last], all_h[first:last])
                parts.append(self._rows(x[first:last], wanted, sizes[first:last], told))
        return torch.cat(parts)

    def _blank(self, x: Tensor, sizes: Sequence[int]) -> list[bool]:
        """Which sequences hold nothing but masks, where that makes their rows equal.

        All positions attend to equal values then. Other devices than a CPU would be waited for.
        """
        if not self.all_masks_are_one or x.device.type != "cpu":
            return [False] * len(sizes)
        masks = x == self.model.config.vocab_size
        return [bool(one[:size].all()) for one, size in zip(masks, sizes, strict=True)]

    def _new_blank_row(self, t: float, h: float) -> Tensor:
        """The hidden row of every position of a text of masks, (1, D)."""
        tokens, rows = torch.full((1, 1), self.model.config.vocab_size), torch.tensor([0])
        return self._rows(tokens, rows, [1], self._told_times([t], [h]))

    def _groups(self, sizes: Sequence[int], alone: Sequence[bool]) -> Iterator[tuple[int, int]]:
        """The first of the sequences that are computed together, and the one after the last."""
        first, total, most = 0, 0, self.rows_at_once or sum(sizes)
        for number, size in enumerate(sizes):
            if number > first and (total + size > most or alone[number] or alone[number - 1]):
                yield first, number
                first, total = number, 0
            total += size
        yield first, len(sizes)

    @torch.no_grad()
    def head(self, rows: Tensor) -> Tensor:
        """Logits of hidden rows, (N, D) -> (N, V), or V + 1 columns with the mask source."""
        return self._head(rows)

    @torch.no_grad()
    def told(self, rows: Tensor, at: Tensor, x: Tensor, known: Tensor) -> Tensor:
        """See `Transformer.told`."""
        if self._joint is None:
            return rows
        at, x, known = at.to(self.device), x.to(self.device), known.to(self.device)
        tokens, there = neighbourhood(x, known, at, self.model.config.neighbours)
        return self._joint.told(rows, known_around(self.model.vocab_embed(tokens), there))

    def _told_times(self, t: Sequence[float], h: Sequence[float]) -> Condition:
        """What the times of sequences make of the network."""
        each = [self._modulations(*times) for times in zip(t, h, strict=True)]
        if all(one is each[0] for one in each):
            return each[0]
        layers = [side_by_side(of) for of in zip(*(one for one, _ in each), strict=True)]
        return layers, norms_of(final for _, final in each)

    def _new_modulations(self, t: float, h: float) -> Condition:
        """What (t, h) makes of every block, and of the final norm."""
        # Filled in place: copies from the host would be waited for.
        times = (torch.full((1,), float(e), device=self.device) for e in (t, max(h, SMALLEST_STEP)))
        c = self.model.condition(*times)
        return [layer.modulation(c) for layer in self.layers], self.kind.final(c)

    def _rows(
        self, tokens: Tensor, rows: Tensor, sizes: Sequence[int], condition: Condition
    ) -> Tensor:
        """Hidden rows of sequences that are computed together: tokens (B, L), rows (N,)."""
        tokens, rows, pack = self._packed(tokens, rows, sizes)
        cos, sin = pack.tables(self.model.rotary_emb)
        x = self.model.vocab_embed(tokens).float()
        modulations, final = condition
        for layer, m in zip(self.layers, modulations, strict=True):
            q, k, v = layer.project(self._norm(x, m.norm1, pack))
            k, v = turned(k, cos, sin), v.transpose(1, 2)
            if layer is self.layers[-1] and pack.count == 1 and not self.kind.causal:
                # From here on a row matters to itself alone.
                x, q, cos, sin = x[:, rows], q[:, rows], cos[rows], sin[rows]
                rows = torch.arange(len(rows), device=rows.device)
            y = pack.attend(turned(q, cos, sin), k, v, causal=self.kind.causal)
            x = _added(x, layer.out(y), pack.spread(m.gate1))
            x = _added(x, layer.mlp(self._norm(x, m.norm2, pack)), pack.spread(m.gate2))
        if final[0].ndim == 1:
            return self.kind.norm(x.flatten(0, 1)[rows], *final, self.dtype)
        return self._norm(x, final, pack).flatten(0, 1)[rows]

    def _packed(
        self, tokens: Tensor, rows: Tensor, sizes: Sequence[int]
    ) -> tuple[Tensor, Tensor, Pack]:
        """What passes the blocks, (S, P), where in it the rows are, and who lies where."""
        if len(set(sizes)) == 1:
            tokens, length = tokens[:, : sizes[0]], tokens.shape[1]
            rows = rows - rows // length * (length - sizes[0])
            tokens, rows = self.kind.shifted(tokens, rows)
            return tokens, rows, Pack(len(sizes), (tokens.shape[1],))
        shifted, _ = self.kind.shifted(tokens, rows[:0])
        more, at = shifted.shape[1] - tokens.shape[1], rows // tokens.shape[1]
        pack = Pack(len(sizes), tuple(size + more for size in sizes))
        flat = torch.cat([one[:size] for one, size in zip(shifted, pack.sizes, strict=True)])
        before = send(torch.tensor(pack.edges[:-1]), rows.device)
        return flat[None], rows - at * tokens.shape[1] + before[at], pack

    def _norm(self, x: Tensor, weights: NormWeights, pack: Pack) -> Tensor:
        """In float32, as in training; the result goes into a product."""
        if weights[0].ndim == 1 or len(x) == pack.count:
            return self.kind.norm(x, *weights, self.dtype)
        y = torch.empty(x.shape, dtype=self.dtype, device=x.device)
        for (first, last), weight, bias in zip(pack.places, *weights, strict=True):
            y[:, first:last] = self.kind.norm(x[:, first:last], weight, bias, self.dtype)
        return y


def _added(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    return x + y if gate is None else torch.addcmul(x, gate, y)


class _Published:
    """What is the published network's own."""

    causal = False
    tells_positions = False  # equal tokens have equal rows, wherever they are

    def __init__(self, model: Transformer) -> None:
        self.output = model.output_layer

    def shifted(self, tokens: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What passes the blocks, and where in it the rows are."""
        return tokens, rows

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        """A layer norm, (N, D) or (B, L, D), in a format."""
        if weight.ndim == 1:
            return F.layer_norm(x, x.shape[-1:], weight, bias).to(dtype)
        each = zip(x, weight, bias, strict=True)  # as if it were alone
        normed = [F.layer_norm(one, one.shape[-1:], w, b) for one, w, b in each]
        return torch.stack(normed).to(dtype)

    def final(self, c: Tensor) -> NormWeights:
        """The last norm."""
        shift, scale = self.output.adaLN_modulation(fuse(self.output.condition_fuser, c))[0].chunk(
            2
        )
        return self.output.norm_final.weight * (1.0 + scale), shift


class _Twin:
    """What is the twin of a causal language model's own."""

    def __init__(self, model: CausalNetwork) -> None:
        self.model, self.output = model, model.output_layer
        self.causal = model.config.attention == "causal"
        self.tells_positions = model.config.start_id is not None

    def shifted(self, tokens: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See `_Published`."""
        length, tokens = tokens.shape[1], self.model.shifted(tokens)
        return tokens, rows + rows // length * (tokens.shape[1] - length)

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        """A root-mean-square norm, (N, D) or (B, L, D), in a format."""
        rows = x if x.ndim == 3 else x[None]
        weight, bias = weight.view(-1, x.shape[-1]), bias.view(-1, x.shape[-1])
        epsilon = self.model.config.norm_epsilon
        return modulated_rms(rows, weight, bias, epsilon, dtype).view_as(x)

    def final(self, c: Tensor) -> NormWeights:
        """See `_Published`."""
        shift, scale = self.output.modulations(c)[0].chunk(2)
        return self.output.norm_final.weight * (1.0 + scale), shift


def _other_tree(model: FlowNetwork) -> FlowNetwork:
    """The same tensors as modules of our own."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})
