"""How a model lays pictures out as tokens: one small strategy per kind of layout, chosen by what the processor returns.

- *views*: every view of a picture (the whole, tiles, a thumbnail) is a square grid of tokens, patches merged or not;
- *anyres*: the whole picture, then a finer grid of it whose rows end with a newline token;
- *packed*: patches of pictures of any size in one sequence, merged in blocks.

A layout says for each picture which tokens come in which order. Positions come from the image token and are counted;
where the counts disagree the layout is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from sinklens.core.errors import ModelError

from . import geometry
from .geometry import Box, Frame, Size
from .views import Settings, looks, simple

NO_PLACE = -1


@dataclass(frozen=True, eq=False)
class TokenGrid:
    """A block of tokens in reading order.

    Attributes:
        members: Places in the vision tower's sequence, as in `PatchGrid`.
        row_ends: Whether each row is followed by a token that is no part of the picture.
        ends: Tokens after the grid that are no part of the picture.
    """

    view: str
    box: Box
    members: Int[np.ndarray, "row col member"]
    row_ends: bool = False
    ends: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        return self.members.shape[0], self.members.shape[1]

    @property
    def tokens(self) -> int:
        """Tokens of the grid, those that end its rows included."""
        rows, cols = self.shape
        return rows * (cols + self.row_ends) + self.ends


Layout = list[list[TokenGrid]]
"""Per picture, its grids in the order of their tokens."""


def lay_out(
    config: Any, processor: Any, features: Mapping[str, Any], sizes: Sequence[Size], tokens: int
) -> Layout:
    """The layout of the pictures of one prompt.

    Args:
        config: The model's config.
        features: What the processor returned.
        sizes: Heights and widths of the pictures as they were given.
        tokens: Image tokens of the prompt.

    Raises:
        ModelError: No strategy fits, or the counts disagree.
    """
    settings = Settings(processor)
    if "image_grid_thw" in features:
        found = packed(config, features["image_grid_thw"].tolist(), sizes)
    elif "image_sizes" in features and settings["image_grid_pinpoints"] is not None:
        found = anyres(config, settings, sizes, alone=_alone(features, len(sizes)))
    elif getattr(features.get("pixel_values"), "ndim", 0) == 4:
        found = views(config, settings, features["pixel_values"].shape, sizes, tokens)
    else:
        shapes = {name: tuple(getattr(value, "shape", ())) for name, value in features.items()}
        raise _unknown(processor, f"Its processor returns {shapes}.")
    counted = sum(grid.tokens for grids in found for grid in grids)
    if counted != tokens:
        raise _unknown(
            processor,
            f"{len(sizes)} pictures of {_shown(sizes)} pixels should give {counted} tokens; the prompt has {tokens}.",
        )
    return found


def views(
    config: Any, settings: Settings, shape: Sequence[int], sizes: Sequence[Size], tokens: int
) -> Layout:
    """Equal views of `shape` (view, colour, height, width); each is one grid of merged patches."""
    patch = _patch(config)
    rows, cols = shape[2] // patch[0], shape[3] // patch[1]
    merge = _merge(config, rows)
    all_looks = [looks(settings, size) for size in sizes]
    total = sum(map(len, all_looks))
    if total != shape[0] or tokens % max(total, 1):
        raise _unknown(
            settings.pictures, f"{total} views were expected of {_shown(sizes)} pixels; it made {shape[0]}."
        )
    # Tokens that stand before the patches of the tower: those the model keeps are seen in the count, the one that
    # the "default" choice of features drops is not.
    kept = tokens // total - (rows // merge) * (cols // merge)
    dropped = int(getattr(config, "vision_feature_select_strategy", None) == "default")
    if kept < 0 or (kept and merge > 1):
        raise _unknown(
            settings.pictures,
            f"A view of {rows} x {cols} patches merged {merge} x {merge} cannot give {tokens // total} tokens.",
        )
    before = kept + dropped
    layout: Layout = []
    start = 0
    for found in all_looks:
        grids: list[TokenGrid] = []
        for look in found:
            seen = (rows * patch[0], cols * patch[1])
            box = look.frame.box(0, 0, *seen)
            grids += [
                TokenGrid(look.view, box, np.array([[[start + dropped + i]]], dtype=np.int64))
                for i in range(kept)
            ]
            places = start + before + np.arange(rows * cols).reshape(rows, cols)
            grids.append(
                TokenGrid(
                    look.view,
                    _whole_cells(look.frame, rows, cols, merge, patch),
                    geometry.merged(places, merge),
                )
            )
            start += before + rows * cols
        layout.append(grids)
    return layout


def _whole_cells(frame: Frame, rows: int, cols: int, merge: int, patch: Size) -> Box:
    """The box of the cells: pixels beyond the last whole cell are seen by no token."""
    return frame.box(0, 0, rows // merge * merge * patch[0], cols // merge * merge * patch[1])


def anyres(config: Any, settings: Settings, sizes: Sequence[Size], *, alone: Sequence[bool]) -> Layout:
    """The whole picture, then tiles of a finer look joined to one grid, cut to the picture, with a newline per row.

    Args:
        alone: Whether each picture is the only one of its prompt; LLaVA-OneVision gives the others one view.
    """
    side, patch = _image_side(config), _patch(config)[0]
    across = side // patch
    dropped = int(getattr(config, "vision_feature_select_strategy", None) == "default")
    each = dropped + across * across
    layout: Layout = []
    start = 0
    for size, fine in zip(sizes, alone, strict=True):
        base = start + dropped + np.arange(across * across).reshape(across, across)
        whole = (
            Frame(size).resized((side, side))
            if fine
            else simple(settings, geometry.padded_to_square(Frame(size)))
        )
        grid = TokenGrid(
            "whole", whole.box(0, 0, across * patch, across * patch), base[..., None], ends=int(not fine)
        )
        grids = [grid]
        start += each
        if fine:
            detail, tiles = _detail(config, settings, size, start, across, patch, side, dropped)
            grids.append(detail)
            start += tiles * each
        layout.append(grids)
    return layout


def _detail(
    config: Any, settings: Settings, size: Size, start: int, across: int, patch: int, side: int, dropped: int
) -> tuple[TokenGrid, int]:
    """The finer grid of a picture and the number of tiles it is made from."""
    choices = [(int(tall), int(wide)) for tall, wide in settings["image_grid_pinpoints"]]
    target = geometry.best_resolution(size, choices)
    down, over = target[0] // side, target[1] // side
    tile = np.arange(down * over).reshape(down, 1, over, 1)
    inside = np.arange(across * across).reshape(1, across, 1, across)
    places = start + tile * (dropped + across * across) + dropped + inside
    places = places.reshape(down * across, over * across)
    rows, cols = geometry.unpadded((down * across, over * across), size)
    inner = geometry.fitted(size, target)
    frame = Frame(size).resized(inner)
    frame = frame.moved(-((target[0] - inner[0]) // 2), -((target[1] - inner[1]) // 2), target)
    box = frame.box(rows.start * patch, cols.start * patch, rows.stop * patch, cols.stop * patch)
    places = places[rows, cols]
    members = places[..., None]
    most = _most_patches(config)
    if most is not None:
        ratio = math.sqrt(places.size / (most * across**2))
        if ratio > 1.1:
            members = geometry.interpolated(
                places, (int(places.shape[0] // ratio), int(places.shape[1] // ratio))
            )
    return TokenGrid("detail", box, members, row_ends=True), down * over


def packed(config: Any, grids: Sequence[Sequence[int]], sizes: Sequence[Size]) -> Layout:
    """Pictures of any size in one sequence: patches lie block by block of `merge` x `merge`, one block per token.

    Towers that attend in windows read the blocks window by window.
    """
    vision = config.vision_config
    merge = vision.spatial_merge_size
    window = getattr(vision, "window_size", None) if hasattr(vision, "fullatt_block_indexes") else None
    layout: Layout = []
    start = 0
    for (frames, tall, wide), (height, width) in zip(grids, sizes, strict=True):
        if frames != 1:
            raise ModelError(
                "A picture was read as several frames of a video, which sinklens does not lay out."
            )
        rows, cols = tall // merge, wide // merge
        place = np.arange(rows * cols)
        if window is not None:
            order = geometry.window_order(rows, cols, window // merge // vision.patch_size)
            place = np.argsort(order)
        members = start + place.reshape(rows, cols, 1) * merge**2 + np.arange(merge**2)
        layout.append([TokenGrid("whole", (0.0, 0.0, float(width), float(height)), members)])
        start += tall * wide
    return layout


def _alone(features: Mapping[str, Any], count: int) -> list[bool]:
    """Which pictures are the only one of their prompt, for processors that treat those differently."""
    counts = features.get("batch_num_images")
    if counts is None:
        return [True] * count
    return [int(n) == 1 for n in counts for _ in range(int(n))]


def _pair(value: Any) -> Size:
    return (int(value[0]), int(value[1])) if isinstance(value, list | tuple) else (int(value), int(value))


def _patch(config: Any) -> Size:
    return _pair(config.vision_config.patch_size)


def _image_side(config: Any) -> int:
    return _pair(config.vision_config.image_size)[0]


def _merge(config: Any, rows: int) -> int:
    """Patches per side that become one token: from a shuffle ratio, from the tokens per picture, else 1."""
    ratio = getattr(config, "downsample_ratio", None)
    if ratio is not None:
        return round(1 / ratio)
    tokens = getattr(config, "mm_tokens_per_image", None)
    return rows // math.isqrt(tokens) if tokens is not None else 1


def _most_patches(config: Any) -> int | None:
    """The limit in units of one view that `anyres_max_9` names, None if the finer grid is never shrunk."""
    name = getattr(config, "vision_aspect_ratio", None)
    digits = str(name).removeprefix("anyres_max_")
    return int(digits) if name is not None and digits.isdigit() else None


def _shown(sizes: Sequence[Size]) -> str:
    return ", ".join(f"{width} x {height}" for height, width in sizes[:4]) + (
        ", ..." if len(sizes) > 4 else ""
    )


def _unknown(processor: Any, detail: str) -> ModelError:
    return ModelError(
        f"{type(processor).__name__} lays pictures out as tokens in a way that sinklens does not read.",
        detail=detail,
        hint="Classes that are read: see docs/vision.md.",
    )
