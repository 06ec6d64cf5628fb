"""The run judged at every value that a page lets a threshold take: sentences, boxes and notes, as judged here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sinklens.analyzers.base import Finding
from sinklens.core.adjustable import Adjustable, Threshold
from sinklens.tracers.selfcheck import Check

from .verdict import judge

RULE = "primary-sinks"


def judged(name: str, findings: Mapping[str, Finding], checks: Sequence[Check]) -> Adjustable:
    """What the page says at each epsilon of the finding `name`; equal texts are held once."""
    own = findings[name]
    assert own.swept is not None
    swept = own.swept()
    texts: dict[str, int] = {}

    def held(text: str) -> int:
        return texts.setdefault(text, len(texts))

    told: dict[str, list[int | list[int]]] = {
        key: [] for key in ("verdict", "main", "status", "rule", "notes", "tile_value", "tile_note")
    }
    for finding in swept.values():
        whole = judge({**findings, name: finding}, checks)
        told["verdict"].append(held(finding.verdict))
        told["main"].append(held(whole.text))
        told["status"].append(held(whole.status))
        told["rule"].append(held(whole.rule))
        told["notes"].append(held("\n".join(finding.notes)))
        told["tile_value"].append([held(tile.value) for tile in finding.tiles])
        told["tile_note"].append([held(tile.note) for tile in finding.tiles])
    grid = np.array(list(swept), np.float64)
    value = float(own.parameters["epsilon"])
    return Adjustable(
        RULE,
        (Threshold("epsilon", "Threshold ε", value, float(grid[0]), float(grid[-1])),),
        {"epsilon": grid, **{key: np.array(places, np.int64) for key, places in told.items()}},
        {
            "texts": list(texts),
            "tiles": [tile.label for tile in own.tiles],
            "own": grid.tolist().index(value),
            "figure": "rate",
        },
        note="Verdict, boxes, notes and the map of the rate follow. Every other number, table and figure is of the "
        "run's own ε.",
    )
