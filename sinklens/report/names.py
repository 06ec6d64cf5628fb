"""How keys of rows, summaries and parameters are called in front of readers.

A finding brings labels for what only it knows. This is the one table of words that all findings share, and the
rules that make a readable name of any other key.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

_SHARED = {
    "n_prompts": "prompts",
    "n_tokens": "tokens",
    "n_heads": "heads",
    "n_layers": "layers",
    "token_id": "token id",
    "dim": "dimension",
    "dims": "dimensions",
    "abs_max": "largest |value|",
    "ratio_to_median": "ratio to the median",
    "p_value": "p",
    "kl": "KL divergence",
    "domain": "input domain",
    "seq_len": "prompt length",
}
_WORDS = {
    "ci": "95 % interval",
    "abs": "absolute",
    "kl": "KL",
    "mlp": "MLP",
    "moe": "MoE",
    "bos": "BOS",
    "ffn": "FFN",
    "qk": "q·k",
    "l2": "L2",
    "std": "standard deviation",
    "pct": "percent",
    "proj": "projection",
    "eps": "ε",
    "epsilon": "ε",
    "kv": "key-value",
    "id": "id",
}
_FRONT = {"n": "number of", "max": "largest", "min": "least", "mean": "mean", "median": "median"}
_BACK = {"min": "smallest", "max": "largest", "low": "lower end", "high": "upper end"}
_ENDS = (("_ci_low", "_ci_high"), ("_low", "_high"))


def name(key: str, labels: Mapping[str, str] | None = None) -> str:
    """The label of a key, else the shared word for it, else its parts as words.

    >>> name("n_sink_heads"), name("max_ratio"), name("rate_ci_low")
    ('number of sink heads', 'largest ratio', 'rate, 95 % interval from')
    """
    own = (labels or {}).get(key)
    if own:
        return own
    if key in _SHARED:
        return _SHARED[key]
    for ending, joint in zip(_ENDS[0], ("from", "to"), strict=True):
        if key.endswith(ending):
            return f"{name(key.removesuffix(ending), labels)}, 95 % interval {joint}"
    parts = key.replace("-", "_").split("_")
    if len(parts) > 1 and parts[0] in _FRONT:
        return f"{_FRONT[parts[0]]} {name('_'.join(parts[1:]), labels)}"
    if len(parts) > 1 and parts[-1] in _BACK:
        return f"{name('_'.join(parts[:-1]), labels)}, {_BACK[parts[-1]]}"
    return _spelled(parts)


def ends(key: str, keys: Collection[str]) -> tuple[str, str] | None:
    """The two keys that hold the interval of a key's value, if both are there."""
    pairs = ((key + low, key + high) for low, high in _ENDS)
    return next((pair for pair in pairs if pair[0] in keys and pair[1] in keys), None)


def folded(keys: Collection[str]) -> set[str]:
    """The keys that are only the ends of another key's interval."""
    found = (ends(key, keys) for key in keys)
    return {end for pair in found if pair for end in pair}


def _spelled(parts: list[str]) -> str:
    return " ".join(_WORDS.get(part, part) for part in parts if part)
