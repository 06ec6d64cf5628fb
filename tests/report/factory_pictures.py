"""Findings over pictures that never were: a LLaVA-like grid, tiles with a whole view, crop, padding, many pictures."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from sinklens.core.figures import PictureMap
from sinklens.core.pictures import CellClass, CellGrid, PicturePage, PictureRef, Quantity

from . import factory

CLASSES = (
    CellClass("sink", "ring", "φ ≥ τ = 20"),
    CellClass("dead", "cross", "attention below a quarter of uniform"),
    CellClass("alive", "dot"),
)
QUANTITIES = (
    Quantity("before", "Attention", "share", scale="attention"),
    Quantity("after", "Attention without sinks", "share", scale="attention"),
    Quantity("phi", "φ", "ratio to RMS", threshold=20.0, threshold_label="τ"),
)


def photo(seed: int, width: int, height: int) -> np.ndarray:
    """A smooth picture with a bright disc, so that orientation and place can be seen."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([90 + 120 * x / width, 80 + 110 * y / height, np.full_like(x, 120.0)], axis=-1)
    cx, cy, radius = width * rng.uniform(0.3, 0.7), height * rng.uniform(0.3, 0.7), 0.18 * min(width, height)
    base[(x - cx) ** 2 + (y - cy) ** 2 < radius**2] = (250, 215, 60)
    base[: height // 9, : width // 9] = (210, 40, 40)
    return np.clip(base + rng.normal(0, 4, base.shape), 0, 255).astype(np.uint8)


def grid(
    seed: int, view: str, box: tuple[float, ...], shape: tuple[int, int], start: int, *, empty: int = 0
) -> CellGrid:
    """Cells of a hand-made finding: a few sinks with large φ that hold most of the attention."""
    rng = np.random.default_rng(seed)
    rows, cols = shape
    n = rows * cols
    positions = (start + np.arange(n)).reshape(shape)
    phi = rng.gamma(3.0, 0.6, shape)
    sinks = rng.choice(n, max(1, n // 12), replace=False)
    phi.ravel()[sinks] = rng.uniform(22, 40, len(sinks))
    before = rng.dirichlet(np.full(n, 0.8)).reshape(shape) * 0.4
    before.ravel()[sinks] += 0.6 / len(sinks)
    without = before.copy()
    without.ravel()[sinks] = np.nan
    after = without / np.nansum(without)
    classes = np.where(before < 0.1 / n, 1, 2)
    classes.ravel()[sinks] = 0
    if empty:
        positions.ravel()[-empty:] = -1
        classes.ravel()[-empty:] = -1
        for values in (before, after, phi):
            values.ravel()[-empty:] = np.nan
    box_ = (float(box[0]), float(box[1]), float(box[2]), float(box[3]))
    return CellGrid(view, box_, positions, np.stack([before, after, phi]), classes)


def picture(
    seed: int, prompt: int, width: int, height: int, grids: tuple[CellGrid, ...], name: str, number: int = 0
) -> tuple[PicturePage, dict[str, np.ndarray]]:
    pixels = photo(seed, width, height)
    ref = PictureRef(prompt, number, name, width, height, hashlib.sha256(pixels.tobytes()).hexdigest())
    sinks = sum(int((np.asarray(g.classes) == 0).sum()) for g in grids)
    cells = sum(int(np.size(g.positions)) for g in grids)
    sentence = f"Attention sticks to {sinks} of {cells} patches; they are visual sinks (φ ≥ τ = 20)."
    bars = (("visual sinks", 0.38), ("other visual tokens", 0.24), ("question", 0.21), ("BOS", 0.17))
    return PicturePage(ref, grids, sentence, bars), {ref.sha256: pixels}


def make(n: int = 3, *, cells: int = 24, **shape: Any) -> tuple[factory.Run, dict[str, np.ndarray]]:
    """A run with `visual-sinks` over `n` pictures: cropped, padded, tiled, then plain ones; and its pictures."""
    run = factory.make(**shape)
    kinds = [
        (448, 336, (grid(1, "whole", (56, 0, 392, 336), (cells, cells), 5),), "cat <b>on</b> a mat.png"),
        (200, 420, (grid(2, "whole", (-110, 0, 310, 420), (12, 12), 5),), "padded.jpg"),
        (600, 400, _tiled(), "tiles.webp"),
    ]
    pages, pictures = [], {}
    for i in range(n):
        plain = (320, 240, (grid(9 + i, "whole", (0, 0, 320, 240), (9, 12), 7),), f"plain-{i}.png")
        width, height, grids, name = kinds[i] if i < len(kinds) else plain
        page, found = picture(i, i, width, height, grids, name)
        pages.append(page)
        pictures |= found
    run.figures["visual-sinks"] = [
        PictureMap(
            "patches",
            "Where the visual sinks are",
            "Attention from the question's tokens to each patch, mean over layers 2 to 5 and all heads; φ in layer 3.",
            tuple(pages),
            QUANTITIES,
            CLASSES,
            "Where the attention of the question goes",
        )
    ]
    run.document["findings"]["visual-sinks"] = _finding()
    return run, pictures


def figure(run: factory.Run) -> PictureMap:
    found = run.figures["visual-sinks"][0]
    assert isinstance(found, PictureMap)
    return found


def _tiled() -> tuple[CellGrid, ...]:
    boxes = [(200 * c, 200 * r, 200 * c + 200, 200 * r + 200) for r in range(2) for c in range(3)]
    tiles = [grid(20 + i, "tile", box, (8, 8), 100 + 64 * i) for i, box in enumerate(boxes)]
    whole = grid(30, "thumbnail", (0, 0, 600, 400), (8, 8), 700)
    detail = grid(31, "detail", (0, 0, 600, 400), (10, 15), 800, empty=5)
    return (*tiles, whole, detail)


def _finding() -> dict[str, Any]:
    return {
        "title": "Visual sinks",
        "status": "found",
        "reason": None,
        "verdict": "Visual sinks stand in every picture.",
        "parameters": {"tau": 20.0},
        "summary": {},
        "rows": [{"prompt": 0, "picture": "cat <b>on</b> a mat.png", "patches": 48}],
        "units": {},
        "notes": [],
    }
