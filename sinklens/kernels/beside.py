"""One more place beside all keys that a row may give attention to, with a value or without one, after the kernel.

With the logit `b` of that place and the log-sum-exp of a row, its mass is `m = exp(b) / (exp(b) + exp(lse))`, and

    o' = (1 - m) o + m v'

so neither the map nor the kernel is needed, at any length.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .edits import MapEdit
from .spec import AttentionCall
from .transfer import Transferred


def beside(
    call: AttentionCall,
    output: Float[Tensor, "batch query head value_dim"],
    logit: Float[Tensor, "#batch #head #query"],
    lse: Float[Tensor, "batch head query"],
    edited: Bool[Tensor, "batch head query"],
    *,
    value: Float[Tensor, "head value_dim"] | None = None,
    before: MapEdit | None = None,
    remember: bool = False,
) -> Transferred:
    """Let rows give attention to a place that is no key.

    Args:
        call: What the kernel was given.
        output: What the kernel made of it, `before` included. Not changed.
        logit: Of the place, in the units of the softmax (scaled and capped).
        lse: Log-sum-exp of the rows before all edits, learned sinks included.
        edited: Rows that get the place.
        value: What it writes; None for nothing.
        before: An edit by the same method that hid keys: rows add up to 1 after it.
        remember: Also return the edit, `before` included.
    """
    with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
        lse, output_ = lse.to(torch.promote_types(lse.dtype, torch.float32)), output
        logit = logit.to(lse.dtype)
        rest, learned = torch.ones_like(lse), torch.ones_like(lse)
        if before is not None:
            before = before.of_block(slice(0, output.shape[1]))
            rest, learned = before.scale[..., -1], before.learned
        # The softmax of what was left has the log-sum-exp of what was left.
        shift = logit - lse + rest.log()
        mass = torch.where(edited, torch.sigmoid(shift), 0.0)
        left = torch.where(edited, torch.sigmoid(-shift), 1.0)
        wide = output_.to(lse.dtype) * left.transpose(1, 2)[..., None]
        if value is not None:
            wide = wide + mass.transpose(1, 2)[..., None] * value.to(wide)
        touched = edited & (mass > 0)
        changed = torch.where(touched.transpose(1, 2)[..., None], wide.to(output.dtype), output)
        edit = None
        if remember and before is None:
            sets = torch.zeros(1, 1, call.key.shape[2], dtype=torch.long, device=lse.device)
            edit = MapEdit(sets, left[..., None], left, mass)
        elif remember and before is not None:
            edit = replace(before, scale=before.scale * left[..., None], learned=learned * left, added=mass)
        kept = 1.0 / rest  # what the hidden keys left of the row
        moved = 0.5 * ((1.0 - kept) + kept * (1.0 - left * rest).abs() + mass)
        moved = torch.where(touched, moved, 0.0).sum(dtype=torch.float64)
        return Transferred(changed, touched.sum(), moved, touched.sum() * 0, edit)
