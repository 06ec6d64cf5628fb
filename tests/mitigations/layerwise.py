"""Held against its definition layer by layer: what an attention call gives under a mitigation, from its own q, k, v.

Models of every class of attention, taken for ones that read pictures: some of their token ids stand for visual tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sinklens.kernels.reference import dense_logits, dense_visibility
from sinklens.kernels.shapes import sizes_of
from sinklens.kernels.spec import AttentionCall, Want
from sinklens.models.anatomy import find_anatomy
from sinklens.tracers.attention import AttentionTap, Site, ignore, no_statistics
from sinklens.tracers.executor import sites

from ..families import FAMILIES, IMAGE, VIDEO, build, inputs
from .dense import mixed

# MHA, MLA, sliding windows of two sorts, learned sinks, soft caps, bidirectional; then real readers of pictures.
CLASSES = (
    "gpt2", "llama", "deepseek_v3", "mistral", "gemma2", "gemma3_text", "gpt_oss", "bert_mlm",
    "llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3",
)  # fmt: skip
Definition = Callable[[Site, AttentionCall], Tensor]
"""What becomes of a call: `[batch query head value_dim]`, float64."""


def reader(family: str, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """A model and inputs with visual tokens; a model of text gets image tokens, which it reads as words."""
    model = build(family)
    given = inputs(family, **{"batch": 2, "length": 17, "padding": "left", **options})
    if FAMILIES[family].kind != "vlm":
        model.config.image_token_id, model.config.video_token_id = IMAGE, VIDEO
        for row, mask in zip(given["input_ids"], given["attention_mask"], strict=True):
            first = int(mask.argmax())
            row[first + 2 : first + 7] = torch.tensor([IMAGE, VIDEO, VIDEO, IMAGE, VIDEO])
    return model, given


def visual_of(given: dict[str, Tensor]) -> Tensor:
    return ((given["input_ids"] == IMAGE) | (given["input_ids"] == VIDEO)) & (given["attention_mask"] != 0)


def logits_of(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Logits as the softmax sees them, and those of learned sinks `[batch head query 1]` (`-inf` without)."""
    sizes = sizes_of(call, Want(frozenset()))
    z = dense_logits(call, sizes, dense_visibility(call, sizes))
    if call.learned_sinks is None:
        return z, torch.full_like(z[..., :1], -torch.inf)
    return z, call.learned_sinks.double()[None, :, None, None].expand(*z.shape[:3], 1)


def softmax_of(z: Tensor, *beside: Tensor) -> Tensor:
    """Weights of the keys; rows that see nothing are 0."""
    seen = torch.isfinite(z).any(-1, keepdim=True)
    weights = torch.softmax(torch.cat([z, *beside], -1), -1)[..., : z.shape[-1]]
    return torch.where(seen, weights, 0.0)


@contextmanager
def held_against(
    model: Any, real: Tensor, definition: Definition, limit: float = 1e-6
) -> Iterator[dict[int, float]]:
    """Every call under the block equals the definition of the same call; by layer, how far it is from the unedited."""
    apart: dict[int, float] = {}

    def check(site: Site, call: AttentionCall, output: Tensor) -> Tensor:
        bare = AttentionCall(**{**vars(call), "edits": ()})
        truth = definition(site, bare)
        rows = real[:, -call.query.shape[2] :]
        scale = max(1.0, float(truth[rows].abs().max())) if bool(rows.any()) else 1.0
        off = (output.double() - truth)[rows].abs().max() if bool(rows.any()) else torch.tensor(0.0)
        assert float(off) <= limit * scale, f"layer {site.layer}: {float(off):.2g} of {scale:.2g}"
        plain = mixed(softmax_of(*logits_of(bare)), bare)
        moved = float((truth - plain)[rows].abs().max()) if bool(rows.any()) else 0.0
        apart[site.layer] = max(apart.get(site.layer, 0.0), moved)
        return output

    tower = find_anatomy(model).main
    tap = AttentionTap(sites(model, tower, "attention"), no_statistics, ignore, edit=check)
    with tap.attached(model):
        yield apart
    assert apart
