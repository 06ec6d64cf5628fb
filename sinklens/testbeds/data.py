"""The language of the trained testbeds: small worlds of words in which a head must sometimes stay silent.

A sequence wanders inside one of four topics (a sticky Markov chain). Two things are predictable from the
context and nothing else is:

* after a *trigger* (`again`, `twice`) the word before the trigger comes back ("river again river");
* a *key* (a name) that has occurred before is mostly followed by what followed it last time.

A name seen for the first time, or a noun, gives an induction head nothing to do. That pressure, "act only if the
context allows it", is what attention sinks relieve. The backcopy half follows the Bigram-Backcopy task of Guo et al.
(arXiv 2410.13835); the topics and the induction keys are this project's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from jaxtyping import Float, Int

# fmt: off
NAMES = (
    "Anna", "Ben", "Cara", "Dan", "Ella", "Finn", "Gwen", "Hugo", "Iris", "Jack", "Kate", "Leo",
    "Mia", "Noah", "Olga", "Paul", "Quinn", "Rosa", "Sam", "Tina", "Uma", "Vera", "Will", "Xena",
    "Yara", "Zoe", "Ada", "Bob", "Clara", "Dora", "Emil",
)
NOUNS = (
    "street", "tide", "moss", "bread", "tram", "wave", "fern", "salt", "shop", "shell", "pine",
    "soup", "bridge", "sail", "owl", "spoon", "tower", "sand", "oak", "rice", "lamp", "reef",
    "deer", "apple", "market", "coral", "leaf", "honey", "train", "harbour", "fox",
)
# fmt: on
TRIGGERS = ("again", "twice")
SPECIALS = ("<s>", "<unk>", "<pad>")


class QueryClass(IntEnum):
    """What the word at a position lets the model predict about the next one."""

    BOS = 0  # the first token: nothing
    TRIGGER = 1  # the next word is the word before this one
    KEY_SEEN = 2  # the next word is mostly what followed this name last time
    KEY_FIRST = 3  # a name without a past: only topic statistics
    PLAIN = 4  # a noun: only topic statistics


@dataclass(frozen=True)
class InductionTask:
    """The generator. All defaults together are the world of the bundled checkpoints.

    Attributes:
        topics: Symbol `i` belongs to topic `i mod topics`.
        stay: Probability mass of a word's successors that stays in its topic.
        concentration: Of the Dirichlet from which each word's successors are drawn; small is peaked.
        trigger_rate: Probability that a name or noun is followed by a trigger, where the step is free.
        recall: Probability that a known name brings back what followed it; otherwise the step is free. Below 1,
            so that names which follow each other do not repeat for ever.
        chain_seed: Seed of the transition matrix. The language is the same for every model seed.
    """

    topics: int = 4
    stay: float = 0.95
    concentration: float = 0.3
    trigger_rate: float = 0.15
    recall: float = 0.95
    chain_seed: int = 0

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Every token; its place is its id. Names first, then nouns, triggers and special tokens."""
        return (*NAMES, *NOUNS, *TRIGGERS, *SPECIALS)

    @property
    def keys(self) -> int:
        """Number of induction keys; they are the first ids."""
        return len(NAMES)

    @property
    def ordinary(self) -> int:
        """Number of symbols that are neither triggers nor special tokens."""
        return len(NAMES) + len(NOUNS)

    @property
    def symbols(self) -> int:
        return self.ordinary + len(TRIGGERS)

    @property
    def bos_id(self) -> int:
        return self.symbols

    def transition(self) -> Float[np.ndarray, "symbol symbol"]:
        """Probability of the next symbol (column) after a symbol (row) where the context decides nothing."""
        rng = np.random.RandomState(self.chain_seed)
        n = self.ordinary
        rows = rng.dirichlet(np.full(n, self.concentration), size=n)
        np.fill_diagonal(rows, 0)
        topic = np.arange(n) % self.topics
        inside = topic[:, None] == topic[None, :]
        rows = self.stay * rows * inside / (rows * inside).sum(1, keepdims=True) + (
            1 - self.stay
        ) * rows * ~inside / (rows * ~inside).sum(1, keepdims=True)
        matrix = np.zeros((self.symbols, self.symbols))
        matrix[:n, :n] = (1 - self.trigger_rate) * rows
        matrix[:n, n:] = self.trigger_rate / len(TRIGGERS)
        matrix[n:, :n] = 1 / n
        return matrix

    def sample(self, count: int, length: int, rng: np.random.Generator) -> Int[np.ndarray, "count length"]:
        """`count` sequences of `length` tokens, each with BOS first."""
        cumulative = self.transition().cumsum(1)
        ids = np.empty((count, length), dtype=np.int64)
        ids[:, 0] = self.bos_id
        ids[:, 1] = rng.integers(self.ordinary, size=count)
        successor = np.full((count, self.symbols), -1, dtype=np.int64)
        rows = np.arange(count)
        for t in range(2, length):
            last = ids[:, t - 1]
            drawn = (rng.random(count)[:, None] > cumulative[last]).sum(1).clip(max=self.symbols - 1)
            known = successor[rows, last]
            recalled = (last < self.keys) & (known >= 0) & (rng.random(count) < self.recall)
            following = np.where(recalled, known, drawn)
            following = np.where(last >= self.ordinary, ids[:, t - 2], following)
            ids[:, t] = following
            successor[rows, last] = following
        return ids

    def classify(self, ids: Int[np.ndarray, "count length"]) -> Int[np.ndarray, "count length"]:
        """The `QueryClass` of every position, from the tokens up to that position only."""
        classes = np.full(ids.shape, QueryClass.PLAIN, dtype=np.int64)
        earlier = np.tril(ids[:, :, None] == ids[:, None, :], k=-1).any(2)
        is_key = ids < self.keys
        classes[is_key & ~earlier] = QueryClass.KEY_FIRST
        classes[is_key & earlier] = QueryClass.KEY_SEEN
        classes[(ids >= self.ordinary) & (ids < self.symbols)] = QueryClass.TRIGGER
        classes[ids >= self.symbols] = QueryClass.BOS
        return classes

    def floor(self, ids: Int[np.ndarray, "count length"]) -> float:
        """Mean loss in nats of a reader who knows the language: no model can do better on average."""
        matrix = self.transition()
        current, following = ids[:, 1:-1], ids[:, 2:]
        chance = matrix[current, following]
        known = self._known_successors(ids)[:, 1:-1]
        recalled = self.recall * (known == following) + (1 - self.recall) * chance
        chance = np.where((current < self.keys) & (known >= 0), recalled, chance)
        chance = np.where(current >= self.ordinary, 1.0, chance)
        first = np.full((len(ids), 1), 1 / self.ordinary)
        return float(-np.log(np.concatenate([first, chance], 1)).mean())

    def _known_successors(self, ids: Int[np.ndarray, "count length"]) -> Int[np.ndarray, "count length"]:
        """What followed each token at its last earlier occurrence, -1 if it did not occur."""
        rows = np.arange(len(ids))
        successor = np.full((len(ids), len(self.vocabulary)), -1, dtype=np.int64)
        known = np.full(ids.shape, -1, dtype=np.int64)
        for t in range(ids.shape[1]):
            known[:, t] = successor[rows, ids[:, t]]
            if t + 1 < ids.shape[1]:
                successor[rows, ids[:, t]] = ids[:, t + 1]
        return known
