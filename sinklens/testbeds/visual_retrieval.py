"""Questions about pictures that one head answers by looking a cell up, and that sinks keep it from answering.

A picture holds objects in different colours, each in a cell of its own, and a few specks: small white strokes that
mean nothing. The question asks for the shape of an object by its colour:

    <s> <image> x 25 what shape has the thing that is cyan?      post

Whoever cannot look it up can only guess: every asking word has one shape it suggests, right as often as chance.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from .vision import COLOURS, SHAPES, Scenes, ShapesTask

QUESTION = ("what", "shape", "has", "the", "thing", "that", "is")
SPECIALS = ("<s>", "</s>", "<image>", "<unk>", "<pad>")


@dataclass(frozen=True, eq=False)
class Asked:
    """Pictures with a question each.

    Attributes:
        specks: Cells of each picture that hold a speck.
        colours, shapes: What is asked for, and the answer, as indices into `COLOURS` and `SHAPES`.
    """

    scenes: Scenes
    specks: Int[np.ndarray, "picture speck"]
    colours: Int[np.ndarray, " picture"]
    shapes: Int[np.ndarray, " picture"]

    def __len__(self) -> int:
        return len(self.scenes)


@dataclass(frozen=True)
class VisualRetrievalTask(ShapesTask):
    """The generator. Pictures have no noise, so a cell shows exactly one of 26 patches.

    Attributes:
        objects, specks: In every picture.
    """

    noise: float = 0.0
    most: int = 4
    objects: int = 4
    specks: int = 4

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return (*QUESTION, *[self.asking(colour) for colour in COLOURS], *SHAPES, *SPECIALS)

    def asking(self, colour: str) -> str:
        """The last word of the question for a colour."""
        return f"{colour}?"

    def question(self, colour: str) -> str:
        return " ".join([*QUESTION, self.asking(colour)])

    def suggested(self, colour: int) -> int:
        """The shape that the asking word of a colour suggests."""
        return colour % len(SHAPES)

    @property
    def empty(self) -> int:
        """Cells of a picture that show nothing."""
        return self.patches - self.objects - self.specks

    def speck(self) -> Float[np.ndarray, "3 cell cell"]:
        """A white stroke from corner to corner, in 0 to 1."""
        return np.broadcast_to(np.eye(self.cell), (3, self.cell, self.cell)).copy()

    def patch_kinds(self) -> UInt8[np.ndarray, "kind 3 cell cell"]:
        """Every patch there is, as 8-bit pixels: objects by colour and shape, then a speck, then nothing."""
        table, masks = np.array(list(COLOURS.values())), self.masks()
        painted = self.brightness * table[:, None, :, None, None] * masks[None, :, None]
        flat = painted.reshape(-1, 3, self.cell, self.cell)
        kinds = np.concatenate([flat, self.speck()[None], np.zeros_like(flat[:1])])
        return (255 * kinds).round().astype(np.uint8)

    def kinds_of(self, asked: Asked) -> Int[np.ndarray, "picture patch"]:
        """Which of `patch_kinds` each cell shows."""
        empty = len(COLOURS) * len(SHAPES) + 1
        found = np.full((len(asked), self.patches), empty)
        rows = np.arange(len(asked))[:, None]
        found[rows, asked.specks] = empty - 1
        scenes = asked.scenes
        found[rows, scenes.cells] = scenes.colours * len(SHAPES) + scenes.shapes
        return found

    def ask(self, count: int, rng: np.random.Generator) -> Asked:
        """Pictures with a question each; cells, colours and shapes are uniform, and answers are balanced."""
        cells = rng.random((count, self.patches)).argsort(1)
        mine = np.sort(cells[:, : self.objects], 1)
        specks = np.sort(cells[:, self.objects : self.objects + self.specks], 1)
        colours = rng.random((count, len(COLOURS))).argsort(1)[:, : self.objects]
        shapes = rng.integers(len(SHAPES), size=mine.shape)
        which = rng.integers(self.objects, size=count)
        rows = np.arange(count)
        shapes[rows, which] = rows % len(SHAPES)
        scenes = Scenes(np.zeros((count, 3, self.side, self.side), np.uint8), mine, colours, shapes)
        asked = Asked(scenes, specks, colours[rows, which], shapes[rows, which])
        return replace(asked, scenes=replace(scenes, pixels=self.painted(self.kinds_of(asked))))

    def painted(self, kinds: Int[np.ndarray, "picture patch"]) -> UInt8[np.ndarray, "picture 3 side side"]:
        """Pictures of the given patches."""
        patches = self.patch_kinds()[kinds].reshape(len(kinds), self.grid, self.grid, 3, self.cell, self.cell)
        return patches.transpose(0, 3, 1, 4, 2, 5).reshape(len(kinds), 3, self.side, self.side)

    def questions(self, asked: Asked) -> list[dict[str, Any]]:
        """Items of a choice task, without their pictures: `prompt`, `choices`, `answer`."""
        names = tuple(COLOURS)
        return [
            {"prompt": self.question(names[colour]), "choices": list(SHAPES), "answer": int(shape)}
            for colour, shape in zip(asked.colours, asked.shapes, strict=True)
        ]
