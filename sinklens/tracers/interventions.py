"""Interventions: what is changed inside a model for the length of a `with`, to see what depends on it.

Every intervention is plain data; `applied(opened, batch)` puts its hooks on the model for one batch and takes them off
again, also after an error. They sit below the taps that measure, so a traced pass inside the `with` sees the changed
model; passes of other batches (probes) are left alone. Positions are those of the prompt's own tokens: padding is
counted off, prompts too short are left as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sinklens.core.errors import ModelError
from sinklens.models.spec import Block, OpenedModel

from .batch import Batch
from .states import first_of


@dataclass
class Acted:
    """What an intervention did in the passes that ran inside its `with`.

    Attributes:
        edited: Entries, routed rows, keys, heads or tokens that were changed; each kind counts its own.
        largest: Largest absolute change of a number, 0 where numbers are not changed directly (masks, routing).
    """

    edited: int = 0
    largest: float = 0.0

    def saw(self, before: Tensor, after: Tensor) -> None:
        """Count the entries that differ."""
        change = (after.float() - before.float()).abs()
        self.edited += int((change > 0).sum())
        self.largest = max(self.largest, float(change.max()) if change.numel() else 0.0)


class Intervention(Protocol):
    """A change of a model."""

    def applied(self, opened: OpenedModel, batch: Batch) -> AbstractContextManager[Acted]:
        """Change the model for passes of this batch.

        Raises:
            ModelError: The model has no place for this change; the message says what is missing.
        """
        ...


@dataclass(frozen=True)
class Entry:
    """One entry of the residual stream after a block, in the unit of the activations.

    Attributes:
        prompt: `Prompt.index` of the prompt it is changed in, None for all.
        value: What it becomes, or with `add` what is added to it.
    """

    prompt: int | None
    layer: int
    position: int
    dim: int
    value: float = 0.0
    add: bool = False


@dataclass(frozen=True)
class EntriesSet:
    """Entries of the residual stream are overwritten (or shifted) after their block."""

    entries: tuple[Entry, ...]

    @contextmanager
    def applied(self, opened: OpenedModel, batch: Batch) -> Iterator[Acted]:
        acted, blocks = Acted(), opened.anatomy.main.blocks
        with ExitStack() as stack:
            for layer in sorted({entry.layer for entry in self.entries}):
                mine = [entry for entry in self.entries if entry.layer == layer]
                stack.enter_context(state_edit(opened.module, blocks[layer], self._edit(mine, batch, acted)))
            yield acted

    @staticmethod
    def _edit(entries: list[Entry], batch: Batch, acted: Acted) -> Callable[[Tensor], Tensor]:
        def edit(state: Tensor) -> Tensor:
            if state.shape[:2] != shape_of(batch):
                return state
            found = [
                (row, place, entry)
                for entry in entries
                for row, place in places_of(batch, entry.position, entry.prompt)
            ]
            if not found:
                return state
            rows, places = [row for row, *_ in found], [place for _, place, _ in found]
            dims = [entry.dim for *_, entry in found]
            value = torch.tensor([entry.value for *_, entry in found], dtype=state.dtype, device=state.device)
            added = torch.tensor([entry.add for *_, entry in found], device=state.device)
            before = state[rows, places, dims]
            after = torch.where(added, before + value, value)
            acted.saw(before, after)
            state = state.clone()
            state[rows, places, dims] = after
            return state

        return edit


@dataclass(frozen=True)
class MedianEntriesZeroed:
    """Entries of median magnitude are set to zero after a block: the control of Sun et al. for massive ones.

    Attributes:
        counts: `(prompt, layer, number of entries)`.
    """

    counts: tuple[tuple[int, int, int], ...]

    @contextmanager
    def applied(self, opened: OpenedModel, batch: Batch) -> Iterator[Acted]:
        acted, blocks = Acted(), opened.anatomy.main.blocks
        with ExitStack() as stack:
            for layer in sorted({layer for _, layer, _ in self.counts}):
                wanted = {prompt: n for prompt, at, n in self.counts if at == layer}
                stack.enter_context(
                    state_edit(opened.module, blocks[layer], self._edit(wanted, batch, acted))
                )
            yield acted

    @staticmethod
    def _edit(wanted: dict[int, int], batch: Batch, acted: Acted) -> Callable[[Tensor], Tensor]:
        def edit(state: Tensor) -> Tensor:
            if state.shape[:2] != shape_of(batch):
                return state
            state = state.clone()
            for row, places in enumerate(rows_of(batch, state.shape[1])):
                n = wanted.get(batch.prompts[row].index, 0)
                if not n:
                    continue
                real = state[row, places]
                size = real.abs().float().flatten()
                nearest = (size - size.median()).abs().argsort(stable=True)[:n]
                after = real.flatten().index_fill(0, nearest, 0.0).view_as(real)
                acted.saw(real, after)
                state[row, places] = after
            return state

        return edit


@dataclass(frozen=True)
class ExpertsPruned:
    """Routed experts add nothing: their routing weights become zero, the others are not renormalised."""

    experts: frozenset[tuple[int, int]]

    @contextmanager
    def applied(self, opened: OpenedModel, batch: Batch) -> Iterator[Acted]:
        acted, blocks = Acted(), opened.anatomy.main.blocks
        with ExitStack() as stack:
            for layer in sorted({layer for layer, _ in self.experts}):
                path = _part(
                    blocks[layer].experts, f"Block {layer} has no fused experts, so none can be pruned."
                )
                gone = [expert for at, expert in self.experts if at == layer]
                hook = self._hook(torch.tensor(sorted(gone)), batch, acted)
                module = opened.module.get_submodule(path)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield acted

    @staticmethod
    def _hook(gone: Tensor, batch: Batch, acted: Acted) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if len(args) != 3:
                raise ModelError(
                    f"The experts of {type(module).__name__} cannot be pruned.",
                    detail=f"Expected hidden states, experts and weights in order; found {len(args)} arguments.",
                )
            hidden, index, weights = args
            if len(index) != math.prod(shape_of(batch)):
                return None
            pruned = torch.isin(index, gone.to(index.device)).view_as(weights)
            acted.edited += int(pruned.sum())
            return (hidden, index, weights.masked_fill(pruned, 0.0)), kwargs

        return hook


@dataclass(frozen=True)
class ProjectionZeroed:
    """A block's dense (or shared-expert) down projection puts out zero for every token."""

    layer: int

    @contextmanager
    def applied(self, opened: OpenedModel, batch: Batch) -> Iterator[Acted]:
        block, acted = opened.anatomy.main.blocks[self.layer], Acted()
        path = _part(block.shared_down_proj or block.down_proj, f"Block {self.layer} has no down projection.")

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            before = first_of(output)
            if not _is_of(batch, before):
                return None
            acted.saw(before, torch.zeros_like(before))
            return _replaced(output, torch.zeros_like(before))

        with removed(opened.module.get_submodule(path).register_forward_hook(hook)):
            yield acted


@dataclass(frozen=True)
class WriteZeroed:
    """What one sublayer of one block adds to the residual stream at one position becomes zero."""

    layer: int
    part: Literal["mlp", "attention"]
    position: int

    @contextmanager
    def applied(self, opened: OpenedModel, batch: Batch) -> Iterator[Acted]:
        block, acted = opened.anatomy.main.blocks[self.layer], Acted()
        path = block.mlp or block.down_proj if self.part == "mlp" else block.attention_output
        path = _part(path, f"Block {self.layer} has no {self.part} whose output could be set to zero.")

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            whole = first_of(output)
            if not _is_of(batch, whole):
                return None
            state = whole.reshape(batch.size, -1, whole.shape[-1]).clone()
            for row, place in places_of(batch, self.position):
                before = state[row, place].clone()
                state[row, place] = 0.0
                acted.saw(before, state[row, place])
            return _replaced(output, state.view_as(whole))

        with removed(opened.module.get_submodule(path).register_forward_hook(hook)):
            yield acted


@dataclass(frozen=True)
class HeadsZeroed:
    """Query heads write nothing: their slices of the output projection's input become zero."""

    heads: frozenset[tuple[int, int]]

    @contextmanager
    def applied(self, opened: OpenedModel, batch: Batch) -> Iterator[Acted]:
        tower, acted = opened.anatomy.main, Acted()
        with ExitStack() as stack:
            for layer in sorted({layer for layer, _ in self.heads}):
                what = f"Block {layer} has no output projection after its heads, so none can be switched off."
                path = _part(tower.blocks[layer].attention_output, what)
                mine = sorted(head for at, head in self.heads if at == layer)
                module = opened.module.get_submodule(path)
                stack.callback(
                    module.register_forward_pre_hook(self._hook(mine, tower.heads, batch, acted)).remove
                )
            yield acted

    @staticmethod
    def _hook(heads: list[int], of: int, batch: Batch, acted: Acted) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            joined = args[0]
            if not _is_of(batch, joined):
                return None
            if joined.shape[-1] % of:
                raise ModelError(
                    "Heads cannot be switched off in this model.",
                    detail=f"Its output projection reads {joined.shape[-1]} numbers, which is not {of} equal heads.",
                )
            split = joined.clone().view(*joined.shape[:-1], of, -1)
            before = split[..., heads, :].clone()
            split[..., heads, :] = 0.0
            acted.saw(before, split[..., heads, :])
            return (split.view_as(joined), *args[1:])

        return hook


@contextmanager
def state_edit(model: nn.Module, block: Block, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change the residual stream after a block: its output, or in post-LayerNorm blocks what the last norm reads."""
    if block.residual_norm is None:

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            made = first_of(output)
            edited = edit(block.residual(made))
            if block.residual(made) is not made:  # one stream of several
                whole = made.clone()
                block.residual(whole).copy_(edited)
                edited = whole
            return _replaced(output, edited)

        handle = model.get_submodule(block.path).register_forward_hook(hook)
    else:

        def before(module: nn.Module, args: tuple[Any, ...]) -> Any:
            return (edit(args[0]), *args[1:])

        handle = model.get_submodule(block.residual_norm).register_forward_pre_hook(before)
    with removed(handle):
        yield


@contextmanager
def removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _replaced(output: Any, tensor: Tensor) -> Any:
    return (tensor, *output[1:]) if isinstance(output, tuple) else tensor


def _part(path: str | None, missing: str) -> str:
    if path is None:
        raise ModelError(missing)
    return path


def shape_of(batch: Batch) -> tuple[int, int]:
    """Rows and tokens with padding."""
    rows, tokens = next(value.shape[:2] for value in batch.inputs.values() if isinstance(value, Tensor))
    return rows, tokens


def _is_of(batch: Batch, made: Tensor) -> bool:
    """Whether a module's output belongs to a pass of this batch; probes with other inputs are left alone."""
    return made[..., 0].numel() == math.prod(shape_of(batch))


def rows_of(batch: Batch, length: int) -> Iterable[Tensor]:
    """Places of the real tokens of each row."""
    if batch.valid is None:
        return [torch.arange(length)] * batch.size
    return [row.nonzero().squeeze(-1) for row in batch.valid]


def places_of(batch: Batch, position: int, prompt: int | None = None) -> Iterator[tuple[int, int]]:
    """`(row, place in the padded row)` of a position in the prompts that have it."""
    for row, places in enumerate(rows_of(batch, shape_of(batch)[1])):
        mine = prompt is None or batch.prompts[row].index == prompt
        if mine and position < len(places):
            yield row, int(places[position])


def position_states(
    state: Float[Tensor, "batch pos dim"], batch: Batch, position: int
) -> Iterator[tuple[int, Float[Tensor, " dim"]]]:
    """The state of one position in each prompt that has it, by row of the batch."""
    for row, place in places_of(batch, position):
        yield row, state[row, place]
