"""What can be planted, and what is then true of the model: plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """What makes a token a sink: its id, wherever it stands, or its absolute position, whatever it is."""

    token: int | None = None
    position: int | None = None

    def __str__(self) -> str:
        return f"token {self.token}" if self.position is None else f"position {self.position}"


@dataclass(frozen=True)
class SinkPlant:
    """Chosen heads attend to the target from every query that comes after it.

    Attributes:
        heads: `(layer, query head)` pairs, 0-based.
        token, position: The target; with neither, the BOS token (learned positions: position 0).
            `position` needs a model with learned positions: rotary attention cannot tell where position 0 is.
        strength: Logit of the target in nats over every other key. With `t` other keys a query gives the
            target `e^s / (e^s + t)`.
    """

    heads: Sequence[tuple[int, int]]
    token: int | None = None
    position: int | None = None
    strength: float = 40.0


@dataclass(frozen=True)
class MassivePlant:
    """One dim of the target's residual state becomes `magnitude`, written by a dense feed-forward part.

    Attributes:
        layer_in: The block whose feed-forward part writes it: the first block output that shows it.
        layer_out: The block that erases it: the first block output without it. None keeps it to the end.
        magnitude: Signed value of the activation, absolute units.
    """

    dim: int
    layer_in: int
    layer_out: int | None = None
    magnitude: float = 500.0
    token: int | None = None
    position: int | None = None


@dataclass(frozen=True)
class SuperExpertPlant:
    """The same in an MoE block: the router sends the target to `expert`, whose down_proj writes the dim.

    Attributes:
        layer_out: The block that erases it, through another expert, which then also has a large output and is
            named in the truth's `erasers`. None, the default, keeps the truth free of such a second expert.
        magnitude: Value in the residual stream, thus after the routing weight.
    """

    layer: int
    expert: int
    dim: int
    layer_out: int | None = None
    magnitude: float = 500.0
    token: int | None = None
    position: int | None = None


@dataclass(frozen=True)
class SecondaryPlant:
    """The target's state turns into the primary sink's at a middle block (Wong et al., arXiv 2512.22213).

    Needs one massive plant of another target: the same dim is written here, so the two states are parallel.

    Attributes:
        layer: The block that creates it.
        lifetime: Number of block outputs that show it; None keeps it to the end.
        magnitude: Of the shared dim; None makes it 12 times the target's own state in that block.
        heads: Heads that attend to this target alone. Heads whose key reads the massive dim (`via="massive"`)
            share their attention between the primary and every live secondary, without being named here.
        expert: The writing expert if the block is an MoE block.
    """

    layer: int
    token: int | None = None
    position: int | None = None
    lifetime: int | None = None
    magnitude: float | None = None
    heads: Sequence[tuple[int, int]] = ()
    strength: float = 40.0
    expert: int | None = None


@dataclass(frozen=True)
class PlantedHead:
    """A head that sinks.

    Attributes:
        target: Its own sink.
        shared_with: Live secondary sinks that its key cannot tell from the target; each gets an equal part.
        via: What its key reads: `massive`, the massive dim, or `flag`, a small mark in the embedding.
        reach: Distance in tokens over which rotary attention keeps 90 % of the strength, None if unlimited.
        window: Sliding window of the block; farther targets are invisible.
    """

    layer: int
    head: int
    target: Target
    strength: float
    via: str
    shared_with: tuple[Target, ...] = ()
    reach: int | None = None
    window: int | None = None


@dataclass(frozen=True)
class PlantedMassive:
    """A massive dim of a target: present in the outputs of blocks `layer_in .. layer_out - 1`.

    Attributes:
        expert: The expert that writes it; None for a dense feed-forward part.
        eraser: The expert that erases it, None if nothing or a dense part does.
        neuron: The neuron that writes it: an input of the down projection, of the expert in MoE blocks.
        eraser_neurons: The neurons that erase it, together.
        secondary: Whether it makes a secondary sink.
    """

    dim: int
    target: Target
    layer_in: int
    layer_out: int
    magnitude: float
    expert: int | None = None
    eraser: int | None = None
    secondary: bool = False
    erased: bool = False
    neuron: int | None = None
    eraser_neurons: tuple[int, ...] = ()

    def lives_at(self, layer: int) -> bool:
        """Whether the *input* of this block carries it."""
        return self.layer_in < layer <= self.layer_out


@dataclass(frozen=True)
class Truth:
    """What was planted: the answer key of a detector. Layers, heads, experts, dims and positions are 0-based.

    Attributes:
        layers: Number of blocks; `layer_out` of a dim that is never erased.
        massive: Every massive dim, secondary ones included.
        flags: The dim that marks each target; small, but constant. `(target, dim)` pairs.
        constant: The dim that is equal for all tokens, if the family needed one.
    """

    family: str
    layers: int
    heads: tuple[PlantedHead, ...]
    massive: tuple[PlantedMassive, ...]
    flags: tuple[tuple[Target, int], ...] = ()
    constant: int | None = None

    @property
    def head_set(self) -> frozenset[tuple[int, int]]:
        return frozenset((head.layer, head.head) for head in self.heads)

    @property
    def dims(self) -> frozenset[int]:
        return frozenset(item.dim for item in self.massive)

    @property
    def super_experts(self) -> tuple[tuple[int, int], ...]:
        """`(layer, expert)` that write a massive dim of a primary target."""
        return tuple(
            (item.layer_in, item.expert)
            for item in self.massive
            if item.expert is not None and not item.secondary
        )

    @property
    def erasers(self) -> tuple[tuple[int, int], ...]:
        """`(layer, expert)` that erase a massive dim: large outputs too, but they end a sink."""
        return tuple((item.layer_out, item.eraser) for item in self.massive if item.eraser is not None)

    @property
    def secondary(self) -> tuple[PlantedMassive, ...]:
        return tuple(item for item in self.massive if item.secondary)

    @property
    def reserved(self) -> frozenset[int]:
        """Dims the planting took from the model."""
        extra = set() if self.constant is None else {self.constant}
        return self.dims | {dim for _, dim in self.flags} | extra

    def share(self, head: PlantedHead, others: int) -> float:
        """Attention on the head's own target from a query that sees it and `others` ordinary keys.

        Rotary turning is left out; it is below 10 % of the strength within `head.reach`.
        """
        equal = 1 + len(head.shared_with)
        return 1.0 / (equal + others * math.exp(-head.strength))

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the derived answers spelled out."""
        return {
            **asdict(self),
            "super_experts": [list(pair) for pair in self.super_experts],
            "erasers": [list(pair) for pair in self.erasers],
            "reserved": sorted(self.reserved),
        }
