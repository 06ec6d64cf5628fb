"""The weight matrices of a block that a quantiser rounds, and the rounding of what they read."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sinklens.core.errors import ModelError
from sinklens.kernels.quantise import Scheme, fake_quantised
from sinklens.models.spec import Tower
from sinklens.models.sums import states_of

from .edits import Edits
from .tokens import Tokens


@dataclass(frozen=True)
class Matrix:
    """A weight matrix, or the matrices of fused experts.

    Attributes:
        path: Of its module, from the root of the model.
        name: Of the parameter in that module.
        turned: Whether it is stored `[in, out]`.
        fused: Whether it holds the experts of a block, one after the other.
        reads, writes: Whether its inputs are dims of the residual stream, or its outputs are.
        down: Whether it is the down projection of a dense feed-forward part or of a shared expert.
    """

    layer: int
    path: str
    module: nn.Module
    name: str
    turned: bool
    fused: bool
    reads: bool
    writes: bool
    down: bool = False

    def weight(self) -> nn.Parameter:
        return self.module._parameters[self.name]  # type: ignore[return-value]

    def put(self, parameter: nn.Parameter) -> None:
        self.module._parameters[self.name] = parameter

    def straight(self, weight: Tensor) -> Float[Tensor, "matrix out in"]:
        weight = weight if self.fused else weight[None]
        return weight.transpose(1, 2) if self.turned else weight

    def back(self, straight: Float[Tensor, "matrix out in"]) -> Tensor:
        weight = straight.transpose(1, 2) if self.turned else straight
        return weight if self.fused else weight[0]

    def kept(self, dims: tuple[int, ...], experts: Collection[int]) -> Bool[Tensor, "matrix out in"] | None:
        """What stays as it is; one matrix for all experts where none of them is protected."""
        count, outs, ins = self.straight(self.weight()).shape
        mine = experts if self.fused else ()
        if not (dims and (self.reads or self.writes)) and not mine:
            return None
        kept = torch.zeros(count if mine else 1, outs, ins, dtype=torch.bool, device=self.weight().device)
        if self.reads:
            kept[:, :, list(dims)] = True
        if self.writes:
            kept[:, list(dims)] = True
        kept[list(mine)] = True
        return kept


def matrices(model: nn.Module, tower: Tower, layer: int) -> Iterator[Matrix]:
    """Of one block, routers left out.

    Raises:
        ModelError: Weights are quantised already, or are not in memory.
    """
    block = tower.blocks[layer]
    writers = {block.attention_output, block.down_proj, block.shared_down_proj}
    for inner, module in model.get_submodule(block.path).named_modules():
        path = f"{block.path}.{inner}" if inner else block.path
        if block.router is not None and (path == block.router or path.startswith(f"{block.router}.")):
            continue
        if path == block.experts:
            turned = bool(getattr(module, "is_transposed", False))
            for name, weight in module._parameters.items():
                if weight is not None and weight.ndim == 3:
                    writes = name.startswith("down")
                    _checked(path, weight)
                    yield Matrix(layer, path, module, name, turned, True, not writes, writes)
        elif _is_linear(module):
            weight: Any = module.weight
            _checked(path, weight)
            turned = type(module).__name__ == "Conv1D"
            outs, ins = weight.shape[::-1] if turned else weight.shape
            writes = path in writers and outs == tower.hidden_size
            reads = path not in writers and ins == tower.hidden_size
            down = path in (block.down_proj, block.shared_down_proj)
            yield Matrix(layer, path, module, "weight", turned, False, reads, writes, down)


def _is_linear(module: nn.Module) -> bool:
    named = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    return named and getattr(module, "weight", None) is not None


def _checked(path: str, weight: Tensor) -> None:
    if weight.is_meta:
        raise ModelError(
            f"The weights of {path} are not in memory, so they cannot be rounded.",
            hint="Load the model without offloading.",
        )
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise ModelError(
            f"The weights of {path} are quantised already ({str(weight.dtype).removeprefix('torch.')}).",
            hint="Load the model without quantization=...",
        )


@dataclass
class ActivationRounding:
    """Rounds what the matrices of a block read, while they read it."""

    scheme: Scheme
    dims: tuple[int, ...]
    positions: tuple[int, ...]
    tokens: Tokens
    effect: Edits
    _shape: tuple[int, int] = (0, 0)

    def attach(
        self, model: nn.Module, tower: Tower, layer: int, found: list[Matrix], stack: ExitStack
    ) -> None:
        block = model.get_submodule(tower.blocks[layer].path)
        stack.callback(block.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        reads: dict[str, Matrix] = {}
        for matrix in found:
            if not (matrix.fused and matrix.path in reads):
                reads[matrix.path] = matrix
        for matrix in reads.values():
            hook = self._hook(layer, matrix.reads or matrix.fused)
            stack.callback(matrix.module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _begin(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        state = states_of(args, kwargs)
        self._shape = (0, 0) if state is None else (int(state.shape[0]), int(state.shape[1]))

    def _hook(self, layer: int, residual: bool) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = states_of(args, kwargs)
            if given is None or not given.is_floating_point():
                return None
            after = self._rounded(layer, given, residual)
            if args and args[0] is given:
                return (after, *args[1:]), kwargs
            return args, {key: after if value is given else value for key, value in kwargs.items()}

        return hook

    def _rounded(self, layer: int, given: Tensor, residual: bool) -> Tensor:
        rows = given.reshape(1, -1, given.shape[-1])
        stays = torch.zeros(rows.shape[1], dtype=torch.bool, device=given.device)
        batch, length = self._shape
        if rows.shape[1] == batch * length:
            real = self.tokens.real_of(batch, length, given.device)
            now = real[:, self.tokens.past :]
            place = real.long().cumsum(1)[:, self.tokens.past :] - 1
            chosen = torch.isin(place, torch.tensor(self.positions, dtype=torch.long, device=given.device))
            stays = (~now | chosen).reshape(-1)
        kept = stays[None, :, None]
        if residual and self.dims:
            protected = torch.zeros(rows.shape[-1], dtype=torch.bool, device=given.device)
            protected[list(self.dims)] = True
            kept = kept | protected
        after = fake_quantised(rows, self.scheme, kept)
        change = (after - rows).abs().float()
        self.effect.add(
            layer, (change > 0).sum(), math.prod(rows.shape), change.max() if change.numel() else 0.0
        )
        return after.view_as(given)
