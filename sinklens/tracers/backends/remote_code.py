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
        names: Statistics to return; `received` and what counts rows always come along.
        block: Rows whose weights are in memory at once.

    Returns:
        Float tensors by name, and `visible`, `rows`, `key_norm`, `value_norm`.
    """
    given = {**dict(zip(("module", "query", "key", "value", "attention_mask"), args, strict=False)), **kwargs}
    query, key = given["query"], given["key"]
    real = real.to(query.device)
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    after = real.long().flip(1).cumsum(1).flip(1)  # real rows from this one on
    first = real.long().argmax(1)
    sums, rows, counted = {}, {}, []
    visible = torch.zeros(batch, 1, keys, dtype=torch.int64, device=query.device)
    for start in range(0, queries, block):
        stop = min(start + block, queries)
        at = torch.arange(start, stop, device=query.device) + (keys - queries)
        weight, seen = weights_of(given, at, start, stop)
        counts = real[:, start:stop] & seen.any(-1).any(1).expand(batch, -1)
        counted.append(counts)
        weight = weight * counts[:, None, :, None]
        visible = visible + (seen.any(1).expand(batch, -1, -1) & counts[..., None]).sum(1, keepdim=True)
        tail = counts & (after[:, start:stop] <= 64)
        best = torch.nn.functional.one_hot(weight.argmax(-1), keys).float() * counts[:, None, :, None]
        by_key = {
            "received": weight.sum(2),
            "received_log": torch.xlogy(weight, weight).sum(2),
            "received_tail": (weight * tail[:, None, :, None]).sum(2),
            "top1": best.sum(2),
        }
        for name, value in by_key.items():
            sums[name] = sums.get(name, 0) + value
        for name, value in row_values(weight, seen, at, first).items():
            rows.setdefault(name, []).append(value * counts[:, None])
    found = sums | {name: torch.cat(parts, 2) for name, parts in rows.items()}
    found = {name: value.cpu() for name, value in found.items() if name in names or name == "received"}
    if given.get("s_aux") is None:
        found.pop("learned_sink", None)
    found["visible"], found["rows"] = visible.int().cpu(), torch.cat(counted, 1).cpu()
    for name in ("key", "value"):
        found[f"{name}_norm"] = torch.linalg.vector_norm(given[name].float(), dim=-1).cpu()
    return found


def weights_of(given, at, start, stop):
    """Weights `[batch, head, row, key]` of some rows and who sees whom; `at` are the rows' places among the keys."""
    query, key = given["query"][:, :, start:stop].float(), given["key"].float()
    scale, mask, causal = given.get("scaling"), given.get("attention_mask"), given.get("is_causal")
    score = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(-1, -2)
    score = score * (query.shape[-1] ** -0.5 if scale is None else scale)
    if given.get("softcap") is not None:
        score = torch.tanh(score / given["softcap"]) * given["softcap"]
    if mask is None:
        causal = getattr(given["module"], "is_causal", True) if causal is None else causal
        seen = torch.ones(1, 1, stop - start, key.shape[2], dtype=torch.bool, device=query.device)
        if causal and given["query"].shape[2] > 1:
            seen = seen & (torch.arange(key.shape[2], device=query.device)[None, :] <= at[:, None])
    else:
        part = (mask[:, :, start:stop] if mask.shape[2] > 1 else mask)[..., : key.shape[2]]
        seen = part if part.dtype == torch.bool else part > torch.finfo(part.dtype).min / 2
        if part.dtype != torch.bool:
            score = score + part.float().masked_fill(~seen, 0.0)
    score = score.masked_fill(~seen, float("-inf"))
    lse = torch.logsumexp(score, -1, keepdim=True)
    if given.get("s_aux") is not None:
        lse = torch.logaddexp(lse, given["s_aux"].float().to(lse.device)[None, :, None, None])
    return torch.nan_to_num(torch.exp(score - lse)), seen


def row_values(weight, seen, at, first):
    """What each row does with its attention, `[batch, head, row]`; `first` is the first real token of each prompt."""
    keys, shape = torch.arange(weight.shape[-1], device=weight.device), weight.shape[:3]
    entropy = -torch.xlogy(weight, weight).sum(-1)
    number = seen.sum(-1)
    return {
        "entropy": entropy,
        "entropy_normalised": entropy / number.clamp(min=2).float().log() * (number > 1),
        "distance": (weight * (at[:, None] - keys[None, :]).float()).sum(-1),
        "row_max": weight.amax(-1),
        "diagonal": weight.gather(-1, at[None, None, :, None].expand(*shape, 1)).squeeze(-1),
        "learned_sink": 1 - weight.sum(-1),
        "first": weight.gather(-1, first[:, None, None, None].expand(*shape, 1)).squeeze(-1),
    }


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
