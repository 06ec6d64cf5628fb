"""Massive activations set to zero, or to what they are on average."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sinklens.core.errors import ModelError, UsageError
from sinklens.core.papers import MASSIVE_ACTIVATIONS
from sinklens.inputs.spec import Prompt
from sinklens.models.anatomy import find_anatomy
from sinklens.models.spec import OpenedModel
from sinklens.tracers.batch import collate, forward
from sinklens.tracers.interventions import state_edit
from sinklens.tracers.states import residual_tap

from .edits import Edits
from .effect import NothingEdited
from .method import Method, registry
from .tokens import Tokens

Mean = tuple[int, bool, int, float]
"""Layer, whether it is a starting token's, dim, signed mean."""


@registry.register("massive-activations")
@dataclass(frozen=True, kw_only=True)
class MassiveActivations(Method):
    """Overwrites massive activations, by 0 or by their mean, to see whether their value carries information.

    How it is computed: an entry |h[t, j]| of the residual stream after a block is massive if it exceeds `absolute`
    and is at least `relative` times the median of |h| over all real tokens and dims of the prompt. `calibrated`
    finds these entries on calibration prompts and keeps their signed mean per layer, dim, and kind of token: the
    prompt's first token, or any other. On a model, entries are found again by the same rule in the layers asked for;
    those of a kind and dim that calibration knows are overwritten. By default this happens once, after the first
    layer that has any. Generated tokens are held against the median of their prompt.

    Compared with the paper: Sun et al. overwrite constants at the block where the entries first appear, and so does
    this. Means are signed: the mean of magnitudes would flip every negative one. `control=True` is their control: as
    many entries of the prompt, those whose magnitude is nearest to the median, become 0.

    When not to trust it: the rule is absolute, and narrow models or unusual scales never meet it; see
    `absolute` and `relative`, and say so when they are changed. Means of few prompts describe these prompts. That
    0 hurts and the mean does not shows that the size matters and its variation does not, on the inputs looked at.

    Args:
        means: `(layer, starting token, dim, signed mean)`, as `calibrated` fills it in; empty means that none was
            found, and then nothing is edited.
        to: What they become.
        layers: `first` (the first layer of `means`), `all` of them, or layers by number (0-based).
        absolute: Floor of |h|.
        relative: Multiple of the median.
        control: Zero as many entries of median magnitude instead.
    """

    means: Collection[Mean] = ()
    to: Literal["zero", "mean"] = "mean"
    layers: Literal["first", "all"] | Collection[int] = "first"
    absolute: float = 100.0
    relative: float = 1000.0
    control: bool = False

    name = "massive-activations"
    title = "Massive activations overwritten"
    formula = (
        '<math display="block"><msub><mi>h</mi><mrow><mi>l</mi><mi>t</mi><mi>j</mi></mrow></msub><mo>←</mo>'
        "<msub><mi>μ</mi><mrow><mi>l</mi><mi>b</mi><mo>(</mo><mi>t</mi><mo>)</mo><mi>j</mi></mrow></msub>"
        "<mtext> where </mtext><mo>|</mo><mi>h</mi><mo>|</mo><mo>&gt;</mo><mn>100</mn><mo>∧</mo><mo>|</mo><mi>h</mi>"
        "<mo>|</mo><mo>≥</mo><mn>1000</mn><mo>·</mo><mi>median</mi><mo>|</mo><msub><mi>h</mi><mi>l</mi></msub>"
        "<mo>|</mo></math>"
    )
    reference = MASSIVE_ACTIVATIONS.at("the interventions on massive activations")

    def __post_init__(self) -> None:
        if self.to not in ("zero", "mean"):
            raise UsageError(f"{self.name}: to must be 'zero' or 'mean', got {self.to!r}.")
        for key, value in {"absolute": self.absolute, "relative": self.relative}.items():
            if not math.isfinite(value) or value < 0:
                raise UsageError(f"{self.name}: {key} must be a number of at least 0, got {value}.")
        means = sorted((int(at), bool(first), int(dim), float(value)) for at, first, dim, value in self.means)
        if len({row[:3] for row in means}) < len(means):
            raise UsageError(f"{self.name}: two means are given for one layer, kind of token and dim.")
        object.__setattr__(self, "means", tuple(means))
        if isinstance(self.layers, str):
            if self.layers not in ("first", "all"):
                raise UsageError(
                    f"{self.name}: layers must be 'first', 'all' or numbers, got {self.layers!r}."
                )
            return
        layers = tuple(sorted({int(layer) for layer in self.layers}))
        known = sorted({row[0] for row in means})
        unknown = [layer for layer in layers if layer not in known]
        if means and (unknown or not layers):
            raise UsageError(
                f"{self.name}: calibration found no massive activation after layer {unknown or '(none given)'}.",
                detail=f"It found some after layers {', '.join(map(str, known))}.",
            )
        object.__setattr__(self, "layers", layers)

    finders = ("massive-activations",)

    @property
    def edited_layers(self) -> tuple[int, ...]:
        """Layers after which entries are overwritten."""
        known = sorted({row[0] for row in self.means})
        if isinstance(self.layers, str):
            return tuple(known[:1] if self.layers == "first" else known)
        return tuple(self.layers)

    def calibrated(self, model: nn.Module | OpenedModel, prompts: Sequence[Prompt]) -> MassiveActivations:
        """The same with the means of these prompts.

        Means are over all massive entries of a layer, kind of token and dim. Where no entry is massive the result
        has no means: it edits nothing and says so.

        Raises:
            UsageError: No prompts.
        """
        if not prompts:
            raise UsageError(f"{self.name}: there are no prompts to calibrate on.")
        module = model.module if isinstance(model, OpenedModel) else model
        tower = (model.anatomy if isinstance(model, OpenedModel) else find_anatomy(module)).main
        device = next(module.parameters()).device
        found: dict[tuple[int, bool, int], list[float]] = {}

        def see(layer: int, state: Tensor) -> None:
            size = state[0].abs().float()
            massive = self.is_massive(size, size.median())
            for token, dim in massive.nonzero().tolist():
                found.setdefault((layer, token == 0, dim), []).append(float(state[0, token, dim]))

        for prompt in prompts:
            with residual_tap(module, tower, see):
                forward(module, collate([prompt], device=device), logits=False)
        means = tuple((*key, math.fsum(values) / len(values)) for key, values in sorted(found.items()))
        return replace(self, means=means)

    def is_massive(self, size: Float[Tensor, "..."], median: Float[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """The rule on magnitudes."""
        return (size > self.absolute) & (size >= self.relative * median)

    def controls(self) -> tuple[MassiveActivations, ...]:
        """As many entries of median magnitude, zeroed in the same layers."""
        return (replace(self, control=True),)

    def __call__(self, model: nn.Module | OpenedModel) -> AbstractContextManager[Edits]:
        return self._on(model)

    @contextmanager
    def _on(self, model: nn.Module | OpenedModel) -> Iterator[Edits]:
        module = model.module if isinstance(model, OpenedModel) else model
        tower = (model.anatomy if isinstance(model, OpenedModel) else find_anatomy(module)).main
        effect = Edits(self.name, unit="entries of the residual stream", problem="none is massive")
        layers = self.edited_layers
        for layer, _, dim, _ in self.means:
            if layer >= len(tower.blocks) or dim >= tower.hidden_size:
                raise UsageError(
                    f"{self.name}: the means were calibrated on another model.",
                    detail=f"They name dim {dim} after layer {layer}; this model has {len(tower.blocks)} layers of "
                    f"{tower.hidden_size} dims.",
                )
        if not layers:
            effect.nothing = (
                "calibration found no massive activation (none above "
                f"{self.absolute:g} and {self.relative:g} times the median), so there is nothing to edit."
            )
        with ExitStack() as stack:
            tokens = stack.enter_context(Tokens().watched(module, tower)) if layers else Tokens()
            for layer in layers:
                editor = _Editor(self, layer, tokens, effect, tower.hidden_size)
                stack.enter_context(state_edit(module, tower.blocks[layer], editor))
            yield effect
        if not effect.acted:
            warnings.warn(effect.verdict, NothingEdited, stacklevel=3)


@dataclass
class _Editor:
    """Overwrites the entries of one layer; remembers the medians of the prompts while they are continued."""

    method: MassiveActivations
    layer: int
    tokens: Tokens
    effect: Edits
    width: int
    _medians: tuple[int, Tensor] | None = None
    _tables: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, state: Float[Tensor, "batch token dim"]) -> Tensor:
        tokens = self.tokens
        real = tokens.real_of(state.shape[0], state.shape[1], state.device)
        rows = real[:, tokens.past :]
        size = state.abs().float()
        median = self._median(size, rows)
        known, value = self._table(state)
        first = (real.long().cumsum(1)[:, tokens.past :] == 1) & rows
        kind = first.long()
        massive = self.method.is_massive(size, median[:, None, None]) & rows[..., None] & known[kind]
        if self.method.control:
            massive = _nearest(size, median, rows, massive.sum((1, 2)))
        zero = self.method.to == "zero" or self.method.control
        after = torch.where(massive, torch.zeros_like(state) if zero else value[kind], state)
        change = (after - state).abs().float()
        self.effect.add(
            self.layer, massive.sum(), rows.sum() * self.width, change.max() if change.numel() else 0.0
        )
        return after

    def _median(self, size: Tensor, rows: Bool[Tensor, "batch token"]) -> Float[Tensor, " batch"]:
        """Of each prompt; tokens that continue it are held against it too."""
        if self.tokens.past == 0:
            found = torch.stack(
                [s[r].median() if bool(r.any()) else s.new_zeros(()) for s, r in zip(size, rows, strict=True)]
            )
            self._medians = self.tokens.inputs, found
        if self._medians is None or self._medians[0] != self.tokens.inputs:
            raise ModelError(
                f"{self.method.title} was put on in the middle of an input.",
                detail="What is massive is told by the median of the prompt, and the cache came from outside.",
                hint="Read the prompt inside of the `with` block too.",
            )
        return self._medians[1].to(size.device)

    def _table(self, state: Tensor) -> tuple[Bool[Tensor, "kind dim"], Float[Tensor, "kind dim"]]:
        """Which dims are known for other (0) and starting (1) tokens, and their means."""
        key = state.device, state.dtype
        if key not in self._tables:
            known = torch.zeros(2, self.width, dtype=torch.bool)
            value = torch.zeros(2, self.width, dtype=torch.float64)
            for layer, first, dim, mean in self.method.means:
                if layer == self.layer:
                    known[int(first), dim], value[int(first), dim] = True, mean
            self._tables[key] = known.to(state.device), value.to(state.device, state.dtype)
        return self._tables[key]


def _nearest(
    size: Float[Tensor, "batch token dim"],
    median: Float[Tensor, " batch"],
    rows: Bool[Tensor, "batch token"],
    counts: Tensor,
) -> Bool[Tensor, "batch token dim"]:
    """In every prompt, as many entries as asked for, those nearest to the median."""
    far = (size - median[:, None, None]).abs().masked_fill(~rows[..., None], torch.inf).flatten(1)
    chosen = torch.zeros_like(far, dtype=torch.bool)
    for row, count in enumerate(counts.tolist()):
        chosen[row, far[row].argsort(stable=True)[:count]] = True
    return chosen.view_as(size)
