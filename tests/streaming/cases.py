"""Saved tiny models, prompts for them, and what it means that two traces are equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from sinklens.inputs.spec import Prompt
from sinklens.models.opening import open_model
from sinklens.models.spec import OpenedModel
from sinklens.tracers.executor import TracePlan
from sinklens.tracers.trace import Trace
from tests.families import BOS, build, save_with_tokenizer

LENGTHS = (23, 17, 31, 5, 19)
PLAN = TracePlan(batch_prompts=2)


def saved(family: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str | None = None) -> Path:
    """A tiny model and its tokenizer in a folder, in one file or in shards of a size."""
    model = build(family, dtype=dtype)
    save_with_tokenizer(model, str(folder))
    if shard is not None:
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size=shard)
    return folder


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[Prompt]:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(5, 300, (length - 1,), generator=generator).tolist() for length in lengths]
    return [Prompt(i, (BOS, *row), ("x",) * (len(row) + 1), f"p{i}", "d") for i, row in enumerate(ids)]


def opened(folder: Path, *, stream: bool = True) -> Any:
    return open_model(str(folder), stream=stream)


def in_memory(family: str) -> OpenedModel:
    """The model that `saved` wrote, as it was before."""
    return open_model(build(family))


def differences(a: Trace, b: Trace) -> list[str]:
    """Arrays that are not equal to the last bit, or of which only one trace has any."""
    found = []
    for x, y in zip(a.records, b.records, strict=True):
        found += [f"{x.index}/{name} is missing" for name in x.arrays.keys() ^ y.arrays.keys()]
        for name in x.arrays.keys() & y.arrays.keys():
            p, q = x.arrays[name], y.arrays[name]
            same = np.array_equal(p, q, equal_nan=p.dtype.kind == "f")
            if p.dtype != q.dtype or not same or x.token_ids.tolist() != y.token_ids.tolist():
                found.append(f"{x.index}/{name}")
    return found
