"""A picture with its patches, and a prompt with its pictures, as small pieces of static HTML for notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

from sinklens.core.counts import counted
from sinklens.core.pictures import PictureMap, PicturePage

from . import colour, paper_pictures, pictures, raster, text
from .album import data_uri
from .numbers import brief, percent
from .picture_places import Group, groups, notes
from .svg import tag

MOST_BYTES = 95_000
_SOFT = "opacity:.72"
_SIDES = (300, 220, 150, 100)
_MOST_TOKENS = 700

Stored = Mapping[str, np.ndarray]


def picture_html(figure: PictureMap, page: int, stored: Stored) -> str:
    """One picture of a figure with all its maps, well under 100 KB.

    Args:
        page: Its place among the figure's pages.
        stored: RGB copies by `sha256`.

    Raises:
        UsageError: There is no such page.
    """
    shown = paper_pictures.chosen(figure, page)
    made = ""
    for side in _SIDES:
        made = str(_box(_picture(figure, shown, stored, side)))
        if len(made) <= MOST_BYTES:
            break
    return made


def prompt_html(
    title: str,
    pieces: Sequence[str],
    weights: Sequence[float] | None,
    visual: Sequence[bool],
    said: str,
    below: Sequence[tuple[PictureMap, int]],
    stored: Stored,
) -> str:
    """The tokens of a prompt, darker where the weight is larger, and its pictures below.

    Args:
        weights: One per token, 0 for none; None if nothing is known.
        visual: Tokens that are parts of pictures: runs of them are counted, not written out.
        said: What the weights are.
        below: Figures with the place of the page to show.
    """
    tokens = _tokens(pieces, weights, visual)
    parts = [
        tag("div", tag("strong", title)),
        tag("div", *tokens, style="line-height:1.9;font-family:monospace;font-size:90%;margin:6px 0"),
        tag("div", said, style=f"font-size:80%;{_SOFT}"),
    ]
    for figure, page in below:
        added = _picture(figure, paper_pictures.chosen(figure, page), stored, _SIDES[1])
        if len(str(_box(*parts, added))) > MOST_BYTES:
            parts.append(tag("div", "More pictures: run.picture(prompt, image)", style=_SOFT))
            break
        parts.append(added)
    return str(_box(*parts))


def _box(*parts: Markup) -> Markup:
    style = "max-width:1000px;border:1px solid rgba(127,127,127,.35);border-radius:6px;padding:10px 14px;"
    return tag("div", *parts, style=style + "overflow-wrap:anywhere")


def _picture(figure: PictureMap, page: PicturePage, stored: Stored, side: int) -> Markup:
    scales = pictures.scales(figure)
    rows = [_group(figure, page, group, stored, scales, side) for group in groups(page)]
    held = [np.asarray(grid.classes) for grid in page.grids if grid.classes is not None]
    legend = [
        f"{paper_pictures.GLYPHS.get(class_.mark, '+')} {class_.name} × {sum(int((k == i).sum()) for k in held)}"
        for i, class_ in enumerate(figure.classes)
    ]
    bars = (
        [f"{name} {percent(100 * value)} %" for name, value in page.bars]
        if figure.bars_unit == "share"
        else []
    )
    small = f"font-size:80%;{_SOFT}"
    parts = [
        tag("div", tag("strong", figure.title)),
        tag("div", pictures.describe(figure, page), style=small),
        *([tag("div", page.sentence, style="margin:3px 0")] if page.sentence else []),
        *([tag("div", " · ".join(legend), style="font-size:90%")] if legend else []),
        *rows,
        *([tag("div", f"{figure.bars_title}: {', '.join(bars)}", style="font-size:90%")] if bars else []),
        tag("div", figure.caption, style=small),
    ]
    return tag("div", *parts)


def _group(
    figure: PictureMap,
    page: PicturePage,
    group: Group,
    stored: Stored,
    scales: Mapping[str, colour.Scale],
    side: int,
) -> Markup:
    pixels = stored.get(page.ref.sha256)
    drawn = []
    for what in paper_pictures.maps(figure):
        name = (
            figure.quantities[what].title if what is not None else "Classes" if figure.classes else "Patches"
        )
        scale = None if what is None else scales[figure.quantities[what].key]
        image = raster.draw(page, group, pixels, figure.classes, side, quantity=what, scale=scale)
        ends = ""
        if what is not None and scale is not None:
            ends = f"pale {brief(float(scale.low))} to dark {brief(float(scale.high))} {figure.quantities[what].unit}"
        look = "display:block;max-width:100%"
        alt = f"{name}, {group.title}, {pictures.describe(figure, page)}"
        drawn.append(
            tag(
                "div",
                tag("div", name, style="font-weight:600;font-size:85%"),
                tag("img", src=data_uri(image), alt=alt, style=look),
                tag("div", ends, style=f"font-size:75%;{_SOFT}"),
                style="display:inline-block;vertical-align:top;margin:2px 12px 4px 0;max-width:100%",
            )
        )
    said = " ".join([f"{group.title}.", *notes(page, group)])
    return tag("div", tag("div", said, style=f"font-size:80%;{_SOFT}"), *drawn)


def _tokens(pieces: Sequence[str], weights: Sequence[float] | None, visual: Sequence[bool]) -> list[Markup]:
    largest = max((w for w in weights or () if np.isfinite(w)), default=0.0)
    shown: list[Markup] = []
    i = 0
    while i < len(pieces) and len(shown) < _MOST_TOKENS:
        if visual[i]:
            start = i
            while i < len(pieces) and visual[i]:
                i += 1
            shown.append(tag("span", f"[tokens {start} to {i - 1}: picture]", style=f"margin:0 4px;{_SOFT}"))
            continue
        weight = weights[i] if weights is not None and np.isfinite(weights[i]) else 0.0
        depth = 0.55 * weight / largest if largest > 0 else 0.0
        look = f"background:rgba(10,92,128,{depth:.2f});padding:1px 2px;border-radius:3px;margin-right:1px"
        known = "" if weights is None else f": {brief(float(weight))}"
        shown.append(tag("span", text.token(pieces[i], 40), style=look, title=f"token {i}{known}"))
        i += 1
    if i < len(pieces):
        shown.append(tag("span", f" … {counted(len(pieces) - i, 'more token')}", style=_SOFT))
    return shown
