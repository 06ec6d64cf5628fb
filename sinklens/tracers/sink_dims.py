"""Sink dims: the dims of the hidden state in which sink tokens are large, and the value by which VAR finds them.

A token is a sink of a layer if, in the state that enters the layer,

    φ(x) = max over the sink dims d of |x_d| / RMS(x),   RMS(x) = sqrt(mean x² + 1e-6)

reaches a threshold (VAR, arXiv 2503.03321). φ is at most sqrt(D) for D dims, and φ²/D is the share of the state's
energy in that one dim. The RMS is plain: no learned weight of a norm takes part. The largest entry over *all* dims
is never meant: models have dims that are large for every token, and then every token would be a sink.

Where the dims of a model come from: see `discover_dims` for finding them; `known` for those that others published.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinklens.core.errors import UsageError
from sinklens.core.suggest import did_you_mean

EPS = 1e-6
TAU = 20.0
"""VAR's threshold of φ."""
TAU_ENERGY = TAU**2 / 4096
"""The same as a share of the state's energy, at the 4096 dims of the model it was chosen for: 0.0977."""

Provenance = Literal["discovered", "published", "given"]
THIRD_PARTY = "third party"


@dataclass(frozen=True)
class SinkDim:
    """One dim and how clearly it stands out; None where its source does not say.

    Attributes:
        strength: |x_d| / RMS(x) of the reference token, median over prompts and middle layers.
        baseline: The same of all other tokens.
        margin: `strength` over that of the next dim in order.
    """

    dim: int
    strength: float | None = None
    baseline: float | None = None
    margin: float | None = None


@dataclass(frozen=True)
class SinkDims:
    """The sink dims of a model, and where they come from.

    Attributes:
        dims: Strongest first. Empty if the search found none, and then `failed` says why.
        provenance: `discovered` on the model at hand, `published` by others, or `given` by the caller.
        source: Of published ones title and address; of discovered ones what they were found on.
        status: Of published ones `paper` or `third party`; else `measured` or `given`.
        failed: Why no dim was chosen: a sentence.
        standing_out: Whether any dim stood out at all; False means that the model has no massive activation where
            it was looked for, True with `failed` that it has, and that they do not single out a few dims.
        also: What other notes on the same model give.
    """

    dims: tuple[SinkDim, ...]
    hidden_size: int
    provenance: Provenance
    source: str
    status: str
    failed: str | None = None
    standing_out: bool = True
    also: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        for item in self.dims:
            if not 0 <= item.dim < self.hidden_size:
                raise UsageError(
                    f"There is no dim {item.dim}: the hidden states have {self.hidden_size} dims, counted from 0."
                )

    @property
    def indices(self) -> tuple[int, ...]:
        return tuple(item.dim for item in self.dims)

    def __bool__(self) -> bool:
        return bool(self.dims)

    @classmethod
    def given(cls, dims: tuple[int, ...], hidden_size: int) -> SinkDims:
        """Dims that the caller names."""
        return cls(
            tuple(map(SinkDim, dict.fromkeys(dims))), hidden_size, "given", "named by the user", "given"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SinkDims:
        dims = tuple(SinkDim(**item) for item in data["dims"])
        return cls(**{**data, "dims": dims, "also": tuple(tuple(other) for other in data.get("also", ()))})


@dataclass(frozen=True)
class Cut:
    """The threshold of φ for a model.

    Attributes:
        tau: A token is a sink if its φ is at least this, or above it if `strict`.
        energy: The same as a share of a state's energy.
        note: Why it is not the absolute one that was asked for: a sentence.
    """

    tau: float
    energy: float
    strict: bool = False
    note: str | None = None

    def reached(self, phi: Any) -> Any:
        """Which values of φ (array or tensor) make a sink."""
        return phi > self.tau if self.strict else phi >= self.tau


def cut_for(
    hidden_size: int, tau: float = TAU, tau_energy: float | None = None, *, strict: bool = False
) -> Cut:
    """The threshold of φ in a model of `hidden_size` dims.

    An absolute threshold above the largest possible φ could never be reached, and "no sink" would mean nothing. Then
    VAR's share of the energy is taken instead, and `note` says so.

    Args:
        tau: Absolute.
        tau_energy: Share of the energy in one dim; given, it counts instead of `tau`.
        strict: Above instead of at least, as the official code has it.

    Raises:
        UsageError: A threshold that is not positive, or a share above 1.
    """
    if not tau > 0 or (tau_energy is not None and not 0 < tau_energy <= 1):
        raise UsageError(
            "A threshold of φ is above 0, and one of the energy a share between 0 and 1.",
            detail=f"Got tau={tau}, tau_energy={tau_energy}.",
        )
    bound = math.sqrt(hidden_size)
    if tau_energy is None and tau <= bound:
        return Cut(tau, tau**2 / hidden_size, strict)
    share = TAU_ENERGY if tau_energy is None else tau_energy
    note = None
    if tau_energy is None:
        note = (
            f"tau {tau:g} cannot be reached with {hidden_size} dims, where φ is at most {bound:.3g}; taken instead: "
            f"the share of a state's energy that tau {TAU:g} means with 4096 dims, {100 * share:.2f} %, here "
            f"φ = {math.sqrt(share * hidden_size):.3g}."
        )
    return Cut(math.sqrt(share * hidden_size), share, strict, note)


def ratios(x: Float[Tensor, "... dim"], eps: float = EPS) -> Float[Tensor, "... dim"]:
    """|x| / RMS(x) of every entry, in float32."""
    x = x.detach().float()
    return x.abs() / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def phi(x: Float[Tensor, "... dim"], dims: tuple[int, ...], eps: float = EPS) -> Float[Tensor, "..."]:
    """φ of every state: the largest |x_d| / RMS(x) over the sink dims, in float32.

    Raises:
        UsageError: No dims.
    """
    if not dims:
        raise UsageError("φ needs at least one sink dim.", hint="Find them, or name published ones.")
    x = x.detach().float()
    root = (x.square().mean(-1) + eps).sqrt()
    return x[..., list(dims)].abs().amax(-1) / root


def sinks(x: Float[Tensor, "... dim"], dims: tuple[int, ...], cut: Cut) -> Bool[Tensor, "..."]:
    """Which states are those of sinks; none if there are no sink dims."""
    if not dims:
        return torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
    return cut.reached(phi(x, dims))


@dataclass(frozen=True)
class SinkRule:
    """Which tokens of a run are sinks: φ over these dims, and its threshold.

    Attributes:
        dims: Possibly none, when no token is a sink.
        tau, tau_energy, strict: As in `cut_for`.
    """

    dims: SinkDims
    tau: float = TAU
    tau_energy: float | None = None
    strict: bool = False

    @property
    def cut(self) -> Cut:
        return cut_for(self.dims.hidden_size, self.tau, self.tau_energy, strict=self.strict)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "dims": self.dims.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SinkRule:
        return cls(**{**data, "dims": SinkDims.from_json(data["dims"])})


@dataclass(frozen=True)
class Entry:
    """Published sink dims of one model; `hidden_size` is None where the source does not say it."""

    model: str
    ids: tuple[str, ...]
    dims: tuple[int, ...]
    hidden_size: int | None
    source: str
    status: str
    also: tuple[tuple[int, ...], ...] = ()


@cache
def table() -> tuple[Entry, ...]:
    """All published sink dims that are bundled."""
    data = tomllib.loads(Path(__file__).with_name("sink_dims.toml").read_text(encoding="utf-8"))
    entries = []
    for row in data["dims"]:
        source = data["sources"][row["source"]]
        entries.append(
            Entry(
                row["model"],
                tuple(row["ids"]),
                tuple(row["dims"]),
                row.get("hidden_size"),
                ", ".join(part for part in (source["title"], source["url"]) if part),
                row["status"],
                tuple(map(tuple, row.get("also", ()))),
            )
        )
    return tuple(entries)


def published(model: str) -> Entry | None:
    """The bundled entry of a model by its name on the hub or in the table (case and `@revision` aside)."""
    name = model.partition("@")[0].casefold()
    return next((e for e in table() if name in {e.model.casefold(), *(i.casefold() for i in e.ids)}), None)


def known(model: str, hidden_size: int, *, third_party: bool = False) -> SinkDims:
    """Published sink dims of a model.

    Args:
        model: Its name on the hub, or in the table.
        hidden_size: Of the decoder at hand; dims of a model of another width would mean nothing in it.
        third_party: Also take dims that neither authors nor a paper stand for.

    Raises:
        UsageError: None are bundled, they are third-party ones, or they belong to another width.
    """
    entry = published(model)
    if entry is None:
        names = [e.model for e in table()]
        raise UsageError(
            f"No published sink dims are known for {model!r}.",
            detail=did_you_mean(model, names) or f"They are known for: {', '.join(names)}.",
            hint="Leave them out, and they are searched for on the model itself.",
        )
    if entry.status == THIRD_PARTY and not third_party:
        raise UsageError(
            f"The sink dims listed for {entry.model} are a third party's.",
            detail=f"{', '.join(map(str, entry.dims))}; {entry.source}.",
            hint="Ask for third-party dims, or leave them out, and they are searched for on the model itself.",
        )
    if entry.hidden_size is not None and entry.hidden_size != hidden_size:
        raise UsageError(
            f"The sink dims of {entry.model} belong to {entry.hidden_size} dims; this model has {hidden_size}.",
            hint="Leave them out, and they are searched for on the model itself.",
        )
    dims = tuple(map(SinkDim, entry.dims))
    return SinkDims(dims, hidden_size, "published", entry.source, entry.status, also=entry.also)
