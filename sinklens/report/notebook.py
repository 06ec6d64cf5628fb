"""The short form for notebooks: verdict, tiles and the main map, static, without scripts, styles inline.

It has to survive notebook sanitizers and both themes: text has the page's own colour, and the map is
a PNG with its axes as text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from sinklens.core.canonical import plain
from sinklens.core.figures import Figure, Heatmap, Samples, Tile

from . import colour, first, page, png, samples
from .heatmap import pooled
from .numbers import brief
from .svg import tag

_MOST_CELLS = 256
_SOFT = "opacity:.72"


def run_repr_html(
    document: Mapping[str, Any], figures: Mapping[str, Sequence[Figure]], tiles: Sequence[Tile]
) -> str:
    """The run as a small piece of static HTML, well under 100 KB at any model size.

    Args:
        document: The `sinklens/run/1` document.
        figures: Analyzer name to its figures; the main map is chosen as in the report.
        tiles: Boxes; six are shown.
    """
    record = plain(document)
    assert isinstance(record, dict)
    verdict = page.verdict(record)
    model = record.get("model") or {}
    head = tag(
        "div",
        tag("strong" if verdict.trusted else "span", model.get("id") or "Unnamed model"),
        tag("span", " · ".join(["", *page.chips(record)]), style=_SOFT),
    )
    weight = "600" if verdict.trusted else "400"
    advice = (record.get("recommended") or {}).get("text")  # of a run with mitigations
    says = tag(
        "div",
        tag("div", verdict.headline, style=f"font-size:85%;letter-spacing:.06em;{_SOFT}"),
        tag("div", verdict.sentence, style=f"font-size:115%;font-weight:{weight}"),
        *(_line(line) for line in verdict.lines[: first.FIRST_LINES]),
        *([tag("div", advice, style="font-size:85%")] if advice and verdict.trusted else []),
        tag("div", verdict.trust, style=f"font-size:85%;{_SOFT}"),
        style="margin:6px 0",
    )
    boxes = tag(
        "div", *(_tile(tile, verdict.trusted) for tile in first.split_tiles(tiles)[0]), style="margin:6px 0"
    )
    style = "max-width:900px;border:1px solid rgba(127,127,127,.35);border-radius:6px;padding:10px 14px;"
    return str(tag("div", head, says, boxes, _map(figures), style=style + "overflow-wrap:anywhere"))


def _line(line: page.Line) -> Markup:
    return tag("div", tag("strong", line.title), " ", line.text, style="font-size:85%")


def _tile(tile: Tile, trusted: bool) -> Markup:
    style = "display:inline-block;vertical-align:top;width:132px;margin:0 14px 4px 0"
    name = tag("div", tile.label, style=f"font-size:80%;{_SOFT}")
    if not tile.applicable:
        reason = tile.note or tile.value or "the run gave no reason."
        return tag(
            "div", name, tag("div", f"Not applicable: {reason}", style=f"font-size:80%;{_SOFT}"), style=style
        )
    value = tag(
        "div", tile.value, style="font-size:150%;font-weight:600" if trusted else f"font-size:150%;{_SOFT}"
    )
    note = tile.note if trusted else ": ".join(filter(None, ["Not trustworthy", tile.note]))
    return tag("div", name, value, tag("div", note, style=f"font-size:80%;{_SOFT}"), style=style)


def _map(figures: Mapping[str, Sequence[Figure]]) -> Markup:
    chosen = first.main_map(figures)
    if chosen is None:
        return tag("div", "No map of layers by heads in this run.", style=_SOFT)
    figure = samples.rate_map(chosen[1]) if isinstance(chosen[1], Samples) else chosen[1]
    values = np.asarray(figure.values, dtype=float)
    if values.ndim != 2 or not np.isfinite(values).any():
        return tag("div", f"{figure.title}: there are no values to draw.", style=_SOFT)
    image, scale = _image(figure, values)
    rows, columns = values.shape
    size = f"{rows} × {columns}"
    axes = (
        f"{figure.y_label} 0 to {rows - 1} downwards, {figure.x_label} 0 to {columns - 1} to the right; "
        f"pale {brief(scale.low)} to dark {brief(scale.high)} {figure.unit}"
    )
    return tag(
        "div",
        tag("div", figure.title, style="font-weight:600"),
        image,
        tag("div", axes, style=f"font-size:80%;{_SOFT}"),
        tag("div", figure.caption, style=f"font-size:80%;{_SOFT}"),
        title=f"{figure.title}, {size}",
    )


def _image(figure: Heatmap, values: np.ndarray) -> tuple[Markup, colour.Scale]:
    scale = colour.scale(values, log=figure.log, limits=figure.limits)
    levels = scale.levels(pooled(values, _MOST_CELLS, _MOST_CELLS))
    rows, columns = levels.shape
    step_x, step_y = (max(1, min(most, room // n)) for n, room, most in ((columns, 480, 32), (rows, 260, 20)))
    large = np.repeat(np.repeat(levels, step_y, axis=0), step_x, axis=1)
    source = png.data_uri(png.encode(large, scale.colours(light=True)))
    look = "display:block;margin:4px 0;max-width:100%;image-rendering:pixelated;background:#fff"
    alt = f"{figure.title}, {figure.y_label} by {figure.x_label}"
    return tag("img", src=source, alt=alt, style=f"{look};width:{columns * step_x}px"), scale
