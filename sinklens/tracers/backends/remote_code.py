"""What runs where the model is: reductions of one layer, in plain torch.

These functions travel to the host as source, which has torch but not this package, so they use nothing else and every
helper is named where it is used. Only what they return comes back: sums over queries or keys, never a map or a state.
"""

from __future__ import annotations

import torch


def reduce_attention(args, kwargs, real, names, block):
    """Statistics of one attention call, under the names of `kernels.spec.Stat`.

    Args:
        args, kwargs: What the attention function was given: module, query, key, value and mask, then scaling and so on.
        real: Real tokens, `[batch, pos]`.
        names: Statistics to return; `RECEIVED` and what counts rows always come along.
        block: Rows whose weights are in memory at once.

    Returns:
        Float tensors by name, and `visible`, `rows`, `key_norm`, `value_norm`.
    """
    given = {**dict(zip(("module", "query", "key", "value", "attention_mask"), args, strict=False)), **kwargs}
    query, key, value = (given[name] for name in ("query", "key", "value"))
    real = real.to(query.device)
    batch, heads, queries, dim = query.shape
    keys, group = key.shape[2], heads // key.shape[1]
    mask, scale = given.get("attention_mask"), given.get("scaling")
    scale = dim**-0.5 if scale is None else scale
    causal = given.get("is_causal")
    causal = getattr(given["module"], "is_causal", True) if causal is None else causal
    sinks = given.get("s_aux")
    wide = key.float().repeat_interleave(group, 1)
    first = real.long().argmax(1)
    where = torch.arange(keys, device=query.device)
    out = {
        name: torch.zeros(batch, heads, keys, device=query.device)
        for name in ("received", "received_log", "received_tail", "top1")
    }
    rows_of = {
        name: torch.zeros(batch, heads, queries, device=query.device)
        for name in (
            "entropy",
            "entropy_normalised",
            "distance",
            "row_max",
            "diagonal",
            "learned_sink",
            "first",
        )
    }
    visible = torch.zeros(batch, 1, keys, dtype=torch.int32, device=query.device)
    rows = torch.zeros(batch, queries, dtype=torch.bool, device=query.device)
    after = real.long().flip(1).cumsum(1).flip(1)  # real rows from this one on
    for start in range(0, queries, block):
        stop = min(start + block, queries)
        score = query[:, :, start:stop].float() @ wide.transpose(-1, -2) * scale
        if given.get("softcap") is not None:
            score = torch.tanh(score / given["softcap"]) * given["softcap"]
        at = torch.arange(start, stop, device=query.device) + (keys - queries)
        if mask is None:
            seen = torch.ones(1, 1, stop - start, keys, dtype=torch.bool, device=query.device)
            if causal and queries > 1:
                seen = seen & (where[None, :] <= at[:, None])
        else:
            part = mask[:, :, start:stop, :keys] if mask.shape[2] > 1 else mask[..., :keys]
            seen = part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2
            if part.dtype != torch.bool:
                score = score + part.float().masked_fill(~seen, 0.0)
        score = score.masked_fill(~seen, float("-inf"))
        lse = torch.logsumexp(score, -1, keepdim=True)
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks.float().to(lse.device)[None, :, None, None])
        weight = torch.nan_to_num(torch.exp(score - lse))
        counts = real[:, start:stop] & seen.any(-1).any(1).expand(batch, -1)
        rows[:, start:stop] = counts
        weight = weight * counts[:, None, :, None]
        log = torch.xlogy(weight, weight)
        visible += (seen.any(1).expand(batch, -1, -1) & counts[..., None]).sum(1, keepdim=True).int()
        out["received"] += weight.sum(2)
        out["received_log"] += log.sum(2)
        tail = counts & (after[:, start:stop] <= 64)
        out["received_tail"] += (weight * tail[:, None, :, None]).sum(2)
        best = torch.nn.functional.one_hot(weight.argmax(-1), keys).float()
        out["top1"] += (best * counts[:, None, :, None]).sum(2)
        rows_of["row_max"][:, :, start:stop] = weight.amax(-1)
        rows_of["entropy"][:, :, start:stop] = -log.sum(-1)
        number = seen.sum(-1).clamp(min=2).float().log()
        alone = (seen.sum(-1) > 1).float()
        rows_of["entropy_normalised"][:, :, start:stop] = -log.sum(-1) / number * alone
        distance = (at[:, None] - where[None, :]).float()
        rows_of["distance"][:, :, start:stop] = (weight * distance).sum(-1)
        rows_of["diagonal"][:, :, start:stop] = weight.gather(
            -1, at[None, None, :, None].expand(batch, heads, -1, 1)
        ).squeeze(-1)
        rows_of["learned_sink"][:, :, start:stop] = (1 - weight.sum(-1)) * counts[:, None]
        place = first[:, None, None, None].expand(batch, heads, stop - start, 1)
        rows_of["first"][:, :, start:stop] = weight.gather(-1, place).squeeze(-1)
    found = {
        name: value.cpu() for name, value in (out | rows_of).items() if name in names or name == "received"
    }
    if sinks is None:
        found.pop("learned_sink", None)
    found["visible"], found["rows"] = visible.cpu(), rows.cpu()
    found["key_norm"] = torch.linalg.vector_norm(key.float(), dim=-1).cpu()
    found["value_norm"] = torch.linalg.vector_norm(value.float(), dim=-1).cpu()
    return found


def reduce_state(state, real, ranks):
    """Norms, lower medians and largest entries of states `[batch, pos, dim]`, of real tokens, prompt by prompt."""
    state = state[0] if isinstance(state, tuple) else state
    state, found = state.reshape(real.shape[0], -1, state.shape[-1]), []
    for row in range(len(state)):
        own = state[row][real[row].to(state.device)]
        flat = own.flatten()
        top = flat.abs().topk(min(ranks, flat.numel())).indices
        found.append(
            {
                "norm": torch.linalg.vector_norm(own.float(), dim=-1).cpu(),
                "median": own.abs().flatten().median().float().cpu(),
                "value": flat[top].float().cpu(),
                "pos": (top // own.shape[-1]).cpu(),
                "dim": (top % own.shape[-1]).cpu(),
            }
        )
    return found
