"""Models whose weights are spread over several processes."""

from __future__ import annotations

from typing import Any

from torch import nn

from sinklens.core.errors import ModelError


def refuse_spread(module: nn.Module) -> None:
    """Refuse a model under a tensor-parallel plan (or fully sharded).

    Measured with transformers 5.23 on two gloo processes: its logits are right, but the attention function of a
    Llama of 4 heads is given 2 of them in each process, so means over heads, the positions that are kept, and the
    leader would be those of half of the heads; and the inputs of down projections are half as wide.

    Raises:
        ModelError: Saying what to do instead.
    """
    spread = [name for name, weight in module.named_parameters() if type(weight).__name__ == "DTensor"]
    if not spread:
        return
    first: Any = module.get_parameter(spread[0])
    raise ModelError(
        f"The weights of this model are spread over {first.device_mesh.size()} processes (tensor parallelism): "
        f"{spread[0]} and {len(spread) - 1} more.",
        detail="Each process's attention sees a share of the heads only, so no statistic over heads would be right.",
        hint="Spread the layers instead (device_map='auto'), or the prompts (torchrun -m sinklens profile).",
    )
