"""Interventions on the tokens of pictures: whether, from which layer and up to which layer the text may read them.

All are masks over the whole sequence, so positions, caches and the shapes of hidden states stay what they are, in
`generate()` too. They equal the definitions by cutting and splicing rows: a token whose key nobody sees might as well
not be there, and one whose state is held still does not pass through a layer. Tokens that others no longer see go on
being computed, which costs time and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from sinklens.core.errors import ModelError, UsageError
from sinklens.models.spec import Block, OpenedModel
from sinklens.models.sums import states_of

from .batch import Batch
from .chosen import Chosen, at_places
from .interventions import Acted, removed, shape_of
from .masking import Hide, pairs_hidden
from .renumbering import renumbered


@dataclass(frozen=True)
class VisualKeysBlocked:
    """Queries do not see the keys of the chosen tokens, in a range of layers: the knock-out of attention to them.

    Attributes:
        chosen: The tokens whose keys are hidden.
        layers: First and last layer, both included; None for all.
        queries: `text` hides them from what is no part of a picture (generated tokens too), `others` from every token
            that is not chosen itself.
    """

    chosen: Chosen = field(default_factory=Chosen)
    layers: tuple[int, int] | None = None
    queries: Literal["text", "others"] = "text"

    @contextmanager
    def applied(self, opened: OpenedModel, batch: Batch) -> Iterator[Acted]:
        count = len(opened.anatomy.main.blocks)
        first, last = self.layers or (0, count - 1)
        if not 0 <= first <= last < count:
            raise UsageError(f"There are no layers {first} to {last}; the model has layers 0 to {count - 1}.")
        acted, chosen = Acted(), self.chosen.mask(batch)
        spared = chosen if self.queries == "others" else Chosen().mask(batch)
        with pairs_hidden(opened, batch, range(first, last + 1), _hide(chosen, spared, acted)):
            yield acted


@dataclass(frozen=True)
class VisualInjected:
    """Pictures enter at a layer: before it only the text runs, as if the picture were not there (positions kept).

    In the layers before, no other token sees the chosen ones, and their states are held at what entered the model.
    What some models add to picture tokens between those layers (DeepStack) is held back too.

    Attributes:
        layer: The first layer in which they take part; 0 changes nothing, the number of layers keeps them out.
    """

    layer: int
    chosen: Chosen = field(default_factory=Chosen)

    @contextmanager
    def applied(self, opened: OpenedModel, batch: Batch) -> Iterator[Acted]:
        blocks = opened.anatomy.main.blocks
        _check_layer("Pictures cannot enter", self.layer, len(blocks))
        acted, chosen = Acted(), self.chosen.mask(batch)
        held = _Held(chosen, batch)
        with ExitStack() as stack:
            stack.enter_context(pairs_hidden(opened, batch, range(self.layer), _hide(chosen, chosen, acted)))
            for block in blocks[: self.layer + 1] if self.layer else ():
                held.attach(opened.module, block, stack, still=block.index < self.layer)
            yield acted


@dataclass(frozen=True)
class VisualExit:
    """Pictures leave at a layer: from it on no other token sees the chosen ones, generated tokens neither.

    Attributes:
        layer: The first layer without them; 0 takes them out of the model, the number of layers changes nothing.
    """

    layer: int
    chosen: Chosen = field(default_factory=Chosen)

    @contextmanager
    def applied(self, opened: OpenedModel, batch: Batch) -> Iterator[Acted]:
        count = len(opened.anatomy.main.blocks)
        _check_layer("Pictures cannot leave", self.layer, count)
        acted, chosen = Acted(), self.chosen.mask(batch)
        with pairs_hidden(opened, batch, range(self.layer, count), _hide(chosen, chosen, acted)):
            yield acted


@dataclass(frozen=True)
class TokensRemoved:
    """Tokens are taken out of the prompt, in all layers.

    Attributes:
        positions: `keep` leaves the others where they are, with gaps in between. `renumber` closes the gaps, and what
            is generated goes on from the shortened length: for comparison with methods that do so. Refused where
            positions are not one number per token (M-RoPE), and where a window counts them.
    """

    chosen: Chosen = field(default_factory=Chosen)
    positions: Literal["keep", "renumber"] = "keep"

    @contextmanager
    def applied(self, opened: OpenedModel, batch: Batch) -> Iterator[Acted]:
        acted, chosen = Acted(), self.chosen.mask(batch)
        with ExitStack() as stack:
            if self.positions == "renumber":
                stack.enter_context(renumbered(opened, batch, chosen))
            every = range(len(opened.anatomy.main.blocks))
            stack.enter_context(pairs_hidden(opened, batch, every, _hide(chosen, chosen, acted)))
            yield acted


@dataclass(frozen=True)
class SublayersSkipped:
    """Sublayers write nothing on the chosen tokens: their output is zero before it is added to the residual stream.

    The tokens still are keys and values for others. Prompts only: generated tokens are never among the chosen.

    Attributes:
        sublayers: `n` is the attention of layer n, `n + 0.5` its feed-forward part; layers count from 0.
    """

    sublayers: tuple[float, ...]
    chosen: Chosen = field(default_factory=Chosen)

    @contextmanager
    def applied(self, opened: OpenedModel, batch: Batch) -> Iterator[Acted]:
        acted, chosen = Acted(), self.chosen.mask(batch)
        with ExitStack() as stack:
            for sublayer in sorted(set(self.sublayers)):
                for path in sublayer_writers(opened, sublayer):
                    module = opened.module.get_submodule(path)
                    hook = _zeroing(chosen, batch, acted)
                    stack.enter_context(removed(module.register_forward_hook(hook)))
            yield acted


def sublayer_writers(opened: OpenedModel, sublayer: float) -> tuple[str, ...]:
    """The modules whose output a sublayer adds to the residual stream.

    Raises:
        UsageError: There is no such sublayer.
        ModelError: The block has none, or its sum could not be read.
    """
    blocks = opened.anatomy.main.blocks
    layer, half = divmod(sublayer, 1)
    if half not in (0.0, 0.5) or not 0 <= layer < len(blocks):
        raise UsageError(
            f"There is no sublayer {sublayer:g}.",
            detail="Write n for the attention of layer n and n + 0.5 for its feed-forward part, "
            f"0 to {len(blocks) - 0.5:g}.",
        )
    block, part = blocks[int(layer)], "feed-forward part" if half else "attention"
    writes = block.sum.mlp if half else block.sum.attention
    if block.sum.checked and block.sum.exact and writes:
        return tuple(write.path for write in writes)
    if half and block.experts is not None and block.mlp is None:
        path = None  # the down projection of shared experts is not all that such a block writes
    else:
        path = (block.mlp or block.down_proj) if half else block.attention_output
    if path is None:
        raise ModelError(f"Block {int(layer)} has no {part} that could be skipped.")
    return (path,)


def _hide(chosen: Bool[Tensor, "batch token"], spared: Bool[Tensor, "batch token"], acted: Acted) -> Hide:
    """The chosen keys, from all queries that are not spared; counted once per key, layer and pass."""

    def hide(queries: Int[Tensor, " query"], keys: Int[Tensor, " key"]) -> Bool[Tensor, "batch query key"]:
        gone, still = at_places(chosen, keys), at_places(spared, queries)
        acted.edited += int(gone.sum())
        return gone[:, None, :] & ~still[:, :, None]

    return hide


def _check_layer(what: str, layer: int, count: int) -> None:
    if not 0 <= layer <= count:
        raise UsageError(f"{what} at layer {layer}; the model has layers 0 to {count - 1}.")


class _Held:
    """Rows whose state stays what entered the first block, whatever blocks and what stands between them do to it."""

    def __init__(self, chosen: Bool[Tensor, "batch token"], batch: Batch) -> None:
        self.chosen, self.batch = chosen, batch
        self.entered: Tensor | None = None

    def attach(self, model: nn.Module, block: Block, stack: ExitStack, *, still: bool) -> None:
        module = model.get_submodule(block.path)
        before = self._first if block.index == 0 else self._before
        stack.enter_context(removed(module.register_forward_pre_hook(before, with_kwargs=True)))
        if still:
            stack.enter_context(removed(module.register_forward_hook(self._after)))

    def _first(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        state = states_of(args, kwargs)
        mine = state is not None and state.shape[:2] == shape_of(self.batch)
        self.entered = state[self.chosen.to(state.device)].clone() if state is not None and mine else None

    def _put(self, state: Tensor) -> Tensor:
        if self.entered is None or state.shape[:2] != shape_of(self.batch):
            return state
        state = state.clone()
        state[self.chosen.to(state.device)] = self.entered.to(state.device)
        return state

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = states_of(args, kwargs)
        if state is None:
            return None
        held = self._put(state)
        return (
            tuple(held if value is state else value for value in args),
            {name: held if value is state else value for name, value in kwargs.items()},
        )

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (self._put(output[0]), *output[1:])
        return self._put(output)


def _zeroing(chosen: Bool[Tensor, "batch token"], batch: Batch, acted: Acted) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        whole = output[0] if isinstance(output, tuple) else output
        rows, tokens = shape_of(batch)
        if whole[..., 0].numel() != rows * tokens:
            return None
        state = whole.reshape(rows, tokens, whole.shape[-1]).clone()
        mine = chosen.to(state.device)
        acted.saw(state[mine], torch.zeros_like(state[mine]))
        state[mine] = 0.0
        state = state.view_as(whole)
        return (state, *output[1:]) if isinstance(output, tuple) else state

    return hook
