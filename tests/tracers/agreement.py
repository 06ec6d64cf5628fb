"""Whether two backends recorded the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from sinklens.tracers.backends import open_with
from sinklens.tracers.batch import Batch
from sinklens.tracers.executor import TracePlan, trace_batch
from sinklens.tracers.trace import PromptRecord
from tests.families import FAMILIES, inputs

WRAPPED = (
    "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "olmo2", "phi3", "gemma2",
    "gemma3_text", "gpt_oss", "gpt2", "gpt_neox", "opt", "deepseek_v2", "deepseek_v3",
)  # fmt: skip
"""The 18 language families that a bridge wraps."""


def batch_of(family: str, padding: str | None = "right") -> Batch:
    """A padded batch; vision-language families get one prompt with its picture."""
    picture = FAMILIES[family].kind == "vlm"
    given = inputs(family, batch=1) if picture else inputs(family, padding=padding, length=19)
    return Batch(dict(given), given["attention_mask"].bool())


def recorded(
    model: Any, family: str, backend: str | None = None, plan: TracePlan | None = None
) -> list[PromptRecord]:
    opened = open_with(model, backend=backend)
    return trace_batch(opened, batch_of(family), plan or TracePlan()).records


def differences(ours: list[PromptRecord], theirs: list[PromptRecord], limit: float = 1e-5) -> list[str]:
    """What differs by more than `limit` of a value's size (of 1 for smaller ones); ranks may swap where values tie."""
    found = []
    for a, b in zip(ours, theirs, strict=True):
        for name in sorted(a.arrays.keys() ^ b.arrays.keys()):
            found.append(f"{name}: on one side only")
        for name in sorted(a.arrays.keys() & b.arrays.keys()):
            found += _difference(name, a.arrays, b.arrays, limit)
    return found


def _difference(name: str, a: dict[str, np.ndarray], b: dict[str, np.ndarray], limit: float) -> list[str]:
    x, y = a[name], b[name]
    if x.shape != y.shape:
        return [f"{name}: shapes {x.shape} and {y.shape}"]
    tied = _tied(name, a)
    if tied is not None:
        x, y = (np.where(tied, 0, np.abs(z) if name.endswith("_top") else z) for z in (x, y))
    if not np.issubdtype(x.dtype, np.floating):
        return [] if (x == y).all() else [f"{name}: {(x != y).sum()} of {x.size} differ"]
    if (np.isnan(x) != np.isnan(y)).any():
        return [f"{name}: NaN in other places"]
    limit = max(limit, float(np.finfo(x.dtype).eps))  # some are kept in half precision
    error = np.abs(np.nan_to_num(x) - np.nan_to_num(y)) / np.maximum(1.0, np.abs(np.nan_to_num(x)))
    return [f"{name}: off by {error.max():.2g}"] if error.size and error.max() > limit else []


def _tied(name: str, arrays: dict[str, np.ndarray]) -> np.ndarray | None:
    """Ranks whose value is that of a neighbour to rounding: which comes first is not said."""
    base = name.removesuffix("_pos").removesuffix("_dim")
    if not base.endswith("_top"):
        return None
    size = np.abs(arrays[base])
    close = np.isclose(size[:, 1:], size[:, :-1], rtol=1e-5, atol=0)
    edge = np.zeros((len(size), 1), dtype=bool)
    return np.concatenate([close, edge], 1) | np.concatenate([edge, close], 1)


class State:
    """What a caller can see of a module: parameters, hooks, attention implementation, modes."""

    def __init__(self, module: nn.Module) -> None:
        self.values = {name: value.clone() for name, value in module.state_dict().items()}
        self.ids = [id(parameter) for parameter in module.parameters()]
        self.hooks = [
            (len(part._forward_hooks), len(part._forward_pre_hooks), len(part._backward_hooks))
            for part in module.modules()
        ]
        self.modules = [id(part) for part in module.modules()]
        self.modes = [part.training for part in module.modules()]
        self.attention = [
            getattr(part.config, "_attn_implementation", None)
            for part in module.modules()
            if getattr(part, "config", None) is not None
        ]

    def changed(self, module: nn.Module) -> list[str]:
        """Names of what is different now."""
        now = State(module)
        kinds = ("ids", "hooks", "modules", "modes", "attention")
        different = [kind for kind in kinds if getattr(self, kind) != getattr(now, kind)]
        same = self.values.keys() == now.values.keys() and all(
            torch.equal(value, now.values[name]) for name, value in self.values.items()
        )
        return different if same else [*different, "values"]
