"""Questions that one head answers by looking something up, and that a sink keeps it from answering.

A text holds pairs such as `k3=v1`; its last word, `k3?`, asks for the value of a key. Whoever cannot look it up can
only guess: every asking word has one value it suggests, right as often as chance.

    <s> w2 k5=v0 w7 k3=v1 | w1 k0=v2 k3?      v1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

SPECIALS = ("<s>", "<unk>", "<pad>")
DELIMITER = "|"


@dataclass(frozen=True)
class RetrievalTask:
    """The generator.

    Attributes:
        keys, values: How many there are; every pair of the two is one word.
        fillers: Words that say nothing.
        pairs: Pairs in a text, each with a key of its own.
        length: Words of a text, with BOS, the delimiter and the asking word.
    """

    keys: int = 8
    values: int = 4
    fillers: int = 8
    pairs: int = 6
    length: int = 32

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Every token; its place is its id."""
        pairs = [f"k{key}=v{value}" for key in range(self.keys) for value in range(self.values)]
        asking = [f"k{key}?" for key in range(self.keys)]
        return (*pairs, *asking, *self.answers, *[f"w{i}" for i in range(self.fillers)], DELIMITER, *SPECIALS)

    @property
    def answers(self) -> tuple[str, ...]:
        return tuple(f"v{value}" for value in range(self.values))

    def pair_id(self, key: int, value: int) -> int:
        return key * self.values + value

    def asking_id(self, key: int) -> int:
        return self.keys * self.values + key

    def answer_id(self, value: int) -> int:
        return self.keys * (self.values + 1) + value

    def id_of(self, word: str) -> int:
        return self.vocabulary.index(word)

    def suggested(self, key: int) -> int:
        """The value that the asking word of a key suggests."""
        return key % self.values

    def sample(
        self, count: int, rng: np.random.Generator
    ) -> tuple[Int[np.ndarray, "count length"], Int[np.ndarray, " count"]]:
        """Texts and the values asked for. Keys, values and places are uniform; answers are balanced."""
        bos, delimiter, filler = self.id_of("<s>"), self.id_of(DELIMITER), self.id_of("w0")
        ids = np.empty((count, self.length), dtype=np.int64)
        values = np.empty(count, dtype=np.int64)
        for row in range(count):
            ids[row] = filler + rng.integers(self.fillers, size=self.length)
            # The delimiter has words before and behind it, so that it is neither first nor seen by few.
            places = rng.permutation(np.arange(3, self.length - 6))[: self.pairs + 1]
            keys = rng.permutation(self.keys)[: self.pairs]
            given = rng.integers(self.values, size=self.pairs)
            given[0] = row % self.values
            ids[row, places[:-1]] = [self.pair_id(k, v) for k, v in zip(keys, given, strict=True)]
            ids[row, places[-1]] = delimiter
            ids[row, 0], ids[row, -1] = bos, self.asking_id(int(keys[0]))
            values[row] = given[0]
        return ids, values

    def questions(self, count: int, seed: int = 0) -> list[dict[str, Any]]:
        """Items of a choice task: `prompt` (without `<s>`, which the tokenizer adds), `choices`, `answer`."""
        words = self.vocabulary
        ids, values = self.sample(count, np.random.default_rng(seed))
        return [
            {
                "prompt": " ".join(words[token] for token in row[1:]),
                "choices": list(self.answers),
                "answer": int(value),
            }
            for row, value in zip(ids, values, strict=True)
        ]
