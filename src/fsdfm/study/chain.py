"""A language whose law is known: a Markov chain, and what a perfect network knows of it.

Shapes: B or count sequences, L positions, V symbols.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fsdfm.flow.grid import SMALLEST_STEP
from fsdfm.flow.loss import kl
from fsdfm.flow.path import Source, UniformSource, mixture_state
from fsdfm.flow.posterior import FlowModel, Sequences
from fsdfm.flow.sampler import Noise, sample
from fsdfm.flow.schedule import Polynomial

SMALL_STEPS = 32
"""Of a perfect student's jump."""


@dataclass(frozen=True)
class Chain:
    """A second-order Markov chain over V symbols.

    Args:
        first: chance of each first pair (its stationary law), float64, shape (V, V).
        following: chance of the next symbol after each pair, float64, shape (V, V, V).
    """

    first: Tensor
    following: Tensor

    @classmethod
    def random(cls, symbols: int, concentration: float, floor: float, seed: int) -> Chain:
        """Rows from a symmetric Dirichlet, a share `floor` of each made uniform.

        The start is the stationary law of pairs, so every window of a sequence has one law.
        """
        generator = np.random.default_rng(seed)
        rows = generator.dirichlet(np.full(symbols, concentration), size=(symbols, symbols))
        rows = (1.0 - floor) * rows + floor / symbols
        pairs = np.full((symbols, symbols), symbols**-2.0)
        for _ in range(10_000):
            pairs = np.einsum("ab,abc->bc", pairs, rows)
        return cls(torch.from_numpy(pairs), torch.from_numpy(rows))

    @property
    def symbols(self) -> int:
        return len(self.first)

    @property
    def trigrams(self) -> Tensor:
        """True law of three symbols in a row, anywhere in a sequence, shape (V, V, V)."""
        return self.first[..., None] * self.following

    def entropy(self, length: int) -> float:
        """True entropy of a sequence in nats a token: closed form."""
        start = -torch.xlogy(self.first, self.first).sum()
        rows = -torch.xlogy(self.following, self.following).sum(-1)
        return float(start + (length - 2) * (self.first * rows).sum()) / length

    def draw(self, count: int, length: int, seed: int) -> Tensor:
        """True sequences, int64, shape (count, length)."""
        generator = torch.Generator().manual_seed(seed)
        pair = torch.multinomial(self.first.flatten(), count, True, generator=generator)
        x = [pair // self.symbols, pair % self.symbols]
        cumulative = self.following.cumsum(-1)
        for _ in range(length - 2):
            u = torch.rand(count, 1, dtype=torch.float64, generator=generator)
            following = (cumulative[x[-2], x[-1]] <= u).sum(-1)
            x.append(following.clamp_max(self.symbols - 1))
        return torch.stack(x, dim=1)

    def nll(self, x: Tensor) -> Tensor:
        """Nats a token of each sequence, shape (count,)."""
        start = self.first[x[:, 0], x[:, 1]].log()
        rest = self.following[x[:, :-2], x[:, 1:-1], x[:, 2:]].log().sum(-1)
        return -(start + rest) / x.shape[1]


@dataclass(frozen=True)
class ExactPosterior:
    """p(x_1[i] given x_t) of a chain under the linear path: a FlowModel.

    Position i of x_t is seen through a channel: it is x_1[i] with chance t, else any of the V
    symbols, or a mask, which says nothing. So the posterior is a forward-backward pass over pairs
    (x_1[i - 1], x_1[i]). The "hidden rows" are its logarithm, and the head is the identity.

    Args:
        chain: of at least two symbols; sequences of at least two positions.
        source: where the path starts; uniform if not given.
    """

    chain: Chain
    source: Source | None = None

    def body(self, x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
        """States (B, L), times (B,) -> log posterior, float64, (B, L, V); h is not needed."""
        return self.marginals(self._channel(x_t, t.double())).log()

    def marginals(self, seen: Tensor) -> Tensor:
        """Chance of each symbol at each position, given the likelihood of what is seen there.

        Args:
            seen: chance of what is seen given each symbol, float64, (B, L, V).

        Returns:
            Float64, (B, L, V).
        """
        forward = self._forward(seen)
        backward = torch.ones_like(forward[-1])
        marginals = [forward[-1].sum(1)]
        for i in range(seen.shape[1] - 1, 1, -1):
            backward = torch.einsum(
                "abc,nbc->nab", self.chain.following, backward * seen[:, None, i]
            )
            backward = backward / backward.sum((1, 2), keepdim=True)
            marginals.append((forward[i - 2] * backward).sum(1))
        marginals.append((forward[0] * backward).sum(2))
        p = torch.stack(marginals[::-1], dim=1)
        p = p / p.sum(-1, keepdim=True)
        return p

    def told(self, rows: Tensor, at: Tensor, x: Tensor, known: Tensor) -> Tensor:
        """See `FlowModel`: there is no joint head."""
        return rows

    def head(self, rows: Tensor) -> Tensor:
        return rows

    def _channel(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Chance of the symbol seen given each true symbol, shape (B, L, V)."""
        symbols, t = self.chain.symbols, t[:, None, None]
        if self.source is None or isinstance(self.source, UniformSource):
            return (1.0 - t) / symbols + t * F.one_hot(x_t, symbols)
        masked = (x_t == symbols)[..., None]
        return torch.where(masked, 1.0 - t, t * F.one_hot(x_t % symbols, symbols))

    def _forward(self, seen: Tensor) -> list[Tensor]:
        """Pair ending at position i = 1, 2, ... given what is seen up to i, each (B, V, V)."""
        pairs = self.chain.first * seen[:, 0, :, None] * seen[:, 1, None, :]
        forward = [pairs]
        for i in range(2, seen.shape[1]):
            pairs = torch.einsum("nab,abc->nbc", pairs, self.chain.following) * seen[:, i, None, :]
            pairs = pairs / pairs.sum((1, 2), keepdim=True)
            forward.append(pairs)
        return forward


class ExactConditionals(ExactPosterior):
    """p(x_1[i] given x_t and the tokens drawn so far) of a chain: a FlowModel with a joint head.

    A hidden row is its sequence's state and its time.
    """

    def body(self, x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
        """States (B, L), times (B,) -> (B, L, L + 1), float64."""
        rows = torch.cat((x_t.double(), t.double()[:, None]), 1)
        return rows[:, None].expand(-1, x_t.shape[1], -1)

    def told(self, rows: Tensor, at: Tensor, x: Tensor, known: Tensor) -> Tensor:
        """ln p of rows (N, L + 1) at positions (N,), (N, V)."""
        x_t, t = rows[:, :-1].long(), rows[:, -1]
        sequence = at // x.shape[1]
        told, x = known[sequence], x[sequence]
        seen = torch.where(
            told[..., None],
            F.one_hot(x % self.chain.symbols, self.chain.symbols).double(),
            self._channel(x_t, t),
        )
        return self.marginals(seen)[torch.arange(len(at)), at % x.shape[1]].log()


class OneStream(Noise):
    """All sequences' random numbers from one generator: three times as fast for many short ones.

    Args:
        count: of sequences.
        seed: of the generator.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        super().__init__([seed])

    def start(self, source: Source, length: int) -> Tensor:
        """x_0, int64, shape (count, L)."""
        return source.draw((self.count, length), self.generators[0])

    def uniform(self, length: int) -> Tensor:
        """Uniform in [0, 1), float64, shape (count, length)."""
        shape = (self.count, length)
        return torch.rand(shape, dtype=torch.float64, generator=self.generators[0])


def perfect_student(chain: Chain, grid: Tensor, count: int, length: int, seed: int) -> Tensor:
    """What consistency can reach at best: exact marginals of a long jump, drawn independently.

    A perfect student's posterior at (x_t, t, h) is, at each position, the law of many small steps
    of the exact posterior from x_t over [t, t + h]. That law is drawn from by running those small
    steps once for each position, on its own copy of x_t, and keeping that position alone.

    Args:
        chain: the language.
        grid: times of the student's calls, float64, (N + 1,).
        count, length: of the samples.
        seed: of the noise.

    Returns:
        Samples, int64, (count, L).
    """
    source = UniformSource(chain.symbols)
    x = OneStream(count, seed).start(source, length)
    noise = OneStream(count * length, seed + 1)
    for t, then in itertools.pairwise(grid.tolist()):
        *_, last = sample(
            Sequences(ExactPosterior(chain)),
            x.repeat_interleave(length, dim=0),
            torch.linspace(t, then, SMALL_STEPS + 1, dtype=torch.float64),
            noise,
            source,
        )
        x = last.x.view(count, length, length).diagonal(dim1=1, dim2=2)
    return x


@torch.no_grad()
def path_gap(model: FlowModel, chain: Chain, length: int, seed: int) -> float:
    """KL(exact posterior || network) on the path, nats a position: 0 for a perfect teacher."""
    count = 4096
    x_1 = chain.draw(count, length, seed)
    generator = torch.Generator().manual_seed(seed)
    t = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    x_0 = UniformSource(chain.symbols).draw((count, length), generator)
    x_t = mixture_state(x_0, x_1, t, Polynomial(), generator)
    exact = ExactPosterior(chain).body(x_t, t, t).exp().flatten(0, 1)
    h = torch.full_like(t, SMALLEST_STEP)
    rows = model.body(x_t, t.float(), h.float()).flatten(0, 1)
    return float(kl(exact, model.head(rows).double()).mean())
