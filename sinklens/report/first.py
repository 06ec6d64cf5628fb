"""What stands on the first screen, and how large: it has to hold in 1280 by 800."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sinklens.core.figures import Figure, Heatmap, Intervals, Lines, Samples, Tile

from .page import Check, Section, Verdict

FIRST_TILES, FIRST_LINES = 6, 10
LEAST_ROW, MOST_ROW = 18, 32
"""Height of a row of the strip, in px."""

_PAGE_WIDTH, _FIXED_LINKS = 1232, 460


def main_map(figures: Mapping[str, Sequence[Figure]]) -> tuple[str, Heatmap | Samples] | None:
    """The first screen's map, with its analyzer: layers by heads, of the primary sinks if possible."""
    from_sinks = [("primary-sinks", f) for f in figures.get("primary-sinks", ())]
    others = [(name, f) for name, found in figures.items() for f in found if name != "primary-sinks"]
    candidates = [*from_sinks, *others]
    for name, figure in candidates:
        if isinstance(figure, Heatmap) and (figure.y_label, figure.x_label) == ("layer", "head"):
            return name, figure
    return next(((name, f) for name, f in candidates if isinstance(f, Samples)), None)


def norm_curve(figures: Mapping[str, Sequence[Figure]]) -> tuple[str, Lines] | None:
    """The first screen's curve: by layer, of the massive activations or residual norms, else of anything."""
    preferred = sorted(figures, key=lambda name: (name != "massive-activations", "norm" not in name))
    for name in preferred:
        for figure in figures[name]:
            if isinstance(figure, Lines) and figure.x_label.startswith(("layer", "block")):
                return name, figure
    return None


def strip(figures: Mapping[str, Sequence[Figure]]) -> tuple[str, Intervals] | None:
    """The first screen's third drawing, if the run has one: how the sink changes with the input."""
    found = (("sensitivity", f) for f in figures.get("sensitivity", ()) if isinstance(f, Intervals))
    return next(found, None)


def navigation(found: Sequence[Section]) -> tuple[tuple[Section, ...], tuple[Section, ...]]:
    """Sections named at the top of the page, and those that would need a third row and are folded away."""
    room, shown = 2 * _PAGE_WIDTH - _FIXED_LINKS, 0
    for section in found:
        room -= _link_width(section.title)
        if room < 0:
            break
        shown += 1
    return tuple(found[:shown]), tuple(found[shown:])


def _link_width(title: str) -> float:
    return 18 + 6.8 * len(title)


def sizes(
    verdict: Verdict,
    found: Sequence[Section],
    checked: Sequence[Check],
    *,
    with_strip: bool,
    controls: int = 0,
) -> tuple[tuple[int, int, int], int]:
    """Widths of the first screen's drawings and their height: what the words above leave of 800 px."""
    names_of_checks = 60 + sum(22 + 6 * len(check.name) for check in checked)
    beside = 36 + 18 * math.ceil(names_of_checks / 380)
    says = 18 + 21.5 * math.ceil(len(verdict.sentence) / 96) + 22 * controls
    lines = 19 * math.ceil(min(len(verdict.lines), FIRST_LINES) / 2)
    lines += 18 if len(verdict.lines) > FIRST_LINES else 0
    linked = sum(_link_width(section.title) for section in navigation(found)[0])
    links = 19.5 * math.ceil((_FIXED_LINKS + linked) / _PAGE_WIDTH)
    above = 78 + links + max(beside, says) + (lines + 15 if lines else 0) + 130
    height = round(max(200.0, min(396.0, 800.0 - above - 112)))
    return ((480, 396, 320) if with_strip else (660, 536, 0)), height


def narrow(figure: Intervals, height: int) -> Intervals:
    """The rows that have room in a small box, without the words at their ends."""
    most = max(4, (height - 60) // LEAST_ROW)
    rows = [row for row in figure.rows if math.isfinite(row.value)][:most]
    return replace(figure, rows=tuple(replace(row, note="", group="") for row in rows))


def split_tiles(tiles: Sequence[Tile]) -> tuple[list[Tile], list[Tile]]:
    """The boxes of the first screen and the others; where there are too many, those that say something come first."""
    order = sorted(tiles, key=lambda tile: not tile.applicable) if len(tiles) > FIRST_TILES else list(tiles)
    return order[:FIRST_TILES], order[FIRST_TILES:]
