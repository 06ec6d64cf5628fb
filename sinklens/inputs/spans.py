"""What the tokens of a prompt are: text or parts of pictures, and where in a picture each visual token looks.

The contract between whoever lays pictures out as tokens (`inputs.vision`) and whoever reads what became of them.
Positions are those of the prompt's own tokens, counted from 0. Plain data: a saved run carries it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from jaxtyping import Bool, Int


class Kind(IntEnum):
    """What a token is. Only `VISUAL` tokens carry features of a picture."""

    SYSTEM = 0  # text before the first picture: BOS, system prompt, role marks
    VISUAL = 1
    DELIMITER = 2  # stands around or between the parts of a picture: start and end marks, row ends
    QUESTION = 3  # text after the first picture, and all text of a prompt without one
    GENERATED = 4  # the answer: the model's own, or the known one that a prompt ends with


@dataclass(frozen=True)
class Picture:
    """One picture as it was given.

    Attributes:
        name: File name or what the caller called it; never a path of the machine.
        width, height: Of the original, in pixels, after its EXIF rotation.
        sha256: Of the decoded RGB pixels.
    """

    name: str
    width: int
    height: int
    sha256: str


@dataclass(frozen=True, eq=False)
class PatchGrid:
    """One view of a picture as a grid of tokens: the whole of it, a tile, or a finer look at it.

    Attributes:
        picture: Index into `ModalitySpans.pictures`.
        view: `whole`, `detail` (finer, beside a `whole` of the same picture), `tile` or `thumbnail`.
        positions: Position of the token of each cell, -1 where a cell has none.
        box: Left, top, right, bottom of the grid in pixels of the original picture. It may reach outside (padding)
            or leave parts out (crop). Cells divide it evenly.
        members: Places in the vision tower's own sequence of the patches merged into each cell, -1 where there is
            none; towers that read several tiles count through them in order, CLS and registers included. None if
            it is not known.
    """

    picture: int
    view: str
    positions: Int[np.ndarray, "row col"]
    box: tuple[float, float, float, float]
    members: Int[np.ndarray, "row col member"] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, cols = self.positions.shape
        return rows, cols

    def cell_box(self, row: int, col: int) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of a cell in pixels of the original picture."""
        rows, cols = self.shape
        left, top, right, bottom = self.box
        wide, high = (right - left) / cols, (bottom - top) / rows
        return left + col * wide, top + row * high, left + (col + 1) * wide, top + (row + 1) * high

    def spread(self, values: np.ndarray, fill: float = np.nan) -> np.ndarray:
        """Values by position (first axis) laid out on the grid, `fill` where a cell has no token."""
        laid = np.asarray(values)[np.maximum(self.positions, 0)].astype(np.float64)
        laid[self.positions < 0] = fill
        return laid


@dataclass(frozen=True, eq=False)
class ModalitySpans:
    """The tokens of one prompt by kind, and its pictures.

    Attributes:
        kinds: A `Kind` per token.
        grids: In the order of their tokens; every visual token is in exactly one.
    """

    kinds: Int[np.ndarray, " pos"]
    pictures: tuple[Picture, ...] = ()
    grids: tuple[PatchGrid, ...] = ()

    def is_(self, *kinds: Kind) -> Bool[np.ndarray, " pos"]:
        """Tokens of any of these kinds."""
        return np.isin(self.kinds, kinds)

    @property
    def visual(self) -> Bool[np.ndarray, " pos"]:
        return self.is_(Kind.VISUAL)

    def of_picture(self, picture: int) -> tuple[PatchGrid, ...]:
        return tuple(grid for grid in self.grids if grid.picture == picture)

    def cell_of(self, position: int) -> tuple[PatchGrid, int, int] | None:
        """Grid, row and column of a visual token; None for other tokens."""
        for grid in self.grids:
            found = np.argwhere(grid.positions == position)
            if len(found):
                return grid, int(found[0, 0]), int(found[0, 1])
        return None

    def to_json(self) -> dict[str, Any]:
        return {
            "kinds": self.kinds.tolist(),
            "pictures": [vars(picture) for picture in self.pictures],
            "grids": [
                {
                    "picture": grid.picture,
                    "view": grid.view,
                    "positions": grid.positions.tolist(),
                    "box": list(grid.box),
                    "members": None if grid.members is None else grid.members.tolist(),
                }
                for grid in self.grids
            ],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ModalitySpans:
        return cls(
            np.asarray(data["kinds"], dtype=np.int64),
            tuple(Picture(**picture) for picture in data["pictures"]),
            tuple(
                PatchGrid(
                    grid["picture"],
                    grid["view"],
                    np.asarray(grid["positions"], dtype=np.int64),
                    tuple(grid["box"]),
                    None if grid["members"] is None else np.asarray(grid["members"], dtype=np.int64),
                )
                for grid in data["grids"]
            ),
        )
