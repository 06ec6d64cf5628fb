"""Visual sinks on their pictures: φ, and the attention of the text with and without the sinks, one page per picture."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from sinklens.core.pictures import CellClass, PictureMap, PicturePage, Quantity
from sinklens.tracers import signals as sig
from sinklens.tracers.sink_dims import Cut

from .picture_words import count, sentence
from .pictures import page
from .visual import DELIMITER, TEXT, TEXT_SINK, VISUAL, VISUAL_SINK, Pictured

_GROUPS = (
    (VISUAL_SINK, "visual sinks"),
    (VISUAL, "other visual tokens"),
    (TEXT_SINK, "sinks of the text"),
    (DELIMITER, "delimiters"),
    (TEXT, "other text"),
)
_BEYOND = 0.005
"""Attention that no token receives is named from this share on: a learned sink takes it."""


def patches(seen: list[Pictured], cut: Cut, layer: int) -> PictureMap:
    """Every picture with its sinks; those with most sinks stand first.

    Args:
        layer: The one that is drawn.
    """
    attended = all(sig.TEXT_RECEIVED.name in item.record.arrays for item in seen)
    rule = f"φ {'>' if cut.strict else '≥'} {cut.tau:.3g}"
    pages = [
        _page(item, picture, layer, rule, attended=attended)
        for item in seen
        for picture in range(len(item.spans.pictures))
    ]
    pages.sort(key=lambda one: -_sinks(one))
    phi = Quantity("phi", "φ", "|x| / RMS(x)", threshold=cut.tau, threshold_label="τ")
    attention = Quantity("attention", "Attention of the text", "share", scale="attention")
    without = Quantity("without", "Without the sinks", "share", scale="attention")
    said = (
        " Attention is what the text after the picture gives a visual token in this layer, mean over its queries and "
        "all heads, as a share of all visual tokens of the prompt; without the sinks, as a share of the others."
    )
    return PictureMap(
        "patches",
        f"Visual sinks on their pictures, layer {layer}",
        f"φ and sinks are those of the state that enters layer {layer}, where visual sinks are most frequent; pictures "
        f"with most sinks stand first.{said if attended else ''}",
        tuple(pages),
        (attention, without, phi) if attended else (phi,),
        (CellClass("visual sink", "ring", rule),),
        f"Where the attention of the text goes, layer {layer}",
    )


def _page(item: Pictured, picture: int, layer: int, rule: str, *, attended: bool) -> PicturePage:
    sinks = item.visual_sinks()[layer]
    phi = item.phi[layer].astype(np.float64)
    classes = np.where(sinks, 0, -1)
    values = [*_attention(item, layer, sinks), phi] if attended else [phi]
    built = page(item.record, picture, values, classes, bars=_bars(item, layer, sinks))
    seen = count(built.grids, sink=0, attention=0 if attended else None)
    return PicturePage(built.ref, built.grids, sentence(seen, rule), built.bars)


def _attention(
    item: Pictured, layer: int, sinks: np.ndarray
) -> tuple[Float[np.ndarray, " pos"], Float[np.ndarray, " pos"]]:
    """Shares of the visual tokens, and of those that are no sinks; NaN for tokens that have none."""
    received = item.record[sig.TEXT_RECEIVED][layer].astype(np.float64)
    both = np.where(item.visual, received, np.nan)
    rest = np.where(sinks, np.nan, both)
    shares = [
        values / total if (total := np.nansum(values)) > 0 else values * np.nan for values in (both, rest)
    ]
    return shares[0], shares[1]


def _bars(item: Pictured, layer: int, sinks: np.ndarray) -> tuple[tuple[str, float], ...]:
    """Parts of the attention of the prompt's text, mean over heads.

    They were summed while the model ran, by the sinks as the run decided them; with another definition of a sink
    there are none.
    """
    arrays = item.record.arrays
    if sig.KEY_CLASS_MASS.name not in arrays or sig.KEY_CLASS_COUNT.name not in arrays:
        return ()
    if int(item.record[sig.KEY_CLASS_COUNT][layer, VISUAL_SINK]) != int(sinks.sum()):
        return ()
    mass = np.nanmean(item.record[sig.KEY_CLASS_MASS][layer].astype(np.float64), axis=0)
    bars = [(name, float(mass[index])) for index, name in _GROUPS]
    beyond = 1 - sum(value for _, value in bars)
    return (*bars, ("no token (learned sink)", beyond)) if beyond > _BEYOND else tuple(bars)


def _sinks(one: PicturePage) -> int:
    return sum(int((np.asarray(grid.classes) == 0).sum()) for grid in one.grids if grid.classes is not None)
