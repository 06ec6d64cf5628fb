"""Controls of interventions: changes of equal count and size that should not matter, drawn with a seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sinklens.inputs.spec import Prompt
from sinklens.tracers import signals as sig
from sinklens.tracers.interventions import EntriesSet, Entry, ExpertsPruned, HeadsZeroed, Intervention
from sinklens.tracers.trace import Trace

DRAWS = 2
"""Random controls per experiment; their effects are averaged within a prompt."""

Pair = tuple[int, int]
Instead = dict[int, tuple[int, float]]
"""By dim of an entry: the dim that is changed in its place, and in which direction."""


@dataclass(frozen=True)
class Control:
    """A change that should not matter; the effects of its draws are averaged."""

    what: str
    draws: tuple[Intervention, ...]


@dataclass(frozen=True)
class Spike:
    """A massive entry of one prompt at the block where it first appears."""

    prompt: int
    layer: int
    position: int
    dim: int
    value: float


@dataclass
class Draw:
    """Draws controls; everything comes from one seeded generator, in a fixed order."""

    rng: np.random.Generator
    trace: Trace
    prompts: Sequence[Prompt]
    taken: set[int]
    skipped: list[str] = field(default_factory=list)

    def some(self, items: Sequence[Any], n: int) -> list[Any]:
        """Up to n of the items."""
        return [items[int(i)] for i in self.rng.permutation(len(items))[:n]]

    def dims_instead(self, found: Sequence[Spike], taken: set[int]) -> list[Instead]:
        """For each draw another dim, and a sign, for each dim of the entries; [] where too few are left."""
        free = [dim for dim in range(self.trace.info.hidden_size) if dim not in taken]
        dims = sorted({spike.dim for spike in found})
        if len(free) < len(dims):
            return []
        draws = []
        for _ in range(DRAWS):
            chosen = self.some(free, len(dims))
            signs = [float(self.rng.choice([-1.0, 1.0])) for _ in dims]
            draws.append(dict(zip(dims, zip(chosen, signs, strict=True), strict=True)))
        return draws

    @staticmethod
    def shifted(sized: Sequence[tuple[Spike, float]], instead: Sequence[Instead]) -> tuple[Control, ...]:
        """Shifts of the same size on other dims of the same tokens after the same blocks."""
        draws = tuple(
            EntriesSet(
                tuple(
                    Entry(s.prompt, s.layer, s.position, chosen[s.dim][0], chosen[s.dim][1] * size, add=True)
                    for s, size in sized
                )
            )
            for chosen in instead
        )
        return (
            (Control("as many other entries of the same tokens changed by as much", draws),) if draws else ()
        )

    @staticmethod
    def held(found: Sequence[Spike], instead: Sequence[Instead]) -> tuple[Control, ...]:
        """Other dims of the same tokens held, in the same blocks, as far from 0 as the entries are without a change.

        They are overwritten rather than shifted: a shift in every block would add up in the residual stream.
        """
        draws = tuple(
            EntriesSet(
                tuple(
                    Entry(s.prompt, s.layer, s.position, chosen[s.dim][0], chosen[s.dim][1] * abs(s.value))
                    for s in found
                )
            )
            for chosen in instead
        )
        what = "as many other entries of the same tokens held as far from zero, in every later block too"
        return (Control(what, draws),) if draws else ()

    def other_experts(self, pruned: frozenset[Pair], tried: Sequence[Pair]) -> tuple[Control, ...]:
        """As many other experts of the same blocks that tokens were routed to, untried ones where there are enough."""
        routed = np.sum([record[sig.EXPERT_TOKENS].clip(0) for record in self.trace], axis=0)
        draws = []
        for _ in range(DRAWS):
            chosen: set[Pair] = set()
            for layer in sorted({layer for layer, _ in pruned}):
                gone = [expert for at, expert in pruned if at == layer]
                left = [int(e) for e in np.flatnonzero(routed[layer]) if int(e) not in gone]
                untried = [expert for expert in left if (layer, expert) not in tried]
                pool = untried if len(untried) >= len(gone) else left
                chosen |= {(layer, expert) for expert in self.some(pool, len(gone))}
            if len(chosen) == len(pruned):
                draws.append(ExpertsPruned(frozenset(chosen)))
        said = "another expert" if len(pruned) == 1 else "as many other experts"
        where = "same block" if len({layer for layer, _ in pruned}) == 1 else "same blocks"
        return (Control(f"{said} of the {where} pruned", tuple(dict.fromkeys(draws))),) if draws else ()

    def other_positions(self) -> list[int]:
        """Ordinary positions that every tried prompt has and that enough queries see."""
        shortest = min(len(prompt) for prompt in self.prompts)
        reach = shortest - 16 if shortest > 40 else shortest - 1
        return self.some([p for p in range(1, reach) if p not in self.taken], DRAWS)

    def other_heads(
        self, heads: Sequence[Pair], sinking: set[Pair], shape: tuple[int, int]
    ) -> tuple[Control, ...]:
        """As many heads of the same blocks that do not sink; of any block where these are too few."""
        layers = Counter(layer for layer, _ in heads)
        free = [(i, j) for i in range(shape[0]) for j in range(shape[1]) if (i, j) not in sinking]
        free = [pair for pair in free if self.trace.layers[pair[0]].attention]
        draws = []
        for _ in range(DRAWS):
            chosen: list[Pair] = []
            for layer, n in sorted(layers.items()):
                chosen += self.some([pair for pair in free if pair[0] == layer], n)
            rest = [pair for pair in free if pair not in chosen]
            chosen += self.some(rest, len(heads) - len(chosen))
            if len(chosen) == len(heads):
                draws.append(HeadsZeroed(frozenset(chosen)))
        what = "as many other heads, of the same blocks where there are enough, zeroed"
        return (Control(what, tuple(dict.fromkeys(draws))),) if draws else ()
