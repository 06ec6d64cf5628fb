"""What head-roles draws."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sinklens.core.counts import counted
from sinklens.core.figures import Figure, Heatmap, Lines, Series

from .heads import BINS, groups

if TYPE_CHECKING:
    from .head_roles import Roles


def figures(roles: Roles, classes: np.ndarray, *, dormant: float, active: float) -> list[Figure]:
    """Dormancy, its contrast between domains, and its spread over the queries."""
    where = f"position {roles.position}"
    n = len(roles.mass)
    rings = tuple((int(layer), int(head)) for layer, head in np.argwhere(classes == "dormant"))
    figures: list[Figure] = [
        Heatmap(
            "dormancy",
            f"Dormancy: attention that queries put on {where}",
            f"Mean over the queries after {where} that see it, then over {counted(n, 'prompt')}. Rings: above "
            f"{dormant:g} in every domain.",
            roles.mass.mean(0),
            "share",
            marks=rings,
            limits=(0.0, 1.0),
        )
    ]
    if len(roles.domains) > 1:
        figures.append(
            Heatmap(
                "contrast",
                "Largest difference of dormancy between two domains",
                f"Mean over the prompts of each of {', '.join(roles.domains)}; largest minus smallest. Rings: "
                f"above {dormant:g} in one and at most {active:g} in another.",
                np.ptp(roles.by_domain, axis=0),
                "difference of shares",
                marks=tuple((int(a), int(b)) for a, b in np.argwhere(classes == "by domain")),
                limits=(0.0, 1.0),
            )
        )
        figures.append(_by_layer(roles, dormant))
    if not np.isnan(roles.spread).all():
        figures += [_switching(roles, classes), _distributions(roles)]
    return figures


def _by_layer(roles: Roles, dormant: float) -> Lines:
    layers = np.arange(roles.mass.shape[1])
    share = [
        np.where(np.isnan(values).all(1), np.nan, (values > dormant).mean(1)) for values in roles.by_domain
    ]
    return Lines(
        "by_layer",
        "Dormant heads by layer and domain",
        f"Share of the layer's heads whose dormancy, mean over the domain's prompts, exceeds {dormant:g}.",
        tuple(Series(name, layers, line) for name, line in zip(roles.domains, share, strict=True)),
        "layer",
        "share of heads",
    )


def _switching(roles: Roles, classes: np.ndarray) -> Heatmap:
    high, low = groups(roles.spread)
    return Heatmap(
        "switching",
        "Heads that rest on some queries and work on others",
        f"The smaller of two shares of the queries after position {roles.position}, over all prompts: those with more "
        "than 0.9 of their attention on it, and those with less than 0.1. Near 0.5 the head does both equally often; "
        "a mean alone would hide that. Rings: heads called switching.",
        np.minimum(high, low),
        "share of queries",
        marks=tuple((int(a), int(b)) for a, b in np.argwhere(classes == "switching")),
        limits=(0.0, 0.5),
    )


def _distributions(roles: Roles) -> Lines:
    """The three heads with the largest two groups, and all heads together."""
    high, low = groups(roles.spread)
    both = np.nan_to_num(np.minimum(high, low), nan=-1.0)
    centre = (np.arange(BINS) + 0.5) / BINS
    whole = np.nansum(roles.spread, axis=(0, 1))
    series = [Series("all heads", centre, whole / max(whole.sum(), 1.0), emphasis=True)]
    for place in np.argsort(-both, axis=None, kind="stable")[:3]:
        layer, head = divmod(int(place), both.shape[1])
        if both[layer, head] > 0:
            counts = roles.spread[layer, head]
            series.append(Series(f"layer {layer} head {head}", centre, counts / counts.sum()))
    return Lines(
        "distribution",
        f"Attention on position {roles.position}, query by query",
        "Share of the queries (over all prompts) in each of 20 equal steps of the mass they put on it; all heads, and "
        "the heads with most queries at both ends.",
        tuple(series),
        "share of a query's attention",
        "share of queries",
    )
