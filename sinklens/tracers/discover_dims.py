"""Finding the sink dims of any decoder from the states of its sink token.

The reference token is the key that receives most attention in the middle layers. A sink dim is large there and not
elsewhere: dims that are large for every token say nothing about sinks.

The rules of choice are ours. Those seen in use take the largest entries of token 0, or the dims whose mean exceeds a
multiple of the median, or rank by a median and cut at a gap; these here combine them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from sinklens.kernels.magnitudes import lower_medians

from .sink_dims import TAU_ENERGY, SinkDim, SinkDims


@dataclass(frozen=True)
class Rules:
    """When a dim is a sink dim.

    Attributes:
        top_energy: Share of the reference token's energy that the strongest dim must have.
        energy: The same for the others.
        over_baseline: Strength over that of the other tokens.
        within: Dims are taken while they have at least this part of the strongest one's strength.
        gap: The last one taken must have this many times the strength of the next one.
        most: Largest number of dims.
    """

    top_energy: float = TAU_ENERGY
    energy: float = 0.02
    over_baseline: float = 10.0
    within: float = 0.25
    gap: float = 3.0
    most: int = 4


RULES = Rules()


def middle_layers(count: int) -> range:
    """Layers whose inputs are looked at: 2 to L - 2, in models too shallow for that all that have one before them."""
    inner = range(2, count - 1)
    return inner if inner else range(min(1, count - 1), count)


def attending_layers(count: int) -> range:
    """Layers whose attention chooses the reference token: the middle half."""
    first, last = count // 4, max(count // 4 + 1, math.ceil(3 * count / 4))
    return range(first, last)


def reference_token(received: Float[np.ndarray, "layer pos"], seen: Float[np.ndarray, "layer pos"]) -> int:
    """The key that receives most attention per query that sees it, over the middle half of the layers.

    Keys that fewer than 16 queries see (or than see any key, in short prompts) do not take part: the last ones have
    hardly any rows to be averaged over.

    Args:
        received: Mean attention per visible query, mean over heads; NaN in layers without attention.
        seen: Number of queries that see the key.
    """
    layers = [i for i in attending_layers(len(received)) if not np.isnan(received[i]).any()]
    layers = layers or [i for i in range(len(received)) if not np.isnan(received[i]).any()]
    share = received[layers].mean(0)
    enough = seen.max(0) >= min(16, seen.max())
    return int(np.where(enough, share, -1.0).argmax())


def discover(
    strengths: Float[np.ndarray, "sample dim"],
    baselines: Float[np.ndarray, "sample dim"],
    found_on: str,
    rules: Rules = RULES,
) -> SinkDims:
    """Choose the sink dims.

    Args:
        strengths: |x| / RMS(x) of the reference token, a sample for every prompt and middle layer.
        baselines: The same of the other tokens, the median over the tokens of the prompt and layer.
        found_on: What they were measured on, in words, for the record.

    Returns:
        The dims, or none and the reason in `failed`.
    """
    size = strengths.shape[1]
    # A lower median is at least a value iff more than half of the samples are.
    strength, baseline = (lower_medians(torch.from_numpy(x)).double().numpy() for x in (strengths, baselines))
    # A dim that is large for every token is not in the ranking, not even as the one to stand out from.
    everywhere = baseline**2 / size >= rules.energy
    order = np.argsort(np.where(everywhere, -1.0, -strength), kind="stable")
    order = order[~everywhere[order]]
    ranked, base = strength[order], baseline[order]
    good = (ranked**2 / size >= rules.energy) & (ranked >= rules.over_baseline * (base + 1e-6))

    def none(why: str, standing_out: bool) -> SinkDims:
        return SinkDims((), size, "discovered", found_on, "measured", why, standing_out)

    if not len(order):
        return none("every dim is large for every token.", False)
    needed = math.sqrt(rules.top_energy * size)
    top, at, shown = float(ranked[0]), int(order[0]), f"{ranked[0]:.3g}"
    if top < needed:
        return none(
            f"no dim stands out at the token that receives most attention: the largest, dim {at}, is {shown} times the "
            f"root mean square of its state, less than {needed:.3g}.",
            False,
        )
    if not good[0]:
        return none(
            f"the largest dim at the token that receives most attention, dim {at}, is large for the other tokens too: "
            f"{shown} against {base[0]:.3g} in units of the root mean square, less than {rules.over_baseline:g} times.",
            False,
        )
    fit = good & (ranked >= rules.within * top)
    count = len(fit) if fit.all() else int(fit.argmin())
    nexts = np.append(ranked[1:], 0.0)
    margins = ranked / np.maximum(nexts, 1e-12)
    taken = 1 + int(margins[: min(count, rules.most)].argmax())
    if margins[taken - 1] < rules.gap:
        listed = ", ".join(f"{dim} ({value:.3g})" for dim, value in zip(order[:6], ranked[:6], strict=True))
        return none(
            f"no gap separates the sink dims from the others at the token that receives most attention: {listed}; the "
            f"widest step is {margins[taken - 1]:.2g} times, less than {rules.gap:g}.",
            True,
        )
    dims = tuple(
        SinkDim(int(order[i]), _short(ranked[i]), _short(base[i]), _short(min(margins[i], 1e6)))
        for i in range(taken)
    )
    return SinkDims(dims, size, "discovered", found_on, "measured")


def _short(value: float) -> float:
    """Six digits: what goes into a manifest shall be the same on another machine."""
    return float(f"{value:.6g}")
