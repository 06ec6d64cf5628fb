"""Fake quantisation of weights, activations and experts, with or without protecting what a sink is made of."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from sinklens.core.errors import ModelError, UsageError
from sinklens.core.reference import Reference
from sinklens.kernels.quantise import Scheme, fake_quantised
from sinklens.models.anatomy import find_anatomy
from sinklens.models.spec import OpenedModel, Tower

from .edits import Edits
from .effect import NothingEdited
from .method import FOUND, Method, registry
from .quantise_parts import ActivationRounding, Matrix, matrices
from .tokens import Tokens

Pair = tuple[int, int]


@registry.register("fake-quantisation")
@dataclass(frozen=True, kw_only=True)
class FakeQuantisation(Method):
    """Rounds a model to a few bits, to see what that costs and what of the cost massive activations and sinks explain.

    How it is computed: inside the `with` every weight matrix of the blocks (attention, feed-forward part, experts;
    not embeddings, routers, norms, biases or the output head) holds the values nearest to it on its grid, round to
    nearest, and the input of every such matrix is rounded in each pass, with scales of the running pass (dynamic),
    padding left out. Weights have a scale per output `channel`, per `tensor` or per `group` of inputs, activations
    per `token`, per `tensor` or per `group` of dims. Afterwards the very same parameters are back.
    Protected values stay as they are, to the bit, and have no part in any scale: `protect_dims` are dims of the
    residual stream (inputs of what reads it, outputs of what writes to it), `protect_positions` tokens of each
    prompt, whose activations stay, `protect_experts` experts whose weights stay, `protect_layers` blocks whose down
    projection stays, with what it reads.

    Compared with the paper: the grid is the uniform one of Nagel et al. with min-max ranges. There is no calibration
    of ranges, no error feedback (GPTQ), no smoothing and no integer kernel: it is the plainest quantiser, for finding
    out what is hard to quantise, and better ones lose less. Between the two projections of fused experts nothing is
    rounded, since they are one call.

    When not to trust it: static ranges, which many deployments use, suffer more from a single massive token than these
    dynamic ones. Protecting anything helps a little; compare with protecting as many others.

    Args:
        weights: Bits of dense weight matrices, None leaves them.
        experts: Bits of fused expert weights, None leaves them.
        activations: Bits of the inputs, None leaves them.
        weights_by: `channel`, `tensor` or `group`; also for experts.
        activations_by: `token`, `tensor` or `group`.
        symmetric: Of weights and experts.
        activations_symmetric: Of activations.
        group: Values per group.
        layers: Blocks that are quantised (0-based); None means all.
        protect: `found` takes what a run finds in place of what the following name.
    """

    weights: int | None = 8
    experts: int | None = None
    activations: int | None = None
    weights_by: Literal["channel", "tensor", "group"] = "channel"
    activations_by: Literal["token", "tensor", "group"] = "token"
    symmetric: bool = True
    activations_symmetric: bool = False
    group: int = 128
    layers: Collection[int] | None = None
    protect: Literal["named", "found"] = "named"
    protect_layers: Collection[int] = ()
    protect_dims: Collection[int] = ()
    protect_positions: Collection[int] = ()
    protect_experts: Collection[Pair] = ()

    name = "fake-quantisation"
    title = "Fake quantisation"
    formula = (
        '<math display="block"><mover><mi>x</mi><mo>^</mo></mover><mo>=</mo><mi>s</mi><mo>·</mo><mo>(</mo>'
        "<mi>clamp</mi><mo>(</mo><mo>⌊</mo><mi>x</mi><mo>/</mo><mi>s</mi><mo>⌉</mo><mo>+</mo><mi>z</mi><mo>,</mo>"
        "<mn>0</mn><mo>,</mo><msup><mn>2</mn><mi>b</mi></msup><mo>−</mo><mn>1</mn><mo>)</mo><mo>−</mo><mi>z</mi>"
        "<mo>)</mo></math>"
    )
    reference = Reference(
        key="nagel2021white",
        title="A White Paper on Neural Network Quantization",
        authors="Nagel, Markus and Fournarakis, Marios and Amjad, Rana Ali and Bondarenko, Yelysei and "
        "van Baalen, Mart and Blankevoort, Tijmen",
        year=2021,
        arxiv="2106.08295",
        section="uniform affine quantisation and its simulation",
    )

    def __post_init__(self) -> None:
        if self.weights is None and self.experts is None and self.activations is None:
            raise UsageError(
                f"{self.name}: neither weights, experts nor activations are given bits: there is nothing to edit."
            )
        for key, allowed in {
            "weights_by": ("channel", "tensor", "group"),
            "activations_by": ("token", "tensor", "group"),
        }.items():
            if getattr(self, key) not in allowed:
                raise UsageError(
                    f"{self.name}: {key} must be one of {', '.join(allowed)}, got {getattr(self, key)!r}."
                )
        if self.protect not in ("named", FOUND):
            raise UsageError(f"{self.name}: protect must be 'named' or {FOUND!r}, got {self.protect!r}.")
        if self.protect == FOUND and self.protects:
            raise UsageError(f"{self.name}: what is protected is both named and to be found; leave one out.")
        for bits in (self.weights, self.experts, self.activations):
            self._scheme(bits, "row", self.symmetric)
        for key in ("layers", "protect_layers", "protect_dims", "protect_positions"):
            value = getattr(self, key)
            if value is not None:
                object.__setattr__(self, key, tuple(sorted({int(item) for item in value})))
        pairs = tuple(sorted({(int(layer), int(expert)) for layer, expert in self.protect_experts}))
        object.__setattr__(self, "protect_experts", pairs)

    finders = ("primary-sinks", "massive-activations", "super-experts")

    @property
    def wants(self) -> str:
        return "the parts to protect" if self.protect == FOUND else ""

    @property
    def protects(self) -> bool:
        """Whether anything is named that stays as it is."""
        return bool(
            self.protect_layers or self.protect_dims or self.protect_positions or self.protect_experts
        )

    def _scheme(self, bits: int | None, by: str, symmetric: bool) -> Scheme | None:
        granularity = {"channel": "row", "token": "row"}.get(by, by)
        return None if bits is None else Scheme(bits, granularity, symmetric, self.group)  # type: ignore[arg-type]

    def scheme_of(self, matrix: Matrix) -> Scheme | None:
        """The grid of a weight matrix."""
        return self._scheme(self.experts if matrix.fused else self.weights, self.weights_by, self.symmetric)

    @property
    def activation_scheme(self) -> Scheme | None:
        return self._scheme(self.activations, self.activations_by, self.activations_symmetric)

    def check(self, tower: Tower) -> None:
        """Refuse what the model does not have.

        Raises:
            ModelError: Experts of a dense model.
            UsageError: A layer, dim or expert beyond the model's.
        """
        fused = any(block.experts for block in tower.blocks)
        if (self.experts is not None or self.protect_experts) and not fused:
            raise ModelError(
                f"{self.name}: this model has no fused experts, so there is nothing to edit in them."
            )
        beyond = {
            "layer": [
                at for at in (*(self.layers or ()), *self.protect_layers) if not 0 <= at < len(tower.blocks)
            ],
            "dim": [dim for dim in self.protect_dims if not 0 <= dim < tower.hidden_size],
            "position": [position for position in self.protect_positions if position < 0],
            "expert": [
                pair for pair in self.protect_experts
                if not (0 <= pair[0] < len(tower.blocks) and 0 <= pair[1] < tower.n_experts)
            ],
        }  # fmt: skip
        for what, found in beyond.items():
            if found:
                raise UsageError(
                    f"{self.name}: there is no {what} {found[0]}.",
                    detail=f"The model has {len(tower.blocks)} layers, {tower.hidden_size} dims and "
                    f"{tower.n_experts} experts per layer.",
                )

    def __call__(self, model: nn.Module | OpenedModel) -> AbstractContextManager[Edits]:
        return self._on(model)

    @contextmanager
    def _on(self, model: nn.Module | OpenedModel) -> Iterator[Edits]:
        module = model.module if isinstance(model, OpenedModel) else model
        tower = (model.anatomy if isinstance(model, OpenedModel) else find_anatomy(module)).main
        self.refuse_open()
        self.check(tower)
        effect = Edits(self.name, unit="values", problem="every one lies on its grid already")
        chosen = range(len(tower.blocks)) if self.layers is None else self.layers
        found = [
            matrix for layer in chosen for matrix in matrices(module, tower, layer)
            if not (matrix.down and layer in self.protect_layers)
        ]  # fmt: skip
        with ExitStack() as stack:
            self._round_weights(found, effect, stack)
            scheme = self.activation_scheme
            if scheme is not None:
                tokens = stack.enter_context(Tokens().watched(module, tower))
                rounding = ActivationRounding(
                    scheme, tuple(self.protect_dims), tuple(self.protect_positions), tokens, effect
                )
                for layer in chosen:
                    rounding.attach(module, tower, layer, [m for m in found if m.layer == layer], stack)
            yield effect
        if not effect.acted:
            warnings.warn(effect.verdict, NothingEdited, stacklevel=3)

    def _round_weights(self, found: list[Matrix], effect: Edits, stack: ExitStack) -> None:
        """Put rounded parameters in the place of the model's own, which come back when the stack is left."""
        rounded: dict[tuple[int, Scheme], nn.Parameter] = {}
        for matrix in found:
            scheme = self.scheme_of(matrix)
            if scheme is None:
                continue
            own = matrix.weight()
            key = id(own), scheme
            if key not in rounded:
                rounded[key] = nn.Parameter(self._rounded(matrix, own, scheme, effect), requires_grad=False)
            stack.callback(matrix.put, own)
            matrix.put(rounded[key])

    def _rounded(self, matrix: Matrix, own: nn.Parameter, scheme: Scheme, effect: Edits) -> torch.Tensor:
        kept = matrix.kept(
            tuple(self.protect_dims), [e for at, e in self.protect_experts if at == matrix.layer]
        )
        with torch.no_grad():
            straight = matrix.straight(own.detach())
            # An expert at a time: float32 copies of all of them at once would not fit where the weights just do.
            parts = [
                fake_quantised(
                    straight[i : i + 1], scheme, None if kept is None else kept[i % len(kept)][None]
                )
                for i in range(len(straight))
            ]
            after = matrix.back(torch.cat(parts)).contiguous()
            change = (after.float() - own.detach().float()).abs()
            effect.add(matrix.layer, (change > 0).sum(), own.numel(), change.max() if own.numel() else 0.0)
        return after
