"""The pictures and captions of `vlm-shapes`, and the recipe of the model that reads them.

A picture is a black, slightly noisy square of 5 x 5 cells; one to three cells hold an object: one of four shapes in one
of six colours, each colour at most once. The caption counts the objects and names them in reading order:

    <s> <image> x 25 how many ? two red bar cyan post </s>

One cell is one patch of the vision tower, hence one image token. So it is known of every image token whether it shows
an object or plain background.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from sinklens.core.registry import Registry

if TYPE_CHECKING:
    from transformers import LlavaConfig

COLOURS = {
    "red": (1, 0, 0),
    "green": (0, 1, 0),
    "blue": (0, 0, 1),
    "yellow": (1, 1, 0),
    "purple": (1, 0, 1),
    "cyan": (0, 1, 1),
}
SHAPES = ("square", "bar", "post", "checker")
NUMBERS = ("one", "two", "three")
QUESTION = ("how", "many", "?")
SPECIALS = ("<s>", "</s>", "<image>", "<unk>", "<pad>")
IGNORED = -100
"""The label of tokens without loss, as transformers has it."""


class Answer(IntEnum):
    """What a token of the caption states."""

    NONE = 0  # not part of the answer
    COUNT = 1
    COLOUR = 2
    SHAPE = 3
    END = 4


@dataclass(frozen=True)
class Scenes:
    """Pictures with their truth. Unused places of an object list hold -1; objects are in reading order.

    Attributes:
        pixels: 8-bit RGB, as a PNG stores them.
        cells: Cell of each object, row by row from the upper left.
        colours, shapes: Indices into `COLOURS` and `SHAPES`.
    """

    pixels: UInt8[np.ndarray, "picture 3 side side"]
    cells: Int[np.ndarray, "picture place"]
    colours: Int[np.ndarray, "picture place"]
    shapes: Int[np.ndarray, "picture place"]

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def counts(self) -> Int[np.ndarray, " picture"]:
        """Objects per picture."""
        return (self.cells >= 0).sum(1)

    def part(self, rows: slice) -> Scenes:
        return Scenes(self.pixels[rows], self.cells[rows], self.colours[rows], self.shapes[rows])


@dataclass(frozen=True)
class Encoded:
    """Scenes as the model takes them, padded on the right.

    Attributes:
        pixel_values: In 0 to 1, not centred: the background is 0.
        labels: `input_ids` where an answer stands, else -100.
        answers: The `Answer` each token is.
    """

    input_ids: Int[Tensor, "picture token"]
    pixel_values: Float[Tensor, "picture 3 side side"]
    labels: Int[Tensor, "picture token"]
    answers: Int[Tensor, "picture token"]


@dataclass(frozen=True)
class ShapesTask:
    """The generator. All defaults together are the world of the bundled checkpoint.

    Attributes:
        grid: Cells per side.
        cell: Pixels per cell and side, the vision tower's patch size; even, so that half a cell exists.
        most: Largest number of objects.
        noise: Every channel of every pixel gets uniform noise between 0 and this.
        brightness: Of an object's colour, before the noise.
    """

    grid: int = 5
    cell: int = 4
    most: int = 3
    noise: float = 0.1
    brightness: float = 0.9

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Every token; its place is its id."""
        return (*QUESTION, *NUMBERS[: self.most], *COLOURS, *SHAPES, *SPECIALS)

    @property
    def side(self) -> int:
        """Pixels per side of a picture."""
        return self.grid * self.cell

    @property
    def patches(self) -> int:
        """Image tokens per picture."""
        return self.grid**2

    @property
    def image_slice(self) -> slice:
        """Where the image tokens stand; BOS is before them."""
        return slice(1, 1 + self.patches)

    def masks(self) -> Bool[np.ndarray, "shape cell cell"]:
        """The pixels that each shape colours."""
        y, x = np.mgrid[: self.cell, : self.cell]
        half = self.cell // 2
        return np.stack([np.full_like(x, True, dtype=bool), y < half, x < half, (x + y) % 2 == 0])

    def sample(self, count: int, rng: np.random.Generator) -> Scenes:
        """`count` pictures; number, cells, colours and shapes are uniform and independent of each other.

        No two objects of a picture share their colour: the model tells objects apart by it.
        """
        counts = rng.integers(1, self.most + 1, size=count)
        absent = np.arange(self.most) >= counts[:, None]
        cells = rng.random((count, self.patches)).argsort(1)[:, : self.most]
        cells = np.sort(np.where(absent, self.patches, cells), 1)
        colours = rng.random((count, len(COLOURS))).argsort(1)[:, : self.most]
        colours = np.where(absent, -1, colours)
        shapes = np.where(absent, -1, rng.integers(len(SHAPES), size=cells.shape))
        cells = np.where(absent, -1, cells)
        light = rng.random((count, 3, self.side, self.side)) * self.noise
        masks, table = self.masks(), np.array(list(COLOURS.values()))
        for place in range(self.most):
            rows = np.flatnonzero(cells[:, place] >= 0)
            painted = masks[shapes[rows, place]][:, None] * table[colours[rows, place]][:, :, None, None]
            row, column = np.divmod(cells[rows, place], self.grid)
            y = row[:, None] * self.cell + np.arange(self.cell)
            x = column[:, None] * self.cell + np.arange(self.cell)
            where = (rows[:, None, None], slice(None), y[:, :, None], x[:, None, :])
            light[where] += self.brightness * painted.transpose(0, 2, 3, 1)
        return Scenes((255 * light.clip(0, 1)).round().astype(np.uint8), cells, colours, shapes)

    def background(self, scenes: Scenes) -> Bool[np.ndarray, "picture patch"]:
        """Which cells are empty."""
        return (scenes.cells[:, :, None] != np.arange(self.patches)).all(1)

    def object_pixels(self, scenes: Scenes) -> Bool[np.ndarray, "picture side side"]:
        """The pixels that show an object; half of a cell's for all shapes but the square."""
        found = np.zeros((len(scenes), self.side, self.side), dtype=bool)
        masks = self.masks()
        for picture, place in np.argwhere(scenes.cells >= 0):
            row, column = divmod(int(scenes.cells[picture, place]), self.grid)
            y, x = row * self.cell, column * self.cell
            found[picture, y : y + self.cell, x : x + self.cell] = masks[scenes.shapes[picture, place]]
        return found

    def caption(self, scenes: Scenes, picture: int) -> list[str]:
        """The words of the answer, the end token included."""
        words, names = [NUMBERS[scenes.counts[picture] - 1]], tuple(COLOURS)
        for place in range(scenes.counts[picture]):
            words += [names[scenes.colours[picture, place]], SHAPES[scenes.shapes[picture, place]]]
        return [*words, "</s>"]

    def encode(self, scenes: Scenes) -> Encoded:
        """Question, picture and answer as token ids and pixels in 0 to 1."""
        index = {word: place for place, word in enumerate(self.vocabulary)}
        start = ["<s>", *["<image>"] * self.patches, *QUESTION]
        length = len(start) + 2 + 2 * self.most
        ids = np.full((len(scenes), length), index["<pad>"], dtype=np.int64)
        ids[:, : len(start)] = [index[word] for word in start]
        for picture in range(len(scenes)):
            words = [index[word] for word in self.caption(scenes, picture)]
            ids[picture, len(start) : len(start) + len(words)] = words
        place = np.arange(length) - len(start)
        last = 1 + 2 * scenes.counts[:, None]
        kinds = np.where(place % 2 == 1, Answer.COLOUR, Answer.SHAPE)
        kinds = np.where(place == 0, Answer.COUNT, kinds)
        kinds = np.where(place == last, Answer.END, kinds)
        kinds = np.where((place < 0) | (place > last), Answer.NONE, kinds)
        labels = np.where(kinds == Answer.NONE, IGNORED, ids)
        pixels = torch.from_numpy(scenes.pixels.astype(np.float32) / 255)
        return Encoded(torch.from_numpy(ids), pixels, torch.from_numpy(labels), torch.from_numpy(kinds))


def _tower(blocks: int) -> dict[str, int]:
    return {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": blocks,
        "num_attention_heads": 2,
    }


@dataclass(frozen=True)
class VisionRecipe:
    """A vision-language model, its pictures and an optimiser; the counterpart of `Recipe`.

    Attributes:
        vision, text: Arguments of the two towers' configs, without what follows from `task`.
        batch: Pictures per step; every step draws new ones.
        learning_rate: AdamW, constant between a linear warm-up and the cool-down.
        cooldown: Last steps over which the learning rate falls linearly towards 0; without it the accuracy jumps.
        weight_decay: Decoupled, on every parameter.
        evaluation_seed: Of the held-out pictures; never the training seed.
    """

    name: str
    vision: dict[str, Any] = field(default_factory=lambda: _tower(2))
    text: dict[str, Any] = field(default_factory=lambda: _tower(4) | {"num_key_value_heads": 2})
    task: ShapesTask = field(default_factory=ShapesTask)
    batch: int = 32
    steps: int = 2500
    seed: int = 0
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: int = 100
    cooldown: int = 1000
    clip: float = 1.0
    evaluation_seed: int = 100_003
    about: str = ""

    def config(self) -> LlavaConfig:
        """LLaVA: a CLIP vision tower whose last states, without its class token, feed a Llama."""
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

        vocabulary = self.task.vocabulary
        vision = CLIPVisionConfig(image_size=self.task.side, patch_size=self.task.cell, **self.vision)
        text = LlamaConfig(
            vocab_size=len(vocabulary),
            bos_token_id=vocabulary.index("<s>"),
            eos_token_id=vocabulary.index("</s>"),
            pad_token_id=vocabulary.index("<pad>"),
            max_position_embeddings=512,
            tie_word_embeddings=False,
            **self.text,
        )
        return LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=vocabulary.index("<image>"),
            image_seq_length=self.task.patches,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            tie_word_embeddings=False,
        )


vision_recipes: Registry[VisionRecipe] = Registry("testbed", "sinklens testbed list")

vision_recipes.register("vlm-shapes")(
    VisionRecipe(
        name="vlm-shapes",
        about="A LLaVA that describes pictures of coloured shapes and grew no sink, on BOS or on background.",
    )
)
