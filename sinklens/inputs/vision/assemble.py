"""From a layout to `ModalitySpans`: which token is what, by the image token and counts alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from sinklens.core.errors import ModelError

from ..spans import Kind, ModalitySpans, PatchGrid, Picture
from .layouts import NO_PLACE, Layout, TokenGrid

_AROUND = re.compile(
    r"(vision_start|vision_end|start_image|end_image|image_start|image_end|boi|eoi|newline|row|break)"
)


def image_token_id(config: Any) -> int | None:
    """The id that stands for one token of a picture, None if the model has none."""
    found = getattr(config, "image_token_id", None)
    return getattr(config, "image_token_index", None) if found is None else found


def assemble(
    token_ids: Sequence[int],
    layout: Layout,
    pictures: Sequence[Picture],
    *,
    image_token: int,
    around: frozenset[int],
) -> ModalitySpans:
    """The spans of one prompt.

    Args:
        layout: Per picture, in the order of the prompt.
        around: Ids of tokens that stand around pictures or between their rows.

    Raises:
        ModelError: The image tokens are not as many as the layout has.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    places = np.flatnonzero(ids == image_token)
    expected = sum(grid.tokens for grids in layout for grid in grids)
    if len(places) != expected:
        raise ModelError(
            f"The prompt has {len(places)} image tokens; its {len(pictures)} pictures should give {expected}.",
            hint="Write the placeholder once per picture, and nowhere else.",
        )
    first = int(places[0]) if len(places) else len(ids)
    kinds = np.where(np.arange(len(ids)) < first, int(Kind.SYSTEM), int(Kind.QUESTION))
    kinds[places] = Kind.DELIMITER
    kinds[_next_to(places, ids, around)] = Kind.DELIMITER
    grids: list[PatchGrid] = []
    start = 0
    for picture, blocks in enumerate(layout):
        for block in blocks:
            positions = _positions(places[start : start + block.tokens], block)
            kinds[positions.ravel()] = Kind.VISUAL
            if positions.size:  # of a very long picture nothing may be left of the finer look
                grids.append(PatchGrid(picture, block.view, positions, block.box, block.members))
            start += block.tokens
    return ModalitySpans(kinds, tuple(pictures), tuple(grids))


def _positions(places: Int[np.ndarray, " token"], block: TokenGrid) -> Int[np.ndarray, "row col"]:
    rows, cols = block.shape
    inner = places[: len(places) - block.ends].reshape(rows, cols + block.row_ends)
    return inner[:, :cols].copy()


def _next_to(
    places: Int[np.ndarray, " token"], ids: Int[np.ndarray, " pos"], around: frozenset[int]
) -> Bool[np.ndarray, " pos"]:
    """Tokens of `around` that touch image tokens, directly or through others of them."""
    marks = np.isin(ids, list(around))
    touched = np.zeros(len(ids), dtype=bool)
    touched[places] = True
    for step, order in ((1, range(len(ids))), (-1, range(len(ids) - 1, -1, -1))):
        for place in order:
            before = place - step
            if marks[place] and 0 <= before < len(ids) and touched[before]:
                touched[place] = True
    return touched & marks


def marks_around(config: Any, processor: Any) -> frozenset[int]:
    """Ids that config, processor or tokenizer name as the start or end of a picture or of its rows."""
    found: set[int] = set()
    for owner in (config, processor, getattr(processor, "tokenizer", None)):
        for name in (
            [*vars(owner), *getattr(owner, "SPECIAL_TOKENS_ATTRIBUTES", ())] if owner is not None else ()
        ):
            stem = name.removesuffix("_id").removesuffix("_index")
            if not _AROUND.search(stem):
                continue
            value = getattr(owner, name, None)
            if name != stem and isinstance(value, int):
                found.add(value)
            elif isinstance(value, str):
                found.add(int(processor.tokenizer.convert_tokens_to_ids(value)))
    return frozenset(found) - {NO_PLACE, image_token_id(config) or NO_PLACE}
