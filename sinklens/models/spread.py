"""Models whose weights are spread over several processes by a tensor-parallel plan of transformers.

Under such a plan each process holds a share of the heads and of the neurons. The residual stream is whole everywhere,
because the partial sums of the output and down projections are added over all processes. What a process sees of the
inside of a block is its share; the functions here join shares, in the order in which the plan cut them.

All processes run the same code on the same prompts in lock-step: every function here that joins must be called by all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sinklens.core.counts import counted
from sinklens.core.errors import ModelError, ResourceError

from .spec import Anatomy


@dataclass(frozen=True)
class Spread:
    """The processes that hold one model together, as one of them sees it.

    Attributes:
        mesh: The one-dimensional device mesh of the plan.
    """

    mesh: Any

    @property
    def size(self) -> int:
        return int(self.mesh.size())

    @property
    def rank(self) -> int:
        return int(self.mesh.get_local_rank())

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def __repr__(self) -> str:
        return f"process {self.rank} of {self.size}"

    def joined(self, own: Tensor, dim: int, total: int) -> Tensor:
        """The shares of all processes one after the other along `dim`, of `total` entries; the last may be shorter."""
        import torch.distributed as dist

        share = -(-total // self.size)
        if total != share * self.size:  # equal sizes for the wire
            shape = list(own.shape)
            shape[dim] = share
            padded = own.new_zeros(shape)
            padded.narrow(dim, 0, own.shape[dim]).copy_(own)
            own = padded
        parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(self.size)]
        with _reaching(self):
            dist.all_gather(parts, own.contiguous(), group=self.mesh.get_group())
        return torch.cat(parts, dim).narrow(dim, 0, total)

    def summed(self, own: Tensor) -> Tensor:
        """The sum over all processes; `own` is left alone."""
        import torch.distributed as dist

        total = own.clone(memory_format=torch.contiguous_format)
        with _reaching(self):
            dist.all_reduce(total, group=self.mesh.get_group())
        return total

    def agree(self, name: str, said: Any) -> list[Any]:
        """What every process says to a question, in order of rank. All of them must ask it."""
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        with _reaching(self):
            dist.all_gather_object(found, (name, said), group=self.mesh.get_group())
        if any(asked != name for asked, _ in found):
            raise ResourceError(f"The processes are not in step: {', '.join(asked for asked, _ in found)}.")
        return [answer for _, answer in found]


class OutOfReach(ResourceError):
    """A process that holds a part of the model is gone, or the way to it is."""


@contextmanager
def _reaching(spread: Spread) -> Iterator[None]:
    """Errors of the transport, said in words."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise OutOfReach(
            f"This is {spread!r}, and it can no longer reach the others: "
            f"{(str(error).splitlines() or [''])[0][:120]}",
            detail="Another process has ended, or the network between them has.",
        ) from error


def lost(error: BaseException) -> bool:
    """Whether an error is that another process could not be reached, here or in a layer of the model."""
    transports = ("gloo", "NCCL")
    return isinstance(error, OutOfReach) or (
        isinstance(error, RuntimeError) and any(name in str(error) for name in transports)
    )


@dataclass(frozen=True)
class Share:
    """A part of an axis that a process holds, of `total` entries."""

    spread: Spread
    total: int

    def joined(self, own: Tensor) -> Tensor:
        """The whole last axis."""
        return self.spread.joined(own, own.ndim - 1, self.total)


def distributed(weight: Any) -> bool:
    """Whether a tensor is spread over processes (or could be: replicated ones too)."""
    return type(weight).__name__ == "DTensor" or type(getattr(weight, "data", None)).__name__ == "DTensor"


def own_part(weight: Tensor) -> Tensor:
    """What this process holds of a weight; the weight itself if it is not spread."""
    held: Any = weight
    return held.to_local() if distributed(weight) else weight


def whole(weight: Tensor) -> Tensor:
    """A weight as all processes together hold it."""
    held: Any = weight
    return held.full_tensor() if distributed(weight) else weight


def share_of(weight: Tensor, dim: int) -> Share | None:
    """The share of axis `dim` that this process holds of a weight; None if it holds all of it.

    Raises:
        ModelError: The weight is cut along another axis.
    """
    if not distributed(weight):
        return None
    held: Any = weight
    (placement,) = held.placements
    if placement.is_replicate():
        return None
    if placement.dim % weight.ndim != dim % weight.ndim:
        raise ModelError(
            f"A weight of shape {tuple(weight.shape)} is cut along its axis {placement.dim}; {dim % weight.ndim} was "
            "expected.",
            detail="This plan spreads the model in a way whose shares cannot be put together.",
        )
    return Share(Spread(held.device_mesh), weight.shape[dim])


def whole_input(module: nn.Module, x: Tensor) -> Tensor:
    """What enters a Linear, `[..., in]`: itself, or the shares of all processes joined."""
    weight, width = getattr(module, "weight", None), getattr(module, "in_features", None)
    if not distributed(weight) or not isinstance(weight, Tensor) or width is None or x.shape[-1] == width:
        return x
    share = share_of(weight, 1)
    return x if share is None else share.joined(x)


def whole_output(module: nn.Module, y: Tensor) -> Tensor:
    """What leaves a Linear, `[..., out]`: itself, or the shares of all processes joined."""
    weight, width = getattr(module, "weight", None), getattr(module, "out_features", None)
    if not distributed(weight) or not isinstance(weight, Tensor) or width is None or y.shape[-1] == width:
        return y
    share = share_of(weight, 0)
    if share is None:
        return y
    held: Any = weight
    # Packed projections (gate and up in one matrix) are cut within each of their parts.
    packed = getattr(held.placements[0], "split_factor", 1)
    if packed == 1:
        return share.joined(y)
    part = Share(share.spread, share.total // packed)
    return torch.cat([part.joined(own) for own in y.chunk(packed, -1)], -1)


def rows_of(weight: Tensor, index: Tensor) -> Tensor:
    """Some rows of a weight matrix, whole. Only they travel where the weight is cut along its columns."""
    held: Any = weight
    if distributed(weight) and held.placements[0].is_shard(dim=1):
        share = share_of(weight, 1)
        assert share is not None
        return share.joined(own_part(weight)[index])
    return whole(weight)[index]


def spread_of(module: nn.Module) -> Spread | None:
    """The processes over which a model is spread; None if it is whole in this one.

    Raises:
        ModelError: It is spread in another way than by a tensor-parallel plan over all processes.
    """
    spread = {name: weight for name, weight in module.named_parameters() if distributed(weight)}
    if not spread:
        return None
    import torch.distributed as dist

    meshes: list[Any] = [weight.device_mesh for weight in spread.values()]  # pyright: ignore
    first, name = meshes[0], next(iter(spread))
    names = sorted({axis for mesh in meshes for axis in mesh.mesh_dim_names or ("unnamed",)})
    if names != ["tp"] or first.ndim != 1 or first.size() != dist.get_world_size():
        raise ModelError(
            f"The weights of this model are spread over {first.size()} of {dist.get_world_size()} processes "
            f"({', '.join(names)}): {name} and {len(spread) - 1} more.",
            detail="Only a tensor-parallel plan over all processes can be put together again: whole experts, whole "
            "layers or replicas that are spread, fully sharded weights cannot.",
            hint="Load it with DistributedConfig(tp_plan='auto') and nothing else, or with device_map='auto'.",
        )
    return Spread(first)


def refuse_spread(module: nn.Module) -> None:
    """Refuse a model under a tensor-parallel plan where only whole models can be worked on.

    Raises:
        ModelError: Saying what to do instead.
    """
    spread = [name for name, weight in module.named_parameters() if distributed(weight)]
    if not spread:
        return
    first: Any = module.get_parameter(spread[0])
    raise ModelError(
        f"The weights of this model are spread over {first.device_mesh.size()} processes (tensor parallelism): "
        f"{spread[0]} and {len(spread) - 1} more.",
        detail="A spread model can be profiled, by all of its processes together; nothing else is done with it.",
        hint="Spread the layers instead (device_map='auto'), or use `profile`.",
    )


def refuse_unspreadable(
    shell: nn.Module, anatomy: Anatomy, size: int | None, name: str, quantised: Any = None
) -> None:
    """Refuse to spread a model over `size` processes before its weights are read.

    Args:
        size: None where nobody wants to spread it.

    Raises:
        ModelError: It has no plan, its heads cannot be shared out evenly, or its attention cannot be seen in shares.
    """
    if size is None:
        return
    plan: dict[str, str] = getattr(shell, "tp_plan", None) or {}  # pyright: ignore
    config: Any = shell.config
    tower = anatomy.main
    instead = (
        "Spread the layers instead (--device-map auto), or the prompts (torchrun without --tensor-parallel)."
    )
    blocks = [pattern for pattern in plan if ".*." in pattern]
    if not blocks:
        raise ModelError(
            f"transformers has no tensor-parallel plan for {anatomy.family!r} ({name}).", hint=instead
        )
    if quantised is not None or getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"The weights of {name} are quantised, which tensor parallelism does not go with here.",
            hint=instead,
        )
    if not anatomy.routed or len(anatomy.towers) > 1:
        what = "more than one tower" if anatomy.routed else "attention that bypasses transformers' registry"
        raise ModelError(f"{name} has {what}, which tensor parallelism does not go with here.", hint=instead)
    most = math.gcd(tower.heads, tower.kv_heads)
    if cuts_heads(plan) and most % size:
        fewer = [str(count) for count in range(2, most + 1) if most % count == 0]
        raise ModelError(
            f"{name} has {counted(tower.heads, 'head')} and {counted(tower.kv_heads, 'key-value head')}, which "
            f"{size} processes cannot share evenly.",
            detail="Its tensor-parallel plan gives each process the same number of both.",
            hint=f"Start {' or '.join(fewer)} processes. {instead}" if fewer else instead,
        )


def cuts_heads(plan: dict[str, str]) -> bool:
    """Whether a plan leaves each process a share of the heads, and not all of them after a gather."""
    return any(
        style == "colwise" and ("attn" in pattern or "attention" in pattern)
        for pattern, style in plan.items()
    )


def spreading(size: int) -> Any:
    """What transformers is told to load a model by its own tensor-parallel plan."""
    from transformers.distributed.configuration_utils import DistributedConfig

    return DistributedConfig(tp_size=size, tp_plan="auto")


def bad_anywhere(names: Iterable[str], bad: Iterable[str], spread: Spread | None) -> list[str]:
    """Those of `names` that are in `bad` in any process."""
    found = set(bad)
    if spread is not None:
        found = {name for mine in spread.agree("damaged", sorted(found)) for name in mine}
    return [name for name in names if name in found]
