"""Expert pruning: chosen experts add nothing, whatever stores their weights."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sinklens.core.errors import ModelError, UsageError
from sinklens.core.papers import SUPER_EXPERTS
from sinklens.models.anatomy import find_anatomy
from sinklens.models.spec import OpenedModel, Tower
from sinklens.tracers.states import first_of

from .edits import Edits
from .effect import NothingEdited
from .method import FOUND, Method, registry

Pair = tuple[int, int]


@registry.register("expert-pruning")
@dataclass(frozen=True, kw_only=True)
class ExpertPruning(Method):
    """Takes experts out of a mixture-of-experts model, to see what depends on them.

    How it is computed: the routing weight of every (token, expert) pair of a pruned expert becomes 0 just before the
    experts run; the other weights are not renormalised, so a token loses that expert's contribution and nothing
    else. This equals a zeroed `down_proj` (and its bias), but touches no weight, so it works on fused, quantised and
    offloaded weights alike. `projections` names layers whose shared expert (or dense feed-forward part) is pruned:
    its down projection puts out 0. A token that is routed to a pruned expert only gets nothing from the block's
    routed experts.

    Compared with the paper: Su et al. zero the expert's down projection, for Mixtral its up projection, which is the
    same function. Their control is the mean over five random draws of as many experts; `random_controls` draws from
    all experts of the model, `layer_matched_controls` as many from each of the same layers.

    When not to trust it: an expert that no token was routed to cannot matter on these inputs; a control that draws
    such experts is no control (give `among`). An expert whose output overflows still does so: 0 times infinity is
    not a number. That pruning hurts does not make an expert a Super Expert: look at what becomes of the sink.

    Args:
        experts: `(layer, expert)` pairs, 0-based; may be empty if `projections` is not. `found` takes the Super
            Experts that a run finds; so does None unless projections are named.
        projections: Layers whose shared or dense down projection is pruned.
    """

    experts: Collection[Pair] | Literal["found"] | None = None
    projections: Collection[int] = ()

    name = "expert-pruning"
    title = "Expert pruning"
    formula = (
        '<math display="block"><msub><mi>y</mi><mi>t</mi></msub><mo>=</mo><munder><mo>∑</mo><mrow><mi>e</mi><mo>∈</mo>'
        "<mi>top</mi><mo>(</mo><mi>t</mi><mo>)</mo><mo>∖</mo><mi>P</mi></mrow></munder><msub><mi>g</mi><mrow>"
        "<mi>t</mi><mi>e</mi></mrow></msub><msub><mi>E</mi><mi>e</mi></msub><mo>(</mo><msub><mi>x</mi><mi>t</mi></msub>"
        "<mo>)</mo></math>"
    )
    reference = SUPER_EXPERTS.at("the pruning experiments and their random controls")

    def __post_init__(self) -> None:
        projections = tuple(sorted({int(layer) for layer in self.projections}))
        given = self.experts
        if given is None:
            given = () if projections else FOUND
        if isinstance(given, str) and given != FOUND:
            raise UsageError(
                f"{self.name}: experts are (layer, expert) pairs or {FOUND!r}, got {given!r}.",
                hint="For instance: expert-pruning:experts=2/7+3/0",
            )
        experts = (
            FOUND
            if isinstance(given, str)
            else tuple(sorted({(int(layer), int(expert)) for layer, expert in given}))
        )
        if not experts and not projections:
            raise UsageError(
                f"{self.name}: no expert is named, so there is nothing to edit.",
                hint="experts=[(layer, expert), ...], or experts='found' in `sinklens mitigate`.",
            )
        object.__setattr__(self, "experts", experts)
        object.__setattr__(self, "projections", projections)

    finders = ("super-experts",)

    @property
    def wants(self) -> str:
        return "Super Experts" if self.experts == FOUND else ""

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The experts that are named."""
        return () if self.experts == FOUND else tuple(self.experts or ())  # type: ignore[arg-type]

    def check(self, tower: Tower) -> None:
        """Refuse experts that the model does not have.

        Raises:
            ModelError: A dense model, or one whose experts cannot be reached.
            UsageError: A layer or expert beyond the model's.
        """
        if self.experts and not tower.n_experts:
            raise ModelError(
                f"{self.name}: this model has no experts, so there is nothing to edit.",
                detail="Every feed-forward part of it is dense.",
                hint="projections=[layer, ...] prunes a dense feed-forward part.",
            )
        for layer in (*(layer for layer, _ in self.pairs), *self.projections):
            if not 0 <= layer < len(tower.blocks):
                raise UsageError(
                    f"{self.name}: there is no layer {layer}.",
                    detail=f"The model has layers 0 to {len(tower.blocks) - 1}.",
                )
        for layer, expert in self.pairs:
            if not 0 <= expert < tower.n_experts:
                raise UsageError(
                    f"{self.name}: there is no expert {expert}.",
                    detail=f"The model has experts 0 to {tower.n_experts - 1}.",
                )
            if tower.blocks[layer].experts is None:
                have = [block.index for block in tower.blocks if block.experts]
                raise ModelError(
                    f"{self.name}: layer {layer} has no experts that could be pruned.",
                    detail=f"Layers with fused experts: {', '.join(map(str, have)) or 'none'}.",
                )
        for layer in self.projections:
            if _projection(tower, layer) is None:
                raise ModelError(f"{self.name}: layer {layer} has no dense or shared down projection.")

    def random_controls(
        self,
        model: nn.Module | OpenedModel,
        *,
        draws: int = 5,
        seed: int = 0,
        among: Collection[Pair] | None = None,
    ) -> tuple[ExpertPruning, ...]:
        """As many experts drawn from the whole model, pruned ones left out; fewer draws where there are not as many.

        Args:
            among: Experts to draw from, for instance those that tokens were routed to; None means all.

        Raises:
            UsageError: Fewer are left than are needed.
        """
        return self._drawn(_tower(model), draws, seed, among, matched=False)

    def layer_matched_controls(
        self,
        model: nn.Module | OpenedModel,
        *,
        draws: int = 5,
        seed: int = 0,
        among: Collection[Pair] | None = None,
    ) -> tuple[ExpertPruning, ...]:
        """As many experts from each of the same layers; arguments and errors as in `random_controls`."""
        return self._drawn(_tower(model), draws, seed, among, matched=True)

    def _drawn(
        self, tower: Tower, draws: int, seed: int, among: Collection[Pair] | None, *, matched: bool
    ) -> tuple[ExpertPruning, ...]:
        self.refuse_open()
        self.check(tower)
        every = [
            (block.index, expert)
            for block in tower.blocks
            if block.experts
            for expert in range(tower.n_experts)
        ]
        free = [pair for pair in (every if among is None else sorted(set(among))) if pair not in self.pairs]
        layers = [layer for layer, _ in self.pairs]
        pools = [
            ([pair for pair in free if pair[0] == layer], layers.count(layer))
            for layer in sorted(set(layers))
        ]
        pools = pools if matched else [(free, len(layers))]
        for pool, count in pools:
            if len(pool) < count or not count:
                where = f" in layer {pool[0][0]}" if matched and pool else ""
                raise UsageError(
                    f"{self.name}: {count} other experts are needed as a control, {len(pool)} are left{where}."
                )
        rng = np.random.default_rng(seed)
        found: dict[tuple[Pair, ...], None] = {}
        for _ in range(20 * draws):  # small pools give some draws twice
            if len(found) < draws:
                chosen = [pool[int(i)] for pool, count in pools for i in rng.permutation(len(pool))[:count]]
                found[tuple(sorted(chosen))] = None
        return tuple(replace(self, experts=experts, projections=()) for experts in found)

    def __call__(self, model: nn.Module | OpenedModel) -> AbstractContextManager[Edits]:
        return self._on(model)

    @contextmanager
    def _on(self, model: nn.Module | OpenedModel) -> Iterator[Edits]:
        module = model.module if isinstance(model, OpenedModel) else model
        tower = _tower(model)
        self.refuse_open()
        self.check(tower)
        effect = Edits(self.name, unit="routed rows", problem="none was routed to a pruned expert")
        with ExitStack() as stack:
            for layer in sorted({layer for layer, _ in self.pairs}):
                path = tower.blocks[layer].experts
                assert path is not None
                part = module.get_submodule(path)
                gone = torch.tensor([expert for at, expert in self.pairs if at == layer])
                hook = _unrouted(part, layer, gone, effect)
                stack.callback(part.register_forward_pre_hook(hook, with_kwargs=True).remove)
            for layer in self.projections:
                path = _projection(tower, layer)
                assert path is not None
                stack.callback(
                    module.get_submodule(path).register_forward_hook(_silenced(layer, effect)).remove
                )
            yield effect
        if not effect.acted:
            warnings.warn(effect.verdict, NothingEdited, stacklevel=3)


def _tower(model: nn.Module | OpenedModel) -> Tower:
    return (model.anatomy if isinstance(model, OpenedModel) else find_anatomy(model)).main


def _projection(tower: Tower, layer: int) -> str | None:
    return tower.blocks[layer].shared_down_proj or tower.blocks[layer].down_proj


def _unrouted(part: nn.Module, layer: int, gone: Tensor, effect: Edits) -> Callable[..., Any]:
    """A pre-hook that takes the pruned experts' routing weights away."""
    names = list(inspect.signature(part.forward).parameters)[:3]

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        index, weights = (given.get(name) for name in names[1:]) if len(names) == 3 else (None, None)
        if not isinstance(index, Tensor) or not isinstance(weights, Tensor) or index.is_floating_point():
            raise ModelError(
                f"The experts of {type(module).__name__} cannot be pruned.",
                detail="Expected hidden states, chosen experts and their weights.",
            )
        pruned = torch.isin(index, gone.to(index.device))
        if weights.shape != index.shape:  # one weight per expert rather than per choice
            raise ModelError(
                f"The experts of {type(module).__name__} cannot be pruned.",
                detail=f"Chosen experts have the shape {tuple(index.shape)}, weights {tuple(weights.shape)}.",
            )
        effect.add(layer, pruned.sum(), index.numel())
        kept = weights.masked_fill(pruned, 0.0)
        if names[2] in kwargs:
            return args, {**kwargs, names[2]: kept}
        return (*args[:2], kept, *args[3:]), kwargs

    return hook


def _silenced(layer: int, effect: Edits) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        made = first_of(output)
        rows = made[..., 0].numel()
        effect.add(layer, rows, rows, made.detach().abs().max() if made.numel() else 0.0)
        silent = torch.zeros_like(made)
        return (silent, *output[1:]) if isinstance(output, tuple) else silent

    return hook
