"""An n-gram model with modified Kneser-Ney smoothing over token ids, drawn token by token.

    p_k(w | h) = (c_k(h w) - D_k(c_k(h w))) / c_k(h) + b_k(h) p_{k-1}(w | h')
    b_k(h)     = sum_w D_k(c_k(h w)) / c_k(h)

k is the order, h the k - 1 tokens before w, and h' the same without its first. c_k counts
occurrences at the highest order and, below it, the different tokens that stand before h' w.
c_k(h) is the sum over w. p_0 is uniform; where h was never seen, p_k(w | h) = p_{k-1}(w | h').

EOS is a token like the others: it ends every document, and the model draws it. But nothing before
it tells what follows: each document stands after order - 1 tokens of EOS, whatever came before.

Contexts are numbered by a tree that grows leftwards: the number of a context is its place among the
keys (number of the context without its first token) * V + first token. So one walk from the root
finds the context of every order, and no key outgrows 64 bits, whatever the order.

Source: Chen and Goodman, "An empirical study of smoothing techniques for language modeling",
TR-10-98, Harvard, 1998, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fsdfm.core.errors import ConfigError, DataError

HIGHEST_ORDER = 8
"""Text repeats so little beyond that higher orders add memory and nothing else."""
FALLBACK_DISCOUNTS = (0.0, 0.5, 1.0, 1.5)
"""Of counts 0, 1, 2, 3 and more, where too few n-grams are rare for an estimate."""

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]
Number = TypeVar("Number", np.int64, np.float64)


@dataclass(frozen=True, slots=True)
class _Order:
    """What is known of one order k; C contexts of k - 1 tokens, G distinct n-grams of k."""

    contexts: Ids
    """Keys of the contexts, sorted, shape (C,); a context's number is its place here."""
    grams: Ids
    """Number of the context * V + next token, sorted, shape (G,)."""
    counts: NDArray[np.int32]
    """c_k of each n-gram, shape (G,)."""
    discounts: Floats
    """D_k of counts 0, 1, 2, 3 and more, shape (4,)."""
    first: Ids
    """Context i has the n-grams first[i] to first[i + 1] - 1; shape (C + 1,)."""
    total: Floats
    """c_k of each context, shape (C,)."""
    backoff: Floats
    """b_k of each context, in (0, 1), shape (C,)."""
    mass: Floats
    """Sum of the discounted counts of all n-grams before this one, shape (G + 1,)."""

    @classmethod
    def count(cls, contexts: Ids, grams: Ids, counts: NDArray[np.int64], vocab_size: int) -> _Order:
        """Sums and discounts of distinct, sorted n-grams and their counts."""
        context = grams // vocab_size
        discounts = _discounts(counts)
        taken = discounts[np.minimum(counts, 3)]
        total: Floats = np.bincount(context, counts, len(contexts)).astype(np.float64)
        return cls(
            contexts=contexts,
            grams=grams,
            counts=counts.astype(np.int32),
            discounts=discounts,
            first=_running_sum(np.bincount(context, minlength=len(contexts))),
            total=total,
            backoff=np.bincount(context, taken, len(contexts)) / total,
            mass=_running_sum(counts - taken),
        )


@dataclass(frozen=True, slots=True)
class NgramModel:
    """A fitted model."""

    vocab_size: int
    """V: ids are in [0, V)."""
    eos_id: int
    """The token that ends a document."""
    orders: tuple[_Order, ...]
    """Orders 1 to the highest."""

    @classmethod
    def fit(
        cls,
        ids: NDArray[np.integer[Any]],
        *,
        vocab_size: int,
        eos_id: int,
        order: int = 4,
        advance: Callable[[], None] = lambda: None,
    ) -> NgramModel:
        """Count a text.

        Args:
            ids: the tokens, each document followed by EOS, shape (N,).
            vocab_size: V, at least 1.
            eos_id: the token that ends a document.
            order: tokens of the longest n-gram, from 1 to 8.
            advance: called when a stage is done, `stages(order)` times in all.

        Raises:
            ConfigError: order out of range.
            DataError: no tokens.
        """
        check_order(order)
        ids = _checked(ids, vocab_size)
        if not len(ids):
            raise DataError("An n-gram model needs at least one token to count, got none.")
        node = np.zeros(len(ids), np.int64)
        contexts = [np.zeros(1, np.int64)]
        for before in _before(ids, order, eos_id):
            keys, node = np.unique(node * vocab_size + before, return_inverse=True)
            contexts.append(keys)
            advance()
        grams, counts = np.unique(node * vocab_size + ids, return_counts=True)
        del node
        orders: list[_Order] = []
        while True:
            orders.append(_Order.count(contexts.pop(), grams, counts, vocab_size))
            advance()
            if not contexts:
                return cls(vocab_size, eos_id, tuple(reversed(orders)))
            grams, counts = _continuations(orders[-1], vocab_size)

    @property
    def order(self) -> int:
        """Tokens of the longest n-gram."""
        return len(self.orders)

    def log_probability(self, ids: NDArray[np.integer[Any]]) -> Floats:
        """Log-probability of each token of a text, given those before it.

            ln p(ids[i] | ids[:i])

        Args:
            ids: tokens of whole documents, each followed by EOS; the first starts one. Shape (N,).

        Returns:
            Nats, each below 0 (0 in a vocabulary of one token), shape (N,).
        """
        ids = _checked(ids, self.vocab_size)
        p = np.full(len(ids), 1.0 / self.vocab_size)
        node = np.zeros(len(ids), np.int64)
        before = _before(ids, self.order, self.eos_id)
        for level, known in enumerate(self.orders):
            if level:
                node = _find(known.contexts, _key(node, next(before), self.vocab_size))
            seen = node >= 0
            context = node[seen]
            gram = _find(known.grams, _key(context, ids[seen], self.vocab_size))
            count = np.where(gram >= 0, known.counts[gram], 0)
            kept = count - known.discounts[np.minimum(count, 3)]
            p[seen] = kept / known.total[context] + known.backoff[context] * p[seen]
        logs: Floats = np.log(p)
        return logs

    def sample(self, length: int, seed: int) -> list[int]:
        """Draw a text token by token, from the start of a document on.

        A draw starts at the highest order whose context was seen. With chance b_k it moves down an
        order; else it takes a token in proportion to the discounted counts there. That is the
        interpolated law itself: no distribution over the vocabulary is ever built.

        Args:
            length: tokens to draw, at least 1; another document starts after each EOS.
            seed: at least 0; the same seed gives the same text, and a longer one begins alike.

        Returns:
            `length` ids, EOS among them.
        """
        chance = np.random.default_rng(seed)
        start = [self.eos_id] * (self.order - 1)
        ids, history = [], start
        for _ in range(length):
            # As many numbers a token whatever is drawn.
            token = self._draw(history, chance.random(self.order + 1))
            ids.append(token)
            history = start if token == self.eos_id else [token, *history[:-1]][: len(start)]
        return ids

    def _draw(self, history: list[int], uniforms: Floats) -> int:
        """One token after `history` (the latest first), by a number in [0, 1) for each order."""
        nodes = [0]
        for known, before in zip(self.orders[1:], history, strict=True):
            key = nodes[-1] * self.vocab_size + before
            place = int(known.contexts.searchsorted(key))
            if place == len(known.contexts) or known.contexts[place] != key:
                break
            nodes.append(place)
        for level in range(len(nodes) - 1, -1, -1):
            known, node = self.orders[level], nodes[level]
            first, end = int(known.first[node]), int(known.first[node + 1])
            at = known.mass[first] + uniforms[level + 1] * known.total[node]
            if at < known.mass[end]:
                place = first + int(known.mass[first + 1 : end].searchsorted(at, side="right"))
                return int(known.grams[place] % self.vocab_size)
        return int(uniforms[0] * self.vocab_size)


def stages(order: int) -> int:
    """Stages of a fit, which take about as long as each other: contexts, then n-grams."""
    return 2 * order - 1


def check_order(order: int) -> None:
    """Refuse an order that cannot be fitted.

    Raises:
        ConfigError: it is not from 1 to 8.
    """
    if not 1 <= order <= HIGHEST_ORDER:
        raise ConfigError(f"order must be from 1 to {HIGHEST_ORDER}, got {order}.")


def _checked(ids: NDArray[np.integer[Any]], vocab_size: int) -> Ids:
    """The ids as int64; a wrong id would be taken for another one."""
    if len(ids) and not (ids.min() >= 0 and ids.max() < vocab_size):
        raise ValueError(f"ids must be in [0, {vocab_size}), got {ids.min()} to {ids.max()}.")
    return ids.astype(np.int64, copy=False)


def _continuations(longer: _Order, vocab_size: int) -> tuple[Ids, NDArray[np.int64]]:
    """N-grams one token shorter, and the number of tokens that each was seen behind."""
    shorter, token = longer.contexts // vocab_size, longer.grams % vocab_size
    keys = shorter[longer.grams // vocab_size] * vocab_size + token
    return np.unique(keys, return_counts=True)


def _before(ids: Ids, order: int, eos_id: int) -> Iterator[Ids]:
    """For j = 1 to order - 1, the token j places before each, shape (N,).

    From the start of a document on leftwards it is EOS, whatever stands there.
    """
    before = np.full_like(ids, eos_id)
    ended = np.zeros(len(ids), np.bool_)
    for j in range(1, order):
        before[j:] = ids[:-j]
        before[:j] = eos_id
        before[ended] = eos_id
        ended |= before == eos_id
        yield before


def _key(node: Ids, token: Ids, vocab_size: int) -> Ids:
    """Key of a token at a node; below 0, so that it is never found, where the node is -1."""
    return node * vocab_size + token


def _find(keys: Ids, wanted: Ids) -> Ids:
    """Place of each wanted key among the sorted ones, or -1."""
    place = np.minimum(keys.searchsorted(wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, place, -1)


def _discounts(counts: NDArray[np.int64]) -> Floats:
    """What a count of 0, 1, 2, 3 and more gives up to the order below, shape (4,).

        D_j = j - (j + 1) Y n_{j+1} / n_j,  Y = n_1 / (n_1 + 2 n_2)

    n_j is the number of n-grams with count j. FALLBACK_DISCOUNTS where one of them is missing or
    an estimate is out of (0, j), as in text with few symbols.

    Source: Chen and Goodman 1998, equation 26.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6).astype(np.float64)
    if n[1:5].all():
        y = n[1] / (n[1] + 2.0 * n[2])
        found = np.array([0.0, *(j - (j + 1) * y * n[j + 1] / n[j] for j in (1, 2, 3))])
        if (found[1:] > 0.0).all():
            return found
    return np.array(FALLBACK_DISCOUNTS)


def _running_sum(values: NDArray[Number]) -> NDArray[Number]:
    """0 and the sums of the first 1, 2, ... values, shape (n + 1,)."""
    return np.concatenate([np.zeros(1, values.dtype), np.cumsum(values)])
